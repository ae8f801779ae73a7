"""The demo whole, and whether its model answers by what it hears."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.demo import LOCK, DemoConfig, again, locked
from mellow_platform import storage
from mellow_platform.cluster import free_port
from mellow_platform.local_ray import LOG
from tests.conftest import REPOSITORY

# Families that nothing but listening answers. How many sounds there are is mostly the same number, and the order of
# sounds is more than so small a model has learnt.
LISTENING = ("Heard-MCQ", "Pitch-MCQ", "Level-MCQ", "Compare-MCQ", "Presence", "Entailment")
CONTROLS = ("noise", "text_only", "chance")


@pytest.mark.slow
def test_the_demos_model_is_right_by_listening_and_near_chance_without(tmp_path: Path):
    ports = ["--port", str(free_port()), "--dashboard-port", str(free_port())]
    command = [sys.executable, "jobs/demo.py", "--output", str(tmp_path / "demo"), *ports]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.endswith("demo: ok\n"), done.stdout[-4000:] + done.stderr[-4000:]
    benchmarks = storage.read_json(str(tmp_path / "demo/evaluation/report.json"))["benchmarks"]
    assert len(benchmarks) == 8
    for name, each in benchmarks.items():
        assert all(each["control"][control]["low"] > 0 for control in ("noise", "text_only")), name
    # `mcq` reads the letter of an answer. Without sound, the model may answer `b) high` where b) is low: word for word,
    # that is none of the choices, and a score of such answers is below chance.
    families = benchmarks["families"]["groups"]["family"] | benchmarks["mcq"]["groups"]["family"]
    for name in LISTENING:
        scores = families[f"Scenes-{name}"]["scores"]
        assert scores["audio"]["low"] > max(scores[control]["high"] for control in CONTROLS), name
        assert abs(scores["noise"]["value"] - scores["text_only"]["value"]) < 0.1, name
        assert all(scores[control]["high"] >= scores["chance"]["value"] for control in CONTROLS), name


def test_a_demo_deletes_only_what_a_demo_wrote(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OSError, match=str(tmp_path)), locked(tmp_path, resume=False):
        pass
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / LOG).touch()
    with locked(tmp_path, resume=True):
        assert (tmp_path / "thesis.txt").exists()
    with locked(tmp_path, resume=False):
        assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]


def test_a_folder_belongs_to_one_demo_at_a_time(tmp_path: Path):
    with (
        locked(tmp_path, resume=False),
        pytest.raises(OSError, match=f"{tmp_path}.*--output"),
        locked(tmp_path, resume=False),
    ):
        pass


def test_the_command_to_continue_repeats_the_options_that_are_not_the_default():
    assert again(DemoConfig()) == again(DemoConfig(keep=True)) == "make demo RESUME=1"
    config = DemoConfig(corpus="/my sounds", output="/tmp/mine", port=8001)
    assert again(config) == "make demo RESUME=1 'CORPUS=/my sounds' OUTPUT=/tmp/mine PORT=8001"
