"""Paired comparison of two evaluations on the questions that both answered."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data.tables import read_table
from mellow_platform.evaluation.benchmarks import Benchmark
from mellow_platform.evaluation.bootstrap import Bootstrap, holm
from mellow_platform.evaluation.dataset import BenchmarkItem
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.scoring import AnsweredBenchmark, common_metrics

PREDICTIONS = "predictions.parquet"
Key = tuple[str, ...]  # of a question: benchmark, id, text, and file names of the clips


def _key(benchmark: str, id: str, question: str, clips: Sequence[str]) -> Key:
    """Return the key of a question in two evaluations, without clip folders: their names may differ."""
    return (benchmark, id, question, *(clip.rpartition("/")[2] for clip in clips))


def read_baseline(config: EvaluateConfig, questions: Sequence[tuple[Benchmark, list[BenchmarkItem]]]) -> dict[Key, str]:
    """Read the predictions with audio of the evaluation `against`; empty if it is not set.

    Raises:
        FileNotFoundError: the evaluation does not exist.
        ValueError: it contains none of the questions.
    """
    if not config.against:
        return {}
    names = "benchmark", "condition", "id", "question", "clips", "prediction"
    table = read_table(storage.join(config.against, PREDICTIONS), columns=names)
    rows = table.filter(pa.compute.equal(table["condition"], "audio")).to_pylist()
    baseline = {_key(row["benchmark"], row["id"], row["question"], row["clips"]): row["prediction"] for row in rows}
    keys = {_item_key(benchmark, item) for benchmark, items in questions for item in items if item.references}
    if baseline.keys().isdisjoint(keys):
        raise ValueError(f"against {config.against}: it has none of this evaluation's questions under audio")
    return baseline


def _item_key(benchmark: Benchmark, item: BenchmarkItem) -> Key:
    return _key(benchmark.name, item.id, item.question, item.files or item.paths)


def compare(
    benchmarks: Sequence[AnsweredBenchmark], baseline: dict[Key, str], config: EvaluateConfig
) -> dict[str, Any]:
    """Compare with the predictions of another evaluation on the questions that both answered, with audio.

    A score is reported as lower if its difference is negative and significant among all comparisons (Holm, 5 %).
    """
    differences: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for answered in benchmarks:
        benchmark = answered.benchmark
        rows = [row for row in answered.scored_rows if _item_key(benchmark, answered.items[row]) in baseline]
        if len(rows) < len(answered.scored_rows):
            left_out[benchmark.name] = len(answered.scored_rows) - len(rows)
        if not rows or "audio" not in answered.replies:
            continue
        items = [answered.items[row] for row in rows]
        predictions = {
            "current": [answered.replies["audio"][row].text for row in rows],
            "baseline": [baseline[_item_key(benchmark, item)] for item in items],
        }
        scores = common_metrics({name: benchmark.score(items, texts) for name, texts in predictions.items()})
        draws = Bootstrap([item.clips[0] for item in items], config.resamples, config.seed)
        for current, previous in zip(scores["current"].metrics, scores["baseline"].metrics, strict=True):
            for name, difference in draws.compare(current, previous).items():
                row = {"benchmark": benchmark.name, "score": name, "questions": len(rows)}
                differences.append(row | asdict(difference))
    for row, significant in zip(differences, holm([row["p"] for row in differences]), strict=True):
        row["significant"] = significant
    lower = [f"{row['benchmark']} {row['score']}" for row in differences if row["significant"] and row["value"] < 0]
    return {"against": config.against, "differences": differences, "lower": lower, "left_out": left_out}
