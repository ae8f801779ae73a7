"""Experiment tracking, read back with TensorBoard and MLflow."""

from pathlib import Path

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mellow_platform.training.tracking import Tracker
from mellow_platform.training.train_config import TrainConfig


def configured(tracking: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {"shards": "/s", "encoder": "/e", "output": "/o", "storage": "/r", "run": "mine", "tracking": tracking}
    )


def test_tensorboard_hides_repeated_steps(tmp_path: Path):
    run = str(tmp_path / "run")
    for start, stop, value in ((0, 8, 1.0), (5, 10, 2.0)):
        tracker = Tracker(configured("tensorboard"), run, start)
        for step in range(start, stop):
            tracker.log({"loss": value}, step + 1)
        tracker.close()
    events = EventAccumulator(f"{run}/tensorboard").Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        *((step, 1.0) for step in range(1, 6)),
        *((step, 2.0) for step in range(6, 11)),
    ]


def test_mlflow_continues_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # instead of a server
    for start in (0, 5):
        tracker = Tracker(configured("mlflow"), str(tmp_path / "run"), start)
        tracker.log({"loss": float(start)}, start + 1)
        tracker.close()
    (run,) = mlflow.search_runs(experiment_names=["mellow"], output_format="list")
    assert run.info.run_name == "mine"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.0), (6, 5.0)]
