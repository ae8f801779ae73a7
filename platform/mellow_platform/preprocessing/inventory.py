"""Inventory of a corpus: every clip is read once, and then identified by the SHA-256 of its bytes.

This costs a second read of the corpus and no decoding. In return, clips with equal bytes are decoded, encoded and
stored once per set, whatever their names; a clip that is in two splits under two names fails the job before hours of
encoding; and missing, empty and oversized files are known before the first clip is decoded.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data import shards
from mellow_platform.data.audio import AudioError, check_size
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.clip_reader import AUDIO_SUFFIXES, ClipAddress, ParquetAudio, audio_bytes, read_clips
from mellow_platform.data.records import FIELDS
from mellow_platform.preprocessing.corpus_plan import CorpusUnit
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.progress import Progress
from mellow_platform.resumable import RETRY_LOST_WORKERS, dataset_of_parts, part_name

# A clip's address with the SHA-256 of its bytes (`clip_id`), or with the reason of its failure.
INVENTORY_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("path", "split", "taskname", "uri")),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("offset", "size", "row")),
        *(pa.field(name, pa.string(), nullable=False) for name in ("clip_id", "reason", "detail")),
        pa.field("records", pa.string(), nullable=False),  # JSON of the questions beside the audio
    ]
)


@dataclass(frozen=True)
class Inventory:
    """Clips of a corpus, one row each (`INVENTORY_SCHEMA`), sorted by path."""

    table: pa.Table

    def column(self, name: str) -> list[Any]:
        return self.table[name].to_pylist()

    def distinct(self) -> list[tuple[str, ClipAddress]]:
        """Return (clip id, address) of every distinct clip, at its first path, in order of path."""
        first: dict[str, int] = {}
        for row, clip_id in enumerate(self.column("clip_id")):
            if clip_id:
                first.setdefault(clip_id, row)
        fields = ["path", "split", "uri", "taskname", "offset", "size", "row"]
        rows = self.table.take(list(first.values())).select(fields).to_pylist() if first else []
        return list(zip(first, (ClipAddress(**values) for values in rows), strict=True))


def write_inventory(units: list[CorpusUnit], config: PreprocessConfig) -> Inventory:
    """Scan the missing units on Ray Data, and return the inventory of all units.

    Raises:
        ValueError: one path names different clips, or a clip is in two splits.
    """
    folder = storage.join(config.output, shards.INVENTORY)
    files = [f"{part_name(unit.number)}.parquet" for unit in units]
    done = set(storage.list_folder(folder))
    missing = [unit for unit, file in zip(units, files, strict=True) if file not in done]
    progress = Progress("units of the inventory", len(units), len(units) - len(missing))
    if missing:
        parts = [pa.table({"unit": [json.dumps(asdict(unit))]}) for unit in missing]
        limits = config.limits

        def write(row: dict[str, Any]) -> dict[str, int]:
            """Write the inventory of a unit; the file, written whole, is its own receipt."""
            values = json.loads(row["unit"])
            unit = CorpusUnit(**values | {"clips": tuple(ClipAddress(**clip) for clip in values["clips"])})
            table = scan_unit(unit, limits)
            storage.write_table(storage.join(folder, f"{part_name(unit.number)}.parquet"), table)
            return {"rejected": sum(map(bool, table["reason"].to_pylist()))}

        for counts in dataset_of_parts(parts).map(write, **RETRY_LOST_WORKERS).iter_rows():
            progress.add(1, counts["rejected"])
    table = storage.read_tables([storage.join(folder, file) for file in files])
    inventory = Inventory(_without_repeats(table.sort_by("path")))
    _refuse_clips_in_two_splits(inventory)
    return inventory


def _without_repeats(table: pa.Table) -> pa.Table:
    """Return the sorted inventory with each path once, as rows of a Parquet file may repeat a clip for each question.

    The first row is kept, with the questions of all.

    Raises:
        ValueError: a path names different clips, or is in two splits.
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
            raise ValueError(f"clip {row['path']} is in both {first['split']} and {row['split']}; keep it in one")
        first.setdefault("repeats", []).append(row["records"])
    for row in rows:
        if repeats := row.pop("repeats", None):
            row["records"] = json.dumps([record for text in (row["records"], *repeats) for record in json.loads(text)])
    return pa.Table.from_pylist(rows, schema=table.schema)


def _refuse_clips_in_two_splits(inventory: Inventory) -> None:
    first: dict[str, tuple[str, str]] = {}
    columns = (inventory.column(name) for name in ("clip_id", "path", "split"))
    for clip_id, path, split in zip(*columns, strict=True):
        if clip_id:
            first_path, first_split = first.setdefault(clip_id, (path, split))
            if first_split != split:
                names = f"{first_path} of {first_split} and {path} of {split}"
                raise ValueError(f"clips {names} are the same recording; keep one")


def scan_unit(unit: CorpusUnit, limits: AudioLimits) -> pa.Table:
    """Read every clip of a unit once; return addresses and hashes (`INVENTORY_SCHEMA`) in the unit's order."""
    if unit.uri.lower().endswith(".tar"):
        scanned = _tar_clips(unit, limits)
    elif unit.uri:
        scanned = _parquet_clips(unit)
    else:
        scanned = ((clip, data, []) for clip, data in read_clips(unit.clips, limits))
    rows = []
    for clip, data, records in scanned:
        row = asdict(clip) | {"clip_id": "", "reason": "", "detail": "", "records": json.dumps(records)}
        try:
            if isinstance(data, AudioError):
                raise data
            check_size(len(data), limits)
            row |= {"clip_id": hashlib.sha256(data).hexdigest(), "size": len(data)}
        except AudioError as error:
            row |= {"reason": error.reason, "detail": str(error)}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA)


ScannedClips = Iterator[tuple[ClipAddress, bytes | AudioError, list[dict[str, str]]]]


def _tar_clips(unit: CorpusUnit, limits: AudioLimits) -> ScannedClips:
    """Yield the audio members of a tar, each with the questions in the `.json` members of its key.

    A member's key is its path up to the first dot of its base name, as in WebDataset. A clip's path is
    `<tar>/<member>`, relative to the corpus. The `.json` contains the fields of one record, or a list of them.
    """
    tar = unit.name
    current = ""  # key; its members are adjacent
    clips: list[tuple[ClipAddress, bytes | AudioError]] = []
    questions: list[dict[str, Any]] = []
    with storage.open_read(unit.uri) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            key, _, suffix = base.partition(".")
            if f"{folder}/{key}" != current:
                yield from _with_questions(clips, questions, tar)
                current, clips, questions = f"{folder}/{key}", [], []
            if f".{suffix.rpartition('.')[2]}".lower() in AUDIO_SUFFIXES and member.isreg():
                path = f"{tar}/{member.name}"
                clip = ClipAddress(path, unit.split, unit.uri, "", member.offset_data, member.size)
                clips.append((clip, _member(archive, member, limits)))
            elif suffix == "json" and member.isreg():
                stream = archive.extractfile(member)
                assert stream
                questions = _questions(json.loads(stream.read()), f"{unit.uri}: {member.name}")
    yield from _with_questions(clips, questions, tar)


def _with_questions(
    clips: list[tuple[ClipAddress, bytes | AudioError]], questions: list[dict[str, Any]], tar: str
) -> ScannedClips:
    """Yield the clips of one key, the first with the key's questions."""
    for index, (clip, data) in enumerate(clips):
        records = [_with_paths(entry, clip.path, tar) for entry in questions] if index == 0 else []
        yield replace(clip, taskname=records[0]["taskname"] if records else ""), data, records


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, limits: AudioLimits) -> bytes | AudioError:
    try:
        check_size(member.size, limits)
    except AudioError as error:
        return error
    stream = archive.extractfile(member)
    assert stream
    return stream.read()


def _questions(value: Any, source: str) -> list[dict[str, str]]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{source}: expected the fields of a record or a list of them, found {value!r:.80}")
    return [entry for entry in entries if "input" in entry and "answer" in entry]


def _with_paths(entry: dict[str, Any], path: str, tar: str = "") -> dict[str, str]:
    """Return a record's fields with the paths of its clips in the corpus; `filepath2` may be a name in the tar."""
    values = {name: str(entry.get(name) or "") for name in FIELDS} | {"filepath1": path}
    second = values["filepath2"]
    if second and tar and ".tar/" not in second.lower():
        values["filepath2"] = f"{tar}/{second}"
    return values


def _parquet_clips(unit: CorpusUnit) -> ScannedClips:
    """Yield the rows of a Parquet file: a clip each, and a question if there are columns `input` and `answer`.

    A clip's path is its column `path` or `filepath1`, the path beside the bytes, or `<file>/<row>`.
    """
    rows = ParquetAudio(unit.uri)
    columns = [name for name in ("path", *FIELDS) if name in rows.file.schema_arrow.names]
    number = 0
    for batch in rows.file.iter_batches(batch_size=32, columns=[rows.column, *columns]):
        for cells in batch.to_pylist():
            audio = cells.pop(rows.column)
            inside = audio.get("path") if isinstance(audio, dict) else None
            path = cells.get("path") or cells.get("filepath1") or inside or f"{unit.name}/{number}"
            clip = ClipAddress(path, unit.split, unit.uri, cells.get("taskname") or "", row=number)
            yield clip, audio_bytes(audio), [_with_paths(cells, path)] if {"input", "answer"} <= cells.keys() else []
            number += 1
