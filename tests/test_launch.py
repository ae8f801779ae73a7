"""Start of a Ray cluster on this machine: paths with spaces, temporary folders, the first job."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mellow_platform import local_ray
from mellow_platform.launch import programs, temporary_folder
from tests.conftest import REPOSITORY

# In a separate process: Ray reads its variables once, and this process may have a cluster.
TASK = """
from mellow_platform.launch import prepare_process
prepare_process()
import ray
ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error")
print(ray.get(ray.remote(lambda: "answered").remote(), timeout=60))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """This environment's `python`, by a path with a space."""
    folder = tmp_path / "a space"
    folder.mkdir()
    (folder / "environment").symlink_to(Path(sys.executable).parent.parent)
    return folder / "environment" / Path(sys.executable).parent.name / Path(sys.executable).name


def test_workers_start_from_path_with_space(environment: Path):
    result = subprocess.run([str(environment), "-c", TASK], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["answered"], result.stderr


def test_submission_waits_for_agent():
    class Client:
        """Client of a dashboard whose agent joins after the first submission."""

        answers: ClassVar[list[Any]] = [RuntimeError("status code 500: No available agent to submit job"), "job-1"]

        def submit_job(self, **job: Any) -> str:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    client: Any = Client()
    assert local_ray._submit(client, "python jobs/train.py", {}) == "job-1"
    client.answers.append(RuntimeError("status code 400: no such entrypoint"))
    with pytest.raises(RuntimeError, match="400"):
        local_ray._submit(client, "python jobs/train.py", {})


def test_programs_have_path_without_spaces(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert programs(tmp_path) == Path(sys.executable).parent
    monkeypatch.setattr(sys, "executable", str(environment))
    for _ in range(2):
        found = programs(tmp_path)
        assert found.parent == tmp_path / "environment"
        assert (found / "ray").samefile(environment.with_name("ray"))


@pytest.mark.parametrize("parent", ["with space", "long" * 20])
def test_temporary_folder_is_short_without_spaces(parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / parent).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / parent))
    folder = temporary_folder()
    try:
        assert folder.is_dir()
        assert len(str(folder)) < 40 and " " not in str(folder)
    finally:
        folder.rmdir()
