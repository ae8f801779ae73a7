"""Taking stock of a corpus: every clip is read once, and known by the SHA-256 of its bytes from then on.

It costs a second read of the corpus and no decoding. For it, clips of equal bytes are decoded, encoded and stored once
a set, whatever their names; a clip that stands in two splits under two names is refused before hours of encoding; and
missing, empty and oversized files are known before the first clip is decoded.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray

from mellow_platform import storage
from mellow_platform.data import shards
from mellow_platform.data.clip_reader import ClipAddress, CorpusUnit, take_stock
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.progress import Progress


@dataclass(frozen=True)
class Inventory:
    """The clips of a corpus, a row each (`data.clip_reader.STOCK_SCHEMA`), sorted by path."""

    table: pa.Table

    def column(self, name: str) -> list[Any]:
        return self.table[name].to_pylist()

    def distinct(self) -> list[tuple[str, ClipAddress]]:
        """Return (clip id, address) of every distinct content, at the first path that has it, by path."""
        first: dict[str, int] = {}
        for row, clip_id in enumerate(self.column("clip_id")):
            if clip_id:
                first.setdefault(clip_id, row)
        fields = ["path", "split", "uri", "taskname", "offset", "size", "row"]
        rows = self.table.take(list(first.values())).select(fields).to_pylist() if first else []
        return list(zip(first, (ClipAddress(**values) for values in rows), strict=True))


def write_stock(units: list[CorpusUnit], config: PreprocessConfig) -> Inventory:
    """Take stock of the units that are not done yet on Ray Data, and return all of it.

    Raises:
        ValueError: one path stands for different clips, or a clip stands in two splits.
    """
    folder = storage.join(config.output, shards.STOCK)
    done = set(storage.list_folder(folder))
    open_units = [unit for unit in units if f"{unit.number:06d}.parquet" not in done]
    progress = Progress("stock, in units", len(units), len(units) - len(open_units))
    if open_units:
        rows = [{"unit": json.dumps(asdict(unit))} for unit in open_units]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset.context.enable_progress_bars = False
        limits = config.limits

        def write(row: dict[str, Any]) -> dict[str, int]:
            """Write the stock of one unit, whole or not at all: the file is its own receipt."""
            values = json.loads(row["unit"])
            unit = CorpusUnit(**values | {"clips": tuple(ClipAddress(**clip) for clip in values["clips"])})
            table = take_stock(unit, limits)
            storage.write_table(storage.join(folder, f"{unit.number:06d}.parquet"), table)
            return {"rejected": sum(map(bool, table["reason"].to_pylist()))}

        for counts in dataset.map(write, max_retries=-1).iter_rows():
            progress.add(1, counts["rejected"])
    names = [f"{unit.number:06d}.parquet" for unit in units]
    table = storage.read_tables([storage.join(folder, name) for name in names])
    stock = Inventory(_without_repeats(table.sort_by("path")))
    _refuse_clips_in_two_splits(stock)
    return stock


def _without_repeats(table: pa.Table) -> pa.Table:
    """Return the sorted stock with each path once: rows of a Parquet file may repeat a clip for each question.

    What is kept is the first row, with the questions of all.

    Raises:
        ValueError: a path stands for different clips, or in two splits.
    """
    rows: list[dict[str, Any]] = []
    for row in table.to_pylist():
        if not rows or row["path"] != rows[-1]["path"]:
            rows.append(row)
            continue
        first = rows[-1]
        if row["clip_id"] != first["clip_id"]:
            raise ValueError(
                f"{row['path']} names different clips in {first['uri']} and {row['uri']}: give each a path of its own"
            )
        if row["split"] != first["split"]:
            raise ValueError(f"clip {row['path']} stands in both {first['split']} and {row['split']}: keep it in one")
        first.setdefault("repeats", []).append(row["records"])
    for row in rows:
        if repeats := row.pop("repeats", None):
            row["records"] = json.dumps([record for text in (row["records"], *repeats) for record in json.loads(text)])
    return pa.Table.from_pylist(rows, schema=table.schema)


def _refuse_clips_in_two_splits(stock: Inventory) -> None:
    first: dict[str, tuple[str, str]] = {}
    for clip_id, path, split in zip(stock.column("clip_id"), stock.column("path"), stock.column("split"), strict=True):
        if clip_id:
            known, there = first.setdefault(clip_id, (path, split))
            if there != split:
                raise ValueError(f"clips {known} of {there} and {path} of {split} are the same recording: keep one")
