"""Short run of tests/chaos/kill_training.py: no step is lost after kills of the driver, a worker and a node."""

from pathlib import Path

import pytest

from tests.chaos.kill_training import kill_training


@pytest.mark.extended
def test_killed_run_commits_same_steps(tmp_path: Path):
    result = kill_training(tmp_path, kills=3, seed=0, steps=140, checkpoint_every=20)
    assert result["kills"] == 3
    assert (result["lost"], result["repeated"], result["different"]) == (0, 0, 0)
    assert result["notices"] == result["notices_saved"] == 1
    assert 0 < result["redone"] <= 3 * 20
    assert result["same_weights"]
