"""The short form of tests/chaos/kill_serving.py: a replica and the controller are killed, and no answer is lost."""

import json
import subprocess
import sys

import pytest

from tests.conftest import NEEDS_KUBECTL, REPOSITORY


@NEEDS_KUBECTL
@pytest.mark.extended
def test_no_answer_is_lost_while_replica_and_controller_are_killed():
    command = [sys.executable, "tests/chaos/kill_serving.py", "--victims", "replica", "controller"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["requests"] > 100
    assert (result["wrong"], result["lost"]) == (0, 0)
    assert set(result["recovery_of_s"]) == {"replica", "controller"}
