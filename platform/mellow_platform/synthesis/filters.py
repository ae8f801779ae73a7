"""What is left out of the corpus, and why: functions of what was written, each of which gives a reason to count by.

`reason_of` looks at a question alone, `near_duplicates` at all questions on one clip, `given_away` at what the check
without audio made of a question.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any

from datasketch import MinHash
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from mellow_platform.config import FiltersSection
from mellow_platform.synthesis.candidates import Candidate
from mellow_platform.synthesis.words import content_words, holds_phrase, words

REASONS = (
    "letters_in_text",
    "answer_not_in_choices",
    "several_right_choices",
    "leak",
    "too_short",
    "too_long",
    "language",
    "near_duplicate",
    "answerable_without_audio",
    "not_supported",
    "not_checked",
)
LETTER = re.compile(r"(?:^|\s)[a-h]\) ")
# The identifier's probability that a text is in a language to keep, below which it certainly is not. Few words of
# English look like any language, so that shorter texts (in bytes) are let pass.
FOREIGN, TELLING_BYTES = 0.05, 24
PERMUTATIONS = 128  # of MinHash: similarity is estimated to about 1 / sqrt(128)
SAME_ANSWER = 0.8  # share of common words from which two open answers say the same


def reason_of(candidate: Candidate, limits: FiltersSection) -> str:
    """Return why a question is left out, or "" where nothing in it is wrong."""
    checks = (_letters, lambda c: _length(c, limits), _answer, _choices, _leak, lambda c: _language(c, limits))
    return next((reason for check in checks if (reason := check(candidate))), "")


def _letters(candidate: Candidate) -> str:
    """Letters in a text would be taken for those of the choices."""
    return "letters_in_text" if any(map(LETTER.search, [candidate["question"], *candidate["choices"]])) else ""


def _answer(candidate: Candidate) -> str:
    return "answer_not_in_choices" if candidate["choices"] and candidate["answer"] not in candidate["choices"] else ""


def _choices(candidate: Candidate) -> str:
    """A choice that stands there twice, or is part of the right one, is as right."""
    choices, right = [words(choice) for choice in candidate["choices"]], words(candidate["answer"])
    if len(set(map(tuple, choices))) < len(choices):
        return "several_right_choices"
    wrong = [choice for choice in choices if choice != right]
    return "several_right_choices" if any(holds_phrase(right, choice) for choice in wrong) else ""


def _leak(candidate: Candidate) -> str:
    """A question that names its answer gives it away, unless it names other ones too (`the dog or the cat?`)."""
    if candidate["kind"] not in ("detail", "mcq") or " or " in candidate["question"]:
        return ""
    question, right = set(words(candidate["question"])), content_words(candidate["answer"])
    others = [content_words(choice) for choice in candidate["choices"] if choice != candidate["answer"]]
    return "leak" if right <= question and not any(other <= question for other in others) else ""


def _length(candidate: Candidate, limits: FiltersSection) -> str:
    """A model reads and writes so many tokens; a text of a word or two asks nothing."""
    asked = len(" ".join([candidate["question"], *candidate["choices"]]).split())
    answer = len(candidate["answer"].split())
    if len(candidate["question"].split()) < limits.min_question_words or not words(candidate["answer"]):
        return "too_short"
    return "too_long" if asked > limits.max_question_words or answer > limits.max_answer_words else ""


def _language(candidate: Candidate, limits: FiltersSection) -> str:
    """Question and answer are judged apart: a model that falls into another language does so in the answer first."""
    for text in (candidate["question"], candidate["answer"]):
        if len(text.encode()) >= TELLING_BYTES:
            ranked = dict(_identifier().rank(text))
            if sum(ranked.get(language, 0.0) for language in limits.languages) < FOREIGN:
                return "language"
    return ""


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def near_duplicates(candidates: Iterable[Candidate], similarity: float) -> set[str]:
    """Return the ids of questions that say much the same as an earlier one of the same kind on the same clips.

    Questions on other clips are never compared: the same question about another sound has another answer, or the same
    one for another reason, and this is what there is to learn. An entailment is compared with those of its verdict,
    since a true and a false hypothesis should differ by a word.

    Args:
        similarity: share of common pairs of neighbouring words in question and answer, as MinHash estimates it.
    """
    seen: dict[tuple, list[MinHash]] = {}
    found = set()
    for candidate in candidates:
        verdict = candidate["answer"] if candidate["kind"] == "entailment" else ""
        others = seen.setdefault((*candidate["clips"], candidate["subtype"], verdict), [])
        text = words(_own_words(candidate))
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch([f"{one} {two}".encode() for one, two in zip(["", *text], [*text, ""], strict=True)])
        if any(signature.jaccard(other) >= similarity for other in others):
            found.add(candidate["id"])
        else:
            others.append(signature)
    return found


def _own_words(candidate: Candidate) -> str:
    """Return question and answer without what all questions of the kind have in common."""
    if candidate["kind"] == "difference":
        return candidate["answer"]
    if candidate["kind"] == "entailment":
        return candidate["question"].partition("? ")[2]
    return f"{candidate['question']} {candidate['answer']}"


def given_away(candidate: Candidate, answer: dict[str, Any]) -> bool:
    """Return whether one who has not heard the audio (`forms.BlindAnswer`) is sure of the answer, and right."""
    if not answer["sure"]:
        return False
    if candidate["choices"]:
        return words(answer["answer"]) == words(candidate["answer"])
    guess, right = content_words(answer["answer"]), content_words(candidate["answer"])
    return len(guess & right) >= SAME_ANSWER * len(guess | right) > 0
