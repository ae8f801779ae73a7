"""Check passes: the writer answers questions without the caption, or judges their answers with it."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mellow_platform.synthesis.candidates import Candidate
from mellow_platform.synthesis.filters import is_answerable_blind
from mellow_platform.synthesis.requests import WritingRequest, content_hash

BLIND_BATCH = 10  # questions per request of the blind check


@dataclass(frozen=True)
class Verification:
    """The requests of a check pass, with the questions of each.

    `reason` returns the reason to reject a question, or "", given its item in an answer.
    """

    requests: list[WritingRequest]
    members: list[list[Candidate]]
    list_key: str  # key of the list of items in an answer
    reason: Callable[[Candidate, dict[str, Any]], str]


ID_DIGITS = 24  # hexadecimal digits in the id of a check's request


def blind(candidates: list[Candidate], seed: int, prompt: str) -> Verification:
    """Return the check that a question cannot be answered without audio.

    Questions on one clip reveal each other's answers, so that each of n requests takes every n-th question. Difference
    questions are excluded: their text is always the same.

    Args:
        candidates: all written questions. Rejected ones are not checked, but they keep their positions, so that another
            filter changes only the requests that lose or gain a question.
        prompt: prompt of a language model, which the request ids depend on; empty for rules.
    """
    questions = [candidate for candidate in candidates if candidate["kind"] != "difference"]
    count = -(-len(questions) // BLIND_BATCH)
    members = _not_rejected(questions[start::count] for start in range(count))
    requests = [_request("blind", group, [_without_answer(c, seed) for c in group], prompt) for group in members]
    reason = "answerable_without_audio"
    return Verification(requests, members, "answers", lambda c, a: reason if is_answerable_blind(c, a) else "")


def support(candidates: list[Candidate], seed: int, prompt: str) -> Verification:
    """Return the check that captions support the answers; a request contains the questions of one writing request."""
    members = _not_rejected(group for _, group in groupby(candidates, key=lambda candidate: candidate["request"]))
    requests = [_request("support", group, [_with_answer(c) for c in group], prompt) for group in members]
    return Verification(requests, members, "verdicts", lambda _, answer: "" if answer["supported"] else "not_supported")


CHECKS: dict[str, Callable[[list[Candidate], int, str], Verification]] = {"blind": blind, "support": support}


def _not_rejected(groups: Iterable[Iterable[Candidate]]) -> list[list[Candidate]]:
    """Return the groups without rejected questions and without empty groups."""
    members = ([candidate for candidate in group if not candidate["reason"]] for group in groups)
    return [group for group in members if group]


def _request(kind: str, group: list[Candidate], questions: list[dict[str, Any]], prompt: str) -> WritingRequest:
    material: dict[str, Any] = {"questions": questions}
    if kind == "support":
        material["captions"] = group[0]["captions"]
    return WritingRequest(f"{kind}-{content_hash([kind, material, prompt], ID_DIGITS)}", kind, len(group), material)


def _with_answer(candidate: Candidate) -> dict[str, Any]:
    return {name: candidate[name] for name in ("question", "choices", "answer")}


def _without_answer(candidate: Candidate, seed: int) -> dict[str, Any]:
    """Return question and choices; the choices of mcq are shuffled, since writers often put the correct one first."""
    choices = list(candidate["choices"])
    if candidate["kind"] == "mcq":
        random.Random(f"{seed} {candidate['id']}").shuffle(choices)
    return {"question": candidate["question"], "choices": choices}


def apply(check: Verification, contents: list[dict[str, Any] | None]) -> None:
    """Set `reason` of the checked questions, given the contents of the answers in the order of the requests.

    Questions of a failed request (None) are rejected as `not_checked`.
    """
    for group, content in zip(check.members, contents, strict=True):
        items = {item["number"]: item for item in content[check.list_key]} if content else {}
        for number, candidate in enumerate(group, 1):
            candidate["reason"] = check.reason(candidate, items[number]) if items else "not_checked"
