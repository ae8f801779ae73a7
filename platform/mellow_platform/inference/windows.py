"""Windows of recordings that are longer than one clip, by a named rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("first", "each", "pair")


@dataclass(frozen=True)
class Window:
    """Clips of one question, and their (start, end) in seconds of the recordings."""

    clips: tuple[np.ndarray, ...]
    seconds: tuple[tuple[float, float], ...]


def windows(recordings: Sequence[np.ndarray], clip_samples: int, sampling_rate: int, rule: str) -> list[Window]:
    """Cut one or two recordings into the clips of each question.

    Args:
        recordings: waveforms [samples] at `sampling_rate` Hz.
        clip_samples: length of a window.
        rule: `first`: one question about the first window of every recording; the rest is ignored.
            `each`: one question per window; with two recordings, about simultaneous windows, up to the end of the
            shorter recording.
            `pair`: one question about the first and the last window of one recording, as its two clips.

    Returns:
        One `Window` per question. A shorter last window is kept as it is; the front end fills it.

    Raises:
        ValueError: the rule is unknown, there are not one or two recordings, one is empty, or `pair` has two.
    """
    if rule not in RULES:
        raise ValueError(f"window rule {rule!r} is not one of {', '.join(RULES)}")
    if len(recordings) not in (1, 2):
        raise ValueError(f"{len(recordings)} recordings: give one or two")
    if not all(map(len, recordings)):
        raise ValueError("a recording has 0 samples")
    if rule == "pair" and len(recordings) == 2:
        raise ValueError("window rule 'pair' makes two clips of one recording; use first or each for two recordings")
    starts = range(0, min(map(len, recordings)), clip_samples)
    if rule == "first":
        return [_cut([(recording, 0) for recording in recordings], clip_samples, sampling_rate)]
    if rule == "each":
        return [_cut([(recording, start) for recording in recordings], clip_samples, sampling_rate) for start in starts]
    recording = recordings[0]
    last = max(0, len(recording) - clip_samples)
    return [_cut([(recording, 0), (recording, last)], clip_samples, sampling_rate)]


def _cut(starts: list[tuple[np.ndarray, int]], clip_samples: int, sampling_rate: int) -> Window:
    # Parts are copied, because a view would keep the whole recording in memory.
    parts = ((recording, recording[start : start + clip_samples]) for recording, start in starts)
    clips = tuple(part if len(part) == len(recording) else part.copy() for recording, part in parts)
    seconds = tuple(
        (start / sampling_rate, (start + len(clip)) / sampling_rate)
        for (_, start), clip in zip(starts, clips, strict=True)
    )
    return Window(clips, seconds)
