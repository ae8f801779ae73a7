"""Short run of tests/chaos/kill_serving.py: no answer is lost after kills of a replica and the controller."""

import json
import subprocess
import sys

import pytest

from tests.conftest import NEEDS_KUBECTL, REPOSITORY


@NEEDS_KUBECTL
@pytest.mark.extended
def test_no_answer_is_lost_while_replica_and_controller_are_killed():
    command = [sys.executable, "tests/chaos/kill_serving.py", "--victims", "replica", "controller"]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["requests"] > 100
    assert (result["wrong"], result["lost"]) == (0, 0)
    assert set(result["recovery_of_s"]) == {"replica", "controller"}
