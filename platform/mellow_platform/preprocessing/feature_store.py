"""Features of all clips of a shard set in memory, by clip id."""

import io
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile

from mellow_platform.data.shards import CLIPS, Manifest


@dataclass(frozen=True)
class FeatureStore:
    """Arrays of all clips, one row per distinct clip; put into Ray's object store once and shared by all tasks.

    Attributes:
        arrays: by name, fp16 [clips, ...] (`log_mel`, or `frames` and `latent`).
        filepaths, splits: path and split of each row; those of the first file if several have the same content.
        rows: row of each clip id.
        recordings: FLAC file of each row with `features: waveform`; `arrays` is then empty.
    """

    arrays: dict[str, np.ndarray]
    filepaths: list[str]
    splits: list[str]
    rows: dict[str, int]
    recordings: pa.ChunkedArray | None = None

    @classmethod
    def load(cls, shards: str, clips: Collection[str] | None = None) -> "FeatureStore":
        """Read the clips of the shard set at `shards`.

        Args:
            clips: ids of clips to read; by default all.
        """
        manifest = Manifest.read(shards)
        table = manifest.read_table(
            shards, CLIPS, rows=None if clips is None else pc.field("clip_id").isin(list(clips))
        )
        rows = {clip_id: row for row, clip_id in enumerate(table["clip_id"].to_pylist())}
        names = table["filepath"].to_pylist(), table["split"].to_pylist()
        if "waveform" in manifest.features:
            recordings = table["waveform"].cast(pa.large_binary())
            return cls({}, *names, rows, recordings)
        arrays = {}
        for name, shape in manifest.features.items():
            arrays[name] = np.empty((len(table), *shape), np.float16)
            for row, value in enumerate(table[name]):
                arrays[name][row] = np.frombuffer(value.as_buffer(), np.float16).reshape(shape)
        return cls(arrays, *names, rows)

    def __len__(self) -> int:
        return len(self.filepaths)

    def waveform(self, row: int) -> np.ndarray:
        """Return the whole recording of a row, float32 [samples] at the rate of the set's front end.

        Raises:
            ValueError: the set has no waveforms.
        """
        if self.recordings is None:
            raise ValueError("the shards have no waveforms; run jobs/preprocess.py with --features waveform")
        return soundfile.read(io.BytesIO(self.recordings[row].as_py()), dtype="float32")[0]
