"""Cluster of several Ray nodes on this machine whose workers, nodes and drivers can be killed with SIGKILL.

Each node is one `ray start` with its own loopback address; drivers connect to the head at 127.0.0.1. The cluster's
files are in its own folder, so that `ray.init` in other processes does not connect to it by default.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated import autoscaler_pb2, gcs_pb2

from mellow_platform.authentication import authentication
from mellow_platform.cluster import free_port
from mellow_platform.launch import temporary_folder
from tests.conftest import REPOSITORY
from tests.object_storage import wait_for_port

DRIVER, WORKER, NODE = "driver", "worker", "node"
START_SECONDS = 180  # timeout until nodes have joined; a `ray start` ends after half a minute, and is started again
# Prefixes of processes without work of a job: idle workers, agents, and Ray's internal actors (ray::_StatsActor).
NOT_BUSY = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_")


class ChaosCluster(contextlib.AbstractContextManager):
    """Head and `nodes` more nodes with `cpus` logical CPUs each, which end with the `with` block.

    Args:
        env: additional environment variables of every node and driver (those of a storage server, for example).
        head_cpus: logical CPUs of the head, whose node is never killed.
    """

    def __init__(
        self,
        env: dict[str, str],
        nodes: int = 1,
        cpus: int = 2,
        head_cpus: int = 2,
        object_store_memory: int = 256 << 20,
    ):
        self.folder = temporary_folder()
        self.cpus, self.object_store_memory = cpus, object_store_memory
        self.address = f"127.0.0.1:{free_port()}"
        self.env = os.environ | authentication(self.folder) | {
            "RAY_ADDRESS": self.address,
            # A node that does not respond counts as lost after seconds, not after most of a minute.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "3",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "platform"), str(REPOSITORY)]),
        } | env  # fmt: skip
        self.addresses = 1
        self.ips: dict[int, str] = {}
        self.drivers: list[subprocess.Popen] = []
        self.head = self._start("127.0.0.1", head_cpus, "--head", f"--port={self.address.split(':')[1]}")
        self.nodes: list[subprocess.Popen] = []
        try:
            wait_for_port(int(self.address.split(":")[1]), seconds=60)
            for _ in range(nodes):
                self.add_node()
            self._wait_for_nodes(1 + nodes)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for process in [*self.drivers, *self.nodes, self.head]:
            _kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self) -> None:
        """Start one more node, which joins some seconds later."""
        self.addresses += 1
        self.nodes.append(self._start(f"127.0.0.{self.addresses}", self.cpus, f"--address={self.address}"))

    def run_driver(self, command: list[str], log: Path) -> subprocess.Popen:
        """Start a Python program on the cluster and append its output to `log`."""
        with log.open("a") as output:
            driver = subprocess.Popen(
                [sys.executable, *command], cwd=REPOSITORY, env=self.env, stdout=output, stderr=subprocess.STDOUT
            )
        self.drivers.append(driver)
        return driver

    def busy_workers(self) -> list[psutil.Process]:
        """Return the worker processes that run a task or an actor."""
        workers = []
        for node in [self.head, *self.nodes]:
            for process in _family(node):
                with contextlib.suppress(psutil.Error):
                    title = process.cmdline()[:1]
                    if title and title[0].startswith("ray::") and not title[0].startswith(NOT_BUSY):
                        workers.append(process)
        return workers

    def host_of(self, title: str) -> subprocess.Popen | None:
        """Return a node, except the head, with a worker whose title starts with `title`; None without one."""
        for node in self.nodes:
            for process in _family(node):
                with contextlib.suppress(psutil.Error):
                    if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                        return node
        return None

    def give_notice(self, node: subprocess.Popen, seconds: int = 60) -> None:
        """Tell Ray that a node will be removed in `seconds`, as a cloud's preemption notice does."""
        (node_id,) = [
            node_id for node_id, member in self._members().items() if member.node_manager_address == self.ips[node.pid]
        ]
        # Same call as `ray drain-node`, without its start of some seconds, during which a short run could finish.
        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        deadline = (time.time_ns() // 1_000_000) + 1000 * seconds
        GcsClient(address=self.address).drain_node(node_id.hex(), reason, "preempted", deadline)

    def kill_node(self, node: subprocess.Popen) -> None:
        """Kill a node and start another one."""
        self.nodes.remove(node)
        _kill(node)
        self.add_node()
        self._replace_ended()

    def kill(self, kind: str, rng: random.Random, driver: subprocess.Popen) -> str:
        """Kill the driver, a random busy worker or a random node with SIGKILL; return its description.

        A killed node is replaced. Returns "" if no worker is busy or the driver has ended.
        """
        if kind == DRIVER:
            if driver.poll() is not None:
                return ""
            driver.kill()
            driver.wait()
            return f"driver {driver.pid}"
        if kind == NODE:
            node = rng.choice(self.nodes)
            self.kill_node(node)
            return f"node {node.pid}"
        workers = self.busy_workers()
        if not workers:
            return ""
        victim = rng.choice(workers)
        with contextlib.suppress(psutil.Error):
            title = victim.cmdline()[0]
            victim.kill()
            return f"worker {victim.pid} ({title})"
        return ""

    def _start(self, ip: str, cpus: int, *options: str) -> subprocess.Popen:
        command = [
            sys.executable, str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
            f"--node-ip-address={ip}", f"--num-cpus={cpus}", f"--object-store-memory={self.object_store_memory}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--dashboard-agent-grpc-port={free_port()}", f"--metrics-export-port={free_port()}",
            f"--runtime-env-agent-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0", *options,
        ]  # fmt: skip
        if "--head" in options:
            command += [f"--temp-dir={self.folder}", "--include-dashboard=false"]
        with (self.folder / f"{ip}.log").open("w") as log:
            node = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.ips[node.pid] = ip
        return node

    def _replace_ended(self) -> None:
        """Restart nodes that ended: Ray gives a node a fixed time to start, which a busy machine exceeds."""
        for node in [node for node in self.nodes if node.poll() is not None]:
            self.nodes.remove(node)
            self.add_node()

    def _members(self) -> dict:
        """Return Ray's state of every live node, by id."""
        nodes = GcsClient(address=self.address).get_all_node_info()
        return {node_id: node for node_id, node in nodes.items() if node.state == gcs_pb2.GcsNodeInfo.ALIVE}

    def _wait_for_nodes(self, count: int) -> None:
        for _ in range(START_SECONDS):
            if (joined := len(self._members())) == count:
                return
            self._replace_ended()
            time.sleep(1)
        logs = "\n".join(log.read_text()[-2000:] for log in self.folder.glob("*.log"))
        raise TimeoutError(f"{joined} of {count} nodes joined within {START_SECONDS} s:\n{logs}")


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []


def _kill(process: subprocess.Popen) -> None:
    """Kill a process and its descendants, as a power failure does."""
    family = _family(process)
    process.kill()
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait()
