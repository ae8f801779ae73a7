"""Kill a training run at random moments, and compare its committed log with that of an undisturbed run.

    python tests/chaos/kill_training.py [--kills 10] [--seed 0]

A cluster of three nodes trains a tiny Mellow from an S3 server that fails one request in twenty. Workers, nodes (some
after a preemption notice) and drivers are killed with SIGKILL; a killed driver is submitted again. At the end the
committed log of (step, example ids, loss) is compared with that of an undisturbed run:

    lost        steps of the undisturbed run that are missing from the log, and steps that a kill removed from the log
    repeated    steps that are in the log twice
    different   steps with other examples, or a loss that differs by more than 1e-5
    redone      steps that were repeated because no checkpoint contained them, to within the steps of a second

`redone` must be at most one checkpoint interval per kill. The last line has these counts as JSON; the exit status is 1
if one of them is wrong.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # has only the script's folder by default

import tests  # noqa: F401  # sets a token for Ray, before Ray is imported

# isort: split
import torch

from mellow_platform import storage
from mellow_platform.model import HTSATEncoder, encoder_config
from mellow_platform.model.folder import save_pretrained
from mellow_platform.training.checkpoints import POSITION, CheckpointStore
from mellow_platform.training.trainer import RESULT
from tests.chaos.cluster import DRIVER, NODE, WORKER, ChaosCluster
from tests.object_storage import object_store
from tests.small_corpus import write_corpus

FAILURES = 0.05  # share of storage requests
TOLERANCE = 1e-5
NOTICE = "notice"  # kill of a node after a preemption notice
PATIENCE = 300  # seconds to wait for progress
NOTICE_SECONDS = 30  # within which a notice must lead to a checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--checkpoint-every", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        counts = kill_training(Path(folder), options.kills, options.seed, options.steps, options.checkpoint_every)
    print(json.dumps(counts))
    wrong = counts["lost"] + counts["repeated"] + counts["different"] + counts["notices"] - counts["notices_saved"]
    wrong += options.kills - counts["kills"]
    sys.exit(int(wrong > 0 or counts["redone"] > counts["kills"] * options.checkpoint_every))


def kill_training(folder: Path, kills: int, seed: int, steps: int, checkpoint_every: int) -> dict[str, Any]:
    """Train `steps` steps twice, the second time with `kills` kills, and return the counts of their comparison.

    Args:
        folder: folder for the storage server's files and the drivers' logs.
    """
    with (
        object_store(folder / "s3", failures=FAILURES, seed=seed) as store,
        ChaosCluster(store.env, nodes=2, cpus=3, head_cpus=1) as cluster,
    ):
        examples = write_shards(store.uri, cluster, folder / "shards.log")
        undisturbed = Run(store.uri, "undisturbed", cluster, folder, steps, checkpoint_every, examples)
        undisturbed.submit()
        undisturbed.wait()
        run = Run(store.uri, "disturbed", cluster, folder, steps, checkpoint_every, examples)
        disturbance = Disturbance(run, random.Random(seed), kills)
        disturbance.complete_run()
        expected, found = undisturbed.log(), run.log()
        result = run.result()
        print(f"{store.failed} of {store.requests} storage requests failed")
        weights = [each.published()["files"]["model.safetensors"] for each in (undisturbed, run)]
    counts = compare(expected, found)
    return {
        "kills": disturbance.killed,
        **counts,
        "lost": counts["lost"] + disturbance.lost,
        "redone": result["redone_steps"],
        "notices": disturbance.notices,
        "notices_saved": disturbance.saved,
        "same_weights": weights[0] == weights[1],
    }


def write_shards(uri: str, cluster: ChaosCluster, log: Path) -> int:
    """Write feature shards of a few scenes with a random encoder; return the number of training examples."""
    write_corpus(storage.join(uri, "corpus"), {"train": 24, "val": 1, "test": 1})
    torch.manual_seed(0)
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")).eval(), storage.join(uri, "encoder"))
    driver = cluster.run_driver(
        ["jobs/preprocess.py", "--corpus", f"{uri}/corpus", "--size", "mellow-tiny", "--output", f"{uri}/features",
         "--features", "encoder", "--encoder", f"{uri}/encoder", "--encoder-workers", "1"], log,
    )  # fmt: skip
    if driver.wait(PATIENCE):
        raise RuntimeError(f"preprocessing failed:\n{log.read_text()[-3000:]}")
    return len(storage.read_json(f"{uri}/corpus/train.json"))


class Run:
    """A training run on the cluster, which can be submitted repeatedly."""

    def __init__(
        self, uri: str, name: str, cluster: ChaosCluster, folder: Path, steps: int, checkpoint_every: int, examples: int
    ):
        self.cluster, self.steps, self.checkpoint_every = cluster, steps, checkpoint_every
        self.folder = storage.join(uri, name, "run")
        self.output = storage.join(uri, name, "model")
        self.file = folder / f"{name}.log"
        batch = 64  # steps take a fifth of a second, and kills and notices take seconds to arrive
        self.command = [
            "jobs/train.py", "--shards", f"{uri}/features", "--encoder", f"{uri}/encoder", "--size", "mellow-tiny",
            "--storage", storage.join(uri, name), "--run", "run", "--output", self.output,
            "--batch", str(batch), "--micro-batch", "16", "--epochs", str(steps / -(-examples // batch)),
            "--checkpoint-every", str(checkpoint_every), "--scaling.max-failures", "-1",
        ]  # fmt: skip
        self.driver: subprocess.Popen | None = None

    def submit(self) -> subprocess.Popen:
        self.driver = self.cluster.run_driver(self.command, self.file)
        return self.driver

    def wait(self) -> None:
        """Wait until the run is complete.

        Raises:
            RuntimeError: the driver failed.
        """
        assert self.driver
        if self.driver.wait(2 * PATIENCE):
            raise RuntimeError(f"the driver failed:\n{self.file.read_text()[-5000:]}")

    def position(self) -> int:
        uri = storage.join(self.folder, POSITION)
        return storage.read_json(uri)["step"] if storage.exists(uri) else -1

    def wait_for(self, step: int) -> None:
        """Wait until the run reaches `step` or its end.

        Raises:
            RuntimeError: the driver failed, or the run does not reach the step within `PATIENCE`.
        """
        until = time.monotonic() + PATIENCE
        while self.position() < step and not storage.exists(storage.join(self.folder, RESULT)):
            if (self.driver and self.driver.poll()) or time.monotonic() > until:
                raise RuntimeError(f"the run does not reach step {step}:\n{self.file.read_text()[-5000:]}")
            time.sleep(0.3)

    def log(self) -> list[dict[str, Any]]:
        """Return the committed log."""
        return CheckpointStore(self.folder).read_log().to_pylist()

    def committed(self) -> int:
        """Return the step of the latest complete checkpoint; 0 if there is none."""
        checkpoints = CheckpointStore(self.folder).checkpoints()
        return checkpoints[-1].step if checkpoints else 0

    def result(self) -> dict[str, Any]:
        return storage.read_json(storage.join(self.folder, RESULT))

    def published(self) -> dict[str, Any]:
        return storage.read_json(storage.join(self.output, "training.json"))


class Disturbance:
    """Kills at random steps of a run, one after another."""

    def __init__(self, run: Run, rng: random.Random, kills: int):
        self.run, self.rng = run, rng
        kinds = [DRIVER, NOTICE, WORKER, NODE]
        self.kinds = [kinds[number % len(kinds)] for number in range(kills)]
        rng.shuffle(self.kinds)
        # Steps close together kill a run that is still restarting.
        # The last two fifths have no kills, because a notice takes seconds to arrive, and the run must not end before.
        self.steps = sorted(rng.randrange(run.steps * 3 // 5) for _ in range(kills))
        self.killed = self.lost = self.notices = self.saved = 0

    def complete_run(self) -> None:
        """Submit the run, apply every kill, and wait for its end."""
        run = self.run
        driver = run.submit()
        for step, kind in zip(self.steps, self.kinds, strict=True):
            run.wait_for(step)
            time.sleep(self.rng.random())
            before = run.log()
            victim = self._kill_node(kind) if kind in (NODE, NOTICE) else self._kill(kind, driver)
            self.killed += bool(victim)
            print(f"step {run.position():4d}: killed {victim or f'no {kind}: the run has ended'}", flush=True)
            if kind == DRIVER:
                driver = run.submit()
            # Committed steps must stay in the log.
            self.lost += compare(before, run.log())["lost"]
        run.wait()

    def _kill(self, kind: str, driver: subprocess.Popen) -> str:
        """Kill a driver or a worker as soon as one exists, and return its name; "" if the run has ended."""
        until = time.monotonic() + PATIENCE
        while not (victim := self.run.cluster.kill(kind, self.rng, driver)) and driver.poll() is None:
            if time.monotonic() > until:
                raise RuntimeError(f"no {kind} to kill after {PATIENCE} s")
            time.sleep(0.1)
        return victim

    def _kill_node(self, kind: str) -> str:
        """Kill a node that trains, for `NOTICE` after a preemption notice and the checkpoint that it triggers."""
        cluster = self.run.cluster
        self.run.wait_for(self.run.position() + 1)
        until = time.monotonic() + PATIENCE
        while not (node := cluster.host_of("ray::RayTrainWorker")):
            if time.monotonic() > until:
                raise RuntimeError(f"no node trains after {PATIENCE} s")
            time.sleep(0.3)
        if kind == NOTICE:
            cluster.give_notice(node)
            self.notices += 1
            self.saved += self._is_saved_between_checkpoints()
        cluster.kill_node(node)
        return f"node {node.pid}" + " after a notice" * (kind == NOTICE)

    def _is_saved_between_checkpoints(self) -> bool:
        """Return whether a checkpoint at a step off the interval appears within `NOTICE_SECONDS`."""
        until = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < until:
            committed = self.run.committed()
            if committed % self.run.checkpoint_every and committed < self.run.steps:
                return True
            time.sleep(0.2)
        return False


def compare(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, int]:
    """Count the steps of the log `expected` that `found` lacks, repeats, or has with other values."""
    rows = {row["step"]: row for row in found}
    shared = [(row, rows[row["step"]]) for row in expected if row["step"] in rows]
    return {
        "lost": len(expected) - len(shared),
        "repeated": len(found) - len(rows),
        "different": sum(
            one["examples"] != other["examples"] or abs(one["loss"] - other["loss"]) > TOLERANCE
            for one, other in shared
        ),
    }


if __name__ == "__main__":
    main()
