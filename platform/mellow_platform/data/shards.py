"""Parquet shards and their manifest: the output of preprocessing, which training and evaluation read.

A shard set is a folder with

    configuration.json        options, and the digest of options and input; written first
    stock/*.parquet           inventory: address of every clip of the corpus, and SHA-256 of its bytes
    clips/*.parquet           one row per distinct clip, with its features
    records/<split>/*.parquet one row per question, with token ids and clip ids
    receipts/                 one JSON file per shard, written after the shard
    quarantine/*.parquet      unusable clips, with the reason
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

# A row contains arrays as bytes (fp16, C order; a waveform as FLAC); their shapes are in the manifest.
CLIP_FIELDS = [
    pa.field("clip_id", pa.string(), nullable=False),  # SHA-256 of the file
    pa.field("filepath", pa.string(), nullable=False),  # first path with these bytes
    pa.field("split", pa.string(), nullable=False),
    pa.field("seconds", pa.float32(), nullable=False),  # before cutting or padding
    pa.field("level", pa.float32(), nullable=False),  # root mean square in dB, full scale 0
]
RECORD_SCHEMA = pa.schema(
    [
        *record_format.SCHEMA,
        pa.field("number", pa.int32(), nullable=False),  # position in the split before filtering
        pa.field("clip1", pa.string(), nullable=False),
        pa.field("clip2", pa.string(), nullable=False),  # partner of clip1 if the question is about one clip
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),  # without padding
        pa.field("answer_ids", pa.list_(pa.int32()), nullable=False),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("filepath", "split", "reason", "detail")]
)


@dataclass
class Manifest:
    """Contents of a shard set.

    Attributes:
        features: shapes of a clip's arrays by name; [-1] is a waveform as long as its recording.
        counts: clips, quarantined clips (also by reason), records per split, records dropped with their clips.
        configuration: options of the job that wrote the set.
        files: SHA-256 of clip shards, record shards and quarantine, by path in the set.
        encoder: digest of the encoder's weights (`encoder_digest`) for features: encoder; empty for others.
    """

    features: dict[str, list[int]]
    counts: dict[str, Any]
    configuration: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    encoder: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def content_hash(self) -> str:
        """SHA-256 over paths and hashes of the files: equal for equal sets."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def read_table(
        self, shards: str, folder: str, columns: list[str] | None = None, rows: pc.Expression | None = None
    ) -> pa.Table:
        """Read the set's shards in `folder` (`clips`, `records/test`) in order; other files are ignored.

        Args:
            rows: filter; by default all rows.
        """
        names = sorted(name for name in self.files if name.startswith(f"{folder}/"))
        return storage.read_tables([storage.join(shards, name) for name in names], columns, rows)

    def write(self, shards: str) -> None:
        storage.write_json(storage.join(shards, MANIFEST), asdict(self) | {"content_hash": self.content_hash})

    @classmethod
    def read_with(cls, shards: str, features: Features) -> "Manifest":
        """Read the manifest of a set with `features` of its clips.

        Raises:
            ValueError: the set has other features.
        """
        manifest = cls.read(shards)
        if manifest.configuration["features"] != features:
            raise ValueError(
                f"{shards} has features: {manifest.configuration['features']}; expected features: {features}. Run "
                f"jobs/preprocess.py with --features {features} and another --output"
            )
        return manifest

    @classmethod
    def read(cls, shards: str) -> "Manifest":
        """Read the manifest of the set at `shards`.

        Raises:
            FileNotFoundError: the set is missing or unfinished.
            ValueError: the set has another schema version.
        """
        uri = storage.join(shards, MANIFEST)
        if not storage.exists(uri):
            raise FileNotFoundError(f"{uri} does not exist; run jobs/preprocess.py until it finishes")
        values = storage.read_json(uri)
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{uri} has schema version {values.get('schema_version')}; expected {SCHEMA_VERSION}. "
                "Run jobs/preprocess.py again"
            )
        del values["content_hash"]
        return cls(**values)


def clip_schema(features: dict[str, list[int]]) -> pa.Schema:
    return pa.schema([*CLIP_FIELDS, *(pa.field(name, pa.binary(), nullable=False) for name in features)])


def read_records(shards: str, split: str, columns: list[str] | None = None) -> pa.Table:
    """Return the tokenised records of `split` in their fixed order; by default with all columns.

    Raises:
        ValueError: the set does not have the split.
    """
    manifest = Manifest.read(shards)
    counts = manifest.counts["records"]
    if split not in counts:
        raise ValueError(f"{shards} has no split {split!r}; it has {', '.join(counts) or 'none'}")
    return manifest.read_table(shards, f"records/{split}", columns)
