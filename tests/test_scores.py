"""Scores: what counts as right, and what chance gives."""

import pytest

from mellow_platform.data.records import Record
from mellow_platform.evaluation import scores


def record(family: str, question: str, answer: str) -> Record:
    return Record("scenes", "a.wav", "", "", "", question, answer, family)


MCQ = record("MCQ.json", "which? a) tone b) horn c) clicks d) sweep", "b) horn")
BINARY = record("Binary", "is there a horn?", "yes")
OPEN = record("Caption", "caption the audio.", "a loud horn")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("b) horn", True), ("B) Horn.", True), (" b)  horn ", True), ("a) horn", False), ("b", False), ("", False)],
)
def test_an_answer_is_right_word_for_word(answer: str, right: bool):
    assert scores.is_right(MCQ, answer) is right


def test_chance_is_one_in_the_choices_or_the_train_splits_repetition():
    known = [OPEN, OPEN, record("Caption", "caption the audio.", "silence"), record("Other", "?", "a loud horn")]
    chance = scores.chance([MCQ, BINARY, OPEN], known)
    assert chance == pytest.approx({"MCQ": 0.25, "Binary": 0.5, "Caption": 2 / 3})


def test_accuracy_is_counted_by_family_and_averaged_over_families():
    accuracy = scores.by_family([MCQ, MCQ, BINARY], [True, False, True])
    assert accuracy == {"Binary": 1.0, "MCQ": 0.5}
    assert scores.mean(accuracy) == 0.75
    assert scores.mean(accuracy, scores.multiple_choice_families([MCQ, BINARY])) == 0.5
