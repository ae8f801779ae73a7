"""Scores of a benchmark's answers under each condition, overall and by category, with intervals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mellow_platform.evaluation.benchmarks import (
    Benchmark,
    BenchmarkScores,
    ChoiceBenchmark,
    DescriptionBenchmark,
    Families,
)
from mellow_platform.evaluation.bootstrap import Bootstrap
from mellow_platform.evaluation.dataset import BenchmarkItem
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.metrics import ExpectedMetric, Metric
from mellow_platform.evaluation.models import Reply


@dataclass(frozen=True)
class AnsweredBenchmark:
    """A benchmark with its replies and scores by condition.

    Attributes:
        scored_rows: indices of the items with public references; only these are scored.
        scores: by condition; empty without such items.
    """

    benchmark: Benchmark
    items: list[BenchmarkItem]
    replies: dict[str, list[Reply]]
    scored_rows: np.ndarray
    scores: dict[str, BenchmarkScores]

    @property
    def without_answer(self) -> dict[str, Counter[str]]:
        """Number of unanswered questions by condition and reason; without the conditions that have none."""
        counts = {
            name: Counter(reply.error for reply in replies if reply.error) for name, replies in self.replies.items()
        }
        return {name: reasons for name, reasons in counts.items() if reasons}


def score(benchmark: Benchmark, items: list[BenchmarkItem], replies: dict[str, list[Reply]]) -> AnsweredBenchmark:
    """Score the replies to a benchmark's items."""
    rows = [row for row, item in enumerate(items) if item.references]
    scored_items = [items[row] for row in rows]
    predictions = {name: [answers[row].text for row in rows] for name, answers in replies.items() if rows}
    scores = {
        name: score_chance(benchmark, scored_items, texts) if name == "chance" else benchmark.score(scored_items, texts)
        for name, texts in predictions.items()
    }
    return AnsweredBenchmark(benchmark, items, replies, np.array(rows, np.int64), common_metrics(scores))


def common_metrics(scores: dict[str, BenchmarkScores]) -> dict[str, BenchmarkScores]:
    """Return the scores with only the metrics that all conditions have: a metric's program may fail under one."""
    names = [{name for metric in entry.metrics for name in metric.names} for entry in scores.values()]
    common = set.intersection(*names) if names else set()
    mains = {entry.main for entry in scores.values()} & common
    return {
        condition: BenchmarkScores(
            [metric for metric in entry.metrics if common.issuperset(metric.names)],
            entry.main if mains == {entry.main} else next(iter(mains)),
            entry.per_item,
        )
        for condition, entry in scores.items()
    }


def score_chance(benchmark: Benchmark, items: Sequence[BenchmarkItem], draws: Sequence[str]) -> BenchmarkScores:
    """Return the expected scores of random answers: uniform over an item's choices, or its draw if it has none."""
    candidates = [item.choices or (text,) for item, text in zip(items, draws, strict=True)]
    question = np.repeat(np.arange(len(items)), [len(texts) for texts in candidates])
    scores = benchmark.score([items[int(row)] for row in question], [text for texts in candidates for text in texts])
    per_item = np.bincount(question, weights=scores.per_item) / np.bincount(question)
    return BenchmarkScores([ExpectedMetric(metric, question) for metric in scores.metrics], scores.main, per_item)


def summarise(answered: AnsweredBenchmark, config: EvaluateConfig) -> dict[str, Any]:
    """Return a benchmark's section of the report: scores with intervals, by category, and against the controls."""
    benchmark, items = answered.benchmark, [answered.items[row] for row in answered.scored_rows]
    computed = {name for scores in answered.scores.values() for metric in scores.metrics for name in metric.names}
    unavailable = benchmark.scorer.unavailable if isinstance(benchmark, DescriptionBenchmark) else {}
    summary: dict[str, Any] = {
        "title": benchmark.title,
        "questions": len(answered.items),
        "scored": len(items),
        "no_answer": answered.without_answer,
        "unavailable": {name: reason for name, reason in unavailable.items() if name not in computed},
    }
    if not items:
        return summary
    draws = Bootstrap([item.clips[0] for item in items], config.resamples, config.seed)
    summary["main"] = answered.scores["audio" if "audio" in answered.scores else next(iter(answered.scores))].main
    summary["scores"] = {name: _estimates(draws, scores.metrics) for name, scores in answered.scores.items()}
    summary["groups"] = {}
    for axis in dict.fromkeys(axis for item in items for axis in item.groups):
        values = np.array([item.groups.get(axis, "") for item in items])
        if len(set(values)) > 1:
            summary["groups"][axis] = {
                str(value): _group_scores(answered, draws, np.flatnonzero(values == value))
                for value in sorted(set(values))
            }
    if len(summary["groups"].get("family", {})) > 1 and not isinstance(benchmark, ChoiceBenchmark | Families):
        summary["data_sets"] = _data_sets(answered, draws)
    audio = answered.scores.get("audio")
    summary["control"] = {
        name: asdict(draws.compare(_main(audio), _main(scores))[summary["main"]])
        for name, scores in answered.scores.items()
        if audio and name in ("noise", "text_only")
    }
    return summary


def _estimates(draws: Bootstrap, metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    return {name: asdict(value) for metric in metrics for name, value in draws.estimate(metric).items()}


def _main(scores: BenchmarkScores) -> Metric:
    return next(metric for metric in scores.metrics if scores.main in metric.names)


def _data_sets(answered: AnsweredBenchmark, draws: Bootstrap) -> dict[str, Any]:
    """Return all scores of each family scored separately, as published: CIDEr's weights depend on the whole set."""
    families = np.array([answered.items[row].family for row in answered.scored_rows])
    data_sets = {}
    for family in sorted(set(families)):
        rows = np.flatnonzero(families == family)
        item_rows = answered.scored_rows[rows]
        replies = {name: [answers[row] for row in item_rows] for name, answers in answered.replies.items()}
        subset = score(answered.benchmark, [answered.items[row] for row in item_rows], replies)
        family_draws = draws.subset(rows)
        scores = {name: _estimates(family_draws, entry.metrics) for name, entry in subset.scores.items()}
        data_sets[str(family)] = {"questions": len(rows), "scores": scores}
    return data_sets


def _group_scores(answered: AnsweredBenchmark, draws: Bootstrap, rows: np.ndarray) -> dict[str, Any]:
    """Return the main score of a subset of the items under each condition."""
    group_draws = draws.subset(rows)
    scores = {
        name: asdict(group_draws.estimate(_main(entry).subset(rows))[entry.main])
        for name, entry in answered.scores.items()
    }
    return {"questions": len(rows), "scores": scores}
