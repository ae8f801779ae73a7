"""Two evaluations compared on the questions that both answered, pair by pair."""

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
from mellow_platform.evaluation.scoring import AnsweredBenchmark, alike

PREDICTIONS = "predictions.parquet"
Key = tuple[str, ...]  # of a question: benchmark, id, question, and names of the clips


def _key(benchmark: str, id: str, question: str, clips: Sequence[str]) -> Key:
    """Return what two evaluations know a question by; folders of clips may have other names."""
    return (benchmark, id, question, *(clip.rpartition("/")[2] for clip in clips))


def read_baseline(config: EvaluateConfig, questions: Sequence[tuple[Benchmark, list[BenchmarkItem]]]) -> dict[Key, str]:
    """Return what the other evaluation answered, with audio; nothing without one.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it has none of the questions.
    """
    if not config.against:
        return {}
    names = "benchmark", "condition", "id", "question", "clips", "prediction"
    table = read_table(storage.join(config.against, PREDICTIONS), columns=names)
    rows = table.filter(pa.compute.equal(table["condition"], "audio")).to_pylist()
    before = {_key(row["benchmark"], row["id"], row["question"], row["clips"]): row["prediction"] for row in rows}
    own = {_item_key(benchmark, item) for benchmark, items in questions for item in items if item.references}
    if before.keys().isdisjoint(own):
        raise ValueError(f"against {config.against}: it has none of the questions that are asked here, with audio")
    return before


def _item_key(benchmark: Benchmark, item: BenchmarkItem) -> Key:
    return _key(benchmark.name, item.id, item.question, item.files or item.paths)


def compare(answered: Sequence[AnsweredBenchmark], before: dict[Key, str], config: EvaluateConfig) -> dict[str, Any]:
    """Compare with another evaluation on the questions that both answered, with audio.

    A score counts as lower where its difference is significant among all that are compared (Holm, 5 %).
    """
    compared: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for each in answered:
        benchmark = each.benchmark
        rows = [row for row in each.known if _item_key(benchmark, each.items[row]) in before]
        if len(rows) < len(each.known):
            left_out[benchmark.name] = len(each.known) - len(rows)
        if not rows or "audio" not in each.replies:
            continue
        items = [each.items[row] for row in rows]
        texts = {
            "now": [each.replies["audio"][row].text for row in rows],
            "before": [before[_item_key(benchmark, item)] for item in items],
        }
        scored = alike({name: benchmark.score(items, own) for name, own in texts.items()})
        draws = Bootstrap([item.clips[0] for item in items], config.resamples, config.seed)
        for now, then in zip(scored["now"].measures, scored["before"].measures, strict=True):
            for name, difference in draws.compare(now, then).items():
                row = {"benchmark": benchmark.name, "score": name, "questions": len(rows)}
                compared.append(row | asdict(difference))
    for row, significant in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["significant"] = significant
    lower = [f"{row['benchmark']} {row['score']}" for row in compared if row["significant"] and row["value"] < 0]
    return {"against": config.against, "differences": compared, "lower": lower, "left_out": left_out}
