"""Texts as lists of words, for the comparisons of filters and rules."""

import re

ARTICLES = frozenset(("a", "an", "the"))
# Words that do not describe a sound: answers are compared by the other words.
FUNCTION_WORDS = ARTICLES | {
    "and", "as", "at", "be", "by", "for", "from", "has", "have", "in", "is", "it", "its", "of", "on", "or", "some",
    "that", "there", "this", "to", "was", "were", "which", "while", "with", "are",
    "audio", "clip", "heard", "hear", "sound", "sounds", "recording", "first", "second",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without articles and punctuation."""
    return [word for word in re.findall(r"\w+(?:'\w+)?", text.lower()) if word not in ARTICLES]


def content_words(text: str) -> set[str]:
    """Return the words of a text without function words, or all words if it contains only these."""
    found = set(words(text))
    return found - FUNCTION_WORDS or found


def contains_phrase(text: list[str], phrase: list[str]) -> bool:
    """Return whether a text contains the words of a phrase consecutively."""
    return bool(phrase) and any(
        text[start : start + len(phrase)] == phrase for start in range(len(text) - len(phrase) + 1)
    )
