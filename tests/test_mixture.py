"""Records of written questions, and their mixture with existing pairs."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mellow_platform.data.records import Record
from mellow_platform.synthesis.candidates import TIER_QUESTIONS, assign_letters, candidates, record, subtype
from mellow_platform.synthesis.mixture import Pair, check_share, mix
from mellow_platform.synthesis.requests import WritingRequest
from tests.synthesis_runs import candidate, config


def test_records_follow_reasonaqa():
    request = WritingRequest("write-1", "mcq", 1, {"captions": ["A Dog"]}, ("a.wav",), "train", "audiocaps")
    question = {"aspect": "objects", "question": "What Barks?", "choices": ["A dog", "a cat"], "answer": "a dog."}
    (written,) = candidates(request, {"questions": [question]})
    mcq = record(assign_letters([written], np.random.default_rng(0))[0])
    assert mcq.choices == ("a) a cat", "b) a dog") or mcq.choices == ("a) a dog", "b) a cat")
    assert mcq.answer in mcq.choices and mcq.answer.endswith("a dog")
    assert (mcq.caption1, mcq.subtype, mcq.filepath2) == ("A Dog", "AudioCaps-MCQ.json", "")
    request = WritingRequest("write-2", "entailment", 3, {"captions": ["x"]}, ("a.wav",), "train", "clothov21")
    records = [record(c) for c in candidates(request, {"true": 'A "T".', "plausible": "p", "false": "f"})]
    assert [r.input for r in records] == [
        f'based on the audio, what can be said about the hypothesis - "{claim}"? a) it is definitely true '
        "b) it is definitely false c) it is plausible d) i cannot determine"
        for claim in ("a 't'", "p", "f")
    ]
    assert [r.answer for r in records] == [
        "a) it is definitely true",
        "c) it is plausible",
        "b) it is definitely false",
    ]
    assert all(len(r.choices) == 4 and r.answer in r.choices for r in records)
    request = WritingRequest(
        "write-3", "difference", 3, {"captions": ["x", "y"]}, ("a.wav", "b.wav"), "train", "clothov21"
    )
    records = [record(c) for c in candidates(request, {"few_words": "f", "sentence": "s", "paragraph": "p"})]
    assert [(r.input, r.answer, r.subtype) for r in records] == [
        (question, answer, f"CLD-{tier}.json")
        for question, answer, tier in zip(TIER_QUESTIONS, "fsp", "123", strict=True)
    ]
    assert (records[0].filepath2, records[0].caption2) == ("b.wav", "y")
    names = [subtype(task, "entailment") for task in ("audiocaps", "clothov21", "birds")]
    assert names == ["ACE.json", "CLE.json", "Birds-Entailment"]
    assert subtype("birds", "difference", 2) == "Birds-Difference-2"


def test_correct_letters_are_balanced():
    questions = [candidate(f"q{n}", "right", ("right", "x", "y", "z")[: 4 - n % 2]) for n in range(83)]
    ordered = assign_letters(questions, np.random.default_rng(0))
    for count in (3, 4):
        letters = Counter(c["choices"].index("right") for c in ordered if len(c["choices"]) == count)
        assert len(letters) == count
        assert max(letters.values()) - min(letters.values()) <= 1
    assert [c["question"] for c in ordered] == [c["question"] for c in questions]
    assert ordered == assign_letters(questions, np.random.default_rng(0))


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
def test_train_split_has_the_synthetic_share(existing, synthetic, share, expected):
    pairs = [Pair(Record("x", f"{n}.wav", "", "", "", "caption the audio.", "a", "X")) for n in range(existing)]
    fields: dict[str, Any] = {"captions": ["c"], "taskname": "x", "aspect": "", "request": "r"}
    written = [candidate("what is it?", "a dog", split="train", **fields) for _ in range(synthetic)]
    written += [candidate("what is it?", "a dog", split="test", **fields) for _ in range(5)]
    mixed = mix({"train": pairs, "val": [], "test": pairs}, written, config("/c", "/o", synthetic_share=share))
    assert (sum(not p.kind for p in mixed["train"]), sum(bool(p.kind) for p in mixed["train"])) == expected
    assert (len(mixed["val"]), len(mixed["test"])) == (0, existing + 5)


@pytest.mark.parametrize(("existing", "synthetic", "share"), [(0, 10, 0.7), (10, 0, 0.7), (0, 10, 0.0), (1, 10, 0.01)])
def test_unreachable_synthetic_share(existing, synthetic, share):
    record = Record("x", "0.wav", "", "", "", "caption the audio.", "a", "X")
    pairs = {"train": [Pair(record)] * existing, "val": [], "test": []}
    written = [candidate("what is it?", "a dog", split="train")] * synthetic
    job = config("/c", "/o", synthetic_share=share)
    with pytest.raises(ValueError, match=r"synthetic_share.*`existing`"):
        mix(pairs, written, job)
    if not existing:
        with pytest.raises(ValueError, match="existing"):
            check_share(pairs, 10, job)


def test_unused_pairs_are_reported(capsys):
    pairs = {"train": [Pair(Record("x", "0.wav", "", "", "", "caption the audio.", "a", "X"))] * 3}
    check_share(pairs, 100, config("/c", "/o", synthetic_share=0.7))
    assert re.search(r"\b100\b.*train.*synthetic_share 0\.7.*\b7\b", capsys.readouterr().out)
