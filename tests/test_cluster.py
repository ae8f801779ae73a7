"""`mellow cluster --local`: node groups of the manifests as Ray nodes, and cleanup of their processes."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mellow_platform import cluster
from tests.conftest import NEEDS_KUBECTL, REPOSITORY

ENVIRONMENT = os.environ | {"RAY_AUTH_TOKEN": "of-this-test-alone-and-long-enough", "RAY_AUTH_MODE": "token"}


def mellow(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mellow_platform.cli", "cluster", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture
def definition(tmp_path: Path) -> Path:
    """Definition with a head and one node each of the groups cpu and serving."""
    patch = [
        {"op": "replace", "path": "/spec/workerGroupSpecs/1/replicas", "value": 0},
        {"op": "replace", "path": "/spec/workerGroupSpecs/2/replicas", "value": 1},
    ]
    overlay = {
        "resources": [os.path.relpath(cluster.DEFINITION, tmp_path)],
        "patches": [{"target": {"kind": "RayCluster"}, "patch": yaml.safe_dump(patch)}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return tmp_path


@NEEDS_KUBECTL
def test_cluster_has_defined_groups_runs_job_and_leaves_no_process(definition: Path, tmp_path: Path):
    folder, port = tmp_path / "cluster", cluster.free_port()
    processes: list[psutil.Process] = []
    where = ["--local", "--folder", str(folder)]
    up = ["up", *where, "--definition", str(definition), "--dashboard-port", str(port)]
    started = mellow(*up, "--object-store-memory", "100000000")
    try:
        assert started.returncode == 0, started.stderr
        state = cluster.Cluster.load(folder)
        assert sorted(node.group for node in state.nodes) == ["cpu", "head", "serving"]
        rows = {line.split()[0]: line.split()[1] for line in mellow("status", *where).stdout.splitlines()}
        assert {name: rows[name] for name in ("head", "cpu", "gpu", "serving")} == {
            "head": "1/1", "cpu": "1/1", "gpu": "0/0", "serving": "1/1"
        }  # fmt: skip

        again = mellow(*up)
        assert again.returncode == 1
        assert "mellow cluster down" in again.stderr

        with pytest.raises(urllib.error.HTTPError, match="401"):  # without a token
            urllib.request.urlopen(f"{state.dashboard}/api/v0/nodes", timeout=10)

        seen = submit(state, definition)
        nodes = {node["ray.io/node-group"]: node["resources"] for node in seen["nodes"]}
        assert "CPU" not in nodes["head"]
        assert (nodes["cpu"]["CPU"], nodes["serving"]["CPU"]) == (4, 2)
        assert nodes["serving"]["memory"] == 3 << 30
        # As in the image: the repository is the working folder, and the manifest's variables are set.
        assert seen["folder"] == str(REPOSITORY)
        assert (seen["group"], seen["recipe"], seen["threads"]) == ("serving", "tiny", "1")
        processes = [process for node in state.nodes for process in node.processes()]
        assert len(processes) > len(state.nodes)
    finally:
        stopped = mellow("down", *where)
    assert stopped.returncode == 0, stopped.stderr
    assert not [process for process in processes if process.is_running() and process.status() != "zombie"]
    assert not state.temporary.exists()
    assert str(folder) in mellow("status", *where).stderr


def submit(state: cluster.Cluster, folder: Path) -> dict[str, Any]:
    """Submit a job that reports its node, folder and variables; return the report."""
    script = folder / "look.py"
    script.write_text(
        "import json, os, ray\n"
        "ray.init(logging_level='error')\n"
        "@ray.remote(label_selector={'ray.io/node-group': 'serving'})\n"
        "def look():\n"
        "    labels = ray.get_runtime_context().get_node_labels()\n"
        "    return {'group': labels['ray.io/node-group'], 'folder': os.getcwd(),\n"
        "            'recipe': os.environ['MELLOW_RECIPE'], 'threads': os.environ['OMP_NUM_THREADS']}\n"
        "nodes = [node['Labels'] | {'resources': node['Resources']} for node in ray.nodes()]\n"
        "print(json.dumps(ray.get(look.remote()) | {'nodes': nodes}))\n"
    )
    result = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), "job", "submit", "--", sys.executable, str(script)],
        env=ENVIRONMENT | state.environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"group"')))


@NEEDS_KUBECTL
def test_groups_are_read_from_manifests():
    groups = {group.name: group for group in cluster.read_groups(cluster.render(cluster.DEFINITION))}
    assert {name: group.replicas for name, group in groups.items()} == {"head": 1, "cpu": 1, "gpu": 1, "serving": 2}
    assert groups["gpu"].labels == {"ray.io/node-group": "gpu", "ray.io/market-type": "spot"}
    assert groups["head"].resources["CPU"] == 0
    assert groups["cpu"].env["MELLOW_SIZE"] == "mellow-tiny"
    assert groups["cpu"].env["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] == "60"
    # These name folders of volumes, which a machine does not have.
    assert not {"HOME", "HF_HOME", "MELLOW_API_KEYS_FILE"} & set(groups["cpu"].env)


@NEEDS_KUBECTL
def test_invalid_definition_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}/missing"):
        cluster.render(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"RayCluster.*ConfigMap, RayJob, ServiceAccount"):
        cluster.read_groups(cluster.render(REPOSITORY / "infra/overlays/local/train"))


def test_missing_kubectl_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"kubectl.*https://kubernetes\.io"):
        cluster.render(cluster.DEFINITION)


def test_port_in_use_is_refused(tmp_path: Path):
    with cluster.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"\b{port}\b.*--dashboard-port"):
            cluster.up(folder=tmp_path, dashboard_port=port)
    assert not list(tmp_path.iterdir())


def test_free_ports_are_outside_the_ephemeral_range():
    with cluster.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert taken.getsockname()[1] not in cluster.PORTS
    ports = {cluster.free_port() for _ in range(100)}
    assert ports < set(cluster.PORTS) and len(ports) > 90


def test_process_with_reused_id_is_not_a_node():
    mine = psutil.Process()
    assert mine in cluster.Node("cpu", "127.0.0.2", mine.pid, mine.create_time()).processes()
    assert not cluster.Node("cpu", "127.0.0.2", mine.pid, mine.create_time() - 60).processes()


def test_command_line_imports_neither_torch_nor_ray():
    code = "import sys, mellow_platform.cli; print([name for name in ('torch', 'ray') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
