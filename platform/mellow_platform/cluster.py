"""Cluster of `infra/` on this machine: its node groups as Ray nodes, without Kubernetes.

Groups are read from the rendered manifests, with their resources, labels and settings. Each node is one `ray start`
with its own loopback address, and outlives the process that started it. A state file in `runs/cluster` lists the nodes,
so that another process can find and stop them.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from mellow_platform.authentication import authentication, read_token
from mellow_platform.launch import programs, temporary_folder

REPOSITORY = Path(__file__).resolve().parents[2]
DEFINITION = REPOSITORY / "infra" / "overlays" / "local"
FOLDER = REPOSITORY / "runs" / "cluster"
STATE = "cluster.json"
HEAD = "head"
GROUP_LABEL = "ray.io/node-group"
STARTS = 4  # attempts per node: Ray gives a node a fixed time to start, which a busy machine exceeds
JOIN_SECONDS = 180.0  # timeout until nodes have joined
STOP_SECONDS = 10.0
PORTS = range(20_000, 32_768)  # range of a cluster's ports; see `free_port`


@dataclass(frozen=True)
class Group:
    """Node group of the definition.

    Attributes:
        resources: logical resources per node, by Ray's names (CPU, GPU, memory in bytes, any other).
        env: environment variables of the nodes, except secrets and paths that exist only in containers.
    """

    name: str
    replicas: int
    resources: dict[str, float]
    labels: dict[str, str]
    env: dict[str, str]


@dataclass(frozen=True)
class Node:
    """Running node: a process `ray start`, which ends with the node.

    Attributes:
        started: start time of the process, in seconds since 1970; a later process with the same id has another.
    """

    group: str
    address: str
    pid: int
    started: float

    def processes(self) -> list[psutil.Process]:
        """Return the node's live processes: `ray start`, its descendants, and orphans of its session."""
        leader = self._leader()
        if leader and abs(leader.create_time() - self.started) > 1:
            return []  # another process has the id now
        found = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            found = {leader, *leader.children(recursive=True)} if leader else set()
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.getsid(process.pid) == self.pid:
                    found.add(process)
        return [process for process in found if _runs(process)]

    @property
    def alive(self) -> bool:
        leader = self._leader()
        return leader is not None and abs(leader.create_time() - self.started) <= 1 and _runs(leader)

    def _leader(self) -> psutil.Process | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid)
        return None


@dataclass
class Cluster:
    """Running cluster on this machine.

    Attributes:
        folder: folder of the cluster's state and the nodes' logs.
        temporary: folder of Ray's sockets, logs and spilled objects; short, because paths of sockets are limited.
        address: address of the GCS, host:port, for `ray.init`.
        dashboard: URL to submit jobs to.
        object_store_memory: bytes per node.
    """

    folder: Path
    temporary: Path
    address: str
    dashboard: str
    object_store_memory: int
    groups: list[Group]
    nodes: list[Node] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "Cluster":
        """Return the running cluster of a folder.

        Raises:
            FileNotFoundError: no cluster was started with the folder.
        """
        try:
            state = json.loads((folder / STATE).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"no cluster in {folder}: start one with `mellow cluster up --local`") from None
        return cls(
            **state
            | {
                "folder": Path(state["folder"]),
                "temporary": Path(state["temporary"]),
                "groups": [Group(**group) for group in state["groups"]],
                "nodes": [Node(**node) for node in state["nodes"]],
            }
        )

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which `ray job submit` and `serve deploy` connect to the cluster."""
        addresses = {"RAY_ADDRESS": self.dashboard, "RAY_DASHBOARD_ADDRESS": self.dashboard}
        return addresses | authentication(self.folder)

    def start_node(self, group: Group) -> Node:
        """Start one more node of a group, which joins some seconds later, and return it."""
        is_head = group.name == HEAD
        taken = {node.address for node in self.nodes}
        address = next(ip for ip in (f"127.0.0.{number}" for number in range(1, 255)) if ip not in taken)
        log = self.folder / f"{group.name}-{address}.log"
        scripts = programs(self.temporary)
        with log.open("a") as output:
            process = subprocess.Popen(
                [str(scripts / "python"), str(scripts / "ray"), *self._start_command(group, address, is_head)],
                cwd=REPOSITORY,
                env=_environment(group, scripts) | authentication(self.folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        node = Node(group.name, address, process.pid, psutil.Process(process.pid).create_time())
        self.nodes.append(node)
        self._save()
        return node

    def members(self) -> list[dict[str, Any]]:
        """Return Ray's state of every live node (`/api/v0/nodes`).

        Raises:
            ConnectionError: the dashboard does not respond, or refuses the token.
        """
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes?detail=1&limit=1000")
        request.add_header("Authorization", f"Bearer {read_token(authentication(self.folder))}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                nodes = json.load(response)["data"]["result"]["result"]
        except urllib.error.HTTPError as error:
            raise ConnectionError(
                f"{self.dashboard} responds {error.code} {error.reason}; set RAY_AUTH_TOKEN to its value when the "
                "cluster was started"
            ) from error
        except OSError as error:
            raise ConnectionError(
                f"{self.dashboard} does not respond ({error}); logs are in {self.folder}. Remaining processes end with "
                "`mellow cluster down --local`."
            ) from error
        return [node for node in nodes if node["state"] == "ALIVE"]

    def status(self) -> str:
        """Return a table of the groups with live and expected nodes, resources per node, and addresses.

        Raises:
            ConnectionError: see `members`.
        """
        members = self.members()
        lines = [f"dashboard {self.dashboard}, logs {self.folder}", f"{'group':10}{'nodes':8}{'resources':36}addresses"]
        for group in self.groups:
            expected = sum(node.group == group.name for node in self.nodes)
            here = [node for node in members if node["labels"].get(GROUP_LABEL) == group.name]
            resources = ", ".join(_readable(name, value) for name, value in group.resources.items())
            addresses = " ".join(sorted(node["node_ip"] for node in here))
            lines.append(f"{group.name:10}{f'{len(here)}/{expected}':8}{resources:36}{addresses}".rstrip())
        return "\n".join(lines)

    def down(self) -> None:
        """End every process of the cluster and delete its temporary folder and its state file; logs are kept."""
        processes = self._processes()
        for node in self.nodes:
            if node.alive:
                os.kill(node.pid, signal.SIGTERM)  # `ray start` then ends its node
        wait(processes, STOP_SECONDS)
        processes |= self._processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait(processes, STOP_SECONDS)
        shutil.rmtree(self.temporary, ignore_errors=True)
        (self.folder / STATE).unlink(missing_ok=True)

    def _processes(self) -> set[psutil.Process]:
        return {process for node in self.nodes for process in node.processes()}

    def _start_command(self, group: Group, address: str, is_head: bool) -> list[str]:
        other = {name: value for name, value in group.resources.items() if name not in ("CPU", "GPU", "memory")}
        command = [
            "start", "--block", "--disable-usage-stats", f"--node-ip-address={address}",
            f"--num-cpus={group.resources.get('CPU', 0):g}", f"--num-gpus={group.resources.get('GPU', 0):g}",
            f"--resources={json.dumps(other)}", f"--object-store-memory={self.object_store_memory}",
            "--labels=" + ",".join(f"{name}={value}" for name, value in group.labels.items()),
            # Nodes on one machine cannot share Ray's default ports.
            f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}",
            f"--metrics-export-port={free_port()}", f"--runtime-env-agent-port={free_port()}",
            "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip
        if memory := group.resources.get("memory"):
            command.append(f"--memory={memory:.0f}")
        if not is_head:
            return [*command, f"--address={self.address}"]
        return [
            *command, "--head", f"--port={self.address.split(':')[1]}", f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.temporary}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard.rsplit(':', 1)[1]}",
        ]  # fmt: skip

    def _start_nodes(self) -> None:
        """Start every node of every group and wait until all have joined."""
        # On a small machine, many nodes that start at once slow each other down beyond the time that Ray gives a node.
        at_once = max(1, (os.cpu_count() or 1) // 2)
        starts: Counter[str] = Counter()
        for group in self.groups:
            for _ in range(group.replicas):
                starts[self.start_node(group).address] += 1
                self._wait_until_joined(starts, missing=0 if group.name == HEAD else at_once - 1)
        self._wait_until_joined(starts, missing=0)

    def _wait_until_joined(self, starts: Counter[str], missing: int) -> None:
        """Wait until at most `missing` nodes have not joined; restart nodes that ended, `STARTS - 1` times at most."""
        until = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < until:
            for node in [node for node in self.nodes if not node.alive]:
                if starts[node.address] == STARTS:
                    raise ChildProcessError(f"a node of group {node.group} does not start:\n{self._log(node)}")
                self.nodes.remove(node)
                starts[self.start_node(self._group(node.group)).address] += 1
            with contextlib.suppress(ConnectionError):
                if len(self.nodes) - len(self.members()) <= missing:
                    return
            time.sleep(0.5)
        logs = "\n".join(self._log(node) for node in self.nodes)
        raise TimeoutError(f"not all of {len(self.nodes)} nodes joined within {JOIN_SECONDS:.0f} s:\n{logs}")

    def _group(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def _log(self, node: Node) -> str:
        log = self.folder / f"{node.group}-{node.address}.log"
        return f"{log}:\n{log.read_text()[-2000:]}"

    def _save(self) -> None:
        state = asdict(self) | {"folder": str(self.folder), "temporary": str(self.temporary)}
        partial = self.folder / f".{STATE}"
        partial.write_text(json.dumps(state, indent=1) + "\n")
        partial.replace(self.folder / STATE)


def up(
    definition: Path = DEFINITION,
    folder: Path = FOLDER,
    dashboard_port: int = 8265,
    object_store_memory: int = 512 << 20,
) -> Cluster:
    """Start the groups of a definition and return the cluster when all nodes have joined.

    Args:
        definition: folder that `kubectl kustomize` renders, with one RayCluster.
        object_store_memory: bytes per node.

    Raises:
        OSError: a cluster is up already, the port is in use, kubectl is not installed, or a node does not start.
        ValueError: the definition cannot be rendered, or contains no RayCluster.
    """
    with contextlib.suppress(FileNotFoundError):
        existing = Cluster.load(folder)
        if any(node.alive for node in existing.nodes):
            raise FileExistsError(
                f"a cluster is up already ({existing.dashboard}): use it, or end it with `mellow cluster down --local`"
            )
        existing.down()  # leftovers, for example of a machine that was switched off
    if is_taken(dashboard_port):
        raise OSError(f"port {dashboard_port} is in use: stop its program, or choose another --dashboard-port")
    groups = read_groups(render(definition))
    folder.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        log.unlink()
    cluster = Cluster(
        folder,
        temporary_folder(),
        f"127.0.0.1:{free_port()}",
        f"http://127.0.0.1:{dashboard_port}",
        object_store_memory,
        groups,
    )
    try:
        cluster._start_nodes()
    except BaseException:
        cluster.down()
        raise
    return cluster


def render(definition: Path) -> list[dict[str, Any]]:
    """Return the manifests that `kubectl kustomize` renders from a folder.

    Raises:
        FileNotFoundError: kubectl is not installed.
        ValueError: the folder cannot be rendered; the message contains kubectl's.
    """
    if not (kubectl := shutil.which("kubectl")):
        raise FileNotFoundError(
            "kubectl is not installed; it renders the node groups, without a Kubernetes cluster. Install it: "
            "https://kubernetes.io/docs/tasks/tools"
        )
    result = subprocess.run([kubectl, "kustomize", str(definition)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{definition} cannot be rendered: {result.stderr.strip()}")
    return list(yaml.safe_load_all(result.stdout))


def read_groups(manifests: list[dict[str, Any]]) -> list[Group]:
    """Return the node groups of the RayCluster among rendered manifests, the head first.

    Raises:
        ValueError: there is no RayCluster.
    """
    # The autoscaler's own function, so that a node has the same resources and labels here as on Kubernetes.
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    specs = [manifest["spec"] for manifest in manifests if manifest["kind"] == "RayCluster"]
    if not specs:
        kinds = ", ".join(sorted({manifest["kind"] for manifest in manifests}))
        raise ValueError(f"no RayCluster among the manifests ({kinds}): choose a definition that contains one")
    head, workers = specs[0]["headGroupSpec"], specs[0]["workerGroupSpecs"]
    types = list(_generate_available_node_types_from_ray_cr_spec(specs[0]).values())
    settings = {item["metadata"]["name"]: item["data"] for item in manifests if item["kind"] == "ConfigMap"}
    groups = [(HEAD, 1, head), *((group["groupName"], group["replicas"], group) for group in workers)]
    return [
        Group(
            name,
            replicas,
            {resource: float(amount) for resource, amount in node_type["resources"].items()},
            {GROUP_LABEL: name} | node_type["labels"],
            _container_env(spec["template"]["spec"]["containers"][0], settings),
        )
        for (name, replicas, spec), node_type in zip(groups, types, strict=True)
    ]


def free_port() -> int:
    """Return a free TCP port of this machine, from `PORTS`.

    Above this range, the system assigns ports to programs that request any port, as Ray's processes do by the dozen: a
    free one could be taken before it is used. Below it, Ray's workers use the ports from 10002 to 19999.
    """
    for _ in range(1000):
        port = secrets.choice(PORTS)  # a seed of `random` would give two processes the same ports
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free TCP port found from {PORTS.start} to {PORTS.stop - 1}: stop programs that listen there")


def _container_env(container: dict[str, Any], settings: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return a container's variables, except secrets and paths in its volumes, which do not exist on this machine."""
    env: dict[str, str] = {}
    for source in container.get("envFrom", []):
        env |= settings.get(source.get("configMapRef", {}).get("name"), {})
    mounts = tuple(mount["mountPath"] for mount in container.get("volumeMounts", []))
    literal = {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}
    return env | {name: value for name, value in literal.items() if not value.startswith(mounts)}


def _environment(group: Group, scripts: Path) -> dict[str, str]:
    """Return the variables of a node: the group's, overridden by this process's, and the image's search paths.

    Args:
        scripts: folder of `python` and `ray`, which jobs start by name.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    path = [str(scripts), inherited.get("PATH", "")]
    python_path = [str(REPOSITORY), str(REPOSITORY / "platform"), inherited.get("PYTHONPATH", "")]
    return (
        group.env
        | inherited
        | {
            "PATH": os.pathsep.join(filter(None, path)),
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
            # The endpoint's port belongs to the head's proxy: proxies of other nodes would share it, and drop their
            # connections when their node ends.
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port()),
            # Otherwise Ray hides GPUs from tasks that request none, and warns about it even on machines without GPUs.
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
    )


def is_taken(port: int) -> bool:
    """Return whether a program listens on a TCP port of the loopback address."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait(processes: set[psutil.Process], seconds: float) -> None:
    """Wait until all processes have ended, for `seconds` at most."""
    until = time.monotonic() + seconds
    while any(process.is_running() and _runs(process) for process in processes) and time.monotonic() < until:
        time.sleep(0.1)


def _readable(name: str, amount: float) -> str:
    return f"{amount / (1 << 30):.1f} GiB" if name == "memory" else f"{amount:g} {name}"
