"""Demo end to end, its output folder, and whether its model uses the audio."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.demo import LOCK, DemoConfig, locked, resume_command
from mellow_platform import storage
from mellow_platform.cluster import free_port
from mellow_platform.local_ray import LOG
from tests.conftest import REPOSITORY

# Families that cannot be answered without audio. Count and order of sounds are not among them: the count is mostly the
# same, and so small a model does not learn the order.
LISTENING = ("Heard-MCQ", "Pitch-MCQ", "Level-MCQ", "Compare-MCQ", "Presence", "Entailment")
CONTROLS = ("noise", "text_only", "chance")


@pytest.mark.slow
def test_demo_model_is_right_only_with_audio(tmp_path: Path):
    ports = ["--port", str(free_port()), "--dashboard-port", str(free_port())]
    command = [sys.executable, "jobs/demo.py", "--output", str(tmp_path / "demo"), *ports]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.endswith("demo: ok\n"), done.stdout[-4000:] + done.stderr[-4000:]
    benchmarks = storage.read_json(str(tmp_path / "demo/evaluation/report.json"))["benchmarks"]
    assert len(benchmarks) == 8
    for name, each in benchmarks.items():
        assert all(each["control"][control]["low"] > 0 for control in ("noise", "text_only")), name
    # `mcq` reads the letter of an answer. Without audio, the model may answer `b) high` although b) is low: word for
    # word, that is none of the choices, and the score of such answers is below chance.
    families = benchmarks["families"]["groups"]["family"] | benchmarks["mcq"]["groups"]["family"]
    for name in LISTENING:
        scores = families[f"Scenes-{name}"]["scores"]
        assert scores["audio"]["low"] > max(scores[control]["high"] for control in CONTROLS), name
        assert abs(scores["noise"]["value"] - scores["text_only"]["value"]) < 0.1, name
        assert all(scores[control]["high"] >= scores["chance"]["value"] for control in CONTROLS), name


def test_demo_deletes_only_files_of_demos(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match=str(tmp_path)), locked(tmp_path, resume=False):
        pass
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / LOG).touch()
    with locked(tmp_path, resume=True):
        assert (tmp_path / "thesis.txt").exists()
    with locked(tmp_path, resume=False):
        assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]


def test_folder_is_locked_by_one_demo(tmp_path: Path):
    with (
        locked(tmp_path, resume=False),
        pytest.raises(OSError, match=f"{tmp_path}.*--output"),
        locked(tmp_path, resume=False),
    ):
        pass


def test_resume_command_repeats_changed_options():
    assert resume_command(DemoConfig()) == resume_command(DemoConfig(keep=True)) == "make demo RESUME=1"
    config = DemoConfig(corpus="/my sounds", output="/tmp/mine", port=8001)
    assert resume_command(config) == "make demo RESUME=1 'CORPUS=/my sounds' OUTPUT=/tmp/mine PORT=8001"
