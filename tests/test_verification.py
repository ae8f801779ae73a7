"""Checks of written questions: without audio, and against the caption."""

import json
from collections import Counter
from typing import Any

from mellow_platform.synthesis.candidates import candidates
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.verification import apply, blind, support
from tests.synthesis_runs import QUESTION, candidate


def test_blind_spans_clips_and_support_has_the_caption():
    questions = []
    for number in range(30):
        request = WritingRequest(
            f"write-{number}", "detail", 2, {"captions": [f"c{number}"]}, (f"{number}.wav",), "train", "x"
        )
        questions += candidates(request, {"questions": [QUESTION, QUESTION | {"question": "why is it?"}]})
    check = blind(questions, 0, "")
    assert sum(request.pairs for request in check.requests) == 60
    for request, members in zip(check.requests, check.members, strict=True):
        assert len({member["clips"][0] for member in members}) == len(members) == 10
        assert "captions" not in request.material and "a dog" not in json.dumps(request.material)
    check = support(questions, 0, "")
    assert [(r.pairs, r.material["captions"]) for r in check.requests] == [(2, [f"c{n}"]) for n in range(30)]
    answers: list[dict[str, Any] | None] = [
        {"verdicts": [{"number": 2, "supported": False}, {"number": 1, "supported": True}]} for _ in range(29)
    ]
    apply(check, [*answers, None])
    assert Counter(c["reason"] for c in questions) == {"": 29, "not_supported": 29, "not_checked": 2}
    assert questions[1]["reason"] == "not_supported"


def test_changed_prompt_changes_request_ids():
    questions = [candidate(f"what is heard {n}?", "rain", request=f"r{n}", captions=["rain"]) for n in range(4)]
    for check in (blind, support):
        first, same, other = ({r.id for r in check(questions, 0, prompt).requests} for prompt in ("one", "one", "two"))
        assert first == same
        assert not first & other


def test_rejected_question_changes_one_request():
    questions = [candidate(f"what is heard {n}?", "rain", request=f"r{n}", captions=["rain"]) for n in range(40)]
    fewer = [one | {"reason": "too_long"} if number == 17 else one for number, one in enumerate(questions)]
    for check, changed in ((blind, 1), (support, 0)):
        before, after = ({request.id for request in check(group, 0, "").requests} for group in (questions, fewer))
        assert len(after - before) == changed
        assert len(before - after) == 1
