"""What writers are asked: a list of requests, a function of captions and configuration alone."""

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
DRAWS = 8  # of a partner with another text: all captions of a split may be the same
TIERS = ("few_words", "sentence", "paragraph")  # of a difference explanation, in the order of ACD-1, -2, -3


@dataclass(frozen=True, slots=True)
class WritingRequest:
    """One prompt to a writer.

    Attributes:
        id: name of its answer, the same in every run of the job; of a check, a hash of its content alone.
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


def content_hash(asked: list[Any], length: int) -> str:
    """Return so many hexadecimal digits that tell a request from those that ask for something else."""
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:length]


def plan(captions: Sequence[Caption], config: SynthesizeConfig) -> list[WritingRequest]:
    """Return one request of every kind about each caption, in their order; the captions of a clip stand together.

    A difference is that to a caption of another clip of the same split and task, drawn by the seed; a caption whose
    split has no other clip with another text gets none.
    """
    ordered = sorted(captions, key=lambda caption: (caption.split, caption.taskname, caption.clip))
    requests: list[WritingRequest] = []
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


def _request(number: int, kind: str, captions: list[Caption], config: SynthesizeConfig) -> WritingRequest:
    pairs = config.questions if kind in ("detail", "mcq") else 3
    material = {"captions": [caption.text for caption in captions]}
    first = captions[0]
    clips = tuple(caption.clip for caption in captions)
    name = f"{PASS}-{number:08d}-{content_hash([kind, material], 8)}"
    return WritingRequest(name, kind, pairs, material, clips, first.split, first.taskname)


def _partner(captions: list[Caption], number: int, rng: random.Random) -> Caption | None:
    """Draw a caption of another clip with another text; the clips' captions are neighbours."""
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
        place = rng.randrange(others)
        partner = captions[place if place < first else place + last - first]
        if partner.text.lower() != text:
            return partner
    return None


def content_digest(requests: Sequence[WritingRequest]) -> str:
    """Return the SHA-256 over all that is asked."""
    lines = "".join(json.dumps(asdict(request), ensure_ascii=False) + "\n" for request in requests)
    return hashlib.sha256(lines.encode()).hexdigest()
