"""What is heard of a recording that is longer than one clip: 10-second windows by a named rule."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("first", "each", "pair")


@dataclass(frozen=True)
class Window:
    """The clips of one question, and which seconds of the recordings they are: (start, end) each."""

    clips: tuple[np.ndarray, ...]
    seconds: tuple[tuple[float, float], ...]


def windows(recordings: Sequence[np.ndarray], clip_samples: int, sampling_rate: int, rule: str) -> list[Window]:
    """Cut one or two recordings into what each question about them hears.

    Args:
        recordings: waveforms [samples] at `sampling_rate` Hz.
        clip_samples: length of a window.
        rule: `first`: the first window of every recording, one question (the rest is not heard).
            `each`: a question about every window in turn; of two recordings, about their windows side by side,
            as long as both last.
            `pair`: of one recording, its first and its last window as the two clips of one question.

    Returns:
        One `Window` a question. A last window that is shorter comes as it is; the front end fills it.

    Raises:
        ValueError: no such rule, no or too many recordings, an empty one, or `pair` of two recordings.
    """
    if rule not in RULES:
        raise ValueError(f"window rule {rule!r} is not one of {', '.join(RULES)}")
    if len(recordings) not in (1, 2):
        raise ValueError(f"{len(recordings)} recordings: give one or two")
    if not all(map(len, recordings)):
        raise ValueError("a recording has 0 samples")
    if rule == "pair" and len(recordings) == 2:
        raise ValueError("window rule 'pair' makes two clips of one recording; with two recordings use first or each")
    starts = range(0, min(map(len, recordings)), clip_samples)
    if rule == "first":
        return [_heard([(recording, 0) for recording in recordings], clip_samples, sampling_rate)]
    if rule == "each":
        return [
            _heard([(recording, start) for recording in recordings], clip_samples, sampling_rate) for start in starts
        ]
    recording = recordings[0]
    last = max(0, len(recording) - clip_samples)
    return [_heard([(recording, 0), (recording, last)], clip_samples, sampling_rate)]


def _heard(places: list[tuple[np.ndarray, int]], clip_samples: int, sampling_rate: int) -> Window:
    # Copies, where they are parts: a view would keep the whole recording in memory for as long as it is asked about.
    parts = ((recording, recording[start : start + clip_samples]) for recording, start in places)
    clips = tuple(part if len(part) == len(recording) else part.copy() for recording, part in parts)
    seconds = tuple(
        (start / sampling_rate, (start + len(clip)) / sampling_rate)
        for (_, start), clip in zip(places, clips, strict=True)
    )
    return Window(clips, seconds)
