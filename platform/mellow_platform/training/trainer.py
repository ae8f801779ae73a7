"""Trainer of both training jobs: runs their loops on Ray Train workers, and identifies, resumes and completes runs."""

import logging
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from mellow_platform import storage
from mellow_platform.data.shards import Manifest
from mellow_platform.extras import require
from mellow_platform.training.checkpoints import CheckpointStore
from mellow_platform.training.run_config import RunSection
from mellow_platform.training.step_plan import Examples, StepPlan

logger = logging.getLogger(__name__)

RESULT = "result.json"
# Largest number of workers that resuming with another number is tested for, at every ZeRO stage
# (tests/test_training.py).
MAX_RESIZABLE_WORKERS = 8
# Muon's matrix products are bfloat16, and kill the process on a CPU that announces AMX without granting it; this
# restricts oneDNN to instructions of such machines, and must be set before torch is loaded.
# Ray Data logs four lines per window of batches.
WORKER_ENVIRONMENT = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "RAY_DATA_LOG_LEVEL": "WARNING"}
# Options that a resumed run may change; all others identify the run.
CHANGEABLE = {
    "epochs", "checkpoint_every", "keep_checkpoints", "log_every", "tracking", "dry_run", "scaling", "storage",
    "output", "offload", "activation_checkpointing", "zero_stage", "patience", "publish", "validate_every",
    "validation_examples",
}  # fmt: skip


def run_training(
    loop: Callable[[dict[str, Any]], None], config: RunSection, examples: Examples, validation: Examples | None = None
) -> dict[str, Any]:
    """Run `loop` on the workers of `config`, and return the result that `Recorder.finish` wrote.

    A run of the same name is resumed from its latest complete checkpoint; a complete and published run is not changed.

    Args:
        loop: called on every worker with `config` (a dict), and references to `examples` and `validation` in the
            object store, which has one copy per node.

    Raises:
        ValueError: the run of this name has other options, or a number of workers that it is not tested to resume with.
        ImportError: an extra is not installed.
    """
    require(config.tracking, extra="mlflow" if config.tracking == "mlflow" else "train")
    folder = storage.join(config.storage, config.run)
    claim_run(folder, config)
    check_resize(folder, config)
    total = total_steps(config, len(examples))
    uri = storage.join(folder, RESULT)
    if storage.exists(uri) and is_complete(result := storage.read_json(uri), config, total):
        if is_published(result, config):
            logger.warning("run %s is complete (%d steps); nothing to do", config.run, result["step"])
            return result
        logger.warning("run %s is complete (%d steps); publishing to %s", config.run, result["step"], config.output)
    scaling = config.scaling
    fs, path = storage.arrow_filesystem(config.storage)
    trainer = TorchTrainer(
        loop,
        train_loop_config={
            "config": config.model_dump(),
            "examples": ray.put(examples),
            "validation": None if validation is None else ray.put(validation),
        },
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(scaling.min_workers, scaling.workers) if scaling.min_workers else scaling.workers,
            use_gpu=bool(scaling.gpus_per_worker),
            resources_per_worker={"CPU": scaling.cpus_per_worker}
            | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=config.run,
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(scaling.threads_per_worker)}},
        ),
    )
    _fit(trainer, scaling.max_failures)
    return storage.read_json(uri)


def _fit(trainer: TorchTrainer, max_failures: int) -> None:
    """Run a trainer to its end. Its controller restarts lost workers; this function restarts a lost controller."""
    failures = 0
    while True:
        try:
            trainer.fit()
            return
        except ray.exceptions.ActorDiedError as error:
            failures += 1
            if 0 <= max_failures < failures:
                raise
            logger.warning("controller of the run is lost; restarting it: %s", error)
        except SystemExit as stop:
            # Ctrl-C: Ray Train stops the run, and then exits with the status of a success or a failure.
            if stop.code in (0, 1):
                raise KeyboardInterrupt from None
            raise


def is_complete(result: dict[str, Any], config: RunSection, total: int) -> bool:
    """Return whether a run with this result is complete: all its steps are done, or it was stopped early."""
    return result["total_steps"] == total and (result["step"] == total or is_stopped(config, result["worse"]))


def is_published(result: dict[str, Any], config: RunSection) -> bool:
    """Return whether `config.output` has the weights of a complete run that `config.publish` selects."""
    expected = (config.output, getattr(config, "publish", None))
    return (result.get("output"), result.get("publish")) == expected and storage.exists(config.output)


def is_stopped(config: RunSection, worse: int) -> bool:
    """Return whether `worse` consecutive validations without a better loss stop the run early."""
    patience = getattr(config, "patience", 0)
    return bool(patience) and worse >= patience


def claim_run(folder: str, config: RunSection) -> None:
    """Write the options that identify the run to its folder, or check them if the run exists.

    Raises:
        ValueError: the run has other options; the message lists them.
    """
    uri = storage.join(folder, "run.json")
    values = {name: value for name, value in config.model_dump().items() if name not in CHANGEABLE}
    values["content_of_shards"] = Manifest.read(config.shards).content_hash  # other shards may be in the same folder
    if not storage.exists(uri):
        storage.write_json(uri, values)
        return
    stored = storage.read_json(uri)
    differing = [
        f"{name} {stored.get(name)!r} -> {value!r}" for name, value in values.items() if stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"run {config.run!r} in {config.storage} was started with other values ({', '.join(differing)}); "
            "choose another --run, or delete its folder"
        )


def check_resize(folder: str, config: RunSection) -> None:
    """Check that the number of workers changes only between numbers that this is tested with.

    Raises:
        ValueError: the number changes, or may change during the run, from or to more than `MAX_RESIZABLE_WORKERS`.
    """
    scaling, limit = config.scaling, MAX_RESIZABLE_WORKERS
    if scaling.min_workers and scaling.min_workers != scaling.workers and scaling.workers > limit:
        raise ValueError(
            f"scaling: min_workers {scaling.min_workers} and workers {scaling.workers} differ, which is tested up to "
            f"{limit} workers; remove min_workers, or set workers to {limit}"
        )
    store = CheckpointStore(folder)
    for saved in store.checkpoints()[-1:]:
        workers = store.read_progress(saved)["workers"]
        if workers != scaling.workers and max(workers, scaling.workers) > limit:
            raise ValueError(
                f"run {config.run!r} has a checkpoint of step {saved.step} with {workers} workers; resuming with "
                f"{scaling.workers} is not tested, only up to {limit}; set scaling.workers to {workers}"
            )


def total_steps(config: RunSection, examples: int) -> int:
    """Return the number of steps of a run.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError(f"{config.shards} has no examples to train on")
    return max(1, round(config.epochs * -(-examples // config.batch)))


def build_plan(config: RunSection, examples: Examples, workers: int) -> StepPlan:
    return StepPlan(config.seed, len(examples), config.batch, config.micro_batch, workers)


def prepare_worker(config: RunSection) -> None:
    """Limit this worker's CPU threads and log messages."""
    torch.set_num_threads(config.scaling.threads_per_worker)
    # Ray 2.60 names this logger after its file, so that LoggingConfig does not apply: it logs a line per report.
    logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)


def summary(result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the figures that a job prints at the end of a run."""
    names = ("step", "loss", "examples_per_second", "audio_seconds_per_second", "redone_steps", "run")
    return {name: result[name] for name in names} | {"seconds": round(seconds, 1)}
