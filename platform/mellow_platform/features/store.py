"""The features of every clip of a shard set in memory, by clip content."""

from dataclasses import dataclass

import numpy as np

from mellow_platform.data.shards import Manifest


@dataclass(frozen=True)
class FeatureStore:
    """Arrays of all clips, one row a distinct clip; put into Ray's object store once, read by every task in place.

    Attributes:
        arrays: by name, fp16 [clips, ...] (`log_mel`, or `frames` and `latent`).
        filepaths, splits: of each row; those of the first file where several have the same content.
        rows: row of each clip id.
    """

    arrays: dict[str, np.ndarray]
    filepaths: list[str]
    splits: list[str]
    rows: dict[str, int]

    @classmethod
    def load(cls, shards: str) -> "FeatureStore":
        """Read the clips of the shard set at `shards`; clips of equal content are kept once."""
        manifest = Manifest.read(shards)
        shapes = manifest.features
        table = manifest.read_table(shards, "clips")
        clip_ids = table["clip_id"].to_pylist()
        rows: dict[str, int] = {}
        first: list[int] = []
        for place, clip_id in enumerate(clip_ids):
            if clip_id not in rows:
                rows[clip_id] = len(first)
                first.append(place)
        table = table.take(first)
        arrays = {}
        for name, shape in shapes.items():
            arrays[name] = np.empty((len(first), *shape), np.float16)
            for row, value in enumerate(table[name]):
                arrays[name][row] = np.frombuffer(value.as_buffer(), np.float16).reshape(shape)
        return cls(arrays, table["filepath"].to_pylist(), table["split"].to_pylist(), rows)

    def __len__(self) -> int:
        return len(self.filepaths)
