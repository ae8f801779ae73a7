"""Candidates: written questions before they become records or are rejected."""

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
# Choices of CLE and ACE, in the wording of the published model. The last one is never correct.
VERDICTS = ("it is definitely true", "it is definitely false", "it is plausible", "i cannot determine")
HYPOTHESES = dict(zip(("true", "false", "plausible"), VERDICTS, strict=False))
BEFORE_HYPOTHESIS, AFTER_HYPOTHESIS = 'based on the audio, what can be said about the hypothesis - "', '"?'
CAPTION_QUESTION = "caption the audio."

# Subtypes of ReasonAQA by task name and kind; those of other tasks are built from the task name and a suffix.
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
        pa.field("id", pa.string(), nullable=False),  # <request>-<index in its answer>
        pa.field("request", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("aspect", pa.string(), nullable=False),  # empty except for detail and mcq
        pa.field("split", pa.string(), nullable=False),
        pa.field("taskname", pa.string(), nullable=False),
        pa.field("subtype", pa.string(), nullable=False),
        pa.field("clips", pa.list_(pa.string()), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("question", pa.string(), nullable=False),  # without choices
        pa.field("choices", pa.list_(pa.string()), nullable=False),  # without letters, in the order of the answer
        pa.field("answer", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # of a rejection; empty for an accepted question
    ]
)
RECORD_SCHEMA = pa.schema(
    [*SCHEMA, *(pa.field(name, pa.string(), nullable=False) for name in ("kind", "aspect", "request"))]
)

Candidate = dict[str, Any]  # a row of CANDIDATE_SCHEMA


def subtype(taskname: str, kind: str, tier: int = 0) -> str:
    """Return the subtype of a record: ReasonAQA's (`ACD-1.json`), or `<Taskname>-MCQ` for other tasks."""
    names = SUBTYPES.get(taskname) or {kind: f"{taskname.capitalize()}-{suffix}" for kind, suffix in SUFFIXES.items()}
    return names[kind].format(tier=tier)


def candidates(request: WritingRequest, content: dict[str, Any]) -> list[Candidate]:
    """Return the questions in the answer to `request`, in lower case as in ReasonAQA."""
    found = []
    for index, fields in enumerate(_fields(request, content)):
        tier = index + 1 if request.kind == "difference" else 0
        choices = [_normalized(choice) for choice in fields.get("choices", [])]
        found.append(
            {
                "id": f"{request.id}-{index}",
                "request": request.id,
                "kind": request.kind,
                "aspect": fields.get("aspect", ""),
                "split": request.split,
                "taskname": request.taskname,
                "subtype": subtype(request.taskname, request.kind, tier),
                "clips": list(request.clips),
                "captions": request.material["captions"],
                "question": _normalized(fields["question"]),
                "choices": choices,
                "answer": _matching_choice(_normalized(fields["answer"]), choices),
                "reason": "",
            }
        )
    return found


def _fields(request: WritingRequest, content: dict[str, Any]) -> list[dict[str, Any]]:
    if request.kind == "difference":
        return [{"question": q, "answer": content[tier]} for q, tier in zip(TIER_QUESTIONS, TIERS, strict=True)]
    if request.kind == "entailment":
        return [
            {"question": _hypothesis_question(content[name]), "choices": list(VERDICTS), "answer": HYPOTHESES[name]}
            for name in ("true", "plausible", "false")
        ]
    return content["questions"]


def _hypothesis_question(claim: str) -> str:
    return BEFORE_HYPOTHESIS + claim.strip().rstrip(".").replace('"', "'") + AFTER_HYPOTHESIS


def hypothesis(question: str) -> str:
    """Return the hypothesis in an entailment question."""
    return question.removeprefix(BEFORE_HYPOTHESIS).removesuffix(AFTER_HYPOTHESIS)


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())


def _matching_choice(answer: str, choices: list[str]) -> str:
    """Return the choice that equals an answer except for full stops, or the answer itself."""
    return next((choice for choice in choices if choice.rstrip(".") == answer.rstrip(".")), answer)


def assign_letters(accepted: list[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Return the questions with the choices of mcq in random order; entailment verdicts keep their fixed order.

    Among mcq questions with the same number of choices, the counts of correct letters differ by at most one.
    """
    positions: dict[int, list[int]] = {}
    for count in {len(candidate["choices"]) for candidate in accepted if candidate["kind"] == "mcq"}:
        questions = sum(c["kind"] == "mcq" and len(c["choices"]) == count for c in accepted)
        # Letters with one question more are random too: otherwise they would be the first letters in every split.
        letters = [int(letter) for letter in rng.permutation(count)]
        positions[count] = [int(p) for p in rng.permutation([letters[n % count] for n in range(questions)])]
    ordered = []
    for candidate in accepted:
        if candidate["kind"] == "mcq":
            wrong = [choice for choice in candidate["choices"] if choice != candidate["answer"]]
            choices = [str(choice) for choice in rng.permutation(wrong)]
            choices.insert(positions[len(candidate["choices"])].pop(), candidate["answer"])
            candidate = candidate | {"choices": choices}
        ordered.append(candidate)
    return ordered


def record(candidate: Candidate) -> Record:
    """Return the record of a question after `assign_letters`."""
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
