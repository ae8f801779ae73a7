"""What writers are asked: a list of requests, a function of captions and configuration alone."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from mellow_platform.config import SynthesizeConfig
from mellow_platform.data.captions import Caption

PASS = "write"
TIERS = ("few_words", "sentence", "paragraph")  # of a difference explanation, in the order of ACD-1, -2, -3


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to a writer.

    Attributes:
        id: name of its answer (`request_id`), the same in every run of the job.
        kind: detail, mcq, difference or entailment; of a check, blind or support.
        pairs: questions that the answer is to hold; of a check, those that it judges.
        material: what the prompt is about, as JSON types: `captions`, and of a check `questions`.
        clips, split, taskname: of the questions to be; empty for a check.
    """

    id: str
    kind: str
    pairs: int
    material: dict[str, Any]
    clips: tuple[str, ...] = ()
    split: str = ""
    taskname: str = ""


def request_id(name: str, number: int, kind: str, material: dict[str, Any]) -> str:
    """Return the id of a pass's request: its number and a hash, so that what asks for something else is another one."""
    asked = json.dumps([kind, material], ensure_ascii=False, sort_keys=True)
    return f"{name}-{number:08d}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def plan(captions: Sequence[Caption], config: SynthesizeConfig) -> list[Request]:
    """Return one request of every kind about each caption, in their order; the captions of a clip stand together.

    A difference is that to a caption of another clip of the same split and task, drawn by the seed; a caption whose
    split has no other clip gets none.
    """
    ordered = sorted(captions, key=lambda caption: (caption.split, caption.taskname, caption.clip))
    requests: list[Request] = []
    for _, group in groupby(ordered, key=lambda caption: (caption.split, caption.taskname)):
        alike = list(group)
        rng = random.Random(f"{config.seed} {alike[0].split} {alike[0].taskname}")
        for number, caption in enumerate(alike):
            partner = _partner(alike, number, rng)
            for kind in config.kinds:
                if kind != "difference":
                    requests.append(_request(len(requests), kind, [caption], config))
                elif partner:
                    requests.append(_request(len(requests), kind, [caption, partner], config))
    return requests


def _request(number: int, kind: str, captions: list[Caption], config: SynthesizeConfig) -> Request:
    pairs = config.questions if kind in ("detail", "mcq") else 3
    material = {"captions": [caption.text for caption in captions]}
    first = captions[0]
    clips = tuple(caption.clip for caption in captions)
    return Request(request_id(PASS, number, kind, material), kind, pairs, material, clips, first.split, first.taskname)


def _partner(captions: list[Caption], number: int, rng: random.Random) -> Caption | None:
    """Draw a caption of another clip; the clips' captions are neighbours."""
    clip = captions[number].clip
    first, last = number, number + 1
    while first > 0 and captions[first - 1].clip == clip:
        first -= 1
    while last < len(captions) and captions[last].clip == clip:
        last += 1
    others = len(captions) - (last - first)
    if not others:
        return None
    place = rng.randrange(others)
    return captions[place if place < first else place + last - first]


def digest(requests: Sequence[Request]) -> str:
    """Return the SHA-256 over all that is asked."""
    lines = "".join(json.dumps(asdict(request), ensure_ascii=False) + "\n" for request in requests)
    return hashlib.sha256(lines.encode()).hexdigest()
