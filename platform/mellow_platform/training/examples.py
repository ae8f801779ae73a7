"""TEMP"""

import numpy as np
from mellow_platform.data.shards import Manifest, read_records
from mellow_platform.features.store import FeatureStore
from mellow_platform.model import pad_labels


class AnswerExamples:
    @classmethod
    def load(cls, shards, split, **kw):
        self = cls()
        records = read_records(shards, split)
        store = FeatureStore.load(shards)
        self.features = store.arrays
        self.clips = np.array(
            [
                [store.rows[one], store.rows[two]]
                for one, two in zip(records["clip1"].to_pylist(), records["clip2"].to_pylist(), strict=True)
            ],
            np.int64,
        ).reshape(-1, 2)
        self.prompts = np.array(records["prompt_ids"].to_pylist(), np.int64)
        self.labels = pad_labels(records["answer_ids"].to_pylist()).numpy()
        self.sizes = (self.labels >= 0).sum(1)
        self.ids = [f"{split}/{n}" for n in range(len(self.clips))]
        return self

    def __len__(self):
        return len(self.clips)

    def order(self, seed, epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def collate(self, seed, epoch, numbers):
        c = self.clips[numbers]
        return {
            "input_ids": self.prompts[numbers],
            "labels": self.labels[numbers],
            "audio_frames": self.features["frames"][c],
            "audio_latent": self.features["latent"][c],
        }
