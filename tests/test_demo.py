"""The demo whole, and whether its model answers by what it hears."""

import subprocess
import sys
from pathlib import Path

import pytest

from mellow_platform import storage
from mellow_platform.cluster import free_port
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
    families = benchmarks["families"]["groups"]["family"]
    for name in LISTENING:
        scores = families[f"Scenes-{name}"]["scores"]
        assert scores["audio"]["low"] > max(scores[control]["high"] for control in CONTROLS), name
        assert abs(scores["noise"]["value"] - scores["text_only"]["value"]) < 0.1, name
        assert all(scores[control]["high"] >= scores["chance"]["value"] for control in CONTROLS), name
