"""Caption parser by rules: the sounds in a caption, and their sources, places and feelings by a few hundred words.

It replaces a language model for plain English captions that list sounds (`a loud tone followed by a soft horn`,
`a dog barks while it rains`) and for tags. Unknown words have no source, place or feeling.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mellow_platform.synthesis.words import FUNCTION_WORDS, content_words, words

_SEQUENCE = r"\s+followed by\s+|,?\s+(?:and\s+)?then\s+|,?\s+before\s+"
_SIMULTANEOUS = r"\s*[,;]\s*(?:and\s+)?|\s+and\s+|\s+while\s+|\s+as\s+|\s+with\s+"
STEM = 4  # first letters that identify a word: tone, tones and bark, barking

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


def _group_of_word(table: dict[str, str]) -> dict[str, str]:
    """Return the group of each word, from lists of words by group."""
    return {word: group for group, members in table.items() for word in members.split()}


SOURCES = _group_of_word(
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
PLACES = _group_of_word(
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
FEELINGS = _group_of_word(
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
    """One sound: its phrase, and its name without words for loudness and pitch."""

    phrase: str
    name: str
    loudness: str  # loud, soft, or empty
    pitch: str  # low, middle, high, or empty


@dataclass(frozen=True)
class CaptionScene:
    """The sounds in a caption; `in_order` is true if all of them are consecutive."""

    sounds: tuple[Sound, ...]
    in_order: bool

    def groups(self, table: dict[str, str]) -> list[str]:
        """Return the groups of the caption's words in a table, in the order of the words."""
        found = (word for sound in self.sounds for word in words(sound.phrase))
        return list(dict.fromkeys(table[word] for word in found if word in table))


def parse_caption(caption: str) -> CaptionScene:
    """Return the sounds in a caption or a list of tags."""
    parts = [
        (step, phrase)
        for step, text in enumerate(re.split(_SEQUENCE, caption.lower().strip(" .")))
        for phrase in re.split(_SIMULTANEOUS, text)
    ]
    sounds = [(step, _sound(phrase)) for step, phrase in parts if content_words(phrase) - PROPERTIES]
    in_order = len(sounds) > 1 and len({step for step, _ in sounds}) == len(sounds)
    return CaptionScene(tuple(sound for _, sound in sounds), in_order)


def _sound(phrase: str) -> Sound:
    found = words(phrase)
    name = " ".join(word for word in found if word not in PROPERTIES)
    loudness, pitch = (next((table[word] for word in found if word in table), "") for table in (LOUDNESS, PITCH))
    return Sound(" ".join(phrase.split()).strip("."), name, loudness, pitch)


def stems(text: str) -> set[str]:
    """Return the stems of a text's content words, without loudness and pitch."""
    return {word[:STEM] for word in content_words(text) - PROPERTIES}


def sound_names(captions: Iterable[str]) -> list[str]:
    """Return the distinct names of all sounds in captions, sorted."""
    return sorted({sound.name for caption in captions for sound in parse_caption(caption).sounds})


def supported_words(caption: str) -> set[str]:
    """Return the words that a supported answer may contain: those of the caption, of its groups and of its count."""
    scene = parse_caption(caption)
    found = set(words(caption)) | FUNCTION_WORDS
    found |= {table[word] for table in (LOUDNESS, PITCH) for word in found if word in table}
    for table in TABLES:
        found |= {word for group in scene.groups(table) for word in words(group)}
    return found | {NUMBERS[len(scene.sounds)]} if len(scene.sounds) < len(NUMBERS) else found


NUMBERS = ("none", "one", "two", "three", "four")
