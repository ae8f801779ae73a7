"""Parquet shards and their manifest: what preprocessing leaves for training and evaluation.

A shard set is a folder with `clips/*.parquet` (a row a clip, with its features), `records/<split>/*.parquet`
(a row a question, tokenised, naming its clips by content), `quarantine/*.parquet` (clips that could not be used and
why), `processor/` (front end and tokenizer), and `manifest.json`, written last.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data import records as record_format

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"

# Shape and type of a clip's arrays stand in the manifest; a row holds their bytes (fp16, C order).
CLIP_FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),  # SHA-256 of the file
    pa.field("filepath", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("seconds", pa.float32(), nullable=False),  # before the length was fixed
]
RECORD_SCHEMA = pa.schema(
    [
        *record_format.SCHEMA,
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
        features: array name to shape of one clip's arrays.
        counts: clips, quarantined clips (by reason too), records a split, records dropped with their clips.
        configuration: of the job that wrote the set.
        files: SHA-256 of every shard by its path in the set.
    """

    features: dict[str, list[int]]
    counts: dict[str, Any]
    configuration: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def content_hash(self) -> str:
        """SHA-256 over the shards' names and hashes: equal sets have equal ones."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def read_table(self, shards: str, folder: str, columns: list[str] | None = None) -> pa.Table:
        """Read the set's shards under `folder` (`clips`, `records/test`) in order; stray files are left alone."""
        names = sorted(name for name in self.files if name.startswith(f"{folder}/"))
        return storage.read_tables([storage.join(shards, name) for name in names], columns)

    def write(self, shards: str) -> None:
        storage.write_json(storage.join(shards, MANIFEST), asdict(self) | {"content_hash": self.content_hash})

    @classmethod
    def read_with(cls, shards: str, features: Literal["logmel", "encoder"]) -> "Manifest":
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

    @staticmethod
    def refuse_other(shards: str, configuration: dict[str, Any]) -> None:
        """Make sure that `shards` holds no finished set of another configuration.

        Raises:
            ValueError: it does; the message names the fields that differ.
        """
        if not storage.exists(storage.join(shards, MANIFEST)):
            return
        there = Manifest.read(shards).configuration
        differing = [name for name, value in configuration.items() if there.get(name) != value]
        if differing:
            raise ValueError(
                f"{shards} holds shards of another configuration (differing: {', '.join(differing)}): "
                "choose another output, or delete it"
            )

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


def read_records(shards: str, split: str) -> pa.Table:
    """Return the tokenised records of `split` in their fixed order.

    Raises:
        ValueError: the set has no such split.
    """
    manifest = Manifest.read(shards)
    counts = manifest.counts["records"]
    if split not in counts:
        raise ValueError(f"{shards} has no split {split!r}; it has {', '.join(counts) or 'none'}")
    return manifest.read_table(shards, f"records/{split}")
