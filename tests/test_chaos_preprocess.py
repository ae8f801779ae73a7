"""Short run of tests/chaos/kill_preprocess.py: no shard is lost after kills of a worker, a node and the driver."""

from pathlib import Path

import pytest

from tests.chaos.kill_preprocess import run


@pytest.mark.extended
def test_killed_job_writes_same_output(tmp_path: Path):
    result = run(tmp_path, kills=3, seed=0, clips=60)
    assert result["kills"] == 3
    assert (result["lost"], result["repeated"], result["different"]) == (0, 0, 0)
    assert result["redone"] <= result["redone_at_most"]
