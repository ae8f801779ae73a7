"""Training examples of the audio encoder, clips with tags from a shard set; collated without torch."""

import numpy as np

from mellow_platform.data.labels import read_labels, vocabulary
from mellow_platform.data.shards import Manifest
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.training.tagger_config import TaggerConfig


class TaggedClips:
    """Spectrograms and tags of the labelled clips of the train split."""

    def __init__(self, ids: list[str], spectrograms: np.ndarray, targets: np.ndarray, names: list[str]):
        """
        Args:
            ids: path of each clip.
            spectrograms: log-mel, fp16 [clips, frames, bands].
            targets: [clips, classes], 1 for each tag of a clip.
            names: names of the classes.
        """
        self.ids, self.spectrograms, self.targets, self.names = ids, spectrograms, targets, names
        self.loss_weights = np.ones(len(ids))

    @classmethod
    def load(cls, config: TaggerConfig) -> "TaggedClips":
        """Read the clips that `config` trains on.

        Raises:
            ValueError: the shards contain no spectrograms, or no clip of the train split has labels.
        """
        Manifest.read_with(config.shards, "logmel")
        store = FeatureStore.load(config.shards)
        clips = read_labels(config.labels)
        names = vocabulary(clips)
        by_file = {clip.file: clip.labels for clip in clips}
        files = zip(store.filepaths, store.splits, strict=True)
        rows = [row for row, (path, split) in enumerate(files) if path in by_file and split == "train"]
        if not rows:
            raise ValueError(
                f"{config.labels} has no clip of split train of {config.shards}; use the labels of these shards"
            )
        targets = np.zeros((len(rows), len(names)), np.float32)
        for number, row in enumerate(rows):
            for label in by_file[store.filepaths[row]]:
                targets[number, names.index(label)] = 1.0
        return cls([store.filepaths[row] for row in rows], store.arrays["log_mel"][rows], targets, names)

    def __len__(self) -> int:
        return len(self.ids)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def collate(self, seed: int, epoch: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Return spectrograms and tags of the numbered clips; neither depends on the epoch."""
        return {"input_features": self.spectrograms[numbers].astype(np.float32), "targets": self.targets[numbers]}
