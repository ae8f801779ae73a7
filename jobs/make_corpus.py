"""Write a corpus without a download: synthetic scenes, or questions about labelled recordings.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/make_corpus.py --output /data/scenes
python jobs/make_corpus.py --source recordings --recordings /data/ESC-50-master --output /data/corpus
"""

import json
from typing import Any

from mellow_platform import job, storage
from mellow_platform.data.corpus_config import CorpusConfig

CLIPS_PER_TASK = 32


def make_corpus(config: CorpusConfig) -> None:
    from mellow_platform.data import builtin_corpora

    if config.source == "recordings":
        assert config.recordings
        summary = builtin_corpora.recording_corpus(config.recordings, config.output, config.seed, config.rounds)
        for warning in summary["warnings"]:
            print(f"warning: {warning}")
        result = {key: value for key, value in summary.items() if key not in ("warnings", "labels")}
    else:
        result = {"questions": make_scenes(config)}
    print(json.dumps({"corpus": config.output} | result))


def make_scenes(config: CorpusConfig) -> dict[str, int]:
    """Write a corpus of synthetic scenes; return the number of questions per split."""
    import ray

    from mellow_platform.data import builtin_corpora
    from mellow_platform.data.records import SPLITS

    clips = dict(zip(SPLITS, (config.train_clips, config.val_clips, config.test_clips), strict=True))
    rows = [
        {"split": split, "start": start, "stop": min(start + CLIPS_PER_TASK, count)}
        for split, count in clips.items()
        for start in range(0, count, CLIPS_PER_TASK)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        write_clips, fn_kwargs={"output": config.output, "seed": config.seed}
    )
    parts = sorted(dataset.take_all(), key=lambda row: row["start"])
    scenes = {
        split: [scene for part in parts if part["split"] == split for scene in part["scenes"]] for split in SPLITS
    }
    rounds = config.rounds or builtin_corpora.SCENE_ROUNDS
    return builtin_corpora.write_scene_corpus(config.output, scenes, seed=config.seed, rounds=rounds)


def write_clips(row: dict[str, Any], output: str, seed: int) -> dict[str, Any]:
    """Write the audio of the scenes `start` to `stop` of a split, and return the scenes."""
    from mellow_platform.data import builtin_corpora

    scenes = []
    for number in range(row["start"], row["stop"]):
        scene, audio = builtin_corpora.scene_clip(seed, row["split"], number)
        storage.write_bytes(storage.join(output, "audio", builtin_corpora.scene_path(row["split"], number)), audio)
        scenes.append(scene)
    return row | {"scenes": scenes}


if __name__ == "__main__":
    job.run(CorpusConfig, make_corpus)
