"""Filters of written questions: choices, leaks, language, duplicates, contradictions."""

from typing import Any

import pytest

from mellow_platform.synthesis.filters import contradictions, is_answerable_blind, near_duplicates, reason_of
from mellow_platform.synthesis.synthesize_config import FiltersSection
from tests.synthesis_runs import candidate


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
def test_rejection_reasons(reason, question, answer, choices):
    assert reason_of(candidate(question, answer, choices), FiltersSection()) == reason


def test_short_english_passes_the_language_filter():
    texts = ["a low hum", "an accordion", "calm and serene", "reverberant", "a guitar solo in a minor key",
             "meowing, then purring", "a siren wails", "vroom", "percussion and marimba", "a cappella singing",
             "a tremolo on a mandolin", "espresso machine steam", "didgeridoo drone", "sonar ping", "a taxi idles",
             "definitely true", "the pianissimo passage ends", "a bandoneon plays a tango"]  # fmt: skip
    for text in texts:
        assert reason_of(candidate("which of these best describes it?", text), FiltersSection()) == ""
    german = candidate("was ist in dieser aufnahme zu hören?", "ein hund bellt laut im garten")
    assert reason_of(german, FiltersSection(languages=["en", "de"])) == ""


def test_near_duplicates_within_kind_and_clip():
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
    repeated = true | {"id": "repeated"}
    other = true | {"id": "other", "question": true["question"].replace("a dog barks", "an old bell rings")}
    assert near_duplicates([true, false, repeated, other], 0.7) == {"repeated"}


def test_contradictions_reject_every_verdict():
    def entailment(id: str, claim: str, verdict: str, clip: str = "a.wav") -> dict[str, Any]:
        question = f'based on the audio, what can be said about the hypothesis - "{claim}"?'
        return candidate(question, verdict, kind="entailment") | {"id": id, "clips": [clip]}

    true, plausible = "it is definitely true", "it is plausible"
    different = [entailment("1", "a dog barks", true), entailment("2", "the dog barks", plausible)]
    equal = [entailment("3", "a dog barks twice", plausible), entailment("4", "A dog barks twice.", plausible)]
    other_clip = [entailment("5", "a dog barks", "it is definitely false", "b.wav")]
    assert contradictions([*different, *equal, *other_clip]) == {"1", "2"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("the first audio", "no_difference"),
        ("A dog barks in the yard.", "no_difference"),
        ("a dog barks in the yard, rain falls on a roof", ""),
        ("the first audio has a dog, the second one rain", ""),
    ],
)
def test_difference_must_name_both_clips(answer: str, reason: str):
    difference = candidate("explain the difference between the two audios in a few words.", answer, kind="difference")
    difference |= {"captions": ["a dog barks in the yard", "rain falls on a roof"]}
    assert reason_of(difference, FiltersSection()) == reason


def test_answerable_blind_needs_a_sure_and_correct_guess():
    choice = candidate("which of these is an animal?", "a dog", ("a dog", "a car"))
    assert is_answerable_blind(choice, {"answer": "A dog.", "sure": True})
    assert not is_answerable_blind(choice, {"answer": "a dog", "sure": False})
    assert not is_answerable_blind(choice, {"answer": "a car", "sure": True})
    detail = candidate("what falls on a roof when it rains?", "rain falls on the roof")
    assert is_answerable_blind(detail, {"answer": "rain falls on a roof", "sure": True})
    assert not is_answerable_blind(detail, {"answer": "hail", "sure": True})
