"""Audio-seconds per second of preprocessing on Ray Data, against a plain loop with the same functions.

python tests/benchmarks/preprocess.py            # about ten minutes on two cores; --quick in four

The run generates the files: WAV, FLAC, Ogg and MP3, at 32, 44.1 and 48 kHz, mono and stereo, 4 to 12 seconds. The loop,
one process with one thread, decodes each file, resamples it to 32 kHz and computes its log-mel spectrogram; the job
does the same and writes shards. So the number of cores bounds the ratio, and Ray and writing reduce it. Workers are
started, and files are read once, before the measurement; loop and job take turns, and figures are means of turns.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # otherwise, it contains only the script's folder

import tests  # noqa: F401  # sets its token for Ray before Ray is imported

# isort: split
import numpy as np
import ray
import torch

from mellow_platform import storage
from mellow_platform.data.audio import decode, encode
from mellow_platform.model import HTSATEncoder, MellowFeatureExtractor, encoder_config
from mellow_platform.model.folder import save_pretrained
from mellow_platform.preprocessing.clip_shards import EncodeShard, feature_shapes, shard_rows, write_clip_shards
from mellow_platform.preprocessing.corpus_plan import plan_corpus
from mellow_platform.preprocessing.inventory import write_inventory
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from tests.benchmarks.recorded import add_record_option, report

CONTAINERS = ("WAV", "FLAC", "OGG", "MP3")
RATES = (32_000, 44_100, 48_000)  # Hz
TURNS = 2
CLIPS_PER_SHARD = 128  # as in jobs/configs/mellow-v0/preprocess.yaml
CLIPS_ENCODED = 16  # per shard for the encoder, which takes 0.2 s per clip


def write_files(folder: Path, clips: int) -> float:
    """Write files of noise with tones; return their total seconds."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(write_file, itertools.repeat(folder), range(clips), chunksize=16))


def write_file(folder: Path, number: int) -> float:
    """Write one of the files; return its seconds."""
    rng = np.random.default_rng(number)
    rate, seconds, channels = RATES[number % 3], float(rng.uniform(4, 12)), 1 + number // 2 % 2
    times = np.arange(round(seconds * rate)) / rate
    samples = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 4000) * times)[:, None]
    samples = samples + rng.normal(0.0, 0.05, (len(times), channels))
    container = CONTAINERS[number % 4]
    name = f"{number:05d}.{container.lower()}"
    storage.write_bytes(str(folder / name), encode(samples.astype(np.float32), rate, container))
    return seconds


def loop(files: list[Path], extractor: MellowFeatureExtractor) -> float:
    """Return the seconds of one thread for all files."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    for file in files:
        extractor(decode(file.read_bytes(), extractor.sampling_rate))["input_features"][0].numpy().astype(np.float16)
    return time.perf_counter() - start


class Job:
    """The clip stage of the job on a folder of recordings."""

    def __init__(self, folder: Path, workers: int):
        self.folder, self.workers, self.turn = folder, workers, 0
        self.config = self.settings(folder / "out" / f"inventory-{workers}")
        plan = plan_corpus(self.config)
        start = time.perf_counter()
        self.clips = write_inventory(plan.units, self.config).distinct()
        self.inventory_seconds = time.perf_counter() - start

    def settings(self, output: Path, **fields) -> PreprocessConfig:
        return PreprocessConfig(source="recordings", corpus=str(self.folder / "audio"), output=str(output), **fields)

    def run(
        self, extractor: MellowFeatureExtractor, clips: int | None = None, per_shard: int = CLIPS_PER_SHARD, **fields
    ) -> float:
        """Write the shards of the first `clips`; return the seconds."""
        self.turn += 1
        config = self.settings(self.folder / "out" / f"{self.workers}-{self.turn}", **fields)
        shapes = feature_shapes(config, extractor.front_end, encoder_config("mellow-v0"))
        rows = shard_rows(self.clips[:clips], per_shard)
        start = time.perf_counter()
        receipts = list(write_clip_shards(rows, config, extractor.spectrogram, shapes))
        seconds = time.perf_counter() - start
        assert sum(receipt["read"] for receipt in receipts) == len(self.clips[:clips])
        return seconds


def encoder_rate(folder: str, extractor: MellowFeatureExtractor) -> float:
    """Return the clips per second of the published encoder in one thread, on stored log-mel spectrograms."""
    actor = EncodeShard(folder)
    log_mel = np.full((16, extractor.num_frames, extractor.feature_size), -30.0, np.float16)
    actor({"log_mel": log_mel.copy()})
    start = time.perf_counter()
    actor({"log_mel": log_mel.copy()})
    return 16 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer files")
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of logical CPUs (default: 1, 2, 4, ..., all)")
    add_record_option(parser)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    counts = arguments.workers or sorted({1, *(2**n for n in range(1, 8) if 2**n <= cores), cores})
    clips = 1024 if arguments.quick else 4096
    extractor = MellowFeatureExtractor.from_size("mellow-v0")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        audio_seconds = write_files(folder / "audio", clips)
        files = sorted((folder / "audio").iterdir())
        save_pretrained(HTSATEncoder(encoder_config("mellow-v0")), str(folder / "encoder"))
        loop(files[:32], extractor)
        rates: dict[str, list[float]] = {}
        ratios: dict[int, list[float]] = {}
        inventory_rate = 0.0
        for workers in counts:
            ray.init("local", num_cpus=workers, include_dashboard=False, logging_level="error", log_to_driver=False)
            job = Job(folder, workers)
            job.run(extractor, CLIPS_ENCODED * workers, CLIPS_ENCODED)
            for _ in range(TURNS):
                in_loop, on_ray = loop(files, extractor), job.run(extractor)
                rates.setdefault("loop", []).append(audio_seconds / in_loop)
                rates.setdefault(f"{workers}", []).append(audio_seconds / on_ray)
                ratios.setdefault(workers, []).append(in_loop / on_ray)
            inventory_rate = audio_seconds / job.inventory_seconds
            if workers == counts[-1]:
                few = CLIPS_ENCODED * 2 * workers
                encoding = {"features": "encoder", "encoder": str(folder / "encoder"), "encoder_workers": 1}
                encoded = few / job.run(extractor, few, CLIPS_ENCODED, **encoding)
            ray.shutdown()
        encoder_clips = encoder_rate(str(folder / "encoder"), extractor)
    mean = {name: statistics.fmean(values) for name, values in rates.items()}
    print(f"{clips} files, {audio_seconds:.0f} s of audio, {cores} cores")
    print(f"{'':24}{'audio-s/s':>10}{'to loop':>9}{'bound':>7}{'of bound':>10}")
    print(f"{'plain loop, 1 thread':24}{mean['loop']:10.0f}{1.0:9.2f}")
    speedups = {workers: statistics.fmean(values) for workers, values in ratios.items()}
    for workers, ratio in speedups.items():
        name, bound = f"Ray Data, {workers} workers", min(workers, cores)
        print(f"{name:24}{mean[str(workers)]:10.0f}{ratio:9.2f}{bound:7d}{ratio / bound:10.0%}")
    print(f"inventory (with the start of workers): {inventory_rate:.0f} audio-s/s")
    print(f"encoder stage, published HTSAT: {encoder_clips:.1f} clips/s in one thread, {encoded:.1f} in the whole job")
    best = speedups[counts[-1]]
    result = {
        "speedup_vs_loop": round(best, 3),
        "workers": counts[-1],
        "cores": cores,
        "share_of_bound": round(best / min(counts[-1], cores), 3),
        "audio_seconds_per_second": round(mean[str(counts[-1])], 1),
        "stock_audio_seconds_per_second": round(inventory_rate, 1),
        "loop_audio_seconds_per_second": round(mean["loop"], 1),
        "by_workers": {str(workers): round(ratio, 3) for workers, ratio in speedups.items()},
        "encoder_clips_per_second": round(encoder_clips, 2),
        "encoder_job_clips_per_second": round(encoded, 2),
    }
    report("preprocess", result, arguments.record)


if __name__ == "__main__":
    main()
