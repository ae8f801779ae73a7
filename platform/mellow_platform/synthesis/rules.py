"""Writer without a model: rules that write questions about the sounds in a caption.

It runs without a model or a server, writes only questions that a caption supports, and is a baseline for the questions
of a language model. Its checks are baselines too: the blind check guesses from the form of a question, and the support
check searches the caption for the words of an answer.
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
    parse_caption,
    stems,
    supported_words,
)
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.schemas import CHOICES, parse
from mellow_platform.synthesis.words import content_words, words
from mellow_platform.synthesis.writer import WriterAnswer, empty_answer

# Claims that no recording proves or refutes, so that they are plausible for any sound of a caption.
UNVERIFIABLE = (
    "was recorded in the morning",
    "is heard there every day",
    "goes on after the end",
    "is meant for someone",
)
LEVELS = ("loud", "soft", "growing louder", "fading away")
# Words in answers of rules that are not in captions.
CONNECTIVES = ("then", "since", "versus", "both", "comes", "last", "suggests", "may", "leave", "listener")
REVEALING_RATIO = 2.0  # of the words in the longest choice to those in the second: it reveals the correct one

Question = dict[str, Any]  # fields of schemas.DetailQuestion or ChoiceQuestion


class RuleWriter:
    """Answers requests by rules; the same request has the same answer.

    Args:
        sound_names: names of sounds for wrong choices (`caption_parser.sound_names`).
    """

    def __init__(self, seed: int, sound_names: list[str]):
        self.seed, self.sound_names = seed, random.Random(seed).sample(sound_names, len(sound_names))

    def answers(
        self, requests: list[WritingRequest], folder: str, earlier: Mapping[str, WriterAnswer]
    ) -> list[WriterAnswer]:
        """Return the answers to `requests` (`writer.Writer`); rules are fast, so no answer is stored."""
        return [self.answer(request) for request in requests]

    def answer(self, request: WritingRequest) -> WriterAnswer:
        content = json.dumps(self.write(request), ensure_ascii=False)
        parse(request, content, min_questions=0)
        return empty_answer(request) | {"content": content}

    def write(self, request: WritingRequest) -> dict[str, Any]:
        """Return the content of the answer, in the schema of the request's kind."""
        rng = random.Random(f"{self.seed} {request.id}")
        match request.kind:
            case "blind":
                guesses = [_guess(question) for question in request.material["questions"]]
                return {"answers": [{"number": n, "answer": a, "sure": sure} for n, (a, sure) in enumerate(guesses, 1)]}
            case "support":
                captions = request.material["captions"]
                verdicts = [_supported(captions, question) for question in request.material["questions"]]
                return {"verdicts": [{"number": n, "supported": supported} for n, supported in enumerate(verdicts, 1)]}
        scenes = [parse_caption(caption) for caption in request.material["captions"]]
        match request.kind:
            case "detail":
                return {"questions": _detail_questions(scenes[0])[: request.pairs]}
            case "mcq":
                return {"questions": self._choice_questions(scenes[0], rng)[: request.pairs]}
            case "difference":
                return _difference(*request.material["captions"], *scenes)
            case _:
                return self._hypotheses(request.material["captions"][0], scenes[0], rng)

    def _absent_sounds(self, scene: CaptionScene, count: int, rng: random.Random) -> list[str]:
        """Draw names of sounds that share no word with the scene's sounds nor with each other."""
        used = set().union(*(stems(sound.name) for sound in scene.sounds))
        found: list[str] = []
        # The shuffled names are read from a random start: shuffling all of them per request would take longest.
        names, start = self.sound_names, rng.randrange(max(1, len(self.sound_names)))
        for name in (names[(start + step) % len(names)] for step in range(len(names))):
            if not stems(name) & used:
                found.append(name)
                used |= stems(name)
            if len(found) == count:
                break
        return found

    def _choice_questions(self, scene: CaptionScene, rng: random.Random) -> list[Question]:
        questions: list[Question] = []

        def add(aspect: str, question: str, right: str, wrong: list[str]) -> None:
            if wrong:
                choices = [right, *wrong[: CHOICES - 1]]
                questions.append({"aspect": aspect, "question": question, "choices": choices, "answer": right})

        names, absent = [sound.name for sound in scene.sounds], self._absent_sounds(scene, CHOICES - 1, rng)
        if names:
            add("audio events", "which of these is heard?", rng.choice(names), absent)
        if loud := [sound for sound in scene.sounds if sound.loudness]:
            sound = rng.choice(loud)
            wrong = [level for level in LEVELS if level != sound.loudness]
            add("signal properties", f"at what level is this heard: {sound.name}?", sound.loudness, wrong)
        for aspect, question, table in (
            ("objects", "which of these makes a sound?", SOURCES),
            ("listener emotions", "how do the sounds leave a listener?", FEELINGS),
            ("acoustic scenes", "which place do the sounds suggest?", PLACES),
        ):
            if groups := scene.groups(table):
                wrong = sorted(set(table.values()) - set(groups))
                add(aspect, question, groups[0], rng.sample(wrong, len(wrong)))
        if pitched := [sound for sound in scene.sounds if sound.pitch]:
            sound = rng.choice(pitched)
            wrong = [pitch for pitch in dict.fromkeys(PITCH.values()) if pitch != sound.pitch]
            add("signal properties", f"what is the pitch of this: {sound.name}?", sound.pitch, wrong)
        if scene.in_order:
            index, ordinal = rng.choice(((0, "first"), (-1, "last")))
            wrong = [other for other in names if other != names[index]]
            add("audio events", f"which of these comes {ordinal}?", names[index], [*wrong, *absent])
        if 0 < len(names) < len(NUMBERS):
            wrong = [number for number in NUMBERS[1:] if number != NUMBERS[len(names)]]
            add("semantics", "how many different sounds are heard?", NUMBERS[len(names)], wrong)
        return questions

    def _hypotheses(self, caption: str, scene: CaptionScene, rng: random.Random) -> dict[str, str]:
        present = rng.choice(scene.sounds).name if scene.sounds else caption
        absent = (self._absent_sounds(scene, 1, rng) or ["silence"])[0]
        claim = rng.choice(UNVERIFIABLE)
        # Half of the false hypotheses contain such a claim too, so that it does not reveal the verdict.
        extra = f", which {rng.choice(UNVERIFIABLE)}" if rng.random() < 0.5 else ""
        return {
            "true": f"this is heard: {present}",
            "plausible": f"this is heard: {present}, which {claim}",
            "false": f"this is heard: {absent}{extra}",
        }


def _detail_questions(scene: CaptionScene) -> list[Question]:
    questions: list[Question] = []

    def add(aspect: str, question: str, answer: str) -> None:
        questions.append({"aspect": aspect, "question": question, "answer": answer})

    phrases = [sound.phrase for sound in scene.sounds]
    if scene.in_order:
        add("audio events", "which sounds are heard one after another?", f"{', then '.join(phrases)}.")
    elif phrases:
        add("audio events", "what is heard in the audio?", f"{_joined(phrases)}.")
    for sound in scene.sounds[:1]:
        if properties := _properties(sound):
            add("signal properties", f"how does this sound: {sound.name}?", f"it is {properties}.")
    for aspect, question, table in (
        ("objects", "what makes the sounds?", SOURCES),
        ("listener emotions", "how may a listener feel?", FEELINGS),
        ("acoustic scenes", "what place do the sounds suggest?", PLACES),
    ):
        if groups := scene.groups(table):
            add(aspect, question, f"{_joined(groups)}, since this is heard: {_joined(_phrases_in(scene, table))}.")
    if 1 < len(phrases) < len(NUMBERS):
        add("semantics", "how many sounds are heard, and which?", f"{NUMBERS[len(phrases)]}: {_joined(phrases)}.")
    for sound in scene.sounds[1:]:
        if properties := _properties(sound):
            add("signal properties", f"how does this sound: {sound.name}?", f"it is {properties}.")
    return questions


def _properties(sound: Sound) -> str:
    return " and ".join(filter(None, (sound.loudness, sound.pitch)))


def _phrases_in(scene: CaptionScene, table: dict[str, str]) -> list[str]:
    """Return the phrases of the sounds that have a group in a table."""
    return [sound.phrase for sound in scene.sounds if any(word in table for word in words(sound.phrase))]


def _joined(items: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _difference(caption1: str, caption2: str, scene1: CaptionScene, scene2: CaptionScene) -> dict[str, str]:
    first, second = (
        [sound.phrase for sound in scene.sounds] or [caption]
        for scene, caption in ((scene1, caption1), (scene2, caption2))
    )
    short = f"{first[0]} versus {second[0]}"
    sentence = f"the first audio has {_joined(first)}, while the second audio has {_joined(second)}."
    parts = [sentence]
    if common := [sound.name for sound in scene1.sounds if sound.name in {other.name for other in scene2.sounds}]:
        parts.append(f"both have {_joined(common)}.")
    for ordinal, scene, phrases in (("first", scene1, first), ("second", scene2, second)):
        if scene.in_order:
            parts.append(f"in the {ordinal} audio {phrases[0]} comes first, and {phrases[-1]} comes last.")
        claims = [
            f"{text} {_joined(groups)}"
            for table, text in ((SOURCES, "is from"), (PLACES, "suggests"), (FEELINGS, "may leave a listener"))
            if (groups := scene.groups(table))
        ]
        if claims:
            parts.append(f"the {ordinal} audio {_joined(claims)}.")
    return {"few_words": short, "sentence": sentence, "paragraph": " ".join(parts)}


def _guess(question: Question) -> tuple[str, bool]:
    """Return the most likely answer by the form of a question, and whether the guess is sure.

    The guess is the only choice that shares words with the question (sure), or else the longest (sure if much longer).
    """
    choices = question["choices"]
    if not choices:
        return "", False
    if tuple(choices) == VERDICTS:
        return HYPOTHESES["plausible"], False
    question_words = content_words(question["question"])
    matches = [choice for choice in choices if content_words(choice) & question_words]
    if len(matches) == 1:
        return matches[0], True
    longest, second = sorted(choices, key=lambda choice: len(choice.split()), reverse=True)[:2]
    return longest, len(longest.split()) > REVEALING_RATIO * len(second.split())


def _supported(captions: list[str], question: Question) -> bool:
    """Return whether the captions support all words of an answer (`caption_parser.supported_words`)."""
    known = {word[:STEM] for word in (*CONNECTIVES, *(w for caption in captions for w in supported_words(caption)))}
    verdicts: dict[str, Callable[[set[str], set[str]], bool]] = {
        HYPOTHESES["true"]: lambda claim, known: claim <= known,
        HYPOTHESES["plausible"]: lambda claim, known: bool(claim & known) and not claim <= known,
        HYPOTHESES["false"]: lambda claim, known: not claim <= known,
    }
    if question["answer"] in verdicts and tuple(question["choices"]) == VERDICTS:
        claim = hypothesis(question["question"]).removeprefix("this is heard")
        return verdicts[question["answer"]]({word[:STEM] for word in content_words(claim)}, known)
    return {word[:STEM] for word in content_words(question["answer"])} <= known
