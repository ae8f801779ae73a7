"""Where clips and questions come from: record files with audio folders, tars, Parquet, or a folder of recordings.

A source is cut into units, each of which is read once to take stock: every clip gets an address, from which it can be
read again alone, and the SHA-256 of its bytes. Shards are then ranges of clips by content, whatever held them.

Ray Data's own readers are not used for this. `read_audio` decodes every file whole before anything can be checked, and
one damaged file ends the job; `read_webdataset` reads a tar as one stream, so that a task that is repeated begins at
its first byte, and rows have no address; both take their order from the blocks that the files happen to be put in.
"""

import hashlib
import json
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mellow_platform import storage
from mellow_platform.data import records as record_format
from mellow_platform.data.audio import AudioError, check_size
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.labels import read_labels
from mellow_platform.data.records import FIELDS, SPLITS
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".oga", ".opus")
CLIPS_A_UNIT = 128
READERS = 8  # threads that wait for storage, and so many files that are held ahead

# What taking stock says of a clip: where it is, what it is (SHA-256 of its bytes), or why it cannot be used.
STOCK_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("path", "split", "taskname", "uri")),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("offset", "size", "row")),
        *(pa.field(name, pa.string(), nullable=False) for name in ("clip_id", "reason", "detail")),
        pa.field("records", pa.string(), nullable=False),  # JSON of the questions that stand beside the audio
    ]
)


@dataclass(frozen=True)
class ClipAddress:
    """Where the bytes of a clip are: a whole file, `size` bytes from `offset` of a tar, or a row of a Parquet file.

    `path` is the clip's name in the corpus, `taskname` that of its questions.
    """

    path: str
    split: str
    uri: str
    taskname: str = ""
    offset: int = -1
    size: int = -1
    row: int = -1


@dataclass(frozen=True)
class CorpusUnit:
    """What one task takes stock of: clips in files of their own, or one tar or Parquet file."""

    number: int
    clips: tuple[ClipAddress, ...] = ()
    name: str = ""  # of the file, relative to the corpus
    uri: str = ""
    size: int = 0
    split: str = ""


@dataclass(frozen=True)
class CorpusPlan:
    """What is to be read: the units, and the questions by split where they stand in files of their own."""

    units: list[CorpusUnit]
    records: dict[str, pa.Table]

    @property
    def digest(self) -> str:
        """SHA-256 over names and questions: another one means other shards."""
        digest = hashlib.sha256()
        for unit in self.units:
            digest.update(json.dumps(asdict(unit)).encode())
        for split, table in sorted(self.records.items()):
            digest.update(split.encode())
            for name in FIELDS:
                digest.update("\0".join(table[name].to_pylist()).encode())
        return digest.hexdigest()


def plan_source(config: PreprocessConfig) -> CorpusPlan:
    """List what `config` reads, without reading audio.

    Raises:
        ValueError: a clip stands in two splits, or there is nothing to read.
        FileNotFoundError: the folder or a record file is absent.
    """
    if config.source == "records":
        return _plan_records(config)
    assert config.corpus
    suffixes = {"webdataset": (".tar",), "parquet": (".parquet",), "recordings": AUDIO_SUFFIXES}[config.source]
    files = [(name, size) for name, size in storage.find(config.corpus) if name.lower().endswith(suffixes)]
    if not files:
        raise ValueError(f"{config.corpus} holds no {' or '.join(suffixes)} file: check `corpus` and `source`")
    if config.source == "recordings":
        clips = [ClipAddress(name, "train", storage.join(config.corpus, name)) for name, _ in files[: config.limit]]
        return CorpusPlan(_units(clips), {})
    units: list[CorpusUnit] = []
    for name, size in files:
        split = split_of(name)
        if split in config.split:
            units.append(CorpusUnit(len(units), (), name, storage.join(config.corpus, name), size, split))
    if not units:
        raise ValueError(f"{config.corpus}: none of its {len(files)} files is of {', '.join(config.split)}")
    return CorpusPlan(units, {})


# Words that name a split; Clotho's development split is the one to train on, its evaluation split the test.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "development"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_of(name: str) -> str:
    """Return the split that the first such word of a shard's path names (`train/0.tar`, `Valid-0.parquet`), or train.

    A word goes from one sign or digit to the next.
    """
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def _plan_records(config: PreprocessConfig) -> CorpusPlan:
    records: dict[str, pa.Table] = {}
    for split in config.split if config.corpus else ():
        table = record_format.to_table(record_format.read_records(storage.join(config.corpus or "", f"{split}.json")))
        records[split] = select(table, config)
    clips: dict[str, ClipAddress] = {}
    for split, table in records.items():
        for name in ("filepath1", "filepath2"):
            for path, taskname in zip(table[name].to_pylist(), table["taskname"].to_pylist(), strict=True):
                if not path:
                    continue
                root = audio_root(config.audio_root, config.corpus, taskname)
                clip = ClipAddress(path, split, storage.join(root, path), taskname)
                known = clips.setdefault(path, clip)
                if known.split != split:
                    raise ValueError(f"clip {path} stands in both {known.split} and {split}: keep it in one")
                if known.uri != clip.uri:
                    raise ValueError(f"clip {path} is {known.uri} for one question and {clip.uri} for another")
    for labelled in read_labels(config.labels)[: config.limit] if config.labels else ():
        uri = storage.join(audio_root(config.audio_root, config.corpus, ""), labelled.file)
        clips.setdefault(labelled.file, ClipAddress(labelled.file, "train", uri))
    if not clips:
        raise ValueError(f"{config.corpus or config.labels}: no question or clip is left to read; see the filters")
    return CorpusPlan(_units([clips[path] for path in sorted(clips)]), records)


def audio_root(roots: str | dict[str, str] | None, corpus: str | None, taskname: str) -> str:
    """Return the folder that the paths of a question of `taskname` are relative to: by default `<corpus>/audio`.

    Raises:
        ValueError: `roots` names folders by task, and not this one's.
    """
    if isinstance(roots, dict):
        if taskname not in roots:
            raise ValueError(f"audio_root has no folder for taskname {taskname!r}; it has {', '.join(sorted(roots))}")
        return roots[taskname]
    return roots or storage.join(corpus or "", "audio")


def select(table: pa.Table, config: PreprocessConfig) -> pa.Table:
    """Return the questions of the tasks and subtypes asked for, the first `limit` of them, numbered as all of them are.

    The number is what a question is known by, whatever is left out of the set that it comes to stand in.
    """
    table = table.append_column("number", pa.array(range(len(table)), pa.int32()))
    for column, names in (("taskname", config.tasknames), ("subtype", config.subtypes)):
        if names:
            wanted = {name.removesuffix(".json") for name in names}
            table = table.filter(
                pa.array([value.removesuffix(".json") in wanted for value in table[column].to_pylist()], pa.bool_())
            )
    return table.slice(0, config.limit)


def _units(clips: list[ClipAddress]) -> list[CorpusUnit]:
    starts = range(0, len(clips), CLIPS_A_UNIT)
    return [CorpusUnit(number, tuple(clips[start : start + CLIPS_A_UNIT])) for number, start in enumerate(starts)]


def take_stock(unit: CorpusUnit, limits: AudioLimits) -> pa.Table:
    """Read every clip of a unit once, and return what and where they are (`STOCK_SCHEMA`), in the unit's order."""
    if unit.uri.lower().endswith(".tar"):
        found = _tar_clips(unit, limits)
    elif unit.uri:
        found = _parquet_clips(unit)
    else:
        found = ((clip, data, []) for clip, data in read_clips(unit.clips, limits))
    rows = []
    for clip, data, records in found:
        row = asdict(clip) | {"clip_id": "", "reason": "", "detail": "", "records": json.dumps(records)}
        try:
            if isinstance(data, AudioError):
                raise data
            check_size(len(data), limits)
            row |= {"clip_id": hashlib.sha256(data).hexdigest(), "size": len(data)}
        except AudioError as error:
            row |= {"reason": error.reason, "detail": str(error)}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=STOCK_SCHEMA)


def read(clip: ClipAddress, limits: AudioLimits) -> bytes:
    """Return the bytes of a clip that has a file of its own or stands in a tar.

    Raises:
        AudioError: `missing`, `empty` or `too_large`.
    """
    if clip.offset >= 0:
        return storage.read_range(clip.uri, clip.offset, clip.size)
    try:
        check_size(storage.size(clip.uri), limits)
        return storage.read_bytes(clip.uri)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise AudioError("missing", f"{clip.uri} does not exist") from error


def read_clips(clips: Iterable[ClipAddress], limits: AudioLimits) -> Iterator[tuple[ClipAddress, bytes | AudioError]]:
    """Yield clips with their bytes, or why there are none, in the order given; a few are read ahead."""
    clips = list(clips)
    in_parquet = {clip.uri for clip in clips if clip.row >= 0}
    columns = {uri: _ParquetRows(uri) for uri in in_parquet}

    def fetch(clip: ClipAddress) -> bytes | AudioError:
        return columns[clip.uri][clip.row] if clip.row >= 0 else _attempt(clip, limits)

    # Rows share the group that was read last: one thread.
    return _ahead(fetch, clips, 1 if in_parquet else READERS)


def _attempt(clip: ClipAddress, limits: AudioLimits) -> bytes | AudioError:
    try:
        return read(clip, limits)
    except AudioError as error:
        return error


def _ahead(
    fetch: Callable[[ClipAddress], bytes | AudioError], clips: Iterable[ClipAddress], threads: int
) -> Iterator[tuple[ClipAddress, bytes | AudioError]]:
    """Yield each clip with what `fetch` returns, in order; at most `threads` of them are under way or waiting."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for clip in clips:
            waiting.append((clip, pool.submit(fetch, clip)))
            if len(waiting) >= threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


Found = Iterator[tuple[ClipAddress, bytes | AudioError, list[dict[str, str]]]]


def _tar_clips(unit: CorpusUnit, limits: AudioLimits) -> Found:
    """Yield the audio members of a tar, each with the questions in the `.json` members of its key.

    A member's key is its name up to the first dot of its last part, as WebDataset has it; a clip's path is
    `<tar>/<member>`, the tar's relative to the corpus. The `.json` holds the fields of one record, or a list of such.
    """
    tar = unit.name
    # Of the key at hand, whose members are neighbours.
    current = ""
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
) -> Found:
    """Yield the clips of one key, the first with the key's questions."""
    for place, (clip, data) in enumerate(clips):
        own = [_located(entry, clip.path, tar) for entry in questions] if place == 0 else []
        yield replace(clip, taskname=own[0]["taskname"] if own else ""), data, own


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, limits: AudioLimits) -> bytes | AudioError:
    try:
        check_size(member.size, limits)
    except AudioError as error:
        return error
    stream = archive.extractfile(member)
    assert stream
    return stream.read()


def _questions(value: Any, where: str) -> list[dict[str, str]]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{where}: expected the fields of a record or a list of such, found {value!r:.80}")
    return [entry for entry in entries if "input" in entry and "answer" in entry]


def _located(entry: dict[str, Any], path: str, tar: str = "") -> dict[str, str]:
    """Return a record's fields with its clips by their paths in the corpus; a second one may be named as in its tar."""
    values = {name: str(entry.get(name) or "") for name in FIELDS} | {"filepath1": path}
    second = values["filepath2"]
    if second and tar and ".tar/" not in second.lower():
        values["filepath2"] = f"{tar}/{second}"
    return values


class _ParquetRows:
    """The audio column of a Parquet file by row number; the row group that was read last is kept."""

    def __init__(self, uri: str):
        fs, path = storage.arrow_filesystem(uri)
        self.uri = uri
        with storage.parquet_errors(uri):
            self.file = pq.ParquetFile(path, filesystem=fs)
        self.column = next((name for name in ("audio", "bytes") if name in self.file.schema_arrow.names), "")
        if not self.column:
            raise ValueError(f"{uri} has no column audio or bytes; it has {', '.join(self.file.schema_arrow.names)}")
        self.starts = [0]
        for group in range(self.file.num_row_groups):
            self.starts.append(self.starts[-1] + self.file.metadata.row_group(group).num_rows)
        self.group, self.values = -1, pa.chunked_array([], pa.binary())

    def __getitem__(self, row: int) -> bytes:
        group = next(number for number, start in enumerate(self.starts[1:]) if row < start)
        if group != self.group:
            self.group, self.values = group, self.file.read_row_group(group, [self.column])[self.column]
        return audio_bytes(self.values[row - self.starts[group]].as_py())


def audio_bytes(value: Any) -> bytes:
    """Return the bytes in a cell: binary, or the struct {bytes, path} of the datasets library."""
    return (value.get("bytes") if isinstance(value, dict) else value) or b""


def _parquet_clips(unit: CorpusUnit) -> Found:
    """Yield the rows of a Parquet file: a clip each, and a question where there are columns `input` and `answer`.

    A clip's path is its column `path` or `filepath1`, the path beside the bytes, or `<file>/<row>`.
    """
    rows = _ParquetRows(unit.uri)
    columns = [name for name in ("path", *FIELDS) if name in rows.file.schema_arrow.names]
    number = 0
    for batch in rows.file.iter_batches(batch_size=32, columns=[rows.column, *columns]):
        for cells in batch.to_pylist():
            audio = cells.pop(rows.column)
            inside = audio.get("path") if isinstance(audio, dict) else None
            path = cells.get("path") or cells.get("filepath1") or inside or f"{unit.name}/{number}"
            clip = ClipAddress(path, unit.split, unit.uri, cells.get("taskname") or "", row=number)
            yield clip, audio_bytes(audio), [_located(cells, path)] if {"input", "answer"} <= cells.keys() else []
            number += 1


def stocked_records(stock: pa.Table, config: PreprocessConfig) -> dict[str, pa.Table]:
    """Return the questions that stand beside the audio, by split, in the order of the stock; none gives {}."""
    found: dict[str, list[dict[str, str]]] = {}
    for split, text in zip(stock["split"].to_pylist(), stock["records"].to_pylist(), strict=True):
        if text != "[]":
            found.setdefault(split, []).extend(json.loads(text))
    if not found:
        return {}
    return {
        split: select(pa.Table.from_pylist(found.get(split, []), schema=record_format.SCHEMA), config)
        for split in (*SPLITS, *sorted(found.keys() - set(SPLITS)))
        if split in found or split in config.split
    }
