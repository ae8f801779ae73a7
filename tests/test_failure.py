"""Cause of a failure inside Ray's errors."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from mellow_platform import storage
from mellow_platform.failure import Failure, write_log

pytestmark = pytest.mark.usefixtures("cluster")

CLIP = "clip a.wav: 0 samples;\nremove it"


def fail(*_: object) -> None:
    raise ValueError(CLIP)


def fail_in_turn(*_: object) -> None:
    try:
        miss_key()
    except KeyError as error:
        raise RuntimeError("a is missing; add it") from error


def miss_key(*_: object) -> None:
    dict[str, str]()["a"]


def read_absent(*_: object) -> None:
    storage.size("/absent/file")


def die(*_: object) -> None:
    os._exit(3)


class Failing:
    def __init__(self) -> None:
        fail()

    def __call__(self, batch: dict) -> dict:
        return batch


def run_here(function: Callable) -> None:
    function()


def run_task(function: Callable) -> None:
    ray.get(ray.remote(max_retries=0)(lambda: function()).remote())


def run_nested(function: Callable) -> None:
    ray.get(ray.remote(lambda: run_task(function)).remote())


def run_data(function: Callable) -> None:
    ray.data.range(2).map(function).take_all()


def run_data_in_task(function: Callable) -> None:
    ray.get(ray.remote(lambda: run_data(function)).remote())


def failure_of(run: Callable, *arguments: object) -> Failure:
    try:
        run(*arguments)
    except Exception as error:
        return Failure(error)
    raise AssertionError(f"{run} does not fail")


@pytest.mark.parametrize("run", [run_here, run_task, run_nested, run_data, run_data_in_task])
def test_cause_is_found(run: Callable):
    assert failure_of(run, fail).message == CLIP
    assert failure_of(run, fail_in_turn).message == "a is missing; add it"
    assert failure_of(run, miss_key).message == "KeyError: 'a'"
    absent = failure_of(run, read_absent)
    assert absent.message.startswith("/absent/file: ")
    assert absent.place.startswith("mellow_platform/storage.py:")


def test_failure_outside_project_has_no_place():
    assert failure_of(ray.data.read_parquet, "/absent").place == ""


def test_cause_of_failed_actor_start():
    assert failure_of(lambda: ray.get(ray.remote(Failing).remote().__call__.remote({}))).message == CLIP
    assert failure_of(lambda: ray.data.range(2).map_batches(Failing, concurrency=1).take_all()).message == CLIP


@pytest.mark.extended
def test_cause_of_failed_training_worker(tmp_path: Path):
    run_config = RunConfig(storage_path=str(tmp_path), name="run")
    trainer = TorchTrainer(fail, scaling_config=ScalingConfig(num_workers=2), run_config=run_config)
    assert failure_of(trainer.fit).message == CLIP


def test_dead_worker_has_one_line_message():
    message = failure_of(run_task, die).message
    assert message.startswith("WorkerCrashedError: ")
    assert "\n" not in message


def test_log_contains_remote_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        run_data(read_absent)
    log = write_log(raised.value, "preprocess")
    assert log.parent == tmp_path and log.name.startswith("mellow-preprocess-")
    text = log.read_text()
    assert "in read_absent" in text and "FileNotFoundError" in text and "\x1b" not in text
