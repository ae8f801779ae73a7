"""What counts as right: word for word, by the choice that an answer names, or by MMAU's matching of words."""

import re
from collections.abc import Sequence

from mellow_platform.data.records import Record

_WORD = re.compile(r"\w+")
_LETTERED = re.compile(r"\(?([a-h])[).:]\s*(.*)", re.DOTALL | re.IGNORECASE)
_LETTER = re.compile(r"\(?([a-h])[).:]?", re.IGNORECASE)
# `the answer is b)`, `Answer: B`, `option b`, `I would say (b)`; an `a` before another word may be an article.
_NAMED = re.compile(
    r"\b(?:answer|choice|option)(?: is| would be)?:? *([a-h])(?=[).:,]|$)|\b(?:choice|option) ([b-h])\b|\(([a-h])\)"
    r"|(?:^|\*\*)([a-h])[).:]?\*\*",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"(yes|no)\b(?! (?:or|and)\b)")


def normal(text: str) -> str:
    """Return `text` as it is compared: lower-cased, spaces folded, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def is_right(record: Record, answer: str) -> bool:
    """Tell whether `answer` is the record's, word for word (for lettered choices: letter and text)."""
    return normal(answer) == normal(record.answer)


def words(text: str) -> frozenset[str]:
    """Return the words of a text, lower-cased: maximal runs of letters, digits and underscores."""
    return frozenset(_WORD.findall(text.lower()))


def matches(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """Tell whether a prediction is right by MMAU's official matching.

    It holds every word of the answer, and no word that stands only in wrong choices.
    """
    said, right = words(prediction), words(answer)
    wrong = frozenset().union(*map(words, choices)) - right
    return bool(said) and right <= said and said.isdisjoint(wrong)


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Return the number of the choice that a prediction names, or None where it names none or several.

    Of lettered choices the letter decides where the answer begins with one (`b) chirping birds`) or names one (`The
    answer is (b).`), and of yes and no the first word; else the one choice whose words stand in the answer, one after
    another. A choice within another that is named (`rain` in `heavy rain`) does not count, nor does a list of all
    choices that comes before the answer.
    """
    texts = [normal(unlettered(choice)) for choice in choices]
    if all(map(_LETTERED.match, choices)):
        prediction = _after_the_list(prediction, choices)
        letter = _letter(prediction)
        letter = _named_letter(prediction) if letter is None else letter
        if letter is not None:
            return letter if letter < len(choices) else None
    said = normal(unlettered(prediction))
    if said in texts:
        return texts.index(said)
    if set(texts) == {"yes", "no"} and (first := _YES_OR_NO.match(said)):
        return texts.index(first[1])
    named = [place for place, text in enumerate(texts) if text and _holds(said, text)]
    within = {part for part in named for whole in named if part != whole and _holds(texts[whole], texts[part])}
    left = [place for place in named if place not in within]
    return left[0] if len(left) == 1 else None


def _after_the_list(answer: str, choices: Sequence[str]) -> str:
    """Return an answer without what it repeats of the question: all choices, or `A:` for answer."""
    text = " ".join(answer.split()).strip("*")
    for repeated in (" ".join(choices), "a: " if _LETTERED.match(text[3:]) else ""):
        text = text[len(repeated) :].strip(" .") if text.lower().startswith(repeated.lower()) else text
    return text


def _named_letter(answer: str) -> int | None:
    """Return the number of the one letter that an answer calls its choice, or None."""
    letters = {letter.lower() for found in _NAMED.finditer(answer) for letter in found.groups() if letter}
    return ord(letters.pop()) - ord("a") if len(letters) == 1 else None


def unlettered(text: str) -> str:
    """Return an answer or a choice without the letter before it."""
    found = _LETTERED.fullmatch(text.strip())
    return found[2] if found and found[2] else text.strip()


def choice_text(answer: str, choices: Sequence[str]) -> str:
    """Return what an answer to lettered `choices` says without the letter; a letter alone stands for its choice.

    Only a letter that goes with the words of its own choice is one: choices such as `D` or `A:7/1` stay as they are.
    """
    place = _letter(answer)
    if place is None or place >= len(choices) or normal(answer) in map(normal, choices):
        return answer
    if _LETTER.fullmatch(answer.strip()):
        return choices[place]
    rest = unlettered(answer)
    return rest if _holds(normal(rest), normal(choices[place])) else answer


def _letter(text: str) -> int | None:
    """Return the number of the letter that a text begins with or is."""
    found = _LETTERED.fullmatch(text.strip()) or _LETTER.fullmatch(text.strip())
    return ord(found[1].lower()) - ord("a") if found else None


def _holds(text: str, part: str) -> bool:
    """Tell whether the words of `part` stand in `text`, one after another."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None
