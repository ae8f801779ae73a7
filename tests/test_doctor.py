"""`mellow doctor` and the checks before installation, under the conditions that they report."""

import ast
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mellow_platform import doctor
from mellow_platform.cluster import free_port
from mellow_platform.doctor import GIB, NOTE, OK, PROBLEM
from tests.conftest import REPOSITORY

DOCTOR = REPOSITORY / "platform" / "mellow_platform" / "doctor.py"
TOKEN = "token-of-the-test-cluster"


def before_install(script: Path = DOCTOR, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(script), "--before-install"]  # without installed packages
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def test_file_parses_on_python_3_6_and_imports_only_the_standard_library():
    tree = ast.parse(DOCTOR.read_text(), feature_version=(3, 6))
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
    assert "__future__" not in imported  # its annotations are new in 3.7


@pytest.mark.parametrize(
    ("version", "state"),
    [((3, 8, 18), PROBLEM), ((3, 10, 0), PROBLEM), ((3, 11, 0), OK), ((3, 14, 2), OK), ((3, 15, 0), PROBLEM)],
)
def test_python_version(version: tuple[int, ...], state: str):
    check = doctor.check_python(version)
    assert check.state == state
    assert ("make PYTHON=python3." in check.remedy) == (state == PROBLEM)


def test_before_install_fails_on_problems_unless_skipped(tmp_path: Path):
    copy = tmp_path / "a:b" / "platform" / "mellow_platform" / "doctor.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(DOCTOR, copy)
    (tmp_path / "a:b" / "pyproject.toml").touch()
    refused = before_install(copy)
    assert refused.returncode == 1
    assert f"problem: folder: {tmp_path}/a:b" in refused.stderr and "->" in refused.stderr
    assert "MELLOW_SKIP_CHECKS=1" in refused.stderr
    skipped = before_install(copy, MELLOW_SKIP_CHECKS="1")
    assert skipped.returncode == 0
    assert f"problem: folder: {tmp_path}/a:b" in skipped.stderr


def test_missing_venv_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # as on Debian without python3-venv
    check = runpy.run_path(str(DOCTOR))["check_venv"]()
    assert check.state == PROBLEM
    assert "python{}.{}-venv".format(*sys.version_info[:2]) in check.remedy


@pytest.mark.parametrize(
    ("files", "membership", "memory", "cores"),
    [
        ({"memory.max": "max", "cpu.max": "max 100000"}, "0::/", None, None),
        ({"memory.max": "4294967296", "cpu.max": "150000 100000"}, "0::/", 4 * GIB, 1.5),
        # The lower limit is that of a parent.
        ({"job/memory.max": str(GIB), "job/step/memory.max": "max"}, "0::/job/step", GIB, None),
        # Version 1 inside a container: the path is the host's; the container's own cgroup is mounted at the root.
        (
            {
                "memory/memory.limit_in_bytes": str(2 * GIB),
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_quota_us": "50000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            "9:memory:/docker/0a1b\n2:cpu,cpuacct:/docker/0a1b\n0::/",
            2 * GIB,
            0.5,
        ),
    ],
)
def test_cgroup_limits(files: dict[str, str], membership: str, memory, cores, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    own = tmp_path / "own"
    own.write_text(f"{membership}\n")
    assert doctor.cgroup_memory(tmp_path, own) == memory
    assert doctor.cgroup_cores(tmp_path, own) == cores
    assert doctor.cgroup_memory(tmp_path, tmp_path / "absent") is None


def test_cgroup_limits_memory_and_cores():
    memory, cores = doctor.check_memory(4 * GIB), doctor.check_cores(0.5)
    assert (memory.state, cores.state) == (PROBLEM, NOTE)
    assert memory.found.startswith("4.0 GiB") and "cgroup" in memory.found
    assert "container" in memory.remedy
    assert cores.found.startswith(f"0.5 of {os.cpu_count()}") and "cgroup" in cores.found
    assert "cgroup" not in doctor.check_memory(1 << 62).found


def test_disk(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    full = doctor.check_disk(tmp_path, needed=free + 10 * GIB)
    assert full.state == PROBLEM
    assert str(tmp_path) in full.found
    assert doctor.check_disk(tmp_path, needed=0).state != PROBLEM


def test_folder(tmp_path: Path):
    assert doctor.check_folder(tmp_path).state == OK
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    no_folder = doctor.check_folder(file)
    assert no_folder.state == PROBLEM and str(file) in no_folder.found
    (tmp_path / "a space").mkdir()
    assert doctor.check_folder(tmp_path / "a space").state == NOTE


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc, which is read-only")
def test_folder_without_write_permission():
    read_only = doctor.check_folder(Path("/proc"))
    assert read_only.state == PROBLEM and "/proc" in read_only.found


def test_port_in_use():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        taken = doctor.check_port(port, "endpoint", "pass another --port")
    assert (taken.state, taken.remedy) == (NOTE, "pass another --port")
    assert f"lsof -i :{port}" in taken.found
    assert doctor.check_port(port, "endpoint", "pass another --port").state == OK


class Dashboard(BaseHTTPRequestHandler):
    """Server of both Ray's version, for requests with the token, and a healthy endpoint."""

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        status = {"/api/version": 200 if allowed else 401, "/healthz": 200}.get(self.path, 404)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.60.0"}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables and home folder of a new user."""
    for name in os.environ:
        if name.startswith(("RAY_", "AWS_", "HF_", "CHROMIUM")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_cluster_with_its_token(dashboard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAY_ADDRESS", dashboard)
    without = doctor.check_cluster()
    assert without.state == NOTE and dashboard in without.found and "401" in without.found
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token")
    wrong = doctor.check_cluster()
    assert dashboard in wrong.found and "401" in wrong.found and wrong.found != without.found
    assert "another-token" not in "".join(wrong)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert doctor.check_cluster() == ("Ray cluster", OK, f"Ray 2.60.0 at {dashboard}", "")


def test_cluster_at_a_wrong_address(dashboard: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", f"{dashboard}/elsewhere")
    elsewhere = doctor.check_cluster()
    assert elsewhere.state == NOTE and dashboard in elsewhere.found and "404" in elsewhere.found
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert "RAY_ADDRESS is 127.0.0.1:6379" in doctor.check_cluster().found
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")
    assert "RAY_ADDRESS" in doctor.check_cluster().remedy


def test_endpoint(dashboard: str):
    assert doctor.check_endpoint(dashboard).state == OK
    elsewhere = doctor.check_endpoint(f"{dashboard}/elsewhere")
    assert elsewhere.state == NOTE and "404" in elsewhere.found and "/healthz" in elsewhere.found
    port = free_port()
    absent = doctor.check_endpoint(f"http://127.0.0.1:{port}")
    assert absent.state == NOTE and str(port) in absent.found


def test_requests_to_loopback_bypass_a_proxy(dashboard: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert doctor.check_endpoint(dashboard).state == OK


def test_s3_settings_are_reported_without_secrets(monkeypatch: pytest.MonkeyPatch):
    assert doctor.check_s3().state == NOTE
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@storage:9000/path")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
    incomplete = doctor.check_s3()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    complete = doctor.check_s3()
    assert (incomplete.state, complete.state) == (NOTE, OK)
    assert "AWS_SECRET_ACCESS_KEY" in incomplete.found
    for check in (incomplete, complete):
        assert "http://storage:9000" in check.found
        assert not any(secret in str(check) for secret in ("password", "an-access-key", "a-secret"))


def test_silent_hub_is_a_note(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as silent:  # accepts a connection and sends nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert doctor.check_hub().state == NOTE
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = doctor.check_hub()
    assert offline.state == OK and "HF_HUB_OFFLINE" in offline.found


def test_chromium_variable_selects_the_browser(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHROMIUM", sys.executable)
    assert doctor.check_browser() == ("browser", OK, sys.executable, "")
    monkeypatch.setenv("CHROMIUM", "/no/such/program")
    assert doctor.check_browser().state == NOTE


def test_missing_programs_are_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for check in (doctor.check_java(), doctor.check_kubectl(), doctor.check_browser()):
        assert check.state == NOTE
        assert check.remedy


def test_missing_and_old_packages_are_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    requirements = ["no-such-package>=1", "numpy<1", "torch>=2", "absent; extra == 'mlflow'"]
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "3.2.1"\ndependencies = {requirements}\n')
    monkeypatch.setattr(doctor, "FOLDER", tmp_path)
    checks = {check.name: check for check in doctor.check_project()}
    assert checks["mellow-platform"].found.startswith("3.2.1 at ")
    assert checks["no-such-package"].found == "missing; required: no-such-package>=1"
    assert {name: check.state for name, check in checks.items()} == {
        "mellow-platform": OK,
        "torch": OK,
        "no-such-package": PROBLEM,
        "numpy": PROBLEM,
    }


def test_extras_match_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    packages = {extra.name: extra.packages for extra in doctor.EXTRAS}
    extras = project["optional-dependencies"]
    del extras["demo"]  # a group of other extras
    assert extras.keys() == packages.keys()
    for name, requirements in extras.items():
        required = " ".join([*requirements, *project["dependencies"]])
        assert all(package in required for package in packages[name])


def test_missing_extras_have_an_install_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "EXTRAS", (doctor.Extra("otel", ("no-such-package", "numpy"), "traces"),))
    assert doctor.check_extras() == [
        ("otel", NOTE, "traces; missing: no-such-package", "pip install -e '.[otel]'"),
    ]


def test_command_prints_a_report_and_fails_on_problems():
    command = [sys.executable, "-m", "mellow_platform.cli", "doctor"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    text = subprocess.run(command, capture_output=True, text=True, env=env)
    report = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env)
    assert (text.stderr, report.stderr) == ("", "")
    found = json.loads(report.stdout)
    names = {check["name"] for check in found["checks"]}
    assert names >= {"python", "ray", "torch", "metrics", "memory", "disk", "GPU", "port 8000", "Ray cluster", "S3"}
    assert {check["state"] for check in found["checks"]} <= {OK, NOTE, PROBLEM}
    assert found["problems"] == sum(check["state"] == PROBLEM for check in found["checks"])
    assert text.returncode == report.returncode == bool(found["problems"])
    assert all(name in text.stdout for name in names)
    assert text.stdout.splitlines()[-1].startswith(f"problems: {found['problems']}, notes: ")
    assert all(check["remedy"] for check in found["checks"] if check["state"] != OK)


def test_report_lists_problems_with_remedies():
    sections = {"Machine": [doctor.Check("memory", PROBLEM, "2.0 GiB", "add memory"), doctor.Check("GPU", OK, "none")]}
    assert doctor.problems(sections) == 1
    assert doctor.as_text(sections).splitlines() == [
        "Machine",
        "  problem  memory           2.0 GiB",
        "                            -> add memory",
        "  ok       GPU              none",
        "",
        "problems: 1, notes: 0",
    ]
