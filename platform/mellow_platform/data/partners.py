"""Second clip of the sequence for questions about one clip."""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, TypeVar

Partner = Literal["random", "same", "silence"]

# Path of the silent clip in shard sets with the rule `silence`.
SILENCE = "<silence>"

Clip = TypeVar("Clip")


def second_clip(clips: Sequence[Clip], rule: Partner, silence: Clip, random_clip: Clip | None = None) -> Clip:
    """Return the second clip of a question about one or two `clips`, in any form (waveform, features, id).

    Args:
        rule: partner of a single clip.
        silence: silent clip in this form.
        random_clip: clip for the rule `random`. Without it (there is no corpus), the clip itself is used, so that an
            answer depends only on the question.
    """
    if len(clips) > 1:
        return clips[1]
    if rule == "silence":
        return silence
    return clips[0] if rule == "same" or random_clip is None else random_clip


def draw_partner(clip_id: str, position: int, clips: Sequence[str]) -> str:
    """Return one of the sorted, distinct clip ids `clips`, other than `clip_id` if there is another.

    The draw is a function of the clip's content and the record's position in its split: the same in every run.
    """
    index = bisect_left(clips, clip_id)
    included = index < len(clips) and clips[index] == clip_id
    others = len(clips) - included
    if not others:
        return clip_id
    digest = hashlib.sha256(f"{clip_id} {position}".encode()).digest()
    choice = int.from_bytes(digest[:8], "big") % others
    return clips[choice + (included and choice >= index)]
