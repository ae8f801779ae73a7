"""Parquet shards and their manifest: what preprocessing leaves for training and evaluation.

A shard set is a folder with

    configuration.json        options and input of the set, written first
    stock/*.parquet           inventory: every clip of the corpus with its address and the SHA-256 of its bytes
    clips/*.parquet           a row per distinct clip, with its features
    records/<split>/*.parquet a row per question, tokenised, with its clips by content
    receipts/                 a JSON file per shard, written after it: the shard is done
    quarantine/*.parquet      clips that cannot be used, with the reason
    processor/                front end and tokenizer
    statistics.json, .png     statistics of the corpus
    manifest.json             written last

Shards are the parts of a resumable job (`mellow_platform.resumable`).
"""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mellow_platform import storage
from mellow_platform.data import records as record_format
from mellow_platform.option_values import Features

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
INVENTORY, CLIPS, RECORDS, QUARANTINE = "stock", "clips", "records", "quarantine"

# Shape and type of a clip's arrays stand in the manifest; a row holds their bytes (fp16, C order; a waveform is FLAC).
CLIP_FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),  # SHA-256 of the file
    pa.field("filepath", pa.string(), nullable=False),  # the first of them that has these bytes
    pa.field("split", pa.string(), nullable=False),
    pa.field("seconds", pa.float32(), nullable=False),  # before the length was fixed
    pa.field("level", pa.float32(), nullable=False),  # root mean square in dB, full scale 0
]
RECORD_SCHEMA = pa.schema(
    [
        *record_format.SCHEMA,
        pa.field("number", pa.int32(), nullable=False),  # in its split, before any question was left out
        pa.field("clip1", pa.string(), nullable=False),
        pa.field("clip2", pa.string(), nullable=False),  # the partner rule's clip where the question has one
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),  # without padding
        pa.field("answer_ids", pa.list_(pa.int32()), nullable=False),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("filepath", "split", "reason", "detail")]
)


@dataclass
class Manifest:
    """What a shard set holds.

    Attributes:
        features: array name to shape of one clip's arrays; [-1] for a waveform, as long as its recording.
        counts: clips, quarantined clips (by reason too), records a split, records dropped with their clips.
        configuration: of the job that wrote the set.
        files: SHA-256 of every shard by its path in the set.
        encoder: of the weights (`encoder_digest`) that made features: encoder; empty with other features.
    """

    features: dict[str, list[int]]
    counts: dict[str, Any]
    configuration: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    encoder: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def content_hash(self) -> str:
        """SHA-256 over the shards' names and hashes: equal sets have equal ones."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def read_table(
        self, shards: str, folder: str, columns: list[str] | None = None, rows: pc.Expression | None = None
    ) -> pa.Table:
        """Read the set's shards under `folder` (`clips`, `records/test`) in order; stray files are left alone.

        Args:
            rows: which of them, by their columns; by default all.
        """
        names = sorted(name for name in self.files if name.startswith(f"{folder}/"))
        return storage.read_tables([storage.join(shards, name) for name in names], columns, rows)

    def write(self, shards: str) -> None:
        storage.write_json(storage.join(shards, MANIFEST), asdict(self) | {"content_hash": self.content_hash})

    @classmethod
    def read_with(cls, shards: str, features: Features) -> "Manifest":
        """Read the manifest of a set that holds `features` of its clips.

        Raises:
            ValueError: it holds the other ones.
        """
        manifest = cls.read(shards)
        if manifest.configuration["features"] != features:
            raise ValueError(
                f"{shards} holds features: {manifest.configuration['features']}, and features: {features} are needed: "
                f"run jobs/preprocess.py with --features {features} into another folder"
            )
        return manifest

    @classmethod
    def read(cls, shards: str) -> "Manifest":
        """Read the manifest of the set at `shards`.

        Raises:
            FileNotFoundError: the set is absent or unfinished.
            ValueError: another version of the schema wrote it.
        """
        uri = storage.join(shards, MANIFEST)
        if not storage.exists(uri):
            raise FileNotFoundError(f"{uri} does not exist: run jobs/preprocess.py to its end first")
        values = storage.read_json(uri)
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{uri} has schema version {values.get('schema_version')}, this code reads {SCHEMA_VERSION}: "
                "run jobs/preprocess.py again"
            )
        del values["content_hash"]
        return cls(**values)


def clip_schema(features: dict[str, list[int]]) -> pa.Schema:
    return pa.schema([*CLIP_FIELDS, *(pa.field(name, pa.binary(), nullable=False) for name in features)])


def read_records(shards: str, split: str, columns: list[str] | None = None) -> pa.Table:
    """Return the tokenised records of `split` in their fixed order, or only some of their columns.

    Raises:
        ValueError: the set has no such split.
    """
    manifest = Manifest.read(shards)
    counts = manifest.counts["records"]
    if split not in counts:
        raise ValueError(f"{shards} has no split {split!r}; it has {', '.join(counts) or 'none'}")
    return manifest.read_table(shards, f"records/{split}", columns)
