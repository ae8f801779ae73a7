"""Writing requests of synthesis: plan, prompts, and schemas of answers."""

import json
from collections import Counter

import pytest

from mellow_platform.data.caption_tables import Caption
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.requests import WritingRequest, plan
from mellow_platform.synthesis.schemas import ASPECTS, BadAnswerError, parse, schema, unbounded_schema
from tests.synthesis_runs import KINDS, QUESTION, REQUEST, config


def captions(count: int, texts: int = 1, split: str = "train") -> list[Caption]:
    return [
        Caption(f"{split}{n}.wav", f"a dog barks {n} {t}", split, "clothov21")
        for n in range(count)
        for t in range(texts)
    ]


def test_plan_has_every_kind_and_pairs_within_split():
    all_captions = captions(3, texts=2) + captions(2, split="test") + captions(1, split="val")
    requests = plan(all_captions, config("/c", "/o", questions=4))
    assert requests == plan(list(all_captions), config("/c", "/o", questions=4))
    assert Counter(request.kind for request in requests) == {"detail": 9, "mcq": 9, "entailment": 9, "difference": 8}
    assert len({request.id for request in requests}) == len(requests)
    assert {request.pairs for request in requests if request.kind == "mcq"} == {4}
    for request in requests:
        if request.kind == "difference":
            assert len(set(request.clips)) == len(request.material["captions"]) == 2
            assert all(clip.startswith(request.split) for clip in request.clips)
    partners = {request.clips for request in requests if request.kind == "difference"}
    assert partners != {r.clips for r in plan(all_captions, config("/c", "/o", seed=1)) if r.kind == "difference"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps({"questions": [QUESTION, QUESTION]}), ""),
        (f"<think>so</think>```json\n{json.dumps({'questions': [QUESTION, QUESTION]})}\n```", ""),
        (json.dumps({"questions": [QUESTION]}), "wrong_form"),
        (json.dumps({"questions": [QUESTION] * 3}), ""),
        (json.dumps({"questions": [QUESTION, QUESTION | {"aspect": "Signal_Properties "}]}), ""),
        (json.dumps({"questions": [QUESTION, {}, QUESTION]}), ""),
        (json.dumps({"questions": [QUESTION, QUESTION | {"aspect": "smell"}]}), "wrong_form"),
        (json.dumps({"questions": [QUESTION, QUESTION | {"more": 1}]}), "wrong_form"),
        (json.dumps({"questions": [QUESTION, QUESTION]})[:-3], "broken_json"),
        ("I cannot do that.", "broken_json"),
        (f'<think>{{"questions": []}}</think>{json.dumps({"questions": [QUESTION] * 2})}', ""),
        (f'perhaps {{"questions": []}} or {{so}}: {json.dumps({"questions": [QUESTION] * 2})}', ""),
    ],
)
def test_parse_accepts_only_the_schema(text, reason):
    try:
        assert len(parse(REQUEST, text, min_questions=2)["questions"]) == 2
        assert not reason
    except BadAnswerError as error:
        assert error.reason == reason


def test_parse_drops_invalid_questions_down_to_min_questions():
    partly_valid = json.dumps({"questions": [QUESTION | {"aspect": "smell"}, QUESTION | {"aspect": "Audio Events"}]})
    assert parse(REQUEST, partly_valid, min_questions=1) == {"questions": [QUESTION | {"aspect": "audio events"}]}
    with pytest.raises(BadAnswerError, match=r"questions\.0\.aspect.*'audio events'"):
        parse(REQUEST, json.dumps({"questions": [QUESTION | {"aspect": "smell"}]}), min_questions=1)
    with pytest.raises(BadAnswerError, match=r"questions.*\b0\b.*\b2\b"):
        parse(REQUEST, json.dumps({"questions": []}), min_questions=1)
    incomplete = json.dumps({"true": "it rains", "plausible": "it rains a lot"})
    with pytest.raises(BadAnswerError, match=r"\bfalse\b"):
        parse(WritingRequest("", "entailment", 3, {}), incomplete, min_questions=1)


def test_verdicts_are_one_per_question():
    request = WritingRequest("support-00000000", "support", 2, {})
    verdicts = [{"number": 1, "supported": True}, {"number": 1, "supported": False}]
    with pytest.raises(BadAnswerError, match=r"\[1, 1\].*\b2\b"):
        parse(request, json.dumps({"verdicts": verdicts}), min_questions=1)


def test_schemas_are_closed_and_bounded():
    closed = schema(REQUEST)
    assert closed["additionalProperties"] is False
    assert closed["required"] == ["questions"]
    assert (closed["properties"]["questions"]["minItems"], closed["properties"]["questions"]["maxItems"]) == (
        2,
        2,
    )
    for kind in (*KINDS, "blind", "support"):
        text = json.dumps(schema(WritingRequest("", kind, 3, {})))
        assert text.count('"additionalProperties": false') == text.count('"type": "object"')
        unbounded = json.dumps(unbounded_schema(WritingRequest("", kind, 3, {})))
        assert "Items" not in unbounded and unbounded.count('"items"') == text.count('"items"')


def test_prompts_can_be_replaced(tmp_path):
    prompts = Prompts.read([*KINDS, "blind", "support"], None)
    for kind in KINDS:
        text = prompts.render(WritingRequest("", kind, 7, {"captions": ["a first", "a second"]}))
        assert "a first" in text and (("a second" in text) == (kind == "difference"))
        assert "JSON" in text
        assert ("exactly 7" in text) == (kind in ("detail", "mcq"))
        assert all(f"`{aspect}`" in text for aspect in ASPECTS) == (kind in ("detail", "mcq"))
    question = {"question": "what?", "choices": ["a dog", "a cat"], "answer": "a dog"}
    text = prompts.render(WritingRequest("", "support", 1, {"captions": ["a first"], "questions": [question]}))
    assert "1. what?\n   - a dog\n   - a cat\n   answer: a dog" in text
    assert "answer: a dog" not in prompts.render(WritingRequest("", "blind", 1, {"questions": [question]}))
    (tmp_path / "mcq.md").write_text("{{ pairs }} on {{ captions[0] }}, please")
    custom = Prompts.read(KINDS, str(tmp_path))
    assert custom.render(WritingRequest("", "mcq", 2, {"captions": ["rain"]})) == "2 on rain, please"
    assert custom.digest(KINDS) != Prompts.read(KINDS, None).digest(KINDS)
    assert custom.digest(["detail"]) == Prompts.read(KINDS, None).digest(["detail"])
    (tmp_path / "mcq.md").write_text("{{ number }}")
    with pytest.raises(ValueError, match=r"mcq\.md.*'number'"):
        Prompts.read(KINDS, str(tmp_path)).render(WritingRequest("", "mcq", 2, {"captions": ["rain"]}))
    (tmp_path / "mcq.md").write_text("{% for %}")
    with pytest.raises(ValueError, match=r"\bline 1\b"):
        Prompts.read(KINDS, str(tmp_path))


def test_prompts_shuffle_aspects():
    prompts = Prompts.read(["detail", "mcq"], None)
    for kind in ("detail", "mcq"):
        first: Counter[str] = Counter()
        for number in range(60):
            text = prompts.render(WritingRequest(f"{kind}-{number}", kind, 5, {"captions": ["rain"]}))
            aspects = [line.split("`")[1] for line in text.splitlines() if line.startswith("- `")]
            assert sorted(aspects) == sorted(ASPECTS)
            first[aspects[0]] += 1
        assert first.keys() == set(ASPECTS)
