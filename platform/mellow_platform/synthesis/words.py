"""Texts as lists of words: what filters and rules compare."""

import re

ARTICLES = frozenset(("a", "an", "the"))
# Words that say nothing of what is heard: an answer is told by the others.
FUNCTION_WORDS = ARTICLES | {
    "and", "as", "at", "be", "by", "for", "from", "has", "have", "in", "is", "it", "its", "of", "on", "or", "some",
    "that", "there", "this", "to", "was", "were", "which", "while", "with", "are",
    "audio", "clip", "heard", "hear", "sound", "sounds", "recording", "first", "second",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without articles and punctuation."""
    return [word for word in re.findall(r"\w+(?:'\w+)?", text.lower()) if word not in ARTICLES]


def content_words(text: str) -> set[str]:
    """Return the words that carry what a text says; all of them where it has no other."""
    found = set(words(text))
    return found - FUNCTION_WORDS or found


def holds_phrase(text: list[str], phrase: list[str]) -> bool:
    """Return whether the words of a phrase stand in a text one after another."""
    return bool(phrase) and any(
        text[start : start + len(phrase)] == phrase for start in range(len(text) - len(phrase) + 1)
    )
