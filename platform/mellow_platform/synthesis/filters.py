"""Filters that reject questions, each with a reason.

`reason_of` filters single questions, `contradictions` and `near_duplicates` compare the questions on one clip, and
`is_answerable_blind` evaluates the answer of the blind check.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mellow_platform.data.records import Record, lettered
from mellow_platform.synthesis.candidates import Candidate, hypothesis
from mellow_platform.synthesis.synthesize_config import FiltersSection
from mellow_platform.synthesis.words import FUNCTION_WORDS, contains_phrase, content_words, words

if TYPE_CHECKING:  # packages of the extra `synthesis`, imported by the functions that use them
    from datasketch import MinHash
    from py3langid.langid import LanguageIdentifier

# A text in another language is rejected from this number of bytes (shorter ones look like any language), and above
# this probability.
MIN_BYTES, MIN_PROBABILITY = 24, 0.9
# Languages of the identifier that are not written in Latin letters.
OTHER_SCRIPTS = frozenset([
    "am", "ar", "ary", "arz", "as", "ba", "be", "bg", "bn", "dz", "el", "fa", "grc", "gu", "gom", "hbo", "he",
    "hi", "hy", "ja", "ka", "kk", "km", "kn", "ko", "ku", "ky", "lo", "mk", "ml", "mn", "mr", "my", "ne", "or",
    "pa", "ps", "ru", "sa", "sdh", "si", "sr", "ta", "te", "tg", "th", "tt", "ug", "uk", "ur", "uz", "wuu",
    "yue", "zh",
])  # fmt: skip
# A choice with one of these words differs in meaning from another choice with the same words or a part of them.
DISTINCTIVE_WORDS = frozenset([
    "no", "not", "without", "never", "none", "zero", "one", "two", "three", "four", "five", "six", "seven",
    "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    "hundred", "thousand", "once", "twice", "half", "very", "more", "less", "most", "least", "too", "quite",
    "slightly", "extremely", "much", "from", "to", "than", "louder", "softer", "quieter", "higher", "lower",
    "faster", "slower", "longer", "shorter", "flat", "sharp", "major", "minor",
    "then", "before", "after", "followed", "until", "only", "while",
])  # fmt: skip
# Choices that refer to other choices are meaningless: letters and positions are assigned later.
_LETTER = r"(?:(?:option|choice|answer)s? )?[a-d]\)?"
REFERS_TO_CHOICES = re.compile(
    r"(?:all|none|any|both|neither|either|some|one|two|three) of (?:the )?(?:above|below|following|these|those|"
    r"(?:other )?(?:choices|options|answers))(?: \w+)?|(?:all|none|both|neither|any)(?: the)? above|"
    rf"(?:both |neither |either |only )?{_LETTER}(?:(?:,|,? and|,? or| nor| &) {_LETTER})+(?: only| both)?|"
    r"(?:option|choice|answer) [a-d]\)?"
)
# References to a caption, which a listener does not have; a text that is read aloud is not such a reference.
MENTIONS_CAPTION = re.compile(
    r"\bcaptions?\b|"
    r"\b(?:according to|based on|(?:mentioned|described|stated) (?:in|by)) (?:the|this|its) (?:\w+ )?"
    r"(?:descriptions?|texts?)\b|"
    r"\b(?:the|this) (?:\w+ )?(?:description|text) (?:mentions|describes|states|says|indicates|suggests|implies)\b"
)
PERMUTATIONS = 128  # of MinHash: the error of an estimated similarity is about 1 / sqrt(128)
SAME_ANSWER = 0.8  # share of common words from which two open answers are equal


def reason_of(candidate: Candidate, limits: FiltersSection) -> str:
    """Return the reason to reject a question, or ""."""
    length, language = (lambda c: _length(c, limits)), (lambda c: _language(c, limits))
    checks = (_letters, length, _answer, _references, _caption, _choices, _leak, _difference, language)
    return next((reason for check in checks if (reason := check(candidate))), "")


def _letters(candidate: Candidate) -> str:
    """Reject letters in a text (`a)`) that a parser would read as those of the choices."""
    choices = lettered([*candidate["choices"], "the last"]) if candidate["choices"] else []
    record = Record("", "", "", "", "", " ".join([candidate["question"], *choices]), "", "")
    return "letters_in_text" if record.choices != tuple(choices) else ""


def _answer(candidate: Candidate) -> str:
    return "answer_not_in_choices" if candidate["choices"] and candidate["answer"] not in candidate["choices"] else ""


def _references(candidate: Candidate) -> str:
    refers = any(REFERS_TO_CHOICES.fullmatch(choice.rstrip(".")) for choice in candidate["choices"])
    return "refers_to_choices" if refers else ""


def _caption(candidate: Candidate) -> str:
    texts = [candidate["question"], *candidate["choices"], candidate["answer"]]
    return "mentions_caption" if any(map(MENTIONS_CAPTION.search, texts)) else ""


def _choices(candidate: Candidate) -> str:
    """Reject equal choices (in any word order, unless a word is distinctive), and a second correct choice.

    A choice is correct too if it equals the last words of the answer, which name the sound: `low tone` for `a loud low
    tone`. The first words do not: a car horn is not a car.
    """
    choices = candidate["choices"]
    plain = [choice for choice in choices if not _is_distinctive(choice)]
    for texts, key in ((choices, _normalized), (plain, _sorted_words)):
        if len(set(map(key, texts))) < len(texts):
            return "several_right_choices"
    answer = words(candidate["answer"])
    if candidate["answer"] not in plain:
        return ""
    ends = (words(choice) for choice in plain if choice != candidate["answer"])
    return "several_right_choices" if any(end and answer[-len(end) :] == end for end in ends) else ""


def _sorted_words(text: str) -> tuple[str, ...]:
    return tuple(sorted(words(text)))


def _normalized(text: str) -> str:
    """Return a choice in lower case without punctuation; sharps, signs and articles (`a major`) remain."""
    return " ".join(re.findall(r"[\w#'-]+", text.lower()))


def _is_distinctive(text: str) -> bool:
    return bool(re.search(r"[\d#]", text)) or not DISTINCTIVE_WORDS.isdisjoint(re.findall(r"[a-z]+", text))


def _leak(candidate: Candidate) -> str:
    """Reject a question that contains its answer, unless it contains other answers too (`the dog or the cat?`)."""
    if candidate["kind"] not in ("detail", "mcq") or not _contains_answer(candidate["question"], candidate["answer"]):
        return ""
    if candidate["kind"] == "detail":
        sides = [_contains_answer(side, candidate["answer"]) for side in candidate["question"].split(" or ")]
        return "" if len(sides) > 1 and sum(sides) == 1 else "leak"
    others = [choice for choice in candidate["choices"] if choice != candidate["answer"]]
    return "" if any(_contains_answer(candidate["question"], other) for other in others) else "leak"


def _contains_answer(question: str, answer: str) -> bool:
    """Return whether a question contains all content words of an answer; two of them have to be consecutive."""
    question_words, answer_words = words(question), content_words(answer)
    if len(answer_words) == 2:
        return contains_phrase(question_words, list(dict.fromkeys(w for w in words(answer) if w in answer_words)))
    return answer_words <= set(question_words)


def _difference(candidate: Candidate) -> str:
    """Reject a difference without content words, or equal to one of the captions."""
    if candidate["kind"] != "difference":
        return ""
    answer = words(candidate["answer"])
    is_equal = answer in map(words, candidate["captions"])
    return "no_difference" if is_equal or FUNCTION_WORDS.issuperset(answer) else ""


def _length(candidate: Candidate, limits: FiltersSection) -> str:
    """Reject texts outside the limits: a model reads and writes a limited number of tokens."""
    question = len(" ".join([candidate["question"], *candidate["choices"]]).split())
    answer = len(candidate["answer"].split())
    if len(candidate["question"].split()) < limits.min_question_words or not words(candidate["answer"]):
        return "too_short"
    return "too_long" if question > limits.max_question_words or answer > limits.max_answer_words else ""


def _language(candidate: Candidate, limits: FiltersSection) -> str:
    """Reject other scripts, per text, and other languages, in all texts together: short ones look like any language."""
    texts = [_specific_text(candidate)]
    if candidate["kind"] in ("detail", "mcq"):
        texts = [candidate["question"], *candidate["choices"], candidate["answer"]]
    if OTHER_SCRIPTS.isdisjoint(limits.languages) and any(map(_in_another_script, texts)):
        return "language"
    together = " ".join(dict.fromkeys(texts))
    if len(together.encode()) < MIN_BYTES:
        return ""
    language, probability = _identifier().rank(together)[0]
    return "language" if language not in limits.languages and probability > MIN_PROBABILITY else ""


def _in_another_script(text: str) -> bool:
    letters = [char for char in text if char.isalpha()]
    return 2 * sum(not unicodedata.name(char, "").startswith("LATIN") for char in letters) > len(letters)


def check_languages(limits: FiltersSection) -> None:
    """Raise a ValueError if `filters.languages` contains codes that the identifier does not support."""
    supported = sorted(set(map(str, _identifier().nb_classes)))
    if unknown := sorted(set(limits.languages) - set(supported)):
        raise ValueError(f"filters.languages: unknown {', '.join(unknown)}; expected codes of {', '.join(supported)}")


@functools.cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def contradictions(candidates: Iterable[Candidate]) -> set[str]:
    """Return the ids of equal hypotheses on one clip with different verdicts: none of these is reliable."""
    verdicts: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for candidate in candidates:
        if candidate["kind"] == "entailment":
            claim = (*candidate["clips"], *words(hypothesis(candidate["question"])))
            verdicts.setdefault(claim, {}).setdefault(candidate["answer"], []).append(candidate["id"])
    return {id for by_answer in verdicts.values() if len(by_answer) > 1 for ids in by_answer.values() for id in ids}


def near_duplicates(candidates: Iterable[Candidate], similarity: float) -> set[str]:
    """Return the ids of questions that are similar to an earlier one of the same subtype on the same clips.

    Questions on different clips are never compared: a model learns from the same question about different sounds.
    Entailments are compared only with those of the same verdict, since a true and a false hypothesis should differ by
    few words.

    An open or multiple-choice question is a duplicate only if its answer is similar, too.

    Args:
        similarity: smallest share of common pairs of consecutive words, estimated by MinHash.
    """
    earlier: dict[tuple, list[tuple[MinHash, MinHash, str]]] = {}
    found = set()
    for candidate in candidates:
        verdict = candidate["answer"] if candidate["kind"] == "entailment" else ""
        others = earlier.setdefault((*candidate["clips"], candidate["subtype"], verdict), [])
        answer = candidate["answer"] if candidate["kind"] in ("detail", "mcq") else ""
        question_hash, answer_hash = _signature(_specific_text(candidate)), _signature(answer)
        if any(
            question_hash.jaccard(other_question) >= similarity
            and (content_words(answer) == content_words(other) or answer_hash.jaccard(other_answer) >= similarity)
            for other_question, other_answer, other in others
        ):
            found.add(candidate["id"])
        else:
            others.append((question_hash, answer_hash, answer))
    return found


def _signature(text: str) -> "MinHash":
    from datasketch import MinHash

    found, signature = words(text), MinHash(num_perm=PERMUTATIONS)
    signature.update_batch([f"{one} {two}".encode() for one, two in zip(["", *found], [*found, ""], strict=True)])
    return signature


def _specific_text(candidate: Candidate) -> str:
    """Return the question, or the hypothesis or the difference if the question is a fixed text around it."""
    if candidate["kind"] == "difference":
        return candidate["answer"]
    if candidate["kind"] == "entailment":
        return hypothesis(candidate["question"])
    return candidate["question"]


def is_answerable_blind(candidate: Candidate, answer: dict[str, Any]) -> bool:
    """Return whether an answer without audio (`schemas.BlindAnswer`) is sure and correct."""
    if not answer["sure"]:
        return False
    if candidate["choices"]:
        return words(answer["answer"]) == words(candidate["answer"])
    guess, correct = content_words(answer["answer"]), content_words(candidate["answer"])
    return len(guess & correct) >= SAME_ANSWER * len(guess | correct) > 0
