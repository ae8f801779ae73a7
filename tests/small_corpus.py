"""Small corpus of built-in scenes, and its features from a tiny encoder with random weights."""

from pathlib import Path

import torch

from mellow_platform import storage
from mellow_platform.data import builtin_corpora
from mellow_platform.data.scenes import Scene
from mellow_platform.model import HTSATEncoder, encoder_config
from mellow_platform.model.folder import save_pretrained
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess


def write_corpus(uri: str, clips: dict[str, int]) -> None:
    """Write a corpus of scenes to `uri`, with `clips` clips per split."""
    scenes: dict[str, list[Scene]] = {}
    for split, count in clips.items():
        scenes[split] = []
        for number in range(count):
            scene, audio = builtin_corpora.scene_clip(0, split, number)
            storage.write_bytes(storage.join(uri, "audio", builtin_corpora.scene_path(split, number)), audio)
            scenes[split].append(scene)
    builtin_corpora.write_scene_corpus(uri, scenes, seed=0, rounds=1)


def write_features(root: Path) -> None:
    """Write a corpus of nine scenes, a tiny encoder with random weights, and the corpus's features below `root`."""
    write_corpus(str(root / "corpus"), {"train": 6, "val": 2, "test": 1})
    torch.manual_seed(0)
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")).eval(), str(root / "encoder"))
    folders = {name: str(root / name) for name in ("corpus", "encoder")}
    preprocess(PreprocessConfig(**folders, size="mellow-tiny", output=str(root / "features"), features="encoder"))
