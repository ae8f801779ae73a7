"""A Ray cluster that test modules of one process share, and the killing of a job on it."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import ray


class SharedRay:
    """The Ray cluster of this process; modules share it if they need the same size in the same environment."""

    started: tuple[int, int, dict[str, str]] | None = None

    @classmethod
    def use(cls, num_cpus: int = 8, object_store_memory: int = 500_000_000) -> None:
        """Start a cluster with `num_cpus` logical CPUs and an object store in bytes, unless the same one runs."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        wanted = (num_cpus, object_store_memory, variables)
        if ray.is_initialized() and cls.started == wanted:
            return
        ray.shutdown()
        memory, cls.started = {"object_store_memory": object_store_memory}, wanted
        ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level="warning", **memory)


def kill_when(ready: Callable[[], bool], command: list[str], log: Path) -> None:
    """Run a job on this process's cluster, and kill its driver as soon as `ready` returns true.

    Raises:
        AssertionError: the job ended first, or 300 seconds have passed.
    """
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
