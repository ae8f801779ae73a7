"""What is left out of the corpus, and why: functions of what was written, each of which gives a reason to count by.

`reason_of` looks at a question alone, `contradictions` and `near_duplicates` at all questions on one clip, `given_away`
at what the check without audio made of a question.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mellow_platform.data.records import Record, lettered
from mellow_platform.synthesis.candidates import Candidate, hypothesis
from mellow_platform.synthesis.synthesize_config import FiltersSection
from mellow_platform.synthesis.words import FUNCTION_WORDS, content_words, holds_phrase, words

if TYPE_CHECKING:  # packages of the extra `synthesis`, imported where they are used
    from datasketch import MinHash
    from py3langid.langid import LanguageIdentifier

# A text shorter than so many bytes looks like any language, and is let pass; of longer ones the identifier has to be as
# sure as this that they are in a language outside the list.
TELLING_BYTES, FOREIGN = 24, 0.9
# Of the identifier's languages, those that are not written in Latin letters.
OTHER_SCRIPTS = frozenset([
    "am", "ar", "ary", "arz", "as", "ba", "be", "bg", "bn", "dz", "el", "fa", "grc", "gu", "gom", "hbo", "he",
    "hi", "hy", "ja", "ka", "kk", "km", "kn", "ko", "ku", "ky", "lo", "mk", "ml", "mn", "mr", "my", "ne", "or",
    "pa", "ps", "ru", "sa", "sdh", "si", "sr", "ta", "te", "tg", "th", "tt", "ug", "uk", "ur", "uz", "wuu",
    "yue", "zh",
])  # fmt: skip
# With one of these a choice says something else than another with the same words or a part of them.
TELLING_WORDS = frozenset([
    "no", "not", "without", "never", "none", "zero", "one", "two", "three", "four", "five", "six", "seven",
    "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    "hundred", "thousand", "once", "twice", "half", "very", "more", "less", "most", "least", "too", "quite",
    "slightly", "extremely", "much", "from", "to", "than", "louder", "softer", "quieter", "higher", "lower",
    "faster", "slower", "longer", "shorter", "flat", "sharp", "major", "minor",
    "then", "before", "after", "followed", "until", "only", "while",
])  # fmt: skip
# Choices are dealt to other letters and places than they were written in.
_LETTER = r"(?:(?:option|choice|answer)s? )?[a-d]\)?"
REFERS_TO_CHOICES = re.compile(
    r"(?:all|none|any|both|neither|either|some|one|two|three) of (?:the )?(?:above|below|following|these|those|"
    r"(?:other )?(?:choices|options|answers))(?: \w+)?|(?:all|none|both|neither|any)(?: the)? above|"
    rf"(?:both |neither |either |only )?{_LETTER}(?:(?:,|,? and|,? or| nor| &) {_LETTER})+(?: only| both)?|"
    r"(?:option|choice|answer) [a-d]\)?"
)
# What one who hears the audio cannot know of; a text that is read aloud is none of it.
MENTIONS_CAPTION = re.compile(
    r"\bcaptions?\b|"
    r"\b(?:according to|based on|(?:mentioned|described|stated) (?:in|by)) (?:the|this|its) (?:\w+ )?"
    r"(?:descriptions?|texts?)\b|"
    r"\b(?:the|this) (?:\w+ )?(?:description|text) (?:mentions|describes|states|says|indicates|suggests|implies)\b"
)
PERMUTATIONS = 128  # of MinHash: similarity is estimated to about 1 / sqrt(128)
SAME_ANSWER = 0.8  # share of common words from which two open answers say the same


def reason_of(candidate: Candidate, limits: FiltersSection) -> str:
    """Return why a question is left out, or "" where nothing in it is wrong."""
    of_length, in_language = (lambda c: _length(c, limits)), (lambda c: _language(c, limits))
    checks = (_letters, of_length, _answer, _references, _caption, _choices, _leak, _difference, in_language)
    return next((reason for check in checks if (reason := check(candidate))), "")


def _letters(candidate: Candidate) -> str:
    """Letters in a text would be taken for those of the choices, wherever among these it is put."""
    choices = lettered([*candidate["choices"], "the last"]) if candidate["choices"] else []
    asked = Record("", "", "", "", "", " ".join([candidate["question"], *choices]), "", "")
    return "letters_in_text" if asked.choices != tuple(choices) else ""


def _answer(candidate: Candidate) -> str:
    return "answer_not_in_choices" if candidate["choices"] and candidate["answer"] not in candidate["choices"] else ""


def _references(candidate: Candidate) -> str:
    refers = any(REFERS_TO_CHOICES.fullmatch(choice.rstrip(".")) for choice in candidate["choices"])
    return "refers_to_choices" if refers else ""


def _caption(candidate: Candidate) -> str:
    texts = [candidate["question"], *candidate["choices"], candidate["answer"]]
    return "mentions_caption" if any(map(MENTIONS_CAPTION.search, texts)) else ""


def _choices(candidate: Candidate) -> str:
    """A choice that stands there twice, in whatever order of words, is as right as the right one.

    So is one that names the right one by its last words, which say what it is (`low tone` of `a loud low tone`). Words
    before them do not: a car horn is no car.
    """
    choices = candidate["choices"]
    plain = [choice for choice in choices if not _qualified(choice)]
    for texts, key in ((choices, _normal), (plain, _bag)):
        if len(set(map(key, texts))) < len(texts):
            return "several_right_choices"
    right = words(candidate["answer"])
    if candidate["answer"] not in plain:
        return ""
    ends = (words(choice) for choice in plain if choice != candidate["answer"])
    return "several_right_choices" if any(end and right[-len(end) :] == end for end in ends) else ""


def _bag(text: str) -> tuple[str, ...]:
    return tuple(sorted(words(text)))


def _normal(text: str) -> str:
    """Return a choice without what no listener could tell apart; a sharp, a sign and an article (`a major`) stay."""
    return " ".join(re.findall(r"[\w#'-]+", text.lower()))


def _qualified(text: str) -> bool:
    return bool(re.search(r"[\d#]", text)) or not TELLING_WORDS.isdisjoint(re.findall(r"[a-z]+", text))


def _leak(candidate: Candidate) -> str:
    """A question that names its answer gives it away, unless it names other ones too (`the dog or the cat?`)."""
    if candidate["kind"] not in ("detail", "mcq") or not _names(candidate["question"], candidate["answer"]):
        return ""
    if candidate["kind"] == "detail":
        sides = [_names(side, candidate["answer"]) for side in candidate["question"].split(" or ")]
        return "" if len(sides) > 1 and sum(sides) == 1 else "leak"
    others = [choice for choice in candidate["choices"] if choice != candidate["answer"]]
    return "" if any(_names(candidate["question"], other) for other in others) else "leak"


def _names(question: str, answer: str) -> bool:
    """Return whether a question has all words of an answer; two words that stand apart may mean something else."""
    asked, telling = words(question), content_words(answer)
    if len(telling) == 2:
        return holds_phrase(asked, list(dict.fromkeys(word for word in words(answer) if word in telling)))
    return telling <= set(asked)


def _difference(candidate: Candidate) -> str:
    """What tells two clips apart names something, and something else than one caption does alone."""
    if candidate["kind"] != "difference":
        return ""
    said = words(candidate["answer"])
    alone = said in map(words, candidate["captions"]) or FUNCTION_WORDS.issuperset(said)
    return "no_difference" if alone else ""


def _length(candidate: Candidate, limits: FiltersSection) -> str:
    """A model reads and writes so many tokens; a text of a word or two asks nothing."""
    asked = len(" ".join([candidate["question"], *candidate["choices"]]).split())
    answer = len(candidate["answer"].split())
    if len(candidate["question"].split()) < limits.min_question_words or not words(candidate["answer"]):
        return "too_short"
    return "too_long" if asked > limits.max_question_words or answer > limits.max_answer_words else ""


def _language(candidate: Candidate, limits: FiltersSection) -> str:
    """What was written is judged together, as few words look like any language; another script shows in each text."""
    texts = [_own_words(candidate)]
    if candidate["kind"] in ("detail", "mcq"):
        texts = [candidate["question"], *candidate["choices"], candidate["answer"]]
    if OTHER_SCRIPTS.isdisjoint(limits.languages) and any(map(_in_another_script, texts)):
        return "language"
    together = " ".join(dict.fromkeys(texts))
    if len(together.encode()) < TELLING_BYTES:
        return ""
    language, probability = _identifier().rank(together)[0]
    return "language" if language not in limits.languages and probability > FOREIGN else ""


def _in_another_script(text: str) -> bool:
    letters = [char for char in text if char.isalpha()]
    return 2 * sum(not unicodedata.name(char, "").startswith("LATIN") for char in letters) > len(letters)


def check_languages(limits: FiltersSection) -> None:
    """Raise a ValueError that names the codes of `filters.languages` that the identifier does not know."""
    known = sorted(set(map(str, _identifier().nb_classes)))
    if unknown := sorted(set(limits.languages) - set(known)):
        raise ValueError(f"filters.languages: {', '.join(unknown)} is no code among {', '.join(known)}")


@functools.cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def contradictions(candidates: Iterable[Candidate]) -> set[str]:
    """Return the ids of hypotheses that are called one thing and another of the same clip: neither can be trusted."""
    verdicts: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for candidate in candidates:
        if candidate["kind"] == "entailment":
            claim = (*candidate["clips"], *words(hypothesis(candidate["question"])))
            verdicts.setdefault(claim, {}).setdefault(candidate["answer"], []).append(candidate["id"])
    return {id for found in verdicts.values() if len(found) > 1 for ids in found.values() for id in ids}


def near_duplicates(candidates: Iterable[Candidate], similarity: float) -> set[str]:
    """Return the ids of questions that say much the same as an earlier one of the same kind on the same clips.

    Questions on other clips are never compared: the same question about another sound has another answer, or the same
    one for another reason, and this is what there is to learn. An entailment is compared with those of its verdict,
    since a true and a false hypothesis should differ by a word.

    An open or multiple-choice question is the same only if its answer is, too.

    Args:
        similarity: share of common pairs of neighbouring words, as MinHash estimates it.
    """
    seen: dict[tuple, list[tuple[MinHash, MinHash, str]]] = {}
    found = set()
    for candidate in candidates:
        verdict = candidate["answer"] if candidate["kind"] == "entailment" else ""
        others = seen.setdefault((*candidate["clips"], candidate["subtype"], verdict), [])
        answer = candidate["answer"] if candidate["kind"] in ("detail", "mcq") else ""
        asked, said = _signature(_own_words(candidate)), _signature(answer)
        if any(
            asked.jaccard(question) >= similarity
            and (content_words(answer) == content_words(other) or said.jaccard(signature) >= similarity)
            for question, signature, other in others
        ):
            found.add(candidate["id"])
        else:
            others.append((asked, said, answer))
    return found


def _signature(text: str) -> "MinHash":
    from datasketch import MinHash

    found, signature = words(text), MinHash(num_perm=PERMUTATIONS)
    signature.update_batch([f"{one} {two}".encode() for one, two in zip(["", *found], [*found, ""], strict=True)])
    return signature


def _own_words(candidate: Candidate) -> str:
    """Return what is asked, or said, without what all questions of the kind have in common."""
    if candidate["kind"] == "difference":
        return candidate["answer"]
    if candidate["kind"] == "entailment":
        return hypothesis(candidate["question"])
    return candidate["question"]


def given_away(candidate: Candidate, answer: dict[str, Any]) -> bool:
    """Return whether one who has not heard the audio (`schemas.BlindAnswer`) is sure of the answer, and right."""
    if not answer["sure"]:
        return False
    if candidate["choices"]:
        return words(answer["answer"]) == words(candidate["answer"])
    guess, right = content_words(answer["answer"]), content_words(candidate["answer"])
    return len(guess & right) >= SAME_ANSWER * len(guess | right) > 0
