"""Matching of answers with references: exact, by the named choice, or by MMAU's word matching."""

import re
from collections.abc import Sequence

from mellow_platform.data.records import Record

_WORD = re.compile(r"\w+")
_LETTERED = re.compile(r"\(?([a-h])[).:]\s*(.*)", re.DOTALL | re.IGNORECASE)
_LETTER = re.compile(r"\(?([a-h])[).:]?", re.IGNORECASE)
# `the answer is b)`, `Answer: B`, `option b`, `I would say (b)`; an `a` before another word can be an article.
_NAMED = re.compile(
    r"\b(?:answer|choice|option)(?: is| would be)?:? *([a-h])(?=[).:,]|$)|\b(?:choice|option) ([b-h])\b|\(([a-h])\)"
    r"|(?:^|\*\*)([a-h])[).:]?\*\*",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"(yes|no)\b(?! (?:or|and)\b)")


def normalise(text: str) -> str:
    """Return `text` for comparison: lower-cased, with single spaces and without a final full stop."""
    return " ".join(text.lower().split()).rstrip(".")


def is_right(record: Record, answer: str) -> bool:
    """Return whether `answer` equals the record's (for lettered choices: letter and text)."""
    return normalise(answer) == normalise(record.answer)


def words(text: str) -> frozenset[str]:
    """Return the lower-cased words of a text: maximal runs of letters, digits and underscores."""
    return frozenset(_WORD.findall(text.lower()))


def matches(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """Return whether a prediction is right by MMAU's official matching.

    It must contain every word of the answer, and no word that only wrong choices contain.
    """
    predicted, right = words(prediction), words(answer)
    wrong = frozenset().union(*map(words, choices)) - right
    return bool(predicted) and right <= predicted and predicted.isdisjoint(wrong)


def choice_index(prediction: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that a prediction names, or None if it names none or several.

    For lettered choices a letter at the start of the answer (`b) chirping birds`) or named in it (`The answer is (b).`)
    decides; for yes and no the first word does; otherwise the only choice whose words the answer contains in sequence.
    A choice inside another named one (`rain` in `heavy rain`) and a list of all choices before the answer are ignored.
    """
    texts = [normalise(strip_letter(choice)) for choice in choices]
    if all(map(_LETTERED.match, choices)):
        prediction = _strip_choice_list(prediction, choices)
        letter = _letter(prediction)
        letter = _named_letter(prediction) if letter is None else letter
        if letter is not None:
            return letter if letter < len(choices) else None
    answer = normalise(strip_letter(prediction))
    if answer in texts:
        return texts.index(answer)
    if set(texts) == {"yes", "no"} and (first := _YES_OR_NO.match(answer)):
        return texts.index(first[1])
    named = [index for index, text in enumerate(texts) if text and _contains(answer, text)]
    inner = {part for part in named for whole in named if part != whole and _contains(texts[whole], texts[part])}
    outer = [index for index in named if index not in inner]
    return outer[0] if len(outer) == 1 else None


def _strip_choice_list(answer: str, choices: Sequence[str]) -> str:
    """Return an answer without a repeated list of all choices or a leading `A:` (for answer)."""
    text = " ".join(answer.split()).strip("*")
    for repeated in (" ".join(choices), "a: " if _LETTERED.match(text[3:]) else ""):
        text = text[len(repeated) :].strip(" .") if text.lower().startswith(repeated.lower()) else text
    return text


def _named_letter(answer: str) -> int | None:
    """Return the index of the only letter that an answer names as its choice, or None."""
    letters = {letter.lower() for match in _NAMED.finditer(answer) for letter in match.groups() if letter}
    return ord(letters.pop()) - ord("a") if len(letters) == 1 else None


def strip_letter(text: str) -> str:
    """Return an answer or a choice without its leading letter."""
    match = _LETTERED.fullmatch(text.strip())
    return match[2] if match and match[2] else text.strip()


def choice_text(answer: str, choices: Sequence[str]) -> str:
    """Return an answer to lettered `choices` without the letter; a bare letter becomes the text of its choice.

    A letter is removed only before the text of its own choice: answers such as `D` or `A:7/1` that are choices
    themselves are kept.
    """
    index = _letter(answer)
    if index is None or index >= len(choices) or normalise(answer) in map(normalise, choices):
        return answer
    if _LETTER.fullmatch(answer.strip()):
        return choices[index]
    rest = strip_letter(answer)
    return rest if _contains(normalise(rest), normalise(choices[index])) else answer


def _letter(text: str) -> int | None:
    """Return the index of the letter at the start of a text, or None."""
    match = _LETTERED.fullmatch(text.strip()) or _LETTER.fullmatch(text.strip())
    return ord(match[1].lower()) - ord("a") if match else None


def _contains(text: str, part: str) -> bool:
    """Return whether `text` contains the words of `part` in sequence."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None
