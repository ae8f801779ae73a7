"""Baselines without a model: random draws, and the answers of a predictions file."""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data.tables import read_table
from mellow_platform.evaluation.dataset import BenchmarkItem
from mellow_platform.evaluation.models import Reply


def draw_answers(items: Sequence[BenchmarkItem], seed: int) -> list[Reply]:
    """Draw one random answer per item, from its choices or, for open questions, from other items of its category."""
    categories: dict[tuple[str, ...], list[BenchmarkItem]] = defaultdict(list)
    positions: dict[str, int] = {}  # of an item in its category
    for item in items:
        if item.references and not item.choices:
            category = categories[tuple(item.groups.values())]
            positions[item.id] = len(category)
            category.append(item)
    replies = []
    for item in items:
        rng = np.random.default_rng([seed, zlib.crc32(item.id.encode())])
        category = categories[tuple(item.groups.values())]
        if item.choices:
            replies.append(Reply(item.choices[int(rng.integers(len(item.choices)))]))
        elif item.id in positions and len(category) > 1:
            other = (positions[item.id] + int(rng.integers(1, len(category)))) % len(category)
            replies.append(Reply(category[other].references[0]))
        else:
            replies.append(Reply())
    return replies


def read_answers(benchmark: str, items: Iterable[BenchmarkItem], uri: str) -> list[Reply]:
    """Read the answers to a benchmark's items from a file, by item id; items not in it get the error `no_prediction`.

    Args:
        uri: folder of another evaluation; MMAU's file with `model_output` in each entry; or a table with columns `id`
            and `prediction`, and `benchmark` if it contains several benchmarks.

    Raises:
        ValueError: these columns are missing, or an id has two answers.
    """
    file = uri if uri.endswith((".parquet", ".csv", ".json", ".jsonl")) else storage.join(uri, "predictions.parquet")
    names = "id", "prediction", "model_output", "condition", "benchmark"
    table = read_table(file, text_columns=names, columns=names)
    for name, value in (("condition", "audio"), ("benchmark", benchmark)):
        if name in table.column_names:
            table = table.filter(pa.compute.equal(table[name], value))
    column = next((name for name in ("prediction", "model_output") if name in table.column_names), "")
    if not column or "id" not in table.column_names:
        raise ValueError(f"{file} needs the columns id, and prediction or model_output")
    answers: dict[str, str] = {}
    for id, answer in zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True):
        if answers.setdefault(str(id), answer or "") != (answer or ""):
            raise ValueError(f"{uri} has two answers to question {id}; keep one")
    known = ", ".join(list(answers)[:3]) or "none"
    replies = []
    for item in items:
        answer = answers.get(item.id, answers.get(item.id.removeprefix("mmau/")))  # MMAU's ids lack the prefix
        detail = f"{uri} has no answer to {item.id} (ids in the file: {known}, ...)"
        replies.append(Reply(error="no_prediction", detail=detail) if answer is None else Reply(answer))
    return replies
