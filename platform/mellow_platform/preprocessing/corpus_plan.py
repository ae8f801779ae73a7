"""Plan of a preprocessing job: clips to read, in units, and questions about them.

A unit is read once for the inventory: every clip gets an address, from which it can be read again, and the SHA-256 of
its bytes. Shards are then ranges of distinct clips, independent of the files that contain them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data import records as record_format
from mellow_platform.data.clip_reader import AUDIO_SUFFIXES, ClipAddress, audio_root
from mellow_platform.data.labels import read_labels
from mellow_platform.data.records import FIELDS, SPLITS
from mellow_platform.data.splits import split_of
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig

CLIPS_PER_UNIT = 128


@dataclass(frozen=True)
class CorpusUnit:
    """Input of one inventory task: clips in single files, or one tar or Parquet file."""

    number: int
    clips: tuple[ClipAddress, ...] = ()
    name: str = ""  # path of the file, relative to the corpus
    uri: str = ""
    size: int = 0
    split: str = ""


@dataclass(frozen=True)
class CorpusPlan:
    """Units to read, and questions by split if they are in separate files."""

    units: list[CorpusUnit]
    records: dict[str, pa.Table]

    @property
    def digest(self) -> str:
        """SHA-256 over units and questions; a different digest means different shards."""
        digest = hashlib.sha256()
        for unit in self.units:
            digest.update(json.dumps(asdict(unit)).encode())
        for split, table in sorted(self.records.items()):
            digest.update(split.encode())
            for name in FIELDS:
                digest.update("\0".join(table[name].to_pylist()).encode())
        return digest.hexdigest()


def plan_corpus(config: PreprocessConfig) -> CorpusPlan:
    """List the clips and questions that `config` selects, without reading audio.

    Raises:
        ValueError: a clip is in two splits, or there is nothing to read.
        FileNotFoundError: the folder or a record file is missing.
    """
    if config.source == "records":
        return _plan_records(config)
    assert config.corpus
    suffixes = {"webdataset": (".tar",), "parquet": (".parquet",), "recordings": AUDIO_SUFFIXES}[config.source]
    files = [(name, size) for name, size in storage.find(config.corpus) if name.lower().endswith(suffixes)]
    if not files:
        raise ValueError(f"{config.corpus} contains no {' or '.join(suffixes)} file; check `corpus` and `source`")
    if config.source == "recordings":
        clips = [ClipAddress(name, "train", storage.join(config.corpus, name)) for name, _ in files[: config.limit]]
        return CorpusPlan(_units(clips), {})
    units: list[CorpusUnit] = []
    for name, size in files:
        split = split_of(name)
        if split in config.split:
            units.append(CorpusUnit(len(units), (), name, storage.join(config.corpus, name), size, split))
    if not units:
        raise ValueError(f"{config.corpus}: none of {len(files)} files is in {', '.join(config.split)}; check `split`")
    return CorpusPlan(units, {})


def _plan_records(config: PreprocessConfig) -> CorpusPlan:
    records: dict[str, pa.Table] = {}
    for split in config.split if config.corpus else ():
        table = record_format.to_table(record_format.read_records(storage.join(config.corpus or "", f"{split}.json")))
        records[split] = select_questions(table, config)
    clips: dict[str, ClipAddress] = {}
    for split, table in records.items():
        for name in ("filepath1", "filepath2"):
            for path, taskname in zip(table[name].to_pylist(), table["taskname"].to_pylist(), strict=True):
                if not path:
                    continue
                root = audio_root(config.audio_root, config.corpus, taskname)
                clip = ClipAddress(path, split, storage.join(root, path), taskname)
                first = clips.setdefault(path, clip)
                if first.split != split:
                    raise ValueError(f"clip {path} is in both {first.split} and {split}; keep it in one")
                if first.uri != clip.uri:
                    raise ValueError(f"clip {path} is both {first.uri} and {clip.uri}; give each a path of its own")
    for clip_labels in read_labels(config.labels)[: config.limit] if config.labels else ():
        uri = storage.join(audio_root(config.audio_root, config.corpus, ""), clip_labels.file)
        clips.setdefault(clip_labels.file, ClipAddress(clip_labels.file, "train", uri))
    if not clips:
        raise ValueError(f"{config.corpus or config.labels}: no question or clip is left to read; check the filters")
    return CorpusPlan(_units([clips[path] for path in sorted(clips)]), records)


def select_questions(table: pa.Table, config: PreprocessConfig) -> pa.Table:
    """Return questions with the selected task names and subtypes, at most `limit`, with a column `number`.

    The number identifies a question and does not depend on the filters.
    """
    table = table.append_column("number", pa.array(range(len(table)), pa.int32()))
    for column, names in (("taskname", config.tasknames), ("subtype", config.subtypes)):
        if names:
            selected = {name.removesuffix(".json") for name in names}
            table = table.filter(
                pa.array([value.removesuffix(".json") in selected for value in table[column].to_pylist()], pa.bool_())
            )
    return table.slice(0, config.limit)


def _units(clips: list[ClipAddress]) -> list[CorpusUnit]:
    starts = range(0, len(clips), CLIPS_PER_UNIT)
    return [CorpusUnit(number, tuple(clips[start : start + CLIPS_PER_UNIT])) for number, start in enumerate(starts)]


def records_beside_audio(inventory: pa.Table, config: PreprocessConfig) -> dict[str, pa.Table]:
    """Return the questions stored with the audio, by split, in the order of the inventory; {} if there are none."""
    entries: dict[str, list[dict[str, str]]] = {}
    for split, text in zip(inventory["split"].to_pylist(), inventory["records"].to_pylist(), strict=True):
        if text != "[]":
            entries.setdefault(split, []).extend(json.loads(text))
    if not entries:
        return {}
    return {
        split: select_questions(pa.Table.from_pylist(entries.get(split, []), schema=record_format.SCHEMA), config)
        for split in (*SPLITS, *sorted(entries.keys() - set(SPLITS)))
        if split in entries or split in config.split
    }
