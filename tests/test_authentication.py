"""Tokens of local clusters: created in the cluster's folder, never in the home folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mellow_platform.authentication import authentication, read_token
from tests.conftest import REPOSITORY


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment without a token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_token")
def test_token_is_created_once_and_private(tmp_path: Path):
    environment = authentication(tmp_path / "cluster")
    file = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert file.parent == tmp_path / "cluster"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(read_token(environment)) == 64
    assert authentication(tmp_path / "cluster") == environment
    assert read_token(environment) != read_token(authentication(tmp_path / "other"))


def test_token_in_environment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-environment")
    assert read_token(authentication(tmp_path)) == "of-the-environment"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_token")
def test_missing_token_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/absent.*RAY_AUTH_TOKEN"):
        authentication(tmp_path)


# In a separate process: Ray reads the variables once, when it is imported.
FIRST_JOB = """
import sys
from pathlib import Path
from mellow_platform.local_ray import LocalRay
ray = LocalRay(Path(sys.argv[1]), cpus=2)
with ray.running():
    clips = ["--train-clips", "1", "--val-clips", "1", "--test-clips", "1"]
    print(ray.submit("make_corpus", "--output", ray.uri("corpus"), *clips))
"""


def test_demo_cluster_runs_job_with_empty_home(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join([str(REPOSITORY / "platform"), str(REPOSITORY)])
    command = [sys.executable, "-c", FIRST_JOB, str(tmp_path / "runs")]
    env |= {"HOME": str(home), "PYTHONPATH": paths}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "'questions'" in done.stdout, done.stdout + done.stderr
    assert not [path for path in home.rglob("*") if path.name == "auth_token"]
    assert not (home / ".ray").exists()
