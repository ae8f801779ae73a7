"""Benchmarks of the paper: selection of questions, prompts, and scores.

To add one, write a class with `records` and `score` (and `prompt` if the prompt is not the question itself), and add it
to `BENCHMARKS` and its name to `Benchmark` in config.py.
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
from mellow_platform.evaluation.dataset import BenchmarkItem, QuestionSource, merge_references
from mellow_platform.evaluation.matching import choice_index, choice_text, matches, normalise
from mellow_platform.evaluation.metrics import Classification, Mean, MeanOverFamilies, Metric
from mellow_platform.extras import require

if TYPE_CHECKING:  # needs the extra `metrics`; imported on use
    from mellow_platform.evaluation.caption_metrics import CaptionScorer


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of the answers to N items of a benchmark.

    Attributes:
        metrics: all metrics of the answers.
        main: name of the benchmark's main score.
        per_item: score of every answer [N], to sort by.
    """

    metrics: list[Metric]
    main: str
    per_item: np.ndarray


class Benchmark(ABC):
    """One benchmark.

    Attributes:
        name: name in the option `benchmark`.
        title: description in reports.
    """

    name: str
    title: str

    @abstractmethod
    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        """Return the benchmark's questions; empty if the source contains none."""

    def prompt(self, item: BenchmarkItem) -> str:
        """Return the prompt of a question."""
        return item.question

    def reply(self, item: BenchmarkItem, text: str) -> str:
        """Return the answer to score, from the text that a model generated after `prompt`."""
        return text

    @abstractmethod
    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> BenchmarkScores:
        """Score one prediction per item; an unanswered item has an empty one."""


class FamilyBenchmark(Benchmark):
    """A benchmark of the records whose family name matches `families`."""

    families: re.Pattern[str]

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return [item for item in source.records if self.families.fullmatch(item.family)]


class Families(FamilyBenchmark):
    """All questions of the split, by exact match."""

    name, title = "families", "all questions of the split, exact match"
    families = re.compile(r".*", re.DOTALL)

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> BenchmarkScores:
        pairs = zip(items, predictions, strict=True)
        right = np.array([normalise(text) in map(normalise, item.references) for item, text in pairs])
        mean = MeanOverFamilies("accuracy (mean over families)", right, [item.family for item in items])
        overall = Mean("accuracy (all questions)", right)
        return BenchmarkScores([mean, overall], mean.names[0], overall.values)


def _accuracy(right: Sequence[bool]) -> BenchmarkScores:
    mean = Mean("accuracy", np.array(right))
    return BenchmarkScores([mean], "accuracy", mean.values)


class ChoiceBenchmark(FamilyBenchmark):
    """Accuracy of the choice that an answer names; by exact match if the reference is not one of the choices."""

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> BenchmarkScores:
        return _accuracy([_is_right_choice(item, text) for item, text in zip(items, predictions, strict=True)])


def _is_right_choice(item: BenchmarkItem, text: str) -> bool:
    right = choice_index(item.references[0], item.choices)
    if right is None:
        return normalise(text) == normalise(item.references[0])
    return choice_index(text, item.choices) == right


class MultipleChoice(ChoiceBenchmark):
    name, title = "mcq", "multiple-choice questions about clips"
    families = re.compile(r".*-MCQ")


class ClothoAQA(ChoiceBenchmark):
    name, title = "clotho-aqa", "yes or no"
    families = re.compile(r"ClothoAQA.*|.*-Presence")

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return [item for item in super().records(source) if normalise(item.references[0]) in ("yes", "no")]


class EntailmentBenchmark(FamilyBenchmark):
    """Entailment of a hypothesis by a clip (CLE, ACE)."""

    name, title = "entailment", "hypotheses about a clip: true, plausible or false"
    families = re.compile(r"CLE|ACE|.*-Entailment")

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        items = super().records(source)
        for item in items:
            if _verdict(item, item.references[0]) is None:
                raise ValueError(
                    f"question {item.id} of {item.family} has the answer {item.references[0]!r}; "
                    f"expected one of {', '.join(VERDICTS)}"
                )
        return items

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> BenchmarkScores:
        truth = np.array([_verdict(item, item.references[0]) for item in items])
        verdicts = [_verdict(item, text) for item, text in zip(items, predictions, strict=True)]
        predicted = np.array([len(VERDICTS) if verdict is None else verdict for verdict in verdicts])
        metric = Classification(truth, predicted, VERDICTS)
        return BenchmarkScores([metric], "accuracy", np.equal(truth, predicted).astype(np.float64))


VERDICT_WORDS = (r"true|entailed|entailment", r"plausible|neutral|possible", r"false|contradicted|contradiction")
NEGATED = re.compile(r"\b(not|never|\w+n't)\b")


def _verdict(item: BenchmarkItem, text: str) -> int | None:
    """Return the index in `VERDICTS` of the verdict that an answer names, or None if it names none or several."""
    choice = choice_index(text, item.choices)
    answer = text.lower() if choice is None else item.choices[choice].lower()
    verdicts = [number for number, word in enumerate(VERDICT_WORDS) if re.search(rf"\b({word})\b", answer)]
    return verdicts[0] if len(verdicts) == 1 and not NEGATED.search(answer) else None


@functools.cache
def _caption_scorer() -> "CaptionScorer":
    """Return the scorer that all caption benchmarks share, so that an unavailable metric is reported once."""
    from mellow_platform.evaluation.caption_metrics import CaptionScorer

    return CaptionScorer()


class DescriptionBenchmark(FamilyBenchmark):
    """Free-text descriptions, scored against references."""

    def __init__(self) -> None:
        """Raises ImportError without the extra `metrics`."""
        require("pycocoevalcap", extra="metrics")

    @property
    def scorer(self) -> "CaptionScorer":
        return _caption_scorer()

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return merge_references(super().records(source))

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> BenchmarkScores:
        metrics, main = self.scorer.score([item.references for item in items], predictions)
        return BenchmarkScores(metrics, main.names[0], main.values)


class Captioning(DescriptionBenchmark):
    name, title = "captioning", "captions, against all references of a clip"
    families = re.compile(r"Clotho|AudioCaps|.*-Caption")


class AudioDifference(DescriptionBenchmark):
    name, title = "difference", "differences between two clips (CLD, ACD)"
    families = re.compile(r"(CLD|ACD|.*-Difference)(-\d)?")

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return [_with_tier(item) for item in super().records(source)]


def _with_tier(item: BenchmarkItem) -> BenchmarkItem:
    """Return an item of one of the three explanation tiers with the tier as a separate category."""
    family, _, tier = item.family.rpartition("-")
    return dataclasses.replace(item, groups={"family": family, "tier": tier}) if tier.isdigit() else item


class Detail(DescriptionBenchmark):
    name, title = "detail", "detailed questions about clips"
    families = re.compile(r".*-Detail")


class MMAU(Benchmark):
    """Out-of-domain understanding and reasoning (https://sakshi113.github.io/mmau_homepage), by its official matching.

    Entries without an answer, as in its test split, are answered for the submission file only.
    """

    name, title = "mmau", "understanding and reasoning about sound, music and speech"

    def records(self, source: QuestionSource) -> list[BenchmarkItem]:
        return source.mmau if source.config.mmau else []

    def prompt(self, item: BenchmarkItem) -> str:
        return " ".join([item.question, *lettered(item.choices)])

    def reply(self, item: BenchmarkItem, text: str) -> str:
        return choice_text(text, item.choices)

    def score(self, items: Sequence[BenchmarkItem], predictions: Sequence[str]) -> BenchmarkScores:
        pairs = zip(items, predictions, strict=True)
        return _accuracy([matches(text, item.references[0], item.choices) for item, text in pairs])


BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        Families, MMAU, EntailmentBenchmark, AudioDifference, ClothoAQA, Captioning, MultipleChoice, Detail,
    )
}  # fmt: skip
