"""The rule writer: captions parsed into sounds, questions and verdicts from captions."""

import json

import pytest

from mellow_platform.data.caption_tables import Caption
from mellow_platform.synthesis.candidates import candidates
from mellow_platform.synthesis.caption_parser import parse_caption, sound_names
from mellow_platform.synthesis.filters import reason_of
from mellow_platform.synthesis.requests import WritingRequest, plan
from mellow_platform.synthesis.rules import RuleWriter
from mellow_platform.synthesis.synthesize_config import FiltersSection
from mellow_platform.synthesis.verification import apply, blind, support
from tests.synthesis_runs import KINDS, config


def test_captions_are_parsed_into_sounds():
    scene = parse_caption("a loud low tone followed by a soft horn")
    assert [(s.name, s.loudness, s.pitch) for s in scene.sounds] == [("tone", "loud", "low"), ("horn", "soft", "")]
    assert scene.in_order
    simultaneous = parse_caption("A man speaks while birds chirp, and a car passes by.")
    assert [sound.phrase for sound in simultaneous.sounds] == ["a man speaks", "birds chirp", "a car passes by"]
    assert not simultaneous.in_order
    assert [sound.name for sound in parse_caption("dog, animals").sounds] == ["dog", "animals"]
    assert [sound.name for sound in parse_caption("horn, loud, low").sounds] == ["horn"]


@pytest.mark.parametrize(
    "caption", ["a loud low tone followed by a soft horn", "A man speaks while birds chirp.", "dog"]
)
def test_rules_pass_filters_and_checks(caption):
    captions = [
        Caption(f"{n}.wav", text, "train", "x") for n, text in enumerate([caption, "rain falls", "a bell rings, a saw"])
    ]
    writer = RuleWriter(0, sound_names(c.text for c in captions))
    requests = plan(captions, config("/c", "/o"))
    questions = []
    for request, answer in zip(requests, writer.answers(requests, "", {}), strict=True):
        assert answer == writer.answer(request)
        questions += candidates(request, json.loads(answer["content"]))
    of_first_clip = [c for c in questions if c["clips"][0] == "0.wav"]
    assert {c["kind"] for c in of_first_clip} == set(KINDS)
    for c in of_first_clip:
        assert reason_of(c, FiltersSection()) == "", c
        if c["kind"] == "mcq" and c["question"] == "which of these is heard?":
            assert c["answer"] in caption.lower()
            assert not any(choice in caption.lower() for choice in c["choices"] if choice != c["answer"])
    for build in (blind, support):
        check = build(of_first_clip, 0, "")
        apply(check, [json.loads(writer.answer(request)["content"]) for request in check.requests])
        assert [c for c in of_first_clip if c["reason"]] == []


def test_rules_detect_revealed_and_unsupported_answers():
    writer = RuleWriter(0, [])
    question = {"question": "what falls when rain falls?", "choices": ["rain", "a dog", "a car"], "answer": "a dog"}
    blind_request = WritingRequest("blind-0", "blind", 1, {"questions": [question]})
    assert writer.write(blind_request)["answers"] == [{"number": 1, "answer": "rain", "sure": True}]
    for answer, supported in (("a dog", False), ("rain", True), ("weather or water", True), ("two", False)):
        questions = [{"question": "what is it?", "choices": [], "answer": answer}]
        request = WritingRequest("support-0", "support", 1, {"captions": ["soft rain"], "questions": questions})
        assert writer.write(request)["verdicts"] == [{"number": 1, "supported": supported}], answer
