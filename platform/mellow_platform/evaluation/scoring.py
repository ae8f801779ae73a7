"""What answers to a benchmark come to: scores under each condition with their intervals, over all and by category."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mellow_platform.evaluation.benchmarks import Benchmark, ChoiceBenchmark, DescriptionBenchmark, Families, Scored
from mellow_platform.evaluation.bootstrap import Bootstrap
from mellow_platform.evaluation.dataset import BenchmarkItem
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.metrics import Expected, Metric
from mellow_platform.evaluation.models import Reply


@dataclass(frozen=True)
class AnsweredBenchmark:
    """A benchmark with what was answered under each condition, and what that scores.

    Attributes:
        known: rows of the items whose right answers are public, which scores are of.
        scored: by condition; empty where there are none.
    """

    benchmark: Benchmark
    items: list[BenchmarkItem]
    replies: dict[str, list[Reply]]
    known: np.ndarray
    scored: dict[str, Scored]

    @property
    def without_answer(self) -> dict[str, Counter[str]]:
        """How many questions have no answer, by condition and reason, where there are any."""
        found = {name: Counter(reply.error for reply in own if reply.error) for name, own in self.replies.items()}
        return {name: counts for name, counts in found.items() if counts}


def score(benchmark: Benchmark, items: list[BenchmarkItem], replies: dict[str, list[Reply]]) -> AnsweredBenchmark:
    """Score what was answered to a benchmark's items."""
    known = [row for row, item in enumerate(items) if item.references]
    own = [items[row] for row in known]
    texts = {name: [of[row].text for row in known] for name, of in replies.items() if known}
    scored = {
        name: score_chance(benchmark, own, drawn) if name == "chance" else benchmark.score(own, drawn)
        for name, drawn in texts.items()
    }
    return AnsweredBenchmark(benchmark, items, replies, np.array(known, np.int64), alike(scored))


def alike(scored: dict[str, Scored]) -> dict[str, Scored]:
    """Return what was scored with the measures that all conditions have: a program may have failed for one of them."""
    names = [{name for measure in own.measures for name in measure.names} for own in scored.values()]
    common = set.intersection(*names) if names else set()
    mains = {own.main for own in scored.values()} & common
    return {
        condition: Scored(
            [measure for measure in own.measures if common.issuperset(measure.names)],
            own.main if mains == {own.main} else next(iter(mains)),
            own.each,
        )
        for condition, own in scored.items()
    }


def score_chance(benchmark: Benchmark, items: Sequence[BenchmarkItem], drawn: Sequence[str]) -> Scored:
    """Return what drawn answers are expected to score: over every choice alike, where a question has choices."""
    answers = [item.choices or (text,) for item, text in zip(items, drawn, strict=True)]
    question = np.repeat(np.arange(len(items)), [len(own) for own in answers])
    every = benchmark.score([items[int(row)] for row in question], [text for own in answers for text in own])
    each = np.bincount(question, weights=every.each) / np.bincount(question)
    return Scored([Expected(measure, question) for measure in every.measures], every.main, each)


def summarise(answered: AnsweredBenchmark, config: EvaluateConfig) -> dict[str, Any]:
    """Return a benchmark's scores with their intervals, over all and by category, and how they fall without audio."""
    benchmark, known = answered.benchmark, [answered.items[row] for row in answered.known]
    computed = {name for scored in answered.scored.values() for measure in scored.measures for name in measure.names}
    absent = benchmark.scorer.unavailable if isinstance(benchmark, DescriptionBenchmark) else {}
    summary: dict[str, Any] = {
        "title": benchmark.title,
        "questions": len(answered.items),
        "scored": len(known),
        "no_answer": answered.without_answer,
        "unavailable": {name: reason for name, reason in absent.items() if name not in computed},
    }
    if not known:
        return summary
    draws = Bootstrap([item.clips[0] for item in known], config.resamples, config.seed)
    summary["main"] = answered.scored["audio" if "audio" in answered.scored else next(iter(answered.scored))].main
    summary["scores"] = {name: _estimates(draws, scored.measures) for name, scored in answered.scored.items()}
    summary["groups"] = {}
    for axis in dict.fromkeys(axis for item in known for axis in item.groups):
        values = np.array([item.groups.get(axis, "") for item in known])
        if len(set(values)) > 1:
            summary["groups"][axis] = {
                str(value): _of_group(answered, draws, np.flatnonzero(values == value)) for value in sorted(set(values))
            }
    if len(summary["groups"].get("family", {})) > 1 and not isinstance(benchmark, ChoiceBenchmark | Families):
        summary["data_sets"] = _data_sets(answered, draws)
    heard = answered.scored.get("audio")
    summary["control"] = {
        name: asdict(draws.compare(_main(heard), _main(scored))[summary["main"]])
        for name, scored in answered.scored.items()
        if heard and name in ("noise", "text_only")
    }
    return summary


def _estimates(draws: Bootstrap, measures: Sequence[Metric]) -> dict[str, dict[str, float]]:
    return {name: asdict(value) for measure in measures for name, value in draws.estimate(measure).items()}


def _main(scored: Scored) -> Metric:
    return next(measure for measure in scored.measures if scored.main in measure.names)


def _data_sets(answered: AnsweredBenchmark, draws: Bootstrap) -> dict[str, Any]:
    """Return all scores of each family alone, as they are published: CIDEr weighs words by the whole set it is of."""
    families = np.array([answered.items[row].family for row in answered.known])
    found = {}
    for family in sorted(set(families)):
        rows = np.flatnonzero(families == family)
        known = answered.known[rows]
        replies = {name: [own[row] for row in known] for name, own in answered.replies.items()}
        alone = score(answered.benchmark, [answered.items[row] for row in known], replies)
        scores = {name: _estimates(draws.of(rows), scored.measures) for name, scored in alone.scored.items()}
        found[str(family)] = {"questions": len(rows), "scores": scores}
    return found


def _of_group(answered: AnsweredBenchmark, draws: Bootstrap, rows: np.ndarray) -> dict[str, Any]:
    """Return the main score of some of the items, under each condition."""
    own = draws.of(rows)
    scores = {name: own.estimate(_main(scored).of(rows))[scored.main] for name, scored in answered.scored.items()}
    return {"questions": len(rows), "scores": {name: asdict(value) for name, value in scores.items()}}
