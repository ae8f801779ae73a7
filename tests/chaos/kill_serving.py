"""Kill parts of the endpoint under load, and count wrong and lost answers.

python tests/chaos/kill_serving.py               # six minutes on two cores
python tests/chaos/kill_serving.py --rounds 3    # three kills of each kind

On the local cluster (`mellow cluster up --local`), with a random tiny model on two serving nodes, clients send requests
without pause and without retries: half of the clients stream, and half of the requests are greedy. Meanwhile one model
replica, one serving node with all its processes, and the Serve controller on the head are killed with SIGKILL; a new
node replaces the killed one, as on Kubernetes. Every answer is compared with the answer to the same request before the
kills. Recovery ends when both replicas run again and the controller responds.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tests  # noqa: F401  # its token for Ray, before Ray is imported

# isort: split
import httpx
import psutil
import yaml

from mellow_platform import cluster
from tests.conftest import REPOSITORY
from tests.serve_app import clip, question, replicas_of, serve_details
from tests.tiny_model import write_tiny_model

VICTIMS = ("replica", "node", "controller")
CLIENTS = 8
CLIPS = 12
TOKENS = 48
REPLICAS = 2
CALM_SECONDS = 8.0  # seconds of load before a kill, and after the recovery
PATIENCE = 240.0  # timeout of recovery, in seconds
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Ask:
    """Request with one right answer: greedy, or sampled with a seed."""

    sound: int
    greedy: bool
    stream: bool

    def body(self) -> bytes:
        sampling: dict[str, Any] = {} if self.greedy else {"temperature": 1.0, "seed": self.sound}
        return question(clip(self.sound, seconds=2.0), max_tokens=TOKENS, stream=self.stream, **sampling)


@dataclass
class Tally:
    """Counts of requests, wrong and lost answers, and the right answers by (sound, greedy)."""

    expected: dict[tuple[int, bool], str]
    requests: int = 0
    wrong: int = 0
    lost: int = 0
    slowest: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, ask: Ask, answer: str | None, reason: str, seconds: float) -> None:
        with self.lock:
            self.requests += 1
            self.slowest = max(self.slowest, seconds)
            if answer is None:
                self.lost += 1
                self.reasons[reason] += 1
            elif answer != self.expected[ask.sound, ask.greedy]:
                self.wrong += 1
                self.reasons[f"expected {self.expected[ask.sound, ask.greedy]!r}, got {answer!r}"] += 1


def answer_of(client: httpx.Client, ask: Ask) -> tuple[str | None, str]:
    """Return (answer, "") of a request, or (None, reason)."""
    try:
        if not ask.stream:
            response = client.post("/v1/chat/completions", content=ask.body(), headers=JSON)
            if response.status_code != 200:
                return None, f"status {response.status_code}: {response.text[:200]}"
            return response.json()["choices"][0]["message"]["content"], ""
        text, done = "", False
        with client.stream("POST", "/v1/chat/completions", content=ask.body(), headers=JSON) as response:
            if response.status_code != 200:
                return None, f"status {response.status_code}"
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return None, f"error event: {event['error']['message']}"
                    text += event["choices"][0]["delta"].get("content") or ""
        return (text, "") if done else (None, "the stream ended without [DONE]")
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return None, repr(error)


class Chaos:
    """Local cluster with the endpoint, and methods that kill parts of it."""

    def __init__(self, folder: Path):
        self.model = str(folder / "model")
        write_tiny_model(self.model)
        os.environ["MELLOW_MODEL"] = self.model  # nodes inherit it
        self.cluster = cluster.up(folder=folder / "cluster", dashboard_port=cluster.free_port())
        self.url = f"http://127.0.0.1:{cluster.free_port()}"
        self._deploy(folder)

    def _deploy(self, folder: Path) -> None:
        config = yaml.safe_load((REPOSITORY / "serve/config.yaml").read_text())
        host, port = self.url.removeprefix("http://").split(":")
        config["http_options"] = {"host": host, "port": int(port)}
        model = config["applications"][1]["deployments"][0]
        model["autoscaling_config"] |= {"min_replicas": REPLICAS, "max_replicas": REPLICAS}
        # Otherwise both may be on the killed node; a GPU node has room for one replica only.
        model["max_replicas_per_node"] = 1
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        program = str(Path(sys.executable).with_name("serve"))
        environment = os.environ | self.cluster.environment
        subprocess.run([program, "deploy", str(file)], env=environment, check=True, cwd=REPOSITORY)
        self.wait(lambda: httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200, "readiness")
        self.wait(self.is_whole, f"{REPLICAS} replicas")

    def is_whole(self, without: Collection[int] = ()) -> bool:
        """Return whether all replicas run, none of them in the killed processes `without`."""
        pids = {replica["pid"] for replica in self.replicas()}
        return len(pids) == REPLICAS and pids.isdisjoint(without)

    def replicas(self) -> list[dict[str, Any]]:
        return replicas_of(serve_details(self.cluster.dashboard), "mellow")

    def wait(self, until: Callable[[], bool], event: str) -> float:
        """Wait until a condition is true and return the seconds that it took; `event` names it in the error."""
        start = time.monotonic()
        while time.monotonic() - start < PATIENCE:
            with contextlib.suppress(httpx.HTTPError, KeyError):
                if until():
                    return time.monotonic() - start
            time.sleep(0.25)
        raise TimeoutError(f"{event}: not within {PATIENCE:g} s; logs are in {self.cluster.temporary}")

    def kill_replica(self, rng: random.Random) -> Callable[[], bool]:
        victim = rng.choice(self.replicas())
        psutil.Process(victim["pid"]).kill()
        return lambda: self.is_whole(without=[victim["pid"]])

    def kill_node(self, rng: random.Random) -> Callable[[], bool]:
        serving = {node.address: node for node in self.cluster.nodes if node.group == "serving"}
        replicas = self.replicas()
        victim = serving[rng.choice([replica["node_ip"] for replica in replicas if replica["node_ip"] in serving])]
        dead = [replica["pid"] for replica in replicas if replica["node_ip"] == victim.address]
        for process in victim.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.nodes.remove(victim)
        self.cluster.start_node(next(group for group in self.cluster.groups if group.name == "serving"))
        return lambda: self.is_whole(without=dead)

    def kill_controller(self, rng: random.Random) -> Callable[[], bool]:
        def controllers() -> list[psutil.Process]:
            head = next(node for node in self.cluster.nodes if node.group == cluster.HEAD)
            return [process for process in head.processes() if _title(process).startswith("ray::ServeController")]

        (victim,) = controllers()
        victim.kill()
        return lambda: [process.pid for process in controllers()] not in ([], [victim.pid]) and self.is_whole()


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, IndexError):
        return process.cmdline()[0]
    return ""


@contextlib.contextmanager
def load(url: str, tally: Tally, seed: int) -> Iterator[None]:
    """Run clients that send requests without pause during the block, and wait for their last answers."""
    stop = threading.Event()

    def send_requests(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            while not stop.is_set():
                ask = Ask(rng.randrange(CLIPS), rng.random() < 0.5, number % 2 == 0)
                start = time.monotonic()
                tally.count(ask, *answer_of(client, ask), time.monotonic() - start)

    clients = [threading.Thread(target=send_requests, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS, help="parts to kill, in this order")
    parser.add_argument("--rounds", type=int, default=1, help="number of kills per part")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder))
        try:
            result = run(chaos, arguments.victims * arguments.rounds, arguments.seed)
        finally:
            chaos.cluster.down()
    print(json.dumps(result))
    if result["wrong"] or result["lost"]:
        sys.exit(1)


def run(chaos: Chaos, victims: Sequence[str], seed: int) -> dict[str, Any]:
    """Kill the victims one by one under load; return the counts."""
    rng = random.Random(seed)
    expected: dict[tuple[int, bool], str] = {}
    with httpx.Client(base_url=chaos.url, timeout=PATIENCE) as client:
        for sound in range(CLIPS):
            for greedy in (True, False):
                answer, reason = answer_of(client, Ask(sound, greedy, False))
                if answer is None:
                    raise RuntimeError(f"no answer before the first kill: {reason}")
                expected[sound, greedy] = answer
    print(f"{len(set(expected.values()))} distinct answers to {len(expected)} questions")
    total = Tally(expected)
    recovery: dict[str, float] = {}
    kills = dict(zip(VICTIMS, (chaos.kill_replica, chaos.kill_node, chaos.kill_controller), strict=True))
    for number, name in enumerate(victims):
        tally = Tally(expected)
        with load(chaos.url, tally, seed + number):
            time.sleep(CALM_SECONDS)
            seconds = chaos.wait(kills[name](rng), f"recovery from the loss of a {name}")
            time.sleep(CALM_SECONDS)
        print(
            f"{name}: recovered in {seconds:.1f} s; {tally.requests} requests, {tally.wrong} wrong, {tally.lost} lost, "
            f"slowest answer {tally.slowest:.1f} s"
        )
        for reason, count in tally.reasons.items():
            print(f"  {count} times {reason}")
        recovery[name] = round(max(seconds, recovery.get(name, 0.0)), 1)
        total.requests += tally.requests
        total.wrong += tally.wrong
        total.lost += tally.lost
    return {
        "requests": total.requests,
        "wrong": total.wrong,
        "lost": total.lost,
        "recovery_s": max(recovery.values()),
        "recovery_of_s": recovery,
    }


if __name__ == "__main__":
    main()
