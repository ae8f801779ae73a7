"""What stands in the second place of the sequence where a question is about one clip."""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, TypeVar

Partner = Literal["random", "same", "silence"]

# The silent clip that a shard set stores under the rule `silence`.
SILENCE = "<silence>"

Clip = TypeVar("Clip")


def second_clip(clips: Sequence[Clip], rule: Partner, silence: Clip, drawn: Clip | None = None) -> Clip:
    """Return the second clip of a question about `clips`, one or two, in any form (waveform, features, id).

    Args:
        rule: what joins a single clip.
        silence: the silent clip in this form.
        drawn: the clip that `random` drew. Without a corpus there is none to draw: the clip itself stands in, so
            that an answer depends on nothing but the question.
    """
    if len(clips) > 1:
        return clips[1]
    if rule == "silence":
        return silence
    return clips[0] if rule == "same" or drawn is None else drawn


def draw_partner(clip_id: str, position: int, clips: Sequence[str]) -> str:
    """Return one of the sorted, distinct clip ids `clips`: never `clip_id` itself where there is another.

    The draw is a function of the clip's content and of the record's position in its split: the same in every run.
    """
    place = bisect_left(clips, clip_id)
    among = place < len(clips) and clips[place] == clip_id
    others = len(clips) - among
    if not others:
        return clip_id
    digest = hashlib.sha256(f"{clip_id} {position}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "big") % others
    return clips[drawn + (among and drawn >= place)]
