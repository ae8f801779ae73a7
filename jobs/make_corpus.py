"""Write a corpus that needs no download: synthetic scenes, or questions about labelled recordings.

ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- \
    python jobs/make_corpus.py --output /data/scenes
python jobs/make_corpus.py --source recordings --recordings /data/ESC-50-master --output /data/corpus
"""

import json

import ray

from mellow_platform import storage
from mellow_platform.config import CorpusConfig, load
from mellow_platform.data import corpus
from mellow_platform.data.records import SPLITS
from mellow_platform.data.scenes import Scene

CLIPS_A_TASK = 32


def make_scenes(row: dict, output: str, seed: int) -> dict:
    """Write the audio of one stretch of scenes, and return their truth."""
    scenes = []
    for number in range(row["start"], row["stop"]):
        scene, audio = corpus.scene_clip(seed, row["split"], number)
        storage.write_bytes(storage.join(output, "audio", corpus.scene_path(row["split"], number)), audio)
        scenes.append(scene)
    return row | {"scenes": scenes}


def main() -> None:
    config = load(CorpusConfig)
    if config.source == "recordings":
        assert config.recordings
        summary = corpus.recording_corpus(config.recordings, config.output, config.seed, config.rounds)
        for warning in summary["warnings"]:
            print(f"warning: {warning}")
        result = {key: value for key, value in summary.items() if key not in ("warnings", "labels")}
    else:
        clips = dict(zip(SPLITS, (config.train_clips, config.val_clips, config.test_clips), strict=True))
        rows = [
            {"split": split, "start": start, "stop": min(start + CLIPS_A_TASK, count)}
            for split, count in clips.items()
            for start in range(0, count, CLIPS_A_TASK)
        ]
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            make_scenes, fn_kwargs={"output": config.output, "seed": config.seed}
        )
        parts = sorted(made.take_all(), key=lambda row: row["start"])
        scenes: dict[str, list[Scene]] = {
            split: [scene for part in parts if part["split"] == split for scene in part["scenes"]] for split in SPLITS
        }
        rounds = config.rounds or corpus.SCENE_ROUNDS
        counts = corpus.write_scene_corpus(config.output, scenes, seed=config.seed, rounds=rounds)
        result = {"questions": counts}
    print(json.dumps({"corpus": config.output} | result))


if __name__ == "__main__":
    main()
