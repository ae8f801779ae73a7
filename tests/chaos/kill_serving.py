"""Kill what serves, under load, and count the answers that were wrong or did not come.

python tests/chaos/kill_serving.py               # six minutes on two cores
python tests/chaos/kill_serving.py --rounds 3    # each is killed three times

On the local cluster (`mellow cluster up --local`), with a random tiny model on two serving nodes, clients ask without
pause, half of them for streams, half of them greedily, and never repeat a request. While they do, one model replica,
one serving node with all that runs on it, and the Serve controller on the head are killed with SIGKILL; in place of the
node another one starts, as Kubernetes would have it. Every answer is compared with the one that was given before
anything was killed. A kill is recovered from when both replicas run again and the controller answers.
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
CALM_SECONDS = 8.0  # of load before a kill, and after what it took to recover
PATIENCE = 240.0  # seconds that recovery may take
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Ask:
    """A request that has one right answer: greedy, or drawn with its seed."""

    sound: int
    greedy: bool
    stream: bool

    def body(self) -> bytes:
        drawn: dict[str, Any] = {} if self.greedy else {"temperature": 1.0, "seed": self.sound}
        return question(clip(self.sound, seconds=2.0), max_tokens=TOKENS, stream=self.stream, **drawn)


@dataclass
class Tally:
    """What became of the requests."""

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
    """Return the answer to a request, or None and why there is none."""
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
        return (text, "") if done else (None, "the stream ended silently")
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return None, repr(error)


class Chaos:
    """A local cluster that serves, and the means to kill parts of it."""

    def __init__(self, folder: Path):
        self.model = str(folder / "model")
        write_tiny_model(self.model)
        os.environ["MELLOW_MODEL"] = self.model  # the nodes' own
        self.cluster = cluster.up(folder=folder / "cluster", dashboard_port=cluster.free_port())
        self.url = f"http://127.0.0.1:{cluster.free_port()}"
        self._deploy(folder)

    def _deploy(self, folder: Path) -> None:
        config = yaml.safe_load((REPOSITORY / "serve/config.yaml").read_text())
        host, port = self.url.removeprefix("http://").split(":")
        config["http_options"] = {"host": host, "port": int(port)}
        model = config["applications"][1]["deployments"][0]
        model["autoscaling_config"] |= {"min_replicas": REPLICAS, "max_replicas": REPLICAS}
        # Else both may be on the node that is killed; on GPU nodes there is room for one on each.
        model["max_replicas_per_node"] = 1
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        program = str(Path(sys.executable).with_name("serve"))
        environment = os.environ | self.cluster.environment
        subprocess.run([program, "deploy", str(file)], env=environment, check=True, cwd=REPOSITORY)
        self.wait(lambda: httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200, "an answer")
        self.wait(self.is_whole, f"{REPLICAS} replicas")

    def is_whole(self, without: Collection[int] = ()) -> bool:
        """Whether all replicas run, and none of them in a process that is dead."""
        pids = {replica["pid"] for replica in self.replicas()}
        return len(pids) == REPLICAS and pids.isdisjoint(without)

    def replicas(self) -> list[dict[str, Any]]:
        return replicas_of(serve_details(self.cluster.dashboard), "mellow")

    def wait(self, until: Callable[[], bool], what: str) -> float:
        """Wait until something is so and return the seconds that it took."""
        start = time.monotonic()
        while time.monotonic() - start < PATIENCE:
            with contextlib.suppress(httpx.HTTPError, KeyError):
                if until():
                    return time.monotonic() - start
            time.sleep(0.25)
        raise TimeoutError(f"{what}: not within {PATIENCE:g} s; logs are in {self.cluster.temporary}")

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
    """Have clients ask without pause while the block runs; those that wait at its end are waited for."""
    over = threading.Event()

    def ask_on(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            while not over.is_set():
                ask = Ask(rng.randrange(CLIPS), rng.random() < 0.5, number % 2 == 0)
                start = time.monotonic()
                tally.count(ask, *answer_of(client, ask), time.monotonic() - start)

    clients = [threading.Thread(target=ask_on, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        over.set()
        for client in clients:
            client.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS, help="what is killed, in this order")
    parser.add_argument("--rounds", type=int, default=1, help="times that each is killed")
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
    """Kill one victim after the other under load; return the counts."""
    rng = random.Random(seed)
    expected: dict[tuple[int, bool], str] = {}
    with httpx.Client(base_url=chaos.url, timeout=PATIENCE) as client:
        for sound in range(CLIPS):
            for greedy in (True, False):
                answer, reason = answer_of(client, Ask(sound, greedy, False))
                if answer is None:
                    raise RuntimeError(f"there is no answer before anything is killed: {reason}")
                expected[sound, greedy] = answer
    print(f"{len(set(expected.values()))} different answers to {len(expected)} questions")
    total = Tally(expected)
    recovery: dict[str, float] = {}
    kills = dict(zip(VICTIMS, (chaos.kill_replica, chaos.kill_node, chaos.kill_controller), strict=True))
    for number, name in enumerate(victims):
        tally = Tally(expected)
        with load(chaos.url, tally, seed + number):
            time.sleep(CALM_SECONDS)
            took = chaos.wait(kills[name](rng), f"recovery from the loss of a {name}")
            time.sleep(CALM_SECONDS)
        print(
            f"{name}: recovered in {took:.1f} s; {tally.requests} requests, {tally.wrong} wrong, {tally.lost} lost, "
            f"the slowest answer in {tally.slowest:.1f} s"
        )
        for reason, count in tally.reasons.items():
            print(f"  {count} times {reason}")
        recovery[name] = round(max(took, recovery.get(name, 0.0)), 1)
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
