"""Scores of answers by question family, and what chance gives."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from mellow_platform.data.records import Record


def normal(text: str) -> str:
    """Return `text` as it is compared: lower-cased, spaces folded, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def is_right(record: Record, answer: str) -> bool:
    """Tell whether `answer` is the record's, word for word (for lettered choices: letter and text)."""
    return normal(answer) == normal(record.answer)


def by_family(records: Sequence[Record], right: Sequence[bool]) -> dict[str, float]:
    """Return the share of right answers in each family."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for record, hit in zip(records, right, strict=True):
        groups[record.family].append(hit)
    return {family: sum(hits) / len(hits) for family, hits in sorted(groups.items())}


def chance(records: Sequence[Record], known: Sequence[Record]) -> dict[str, float]:
    """Return the expected accuracy, by family, of answering without the question's audio or text.

    Among given choices each is equally likely; an open question gets an answer drawn from those of its family in
    `known` (the train split).
    """
    answers: dict[str, Counter] = defaultdict(Counter)
    for record in known:
        answers[record.family][normal(record.answer)] += 1

    def expected(record: Record) -> float:
        if record.choices:
            return 1 / len(record.choices)
        drawn = answers[record.family]
        return drawn[normal(record.answer)] / drawn.total() if drawn else 0.0

    groups: dict[str, list[float]] = defaultdict(list)
    for record in records:
        groups[record.family].append(expected(record))
    return {family: sum(values) / len(values) for family, values in sorted(groups.items())}


def multiple_choice_families(records: Sequence[Record]) -> list[str]:
    """Return the families whose questions bring lettered choices."""
    return sorted({record.family for record in records if record.is_multiple_choice})


def mean(values: dict[str, float], families: Sequence[str] | None = None) -> float:
    """Return the mean over families (all by default)."""
    chosen = [values[family] for family in (values if families is None else families)]
    return sum(chosen) / len(chosen) if chosen else 0.0
