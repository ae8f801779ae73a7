"""Progress of a job as lines of its log: share done, speed, time left."""

import time
from dataclasses import dataclass, field

PAUSE = 10.0  # seconds between two lines


@dataclass
class Progress:
    """Counter of finished items that prints a line every `PAUSE` seconds, and the last one when all are done.

    Attributes:
        items: noun of the items in the lines.
        done: number of finished items; `new` of them in this run, `rejected` of them failed.
        rejected_are: word for failed items in the lines.
    """

    items: str
    total: int
    done: int = 0
    rejected: int = 0
    audio_seconds: float = 0.0
    start: float = field(default_factory=time.monotonic)
    new: int = 0
    printed: float = 0.0
    rejected_are: str = "quarantined"

    def __post_init__(self) -> None:
        if self.done:
            print(f"{self.items}: {self.done} of {self.total} are done already", flush=True)

    def add(self, count: int, rejected: int = 0, audio_seconds: float = 0.0) -> None:
        self.done += count
        self.new += count
        self.rejected += rejected
        self.audio_seconds += audio_seconds
        if self.done >= self.total or time.monotonic() - max(self.start, self.printed) > PAUSE:
            self.printed = time.monotonic()
            print(self.line(), flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def line(self) -> str:
        left = self.seconds / max(self.new, 1) * (self.total - self.done)
        parts = [f"{self.items}: {self.done} of {self.total} ({100 * self.done / max(self.total, 1):.0f} %)"]
        if self.rejected:
            parts.append(f"{self.rejected} {self.rejected_are}")
        if self.audio_seconds:
            parts.append(f"{self.audio_seconds / self.seconds:.0f} audio-seconds per second")
        parts.append(f"{left:.0f} s left" if self.done < self.total else f"{self.seconds:.0f} s")
        return ", ".join(parts)
