"""Preprocessing in bounded memory: a corpus several times the size of the object store streams through it."""

from pathlib import Path

import psutil
import pytest
import ray
import soundfile
from ray._private.internal_api import memory_summary

from mellow_platform.model import HTSATEncoder, encoder_config
from mellow_platform.model.folder import save_pretrained
from mellow_platform.preprocessing.preprocess_job import preprocess
from tests.shared_ray import SharedRay
from tests.test_preprocess import config, sound

MIB = 1 << 20
LOG_MEL = 1001 * 64 * 2  # bytes per spectrogram


def write_recordings(folder: Path, clips: int) -> None:
    """Write one-second clips with distinct bytes; most differ only in their last sample, which is fast."""
    folder.mkdir()
    for number in range(16):
        (folder / f"{number}.flac").write_bytes(sound(number))
    for number in range(16, clips):
        data, rate = soundfile.read(folder / f"{number % 16}.flac", dtype="int16")
        data[-1] = number
        soundfile.write(folder / f"{number}.flac", data, rate, subtype="PCM_16")


@pytest.mark.parametrize(
    ("clips", "object_store"),
    [(2000, 80 * MIB), pytest.param(6400, 256 * MIB, marks=pytest.mark.slow)],
)
@pytest.mark.extended
def test_corpus_larger_than_object_store(tmp_path, clips, object_store):
    write_recordings(tmp_path / "recordings", clips)
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")), str(tmp_path / "encoder"))
    SharedRay.use(num_cpus=2, object_store_memory=object_store)
    try:
        before = psutil.Process().memory_info().rss
        fields = {"features": "encoder", "encoder": str(tmp_path / "encoder"), "encoder_workers": 1}
        settings = config(
            tmp_path / "recordings", tmp_path / "set", source="recordings", **fields | {"clips_per_shard": 16}
        )
        manifest = preprocess(settings)
        grown = psutil.Process().memory_info().rss - before
        report = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    finally:
        ray.shutdown()
    assert clips * LOG_MEL > 3 * object_store
    assert manifest.counts["distinct_clips"] == clips
    assert "Spilled" not in report
    assert grown < object_store
