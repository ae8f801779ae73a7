"""A writer without any model: rules that ask about the sounds that a caption names.

It makes the job run anywhere, writes as many questions as a caption supports and no more, and gives a floor to compare
a language model's questions with. Its checks are baselines of the same kind: one that answers without the audio by the
shape of the question, and one that looks for an answer's words in the caption.
"""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from mellow_platform.synthesis.candidates import HYPOTHESES, VERDICTS, hypothesis
from mellow_platform.synthesis.caption_parser import (
    FEELINGS,
    NUMBERS,
    PITCH,
    PLACES,
    SOURCES,
    STEM,
    CaptionScene,
    Sound,
    implied,
    stems,
    take_apart,
)
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.schemas import CHOICES, parse
from mellow_platform.synthesis.words import content_words, words
from mellow_platform.synthesis.writer import WriterAnswer, begin

# What no recording settles, so that it is plausible of a sound that is heard.
UNKNOWABLE = (
    "was recorded in the morning",
    "is heard there every day",
    "goes on after the end",
    "is meant for someone",
)
LEVELS = ("loud", "soft", "growing louder", "fading away")
# Words that answers of rules are made of besides those of the caption.
GLUE = ("then", "since", "versus", "both", "comes", "last", "suggests", "may", "leave", "listener")
MUCH_LONGER = 2.0  # a choice with so many times the words of every other one tells that it is right

Question = dict[str, Any]  # the fields of forms.DetailQuestion or ChoiceQuestion


class RuleWriter:
    """Answers requests by rules, the same ones always the same.

    Args:
        pool: names of sounds to draw wrong choices from (`caption_parser.pool`).
    """

    def __init__(self, seed: int, pool: list[str]):
        self.seed, self.pool = seed, random.Random(seed).sample(pool, len(pool))

    def answers(
        self, requests: list[WritingRequest], kept: str, earlier: Mapping[str, WriterAnswer]
    ) -> list[WriterAnswer]:
        """Return the answers to `requests` (`writer.Writer`); they cost nothing, and none is kept."""
        return [self.answer(request) for request in requests]

    def answer(self, request: WritingRequest) -> WriterAnswer:
        content = json.dumps(self.write(request), ensure_ascii=False)
        parse(request, content, least=0)
        return begin(request) | {"content": content}

    def write(self, request: WritingRequest) -> dict[str, Any]:
        """Return the content of the answer, in the form of the request's kind."""
        rng = random.Random(f"{self.seed} {request.id}")
        match request.kind:
            case "blind":
                guesses = [_guess(question) for question in request.material["questions"]]
                return {"answers": [{"number": n, "answer": a, "sure": sure} for n, (a, sure) in enumerate(guesses, 1)]}
            case "support":
                captions = request.material["captions"]
                found = [_supported(captions, question) for question in request.material["questions"]]
                return {"verdicts": [{"number": n, "supported": is_so} for n, is_so in enumerate(found, 1)]}
        scenes = [take_apart(caption) for caption in request.material["captions"]]
        match request.kind:
            case "detail":
                return {"questions": _detail_questions(scenes[0])[: request.pairs]}
            case "mcq":
                return {"questions": self._choice_questions(scenes[0], rng)[: request.pairs]}
            case "difference":
                return _difference(*request.material["captions"], *scenes)
            case _:
                return self._hypotheses(request.material["captions"][0], scenes[0], rng)

    def _absent(self, scene: CaptionScene, count: int, rng: random.Random) -> list[str]:
        """Draw names of sounds that have no word in common with those heard, nor with each other."""
        taken = set().union(*(stems(sound.name) for sound in scene.sounds))
        found: list[str] = []
        # From any place of the pool on, which is in no order: a draw of all of it for each request would take longest.
        start = rng.randrange(max(1, len(self.pool)))
        for name in (self.pool[(start + step) % len(self.pool)] for step in range(len(self.pool))):
            if not stems(name) & taken:
                found.append(name)
                taken |= stems(name)
            if len(found) == count:
                break
        return found

    def _choice_questions(self, scene: CaptionScene, rng: random.Random) -> list[Question]:
        questions: list[Question] = []

        def ask(aspect: str, question: str, right: str, wrong: list[str]) -> None:
            if wrong:
                choices = [right, *wrong[: CHOICES - 1]]
                questions.append({"aspect": aspect, "question": question, "choices": choices, "answer": right})

        names, absent = [sound.name for sound in scene.sounds], self._absent(scene, CHOICES - 1, rng)
        if names:
            ask("audio events", "which of these is heard?", rng.choice(names), absent)
        if loud := [sound for sound in scene.sounds if sound.loudness]:
            sound = rng.choice(loud)
            wrong = [level for level in LEVELS if level != sound.loudness]
            ask("signal properties", f"at what level is this heard: {sound.name}?", sound.loudness, wrong)
        for aspect, question, table in (
            ("objects", "which of these makes a sound?", SOURCES),
            ("listener emotions", "how do the sounds leave a listener?", FEELINGS),
            ("acoustic scenes", "which place do the sounds suggest?", PLACES),
        ):
            if groups := scene.groups(table):
                wrong = sorted(set(table.values()) - set(groups))
                ask(aspect, question, groups[0], rng.sample(wrong, len(wrong)))
        if pitched := [sound for sound in scene.sounds if sound.pitch]:
            sound = rng.choice(pitched)
            wrong = [pitch for pitch in dict.fromkeys(PITCH.values()) if pitch != sound.pitch]
            ask("signal properties", f"what is the pitch of this: {sound.name}?", sound.pitch, wrong)
        if scene.in_order:
            place, name = rng.choice(((0, "first"), (-1, "last")))
            wrong = [other for other in names if other != names[place]]
            ask("audio events", f"which of these comes {name}?", names[place], [*wrong, *absent])
        if 0 < len(names) < len(NUMBERS):
            wrong = [number for number in NUMBERS[1:] if number != NUMBERS[len(names)]]
            ask("semantics", "how many different sounds are heard?", NUMBERS[len(names)], wrong)
        return questions

    def _hypotheses(self, caption: str, scene: CaptionScene, rng: random.Random) -> dict[str, str]:
        heard = rng.choice(scene.sounds).name if scene.sounds else caption
        missing = (self._absent(scene, 1, rng) or ["silence"])[0]
        claim = rng.choice(UNKNOWABLE)
        # Half of the false ones claim as much as the plausible ones do, so that the claim alone tells nothing.
        more = f", which {rng.choice(UNKNOWABLE)}" if rng.random() < 0.5 else ""
        return {
            "true": f"this is heard: {heard}",
            "plausible": f"this is heard: {heard}, which {claim}",
            "false": f"this is heard: {missing}{more}",
        }


def _detail_questions(scene: CaptionScene) -> list[Question]:
    questions: list[Question] = []

    def ask(aspect: str, question: str, answer: str) -> None:
        questions.append({"aspect": aspect, "question": question, "answer": answer})

    phrases = [sound.phrase for sound in scene.sounds]
    if scene.in_order:
        ask("audio events", "which sounds are heard one after another?", f"{', then '.join(phrases)}.")
    elif phrases:
        ask("audio events", "what is heard in the audio?", f"{_listed(phrases)}.")
    for sound in scene.sounds[:1]:
        if described := _described(sound):
            ask("signal properties", f"how does this sound: {sound.name}?", f"it is {described}.")
    for aspect, question, table in (
        ("objects", "what makes the sounds?", SOURCES),
        ("listener emotions", "how may a listener feel?", FEELINGS),
        ("acoustic scenes", "what place do the sounds suggest?", PLACES),
    ):
        if groups := scene.groups(table):
            ask(aspect, question, f"{_listed(groups)}, since this is heard: {_listed(_telling(scene, table))}.")
    if 1 < len(phrases) < len(NUMBERS):
        ask("semantics", "how many sounds are heard, and which?", f"{NUMBERS[len(phrases)]}: {_listed(phrases)}.")
    for sound in scene.sounds[1:]:
        if described := _described(sound):
            ask("signal properties", f"how does this sound: {sound.name}?", f"it is {described}.")
    return questions


def _described(sound: Sound) -> str:
    return " and ".join(filter(None, (sound.loudness, sound.pitch)))


def _telling(scene: CaptionScene, table: dict[str, str]) -> list[str]:
    """Return the sounds by which a scene belongs to groups of a table."""
    return [sound.phrase for sound in scene.sounds if any(word in table for word in words(sound.phrase))]


def _listed(items: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _difference(caption1: str, caption2: str, scene1: CaptionScene, scene2: CaptionScene) -> dict[str, str]:
    first, second = (
        [sound.phrase for sound in scene.sounds] or [caption]
        for scene, caption in ((scene1, caption1), (scene2, caption2))
    )
    short = f"{first[0]} versus {second[0]}"
    sentence = f"the first audio has {_listed(first)}, while the second audio has {_listed(second)}."
    parts = [sentence]
    if common := [sound.name for sound in scene1.sounds if sound.name in {other.name for other in scene2.sounds}]:
        parts.append(f"both have {_listed(common)}.")
    for which, scene, phrases in (("first", scene1, first), ("second", scene2, second)):
        if scene.in_order:
            parts.append(f"in the {which} audio {phrases[0]} comes first, and {phrases[-1]} comes last.")
        claims = [
            f"{text} {_listed(groups)}"
            for table, text in ((SOURCES, "is from"), (PLACES, "suggests"), (FEELINGS, "may leave a listener"))
            if (groups := scene.groups(table))
        ]
        if claims:
            parts.append(f"the {which} audio {_listed(claims)}.")
    return {"few_words": short, "sentence": sentence, "paragraph": " ".join(parts)}


def _guess(question: Question) -> tuple[str, bool]:
    """Return the answer that the shape of a question points to, and whether it does so alone.

    Of choices, that with words of the question, or one that is much longer than all others.
    """
    choices = question["choices"]
    if not choices:
        return "", False
    if tuple(choices) == VERDICTS:
        return HYPOTHESES["plausible"], False
    asked = content_words(question["question"])
    named = [choice for choice in choices if content_words(choice) & asked]
    if len(named) == 1:
        return named[0], True
    longest, second = sorted(choices, key=lambda choice: len(choice.split()), reverse=True)[:2]
    return longest, len(longest.split()) > MUCH_LONGER * len(second.split())


def _supported(captions: list[str], question: Question) -> bool:
    """Return whether everything that an answer says is in the captions, or in what tables give for their words."""
    known = {word[:STEM] for word in (*GLUE, *(word for caption in captions for word in implied(caption)))}
    verdicts: dict[str, Callable[[set[str], set[str]], bool]] = {
        HYPOTHESES["true"]: lambda said, heard: said <= heard,
        HYPOTHESES["plausible"]: lambda said, heard: bool(said & heard) and not said <= heard,
        HYPOTHESES["false"]: lambda said, heard: not said <= heard,
    }
    if question["answer"] in verdicts and tuple(question["choices"]) == VERDICTS:
        claim = hypothesis(question["question"]).removeprefix("this is heard")
        return verdicts[question["answer"]]({word[:STEM] for word in content_words(claim)}, known)
    return {word[:STEM] for word in content_words(question["answer"])} <= known
