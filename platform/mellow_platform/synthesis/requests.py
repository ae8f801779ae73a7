"""Writing requests: a list that depends only on captions and configuration."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from mellow_platform.data.caption_tables import Caption
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig

PASS = "write"
DRAWS = 8  # attempts to draw a partner with another text: all captions of a split may be the same
TIERS = ("few_words", "sentence", "paragraph")  # lengths of a difference explanation, in the order of ACD-1, -2, -3


@dataclass(frozen=True, slots=True)
class WritingRequest:
    """One prompt to a writer.

    Attributes:
        id: name of the answer, the same in every run of the job; for a check, its kind and a hash of its content.
        kind: detail, mcq, difference or entailment; for a check, blind or support.
        pairs: number of questions to write; for a check, to judge.
        material: variables of the prompt, as JSON types: `captions`, and for a check `questions`.
        clips, split, taskname: fields of the records to write; empty for a check.
    """

    id: str
    kind: str
    pairs: int
    material: dict[str, Any]
    clips: tuple[str, ...] = ()
    split: str = ""
    taskname: str = ""


def content_hash(content: list[Any], length: int) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of a request's content."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:length]


def plan(captions: Sequence[Caption], config: SynthesizeConfig) -> list[WritingRequest]:
    """Return one request per caption and kind, ordered by split, task and clip.

    A difference compares a caption with one of another clip in the same split and task, drawn by the seed. A caption
    without such a partner that has another text (after `DRAWS` attempts) has no difference request.
    """
    ordered = sorted(captions, key=lambda caption: (caption.split, caption.taskname, caption.clip))
    requests: list[WritingRequest] = []
    for _, captions_of_task in groupby(ordered, key=lambda caption: (caption.split, caption.taskname)):
        group = list(captions_of_task)
        rng = random.Random(f"{config.seed} {group[0].split} {group[0].taskname}")
        for number, caption in enumerate(group):
            partner = _partner(group, number, rng)
            for kind in config.kinds:
                if kind != "difference":
                    requests.append(_request(len(requests), kind, [caption], config))
                elif partner:
                    requests.append(_request(len(requests), kind, [caption, partner], config))
    return requests


def _request(number: int, kind: str, captions: list[Caption], config: SynthesizeConfig) -> WritingRequest:
    pairs = config.questions if kind in ("detail", "mcq") else 3
    material = {"captions": [caption.text for caption in captions]}
    first = captions[0]
    clips = tuple(caption.clip for caption in captions)
    name = f"{PASS}-{number:08d}-{content_hash([kind, material], 8)}"
    return WritingRequest(name, kind, pairs, material, clips, first.split, first.taskname)


def _partner(captions: list[Caption], number: int, rng: random.Random) -> Caption | None:
    """Draw a caption of another clip with another text; the captions of each clip are consecutive."""
    clip, text = captions[number].clip, captions[number].text.lower()
    first, last = number, number + 1
    while first > 0 and captions[first - 1].clip == clip:
        first -= 1
    while last < len(captions) and captions[last].clip == clip:
        last += 1
    others = len(captions) - (last - first)
    if not others:
        return None
    for _ in range(DRAWS):
        index = rng.randrange(others)
        partner = captions[index if index < first else index + last - first]
        if partner.text.lower() != text:
            return partner
    return None


def content_digest(requests: Sequence[WritingRequest]) -> str:
    """Return the SHA-256 of all requests."""
    lines = "".join(json.dumps(asdict(request), ensure_ascii=False) + "\n" for request in requests)
    return hashlib.sha256(lines.encode()).hexdigest()
