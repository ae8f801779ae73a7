"""The rule writer: captions parsed into sounds, questions and verdicts from captions."""

import json

import pytest

from mellow_platform.data.caption_tables import Caption
from mellow_platform.synthesis.candidates import candidates
from mellow_platform.synthesis.caption_parser import pool, take_apart
from mellow_platform.synthesis.filters import reason_of
from mellow_platform.synthesis.requests import WritingRequest, plan
from mellow_platform.synthesis.rules import RuleWriter
from mellow_platform.synthesis.synthesize_config import FiltersSection
from mellow_platform.synthesis.verification import apply, blind, support
from tests.synthesis_runs import KINDS, config


def test_captions_are_parsed_into_sounds():
    scene = take_apart("a loud low tone followed by a soft horn")
    assert [(s.name, s.loudness, s.pitch) for s in scene.sounds] == [("tone", "loud", "low"), ("horn", "soft", "")]
    assert scene.in_order
    free = take_apart("A man speaks while birds chirp, and a car passes by.")
    assert [sound.phrase for sound in free.sounds] == ["a man speaks", "birds chirp", "a car passes by"]
    assert not free.in_order
    assert [sound.name for sound in take_apart("dog, animals").sounds] == ["dog", "animals"]
    assert [sound.name for sound in take_apart("horn, loud, low").sounds] == ["horn"]


@pytest.mark.parametrize(
    "caption", ["a loud low tone followed by a soft horn", "A man speaks while birds chirp.", "dog"]
)
def test_rules_pass_filters_and_checks(caption):
    given = [
        Caption(f"{n}.wav", text, "train", "x") for n, text in enumerate([caption, "rain falls", "a bell rings, a saw"])
    ]
    writer = RuleWriter(0, pool(c.text for c in given))
    requests = plan(given, config("/c", "/o"))
    written = []
    for request, answer in zip(requests, writer.answers(requests, "", {}), strict=True):
        assert answer == writer.answer(request)
        written += candidates(request, json.loads(answer["content"]))
    own = [c for c in written if c["clips"][0] == "0.wav"]
    assert {c["kind"] for c in own} == set(KINDS)
    for c in own:
        assert reason_of(c, FiltersSection()) == "", c
        if c["kind"] == "mcq" and c["question"] == "which of these is heard?":
            assert c["answer"] in caption.lower()
            assert not any(choice in caption.lower() for choice in c["choices"] if choice != c["answer"])
    for build in (blind, support):
        check = build(own, 0, "")
        apply(check, [json.loads(writer.answer(request)["content"]) for request in check.requests])
        assert [c for c in own if c["reason"]] == []


def test_rules_detect_given_away_and_unsupported_answers():
    writer = RuleWriter(0, [])
    shown = {"question": "what falls when rain falls?", "choices": ["rain", "a dog", "a car"], "answer": "a dog"}
    blind_request = WritingRequest("blind-0", "blind", 1, {"questions": [shown]})
    assert writer.write(blind_request)["answers"] == [{"number": 1, "answer": "rain", "sure": True}]
    for answer, supported in (("a dog", False), ("rain", True), ("weather or water", True), ("two", False)):
        questions = [{"question": "what is it?", "choices": [], "answer": answer}]
        request = WritingRequest("support-0", "support", 1, {"captions": ["soft rain"], "questions": questions})
        assert writer.write(request)["verdicts"] == [{"number": 1, "supported": supported}], answer
