"""The check passes: questions given back to the writer, without what it wrote them from, or to be judged by it."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mellow_platform.synthesis.candidates import Candidate
from mellow_platform.synthesis.filters import given_away
from mellow_platform.synthesis.requests import WritingRequest, content_hash

BLIND_AT_ONCE = 10  # questions in a request that is answered without audio


@dataclass(frozen=True)
class Verification:
    """The requests of a check pass, the questions that each is about, and what an answer means for one of these.

    `failing` returns the reason to leave a question out, or "".
    """

    requests: list[WritingRequest]
    members: list[list[Candidate]]
    items: str  # the key of the list in an answer
    failing: Callable[[Candidate, dict[str, Any]], str]


ID_DIGITS = 24  # of the hash that names a check's request


def blind(candidates: list[Candidate], seed: int, prompt: str) -> Verification:
    """Return the check that a question needs the audio.

    Questions on one clip tell of each other's answers, so that a request holds questions on different clips: they are
    dealt out in turn. Differences are left out: their question is always the same, and tells nothing.

    Args:
        candidates: all that were written. Those that are left out already are not asked about, but hold their place, so
            that with another filter only the requests change that lose or gain a question.
        prompt: the text that a model is told; with another one its requests are others. Empty for rules.
    """
    asked = [candidate for candidate in candidates if candidate["kind"] != "difference"]
    count = -(-len(asked) // BLIND_AT_ONCE)
    members = _left(asked[place::count] for place in range(count))
    requests = [_request("blind", group, [_hidden(c, seed) for c in group], prompt) for group in members]
    return Verification(
        requests, members, "answers", lambda c, a: "answerable_without_audio" if given_away(c, a) else ""
    )


def support(candidates: list[Candidate], seed: int, prompt: str) -> Verification:
    """Return the check that the captions support an answer; the questions of one request are judged together."""
    members = _left(group for _, group in groupby(candidates, key=lambda candidate: candidate["request"]))
    requests = [_request("support", group, [_shown(c) for c in group], prompt) for group in members]
    return Verification(requests, members, "verdicts", lambda _, answer: "" if answer["supported"] else "not_supported")


CHECKS: dict[str, Callable[[list[Candidate], int, str], Verification]] = {"blind": blind, "support": support}


def _left(groups: Iterable[Iterable[Candidate]]) -> list[list[Candidate]]:
    """Return the groups without the questions that are left out already."""
    members = ([candidate for candidate in group if not candidate["reason"]] for group in groups)
    return [group for group in members if group]


def _request(kind: str, group: list[Candidate], questions: list[dict[str, Any]], prompt: str) -> WritingRequest:
    material: dict[str, Any] = {"questions": questions}
    if kind == "support":
        material["captions"] = group[0]["captions"]
    return WritingRequest(f"{kind}-{content_hash([kind, material, prompt], ID_DIGITS)}", kind, len(group), material)


def _shown(candidate: Candidate) -> dict[str, Any]:
    return {name: candidate[name] for name in ("question", "choices", "answer")}


def _hidden(candidate: Candidate, seed: int) -> dict[str, Any]:
    """Return what one without audio sees; writers tend to put the right choice first, which is not to help."""
    choices = list(candidate["choices"])
    if candidate["kind"] == "mcq":
        random.Random(f"{seed} {candidate['id']}").shuffle(choices)
    return {"question": candidate["question"], "choices": choices}


def apply(check: Verification, contents: list[dict[str, Any] | None]) -> None:
    """Write the reasons to leave questions out into them, given the answers to the check's requests, in order.

    A question whose request got no answer is left out as `not_checked`.
    """
    for group, content in zip(check.members, contents, strict=True):
        judged = {item["number"]: item for item in content[check.items]} if content else {}
        for number, candidate in enumerate(group, 1):
            candidate["reason"] = check.failing(candidate, judged[number]) if judged else "not_checked"
