"""The benchmarks of the paper: which questions each asks, how it puts them, and what its scores are.

To add one, write a class with `records` and `score`, and `prompt` where questions are not put as they stand, and add it
to `BENCHMARKS`, and its name to `Benchmark` in config.py.
"""

import dataclasses
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mellow_platform.data.records import lettered
from mellow_platform.data.scene_questions import VERDICTS
from mellow_platform.evaluation.dataset import BenchmarkItem, QuestionSource, merged
from mellow_platform.evaluation.matching import choice_text, chosen, matches, normal
from mellow_platform.evaluation.metrics import Classification, Mean, MeanOverFamilies, Metric
from mellow_platform.extras import require

if TYPE_CHECKING:  # of the extra `metrics`, imported where it is used
    from mellow_platform.evaluation.caption_metrics import CaptionScorer


@dataclass(frozen=True)
class Scored:
    """What answers to a benchmark's items came to.

    Attributes:
        measures: of the answers.
        main: name of the score that stands for the benchmark.
        each: [N] the score of every answer, to sort by.
    """

    measures: list[Metric]
    main: str
    each: np.ndarray


class Benchmark(ABC):
    """One benchmark.

    Attributes:
        name: as it is asked for.
        title: what it tests.
    """

    name: str
    title: str

    @abstractmethod
    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        """Return the questions; none where the source has none of this kind."""

    def prompt(self, item: BenchmarkItem) -> str:
        """Return what a model is asked."""
        return item.question

    def reply(self, item: BenchmarkItem, text: str) -> str:
        """Return what counts as the answer of what a model wrote to `prompt`."""
        return text

    @abstractmethod
    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> Scored:
        """Score predictions, one an item; an item without an answer has an empty one."""


class FamilyBenchmark(Benchmark):
    """A benchmark of the records whose family has a name like this."""

    families: re.Pattern[str]

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return [item for item in source.records if self.families.fullmatch(item.family)]


class Families(FamilyBenchmark):
    """Every question of the split, right word for word."""

    name, title = "families", "all questions of the split, right word for word"
    families = re.compile(r".*", re.DOTALL)

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> Scored:
        right = [normal(text) in map(normal, item.references) for item, text in zip(items, predictions, strict=True)]
        family = [item.family for item in items]
        mean = MeanOverFamilies("accuracy (mean over families)", np.array(right), family)
        every = Mean("accuracy (all questions)", np.array(right))
        return Scored([mean, every], mean.names[0], every.each)


class ChoiceBenchmark(FamilyBenchmark):
    """Accuracy of the choice that an answer names; word for word, where the right answer is none of the choices."""

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> Scored:
        right = [_names_the_same(item, text) for item, text in zip(items, predictions, strict=True)]
        accuracy = Mean("accuracy", np.array(right))
        return Scored([accuracy], "accuracy", accuracy.each)


def _names_the_same(item: BenchmarkItem, text: str) -> bool:
    right = chosen(item.references[0], item.choices)
    if right is None:
        return normal(text) == normal(item.references[0])
    return chosen(text, item.choices) == right


class MultipleChoice(ChoiceBenchmark):
    name, title = "mcq", "multiple choice about what is heard"
    families = re.compile(r".*-MCQ")


class ClothoAQA(ChoiceBenchmark):
    name, title = "clotho-aqa", "yes or no"
    families = re.compile(r"ClothoAQA.*|.*-Presence")

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return [item for item in super().records(source) if normal(item.references[0]) in ("yes", "no")]


class EntailmentBenchmark(FamilyBenchmark):
    """Whether a hypothesis follows from what is heard (CLE, ACE)."""

    name, title = "entailment", "hypotheses that are true, plausible or false of what is heard"
    families = re.compile(r"CLE|ACE|.*-Entailment")

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        found = super().records(source)
        for item in found:
            if _verdict(item, item.references[0]) is None:
                raise ValueError(
                    f"question {item.id} of {item.family} has the answer {item.references[0]!r}, which is no verdict: "
                    f"expected one of {', '.join(VERDICTS)}"
                )
        return found

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> Scored:
        none = len(VERDICTS)
        truth = np.array([_verdict(item, item.references[0]) for item in items])
        said = [_verdict(item, text) for item, text in zip(items, predictions, strict=True)]
        predicted = np.array([none if verdict is None else verdict for verdict in said])
        measure = Classification(truth, predicted, VERDICTS)
        return Scored([measure], "accuracy", np.equal(truth, predicted).astype(np.float64))


VERDICT_WORDS = (r"true|entailed|entailment", r"plausible|neutral|possible", r"false|contradicted|contradiction")
NEGATED = re.compile(r"\b(not|never|\w+n't)\b")


def _verdict(item: BenchmarkItem, text: str) -> int | None:
    """Return the number in `VERDICTS` of the verdict that an answer names, or None where it names none or several."""
    place = chosen(text, item.choices)
    said = text.lower() if place is None else item.choices[place].lower()
    found = [number for number, word in enumerate(VERDICT_WORDS) if re.search(rf"\b({word})\b", said)]
    return found[0] if len(found) == 1 and not NEGATED.search(said) else None


@functools.cache
def _caption_scorer() -> "CaptionScorer":
    """Return the scorer of all descriptions: what it cannot compute is said once."""
    from mellow_platform.evaluation.caption_metrics import CaptionScorer

    return CaptionScorer()


class DescriptionBenchmark(FamilyBenchmark):
    """Descriptions in words of one's own, scored against references."""

    def __init__(self) -> None:
        """Raises ImportError without the extra `metrics`."""
        require("pycocoevalcap", extra="metrics")

    @property
    def scorer(self) -> "CaptionScorer":
        return _caption_scorer()

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return merged(super().records(source))

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> Scored:
        measures, main = self.scorer.score([item.references for item in items], predictions)
        return Scored(measures, main.names[0], main.each)


class Captioning(DescriptionBenchmark):
    name, title = "captioning", "captions, against all of a clip's"
    families = re.compile(r"Clotho|AudioCaps|.*-Caption")


class AudioDifference(DescriptionBenchmark):
    name, title = "difference", "what tells two clips apart (CLD, ACD)"
    families = re.compile(r"(CLD|ACD|.*-Difference)(-\d)?")

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return [_with_tier(item) for item in super().records(source)]


def _with_tier(item: BenchmarkItem) -> BenchmarkItem:
    """Return an item of one of the three tiers of explanation with the tier as a category of its own."""
    family, _, tier = item.family.rpartition("-")
    return dataclasses.replace(item, groups={"family": family, "tier": tier}) if tier.isdigit() else item


class Detail(DescriptionBenchmark):
    name, title = "detail", "detailed questions about what is heard"
    families = re.compile(r".*-Detail")


class MMAU(Benchmark):
    """Understanding and reasoning out of domain (https://sakshi113.github.io/mmau_homepage), by its official matching.

    Entries without an answer, as in its test split, are asked for the submission file alone.
    """

    name, title = "mmau", "understanding and reasoning about sound, music and speech"

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return source.mmau if source.config.mmau else []

    def prompt(self, item: BenchmarkItem) -> str:
        return " ".join([item.question, *lettered(item.choices)])

    def reply(self, item: BenchmarkItem, text: str) -> str:
        return choice_text(text, item.choices)

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> Scored:
        right = [matches(text, item.references[0], item.choices) for item, text in zip(items, predictions, strict=True)]
        accuracy = Mean("accuracy", np.array(right))
        return Scored([accuracy], "accuracy", accuracy.each)


BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        Families, MMAU, EntailmentBenchmark, AudioDifference, ClothoAQA, Captioning, MultipleChoice, Detail,
    )
}  # fmt: skip
