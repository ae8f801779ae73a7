"""Kill a preprocessing job at seeded random moments, and compare its output with that of an undisturbed run.

python tests/chaos/kill_preprocess.py --kills 10 --seed 0      # about ten minutes on two cores

The corpus is in object storage, whose server fails one request in twenty. A worker, a node or the driver of a job on a
cluster of two nodes is killed in turn; the job is resubmitted only after a kill of its driver. Counted are files of the
undisturbed run that are missing (`lost`), duplicate clips and additional files (`repeated`), files with other bytes
(`different`), and shards that were written more than once (`redone`): at most one per kill and logical CPU of the
cluster.

The last line is JSON; the exit code is 1 if anything was lost, repeated or different, or if too much was redone.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # otherwise, it contains only the script's folder

import tests  # noqa: F401  # sets its token for Ray before Ray is imported

# isort: split
import ray

from mellow_platform import storage
from mellow_platform.data.shards import Manifest
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from mellow_platform.progress import Progress
from tests.chaos.cluster import DRIVER, NODE, WORKER, ChaosCluster
from tests.object_storage import ObjectStore, object_store
from tests.shared_ray import SharedRay
from tests.small_corpus import write_corpus

CPUS = {"head": 1, "node": 1}  # logical CPUs, each with one shard in progress
CLIPS_PER_SHARD = 4
SHARDS = ("stock/", "clips/", "records/")
TIME_LIMIT = 1200.0  # seconds


def run(folder: Path, kills: int, seed: int, clips: int) -> dict[str, Any]:
    """Run the experiment in `folder` with a train split of `clips`; print a table, and return the result."""
    rng = random.Random(seed)
    order = [(WORKER, NODE, DRIVER)[number % 3] for number in range(kills)]
    rng.shuffle(order)
    with object_store(folder / "s3") as store:
        corpus = storage.join(store.uri, "corpus")
        write_corpus(corpus, {"train": clips, "val": 4, "test": 8})
        storage.write_bytes(storage.join(corpus, "audio/train/000001.flac"), b"not a sound")
        storage.write_bytes(
            storage.join(corpus, "audio/train/000003.flac"),
            storage.read_bytes(storage.join(corpus, "audio/train/000002.flac")),
        )
        undisturbed = storage.join(store.uri, "undisturbed")
        config = PreprocessConfig(
            corpus=corpus, output=undisturbed, size="mellow-tiny", clips_per_shard=CLIPS_PER_SHARD, records_per_shard=64
        )
        seconds = _undisturbed(config)
    with object_store(folder / "s3", failures=0.05, seed=seed) as store:
        disturbed = config.model_copy(update={"output": storage.join(store.uri, "disturbed")})
        events = _disturb(disturbed, store, order, rng, folder, seconds)
        written = Counter(_written(store, disturbed.output))
        failed = store.failed, store.requests
    with object_store(folder / "s3") as store:
        found = compare(undisturbed, disturbed.output)
    print(f"{'kill':>4}  {'after':>7}  {'shards':>6}  killed")
    for number, event in enumerate(events, 1):
        print(f"{number:4d}  {event['after']:6.1f}s  {event['shards']:6d}  {event['victim']}")
    print(f"{failed[0]} of {failed[1]} requests failed; {len(written)} shards were written")
    redone = sum(count - 1 for count in written.values())
    bound = len(events) * sum(CPUS.values())
    return {"kills": len(events)} | found | {"redone": redone, "redone_at_most": bound, "shards": len(written)}


def _undisturbed(config: PreprocessConfig) -> float:
    """Run the job on a cluster of this process; return its seconds."""
    SharedRay.use(num_cpus=2, object_store_memory=256 << 20)
    try:
        progress = Progress("undisturbed", 1)
        preprocess(config)
        return progress.seconds
    finally:
        ray.shutdown()


def _disturb(
    config: PreprocessConfig, store: ObjectStore, order: list[str], rng: random.Random, folder: Path, seconds: float
) -> list[dict[str, Any]]:
    """Run the job on a cluster until it finishes; kill at random moments, and return the kills.

    A moment is a random number of written shards, so that kills are spread over the job on any machine, and a random
    delay of up to two seconds.
    """
    settings = folder / "preprocess.yaml"
    settings.write_text(json.dumps(config.model_dump(exclude_none=True)))
    command = ["jobs/preprocess.py", "--config", str(settings)]
    log = folder / "job.log"
    files = [name for name, _ in storage.find(config.output.replace("/disturbed", "/undisturbed"))]
    total = sum(name.startswith(SHARDS) for name in files)
    moments = sorted(rng.uniform(0.0, 0.85) * total for _ in order)
    events: list[dict[str, Any]] = []
    start = time.monotonic()
    with ChaosCluster(store.env, nodes=1, cpus=CPUS["node"], head_cpus=CPUS["head"]) as cluster:
        driver = cluster.run_driver(command, log)
        while time.monotonic() - start < TIME_LIMIT + seconds:
            if driver.poll() == 0:
                return events
            if driver.poll() is not None:
                raise RuntimeError(f"the job failed with status {driver.returncode}:\n{log.read_text()[-4000:]}")
            done = len(set(_written(store, config.output)))
            if len(events) < len(order) and done >= moments[len(events)]:
                time.sleep(rng.uniform(0.0, 2.0))
                victim = cluster.kill(order[len(events)], rng, driver)
                if victim:
                    events.append({"after": time.monotonic() - start, "shards": done, "victim": victim})
                if driver.poll() is not None and driver.returncode != 0:
                    driver = cluster.run_driver(command, log)
            time.sleep(0.2)
    raise TimeoutError(f"the job did not end:\n{log.read_text()[-4000:]}")


def _written(store: ObjectStore, output: str) -> list[str]:
    """Return the shards written to the set `output`, once per write."""
    return [uri for folder in SHARDS for uri in store.written(f"{output}/{folder}")]


def compare(undisturbed: str, disturbed: str) -> dict[str, int]:
    """Return the numbers of lost and different files in `disturbed`, and of duplicate clips and additional files."""
    expected, found = Manifest.read(undisturbed), Manifest.read(disturbed)
    existing = {name for name, _ in storage.find(disturbed)}
    others = ("stock/", "processor/", "statistics.")
    names = set(expected.files) | {name for name, _ in storage.find(undisturbed) if name.startswith(others)}
    lost = names - existing
    different = {
        name
        for name in names - lost
        if storage.read_bytes(f"{undisturbed}/{name}") != storage.read_bytes(f"{disturbed}/{name}")
    }
    extra = {name for name in existing if name.startswith(SHARDS)} - names
    clip_ids = found.read_table(disturbed, "clips", ["clip_id"])["clip_id"].to_pylist()
    repeated = len(clip_ids) - len(set(clip_ids)) + len(extra)
    different |= {"manifest.json"} if expected.content_hash != found.content_hash else set()
    return {"lost": len(lost), "repeated": repeated, "different": len(different)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=400, help="clips of the train split")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), arguments.kills, arguments.seed, arguments.clips)
    print(json.dumps(result))
    wrong = result["lost"] or result["repeated"] or result["different"] or result["redone"] > result["redone_at_most"]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
