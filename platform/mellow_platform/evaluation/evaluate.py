"""Answers a split on Ray Data under each condition and scores it by family.

Conditions: the clips themselves (`audio`), Gaussian noise in their place (`noise`), silence in their place
(`text_only`). A model that listens is right with audio and near chance with the other two.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from mellow_platform import storage
from mellow_platform.config import EvaluateConfig
from mellow_platform.data.records import Record, from_row
from mellow_platform.data.shards import Manifest, read_records
from mellow_platform.evaluation import scores
from mellow_platform.features.store import FeatureStore
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.request import ClipFeatures, Request

NOISE_LEVEL = 0.1  # standard deviation, full scale 1


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Answer and score the split; write `predictions.parquet`, `report.json` and `report.md`; return the report.

    Raises:
        ValueError: the shards hold no encoder features, or the split is empty.
    """
    Manifest.read_with(config.shards, "encoder")
    table = read_records(config.shards, config.split)
    table = table.slice(0, config.limit)
    if not len(table):
        raise ValueError(f"split {config.split!r} of {config.shards} has no records")
    table = table.drop_columns(["prompt_ids", "answer_ids"]).append_column("row", pa.array(range(len(table))))
    conditions = [table.append_column("condition", pa.array([name] * len(table))) for name in config.conditions]
    questions = pa.concat_tables(conditions)
    store = ray.put(FeatureStore.load(config.shards))
    blocks = max(config.workers, len(questions) // (4 * config.batch_size))
    answered = ray.data.from_arrow(questions, override_num_blocks=blocks).map_batches(
        AnswerBatch,
        fn_constructor_args=(config.model, store, config.max_new_tokens, config.batch_size, config.dtype),
        batch_size=config.batch_size,
        concurrency=config.workers,
        num_gpus=config.gpus_per_worker or None,
    )
    rows = sorted(answered.take_all(), key=lambda row: (config.conditions.index(row["condition"]), row["row"]))
    for row in rows:
        row["right"] = scores.is_right(from_row(row), row["prediction"])
    storage.write_table(storage.join(config.output, "predictions.parquet"), pa.Table.from_pylist(rows))
    known = [from_row(row) for row in read_records(config.shards, "train").to_pylist()]
    report = score(rows, config.conditions, known) | {"model": config.model, "split": config.split}
    storage.write_json(storage.join(config.output, "report.json"), report)
    storage.write_bytes(storage.join(config.output, "report.md"), markdown(report).encode())
    return report


class AnswerBatch:
    """Ray Data actor that answers batches of questions from stored features."""

    def __init__(self, model: str, store: ray.ObjectRef, max_new_tokens: int, batch_size: int, dtype: str | None):
        self.engine = Engine.load(
            model, dtype=dtype, slots=batch_size, max_new_tokens=max_new_tokens, max_waiting=batch_size, cpu_threads=1
        )
        self.store: FeatureStore = ray.get(store)
        self.max_new_tokens = max_new_tokens
        self.samples = self.engine.processor.feature_extractor.clip_samples
        self.silence = self.engine.encode([np.zeros(self.samples, np.float32)])[0]
        self.noise: dict[str, ClipFeatures] = {}  # by clip: drawn and encoded once, asked about many times

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        requests = [
            Request(row["input"], (self._clip(row, "clip1"), self._clip(row, "clip2")), self.max_new_tokens)
            for row in rows
        ]
        batch["prediction"] = np.array([answer.text for answer in self.engine.generate(requests)], object)
        return batch

    def _clip(self, row: dict[str, Any], side: str) -> ClipFeatures:
        if row["condition"] == "audio":
            place = self.store.rows[row[side]]
            arrays = self.store.arrays
            return ClipFeatures(arrays["frames"][place], arrays["latent"][place])
        if row["condition"] == "text_only":
            return self.silence
        clip_id = row[side]
        if clip_id not in self.noise:
            noise = np.random.default_rng(zlib.crc32(clip_id.encode())).normal(0.0, NOISE_LEVEL, self.samples)
            self.noise[clip_id] = self.engine.encode([noise.astype(np.float32)])[0]
        return self.noise[clip_id]


def score(rows: list[dict[str, Any]], conditions: Sequence[str], known: list[Record]) -> dict[str, Any]:
    """Return accuracy by family, over all multiple-choice families, and overall, for each condition and for chance."""
    accuracy: dict[str, dict[str, float]] = {}
    records: list[Record] = []
    for condition in conditions:
        own = [row for row in rows if row["condition"] == condition]
        records = [from_row(row) for row in own]
        accuracy[condition] = scores.by_family(records, [row["right"] for row in own])
    accuracy["chance"] = scores.chance(records, known)
    choice = scores.multiple_choice_families(records)
    return {
        "records": len(records),
        "families": {
            family: {name: round(values[family], 4) for name, values in accuracy.items()}
            for family in sorted(accuracy["chance"])
        },
        "multiple_choice_families": choice,
        "multiple_choice": {name: round(scores.mean(values, choice), 4) for name, values in accuracy.items()},
        "overall": {name: round(scores.mean(values), 4) for name, values in accuracy.items()},
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the report's table."""
    names = list(report["overall"])
    rows = [(family, values) for family, values in report["families"].items()]
    rows += [
        ("**multiple choice, mean**", report["multiple_choice"]),
        ("**all families, mean**", report["overall"]),
    ]
    width = max(len(family) for family, _ in rows)
    lines = [
        f"| {'family':{width}} | " + " | ".join(f"{name:>9}" for name in names) + " |",
        f"|{'-' * (width + 2)}|" + "|".join(f"{'-' * 10}:" for _ in names) + "|",
    ]
    lines += [
        f"| {family:{width}} | " + " | ".join(f"{values[name]:9.3f}" for name in names) + " |"
        for family, values in rows
    ]
    return "\n".join(lines) + "\n"
