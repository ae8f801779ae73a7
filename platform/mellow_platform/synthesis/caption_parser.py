"""Captions taken apart by rules: the sounds that they name, and what a few hundred words tell of these.

This is a stand-in for a language model, for captions in plain English that list sounds (`a loud tone followed by a soft
horn`, `a dog barks while it rains`) and for tags. Of what it does not know it says nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mellow_platform.synthesis.words import FUNCTION_WORDS, content_words, words

_AFTER = r"\s+followed by\s+|,?\s+(?:and\s+)?then\s+|,?\s+before\s+"
_BESIDE = r"\s*[,;]\s*(?:and\s+)?|\s+and\s+|\s+while\s+|\s+as\s+|\s+with\s+"
STEM = 4  # letters that tone, tones and bark, barking share

LOUDNESS = {
    **dict.fromkeys(("loud", "loudly", "booming", "blaring"), "loud"),
    **dict.fromkeys(("soft", "softly", "quiet", "quietly", "faint", "faintly", "gentle", "gently"), "soft"),
}
PITCH = {
    **dict.fromkeys(("low", "deep", "bass", "rumbling"), "low"),
    "middle": "middle",
    **dict.fromkeys(("high", "shrill", "squeaky"), "high"),
}
PROPERTIES = frozenset(LOUDNESS) | frozenset(PITCH)


def _groups(table: dict[str, str]) -> dict[str, str]:
    """Return a word's group for each of the words that are listed by group."""
    return {word: group for group, listed in table.items() for word in listed.split()}


SOURCES = _groups(
    {
        "an animal": "animal animals dog dogs bark barks barking cat cats meow meows bird birds chirp chirps chirping "
        "tweet tweets cow cows moo moos sheep horse horses neigh rooster crow crows hen chicken duck ducks goose pig "
        "frog frogs insect insects cricket crickets bee bees buzz buzzes wolf howl howls growl growls owl",
        "a person": "person man woman men women child children boy girl baby people crowd speak speaks speaking speech "
        "talk talks talking laugh laughs laughing laughter cry cries crying cough coughs sneeze sneezes snore snores "
        "sing sings singing shout shouts footsteps clap claps clapping applause whisper whispers breathing",
        "a vehicle": "vehicle car cars truck trucks bus motorcycle motorbike train trains engine engines traffic "
        "airplane plane aircraft helicopter boat ship siren sirens accelerates revs",
        "weather or water": "rain rains raining thunder storm wind winds wave waves sea ocean stream river water "
        "splash splashes drip drips",
        "a machine or a tool": "machine machinery drill drills saw saws chainsaw hammer hammers vacuum mower printer "
        "typewriter keyboard typing clock ticks sewing pump fan washing",
        "a musical instrument": "music guitar piano violin drum drums flute trumpet accordion organ bell bells chime",
        "an electronic device": "tone tremolo sweep beep beeps beeping alarm phone telephone ringtone noise clicks",
    }
)
PLACES = _groups(
    {
        "a road": "car cars truck trucks bus motorcycle motorbike traffic honks",
        "a railway": "train trains railway",
        "a shore": "wave waves sea ocean",
        "a farm": "cow cows moo moos sheep rooster hen chicken pig",
        "a place in the rain": "rain rains raining thunder storm",
        "a gathering of people": "crowd applause clapping audience",
        "a room": "keyboard typing typewriter vacuum clock snore snores printer",
        "a laboratory": "tone tremolo sweep",
    }
)
FEELINGS = _groups(
    {
        "alarmed": "siren sirens alarm scream screams explosion gunshot crash thunder",
        "amused": "laugh laughs laughing laughter giggle",
        "sorry": "cry cries crying sob sobs whimper whimpers",
        "relaxed": "bird birds stream waves chimes soft softly gentle gently quiet quietly faint silence",
        "startled": "loud loudly booming blaring bang slam slams",
    }
)
TABLES = (SOURCES, PLACES, FEELINGS)


@dataclass(frozen=True)
class Sound:
    """One sound: its words with and without those that say how it sounds."""

    phrase: str
    name: str
    loudness: str  # loud, soft, or empty
    pitch: str  # low, middle, high, or empty


@dataclass(frozen=True)
class CaptionScene:
    """The sounds that a caption names; `in_order` where it says that they follow each other."""

    sounds: tuple[Sound, ...]
    in_order: bool

    def groups(self, table: dict[str, str]) -> list[str]:
        """Return the groups of a table that words of the caption belong to, in the order of the words."""
        found = (word for sound in self.sounds for word in words(sound.phrase))
        return list(dict.fromkeys(table[word] for word in found if word in table))


def take_apart(caption: str) -> CaptionScene:
    """Return what a caption or a list of tags names."""
    parts = [
        (place, phrase)
        for place, stretch in enumerate(re.split(_AFTER, caption.lower().strip(" .")))
        for phrase in re.split(_BESIDE, stretch)
    ]
    sounds = [(place, _sound(phrase)) for place, phrase in parts if content_words(phrase) - PROPERTIES]
    in_order = len(sounds) > 1 and len({place for place, _ in sounds}) == len(sounds)
    return CaptionScene(tuple(sound for _, sound in sounds), in_order)


def _sound(phrase: str) -> Sound:
    found = words(phrase)
    name = " ".join(word for word in found if word not in PROPERTIES)
    loudness, pitch = (next((table[word] for word in found if word in table), "") for table in (LOUDNESS, PITCH))
    return Sound(" ".join(phrase.split()).strip("."), name, loudness, pitch)


def stems(text: str) -> set[str]:
    """Return the beginnings of the words that carry what a text says."""
    return {word[:STEM] for word in content_words(text) - PROPERTIES}


def pool(captions: Iterable[str]) -> list[str]:
    """Return the names of all sounds in captions, each once, sorted."""
    return sorted({sound.name for caption in captions for sound in take_apart(caption).sounds})


def implied(caption: str) -> set[str]:
    """Return the words that an answer may be made of: the caption's, and those that the tables give for them."""
    scene = take_apart(caption)
    said = set(words(caption)) | FUNCTION_WORDS
    said |= {table[word] for table in (LOUDNESS, PITCH) for word in said if word in table}
    for table in TABLES:
        said |= {word for group in scene.groups(table) for word in words(group)}
    return said | {NUMBERS[len(scene.sounds)]} if len(scene.sounds) < len(NUMBERS) else said


NUMBERS = ("none", "one", "two", "three", "four")
