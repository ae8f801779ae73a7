"""The short form of tests/chaos/kill_preprocess.py: a worker, a node and the driver are killed, and nothing is lost."""

from pathlib import Path

import pytest

from tests.chaos.kill_preprocess import run


@pytest.mark.extended
def test_killed_job_writes_same_output(tmp_path: Path):
    result = run(tmp_path, kills=3, seed=0, clips=60)
    assert result["kills"] == 3
    assert (result["lost"], result["repeated"], result["different"]) == (0, 0, 0)
    assert result["redone"] <= result["redone_at_most"]
