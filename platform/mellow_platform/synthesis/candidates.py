"""Questions as they were written, on their way to become records or to be left out."""

from typing import Any

import numpy as np
import pyarrow as pa

from mellow_platform.data.records import SCHEMA, Record, lettered
from mellow_platform.synthesis.requests import TIERS, WritingRequest

TIER_QUESTIONS = (
    "explain the difference between the two audios in a few words.",
    "explain the difference between the two audios in one sentence.",
    "explain the difference between the two audios in detail.",
)
# Of CLE and ACE, as the published model is asked. The last choice is never the right one.
VERDICTS = ("it is definitely true", "it is definitely false", "it is plausible", "i cannot determine")
HYPOTHESES = dict(zip(("true", "false", "plausible"), VERDICTS, strict=False))
BEFORE_HYPOTHESIS, AFTER_HYPOTHESIS = 'based on the audio, what can be said about the hypothesis - "', '"?'
CAPTION_QUESTION = "caption the audio."

# Names of ReasonAQA's sources by taskname and kind; other tasks' are made of their own name.
SUBTYPES = {
    "audiocaps": {
        "caption": "AudioCaps.json",
        "detail": "AudioCaps-Detail.json",
        "mcq": "AudioCaps-MCQ.json",
        "difference": "ACD-{tier}.json",
        "entailment": "ACE.json",
    },
    "clothov21": {
        "caption": "Clotho.json",
        "detail": "Clotho-Detail.json",
        "mcq": "Clotho-MCQ.json",
        "difference": "CLD-{tier}.json",
        "entailment": "CLE.json",
    },
}
SUFFIXES = {"caption": "Caption", "detail": "Detail", "mcq": "MCQ", "difference": "Difference-{tier}"}
SUFFIXES["entailment"] = "Entailment"

CANDIDATE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # <request>-<place in its answer>
        pa.field("request", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("aspect", pa.string(), nullable=False),  # empty but for detail and mcq
        pa.field("split", pa.string(), nullable=False),
        pa.field("taskname", pa.string(), nullable=False),
        pa.field("subtype", pa.string(), nullable=False),
        pa.field("clips", pa.list_(pa.string()), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("question", pa.string(), nullable=False),  # without choices
        pa.field("choices", pa.list_(pa.string()), nullable=False),  # without letters, as they were written
        pa.field("answer", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # why it is left out; empty: it is not
    ]
)
RECORD_SCHEMA = pa.schema(
    [*SCHEMA, *(pa.field(name, pa.string(), nullable=False) for name in ("kind", "aspect", "request"))]
)

Candidate = dict[str, Any]  # a row of CANDIDATE_SCHEMA


def subtype(taskname: str, kind: str, tier: int = 0) -> str:
    """Return the name of a source as ReasonAQA has it, or `<Taskname>-MCQ` where that has none."""
    names = SUBTYPES.get(taskname) or {kind: f"{taskname.capitalize()}-{suffix}" for kind, suffix in SUFFIXES.items()}
    return names[kind].format(tier=tier)


def candidates(request: WritingRequest, content: dict[str, Any]) -> list[Candidate]:
    """Return the questions in the answer to `request`, in lower case as all of ReasonAQA."""
    found = []
    for place, fields in enumerate(_fields(request, content)):
        tier = place + 1 if request.kind == "difference" else 0
        choices = [_plain(choice) for choice in fields.get("choices", [])]
        found.append(
            {
                "id": f"{request.id}-{place}",
                "request": request.id,
                "kind": request.kind,
                "aspect": fields.get("aspect", ""),
                "split": request.split,
                "taskname": request.taskname,
                "subtype": subtype(request.taskname, request.kind, tier),
                "clips": list(request.clips),
                "captions": request.material["captions"],
                "question": _plain(fields["question"]),
                "choices": choices,
                "answer": _as_chosen(_plain(fields["answer"]), choices),
                "reason": "",
            }
        )
    return found


def _fields(request: WritingRequest, content: dict[str, Any]) -> list[dict[str, Any]]:
    if request.kind == "difference":
        return [{"question": q, "answer": content[tier]} for q, tier in zip(TIER_QUESTIONS, TIERS, strict=True)]
    if request.kind == "entailment":
        return [
            {"question": _about(content[name]), "choices": list(VERDICTS), "answer": HYPOTHESES[name]}
            for name in ("true", "plausible", "false")
        ]
    return content["questions"]


def _about(claim: str) -> str:
    return BEFORE_HYPOTHESIS + claim.strip().rstrip(".").replace('"', "'") + AFTER_HYPOTHESIS


def hypothesis(question: str) -> str:
    """Return what an entailment question is about."""
    return question.removeprefix(BEFORE_HYPOTHESIS).removesuffix(AFTER_HYPOTHESIS)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _as_chosen(answer: str, choices: list[str]) -> str:
    """Return the choice that an answer repeats but for its full stop, or the answer itself."""
    return next((choice for choice in choices if choice.rstrip(".") == answer.rstrip(".")), answer)


def deal_letters(kept: list[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Return the questions with their choices in the order that they are asked in.

    Of multiple-choice questions with the same number of choices, each letter is the right one equally often, give or
    take one; which is where is drawn. The verdicts of an entailment keep their fixed order.
    """
    places: dict[int, list[int]] = {}
    for count in {len(candidate["choices"]) for candidate in kept if candidate["kind"] == "mcq"}:
        questions = sum(c["kind"] == "mcq" and len(c["choices"]) == count for c in kept)
        # Which letters are one ahead is drawn too, lest it be the first ones in every split.
        letters = [int(letter) for letter in rng.permutation(count)]
        places[count] = [int(place) for place in rng.permutation([letters[n % count] for n in range(questions)])]
    dealt = []
    for candidate in kept:
        if candidate["kind"] == "mcq":
            wrong = [choice for choice in candidate["choices"] if choice != candidate["answer"]]
            choices = [str(choice) for choice in rng.permutation(wrong)]
            choices.insert(places[len(candidate["choices"])].pop(), candidate["answer"])
            candidate = candidate | {"choices": choices}
        dealt.append(candidate)
    return dealt


def record(candidate: Candidate) -> Record:
    """Return the record of a question whose choices are in order."""
    choices = lettered(candidate["choices"])
    answer = choices[candidate["choices"].index(candidate["answer"])] if choices else candidate["answer"]
    clips, captions = [*candidate["clips"], ""], [*candidate["captions"], ""]
    return Record(
        candidate["taskname"],
        clips[0],
        clips[1],
        captions[0],
        captions[1],
        " ".join([candidate["question"], *choices]),
        answer,
        candidate["subtype"],
    )
