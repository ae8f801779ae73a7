"""What both training jobs share: the trainer that Ray runs their loops with, what makes a run, and its schedule."""

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
# Runs of every ZeRO stage are tested to go on with another number of workers up to this one (tests/test_training.py).
MOST_RESIZED = 8
# Muon's matrix products are bfloat16, which on a CPU that announces AMX without granting it end the process; this
# keeps oneDNN to instructions that such machines have. It has to stand before torch is loaded.
# Ray Data makes batches window by window, and would say so in four lines each time.
WORKER_ENVIRONMENT = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "RAY_DATA_LOG_LEVEL": "WARNING"}
# What may change when a run goes on; anything else would make it another run.
CHANGEABLE = {
    "epochs", "checkpoint_every", "keep_checkpoints", "log_every", "tracking", "dry_run", "scaling", "storage",
    "output", "offload", "activation_checkpointing", "zero_stage", "patience", "publish", "validate_every",
    "validation_examples",
}  # fmt: skip


def run_training(
    loop: Callable[[dict[str, Any]], None], config: RunSection, examples: Examples, validation: Examples | None = None
) -> dict[str, Any]:
    """Run `loop` on the workers that `config` asks for, and return what `Recorder.finish` wrote.

    A run of the same name goes on from its latest whole checkpoint; one that is complete is left as it is.

    Args:
        loop: called on every worker with `config` (a dict), `examples` and `validation` (references to them in the
            object store, where every node has them once).

    Raises:
        ValueError: the run of this name was begun with other values.
        ImportError: an extra is missing here.
    """
    require(config.tracking, extra="mlflow" if config.tracking == "mlflow" else "train")
    folder = storage.join(config.storage, config.run)
    begin(folder, config)
    check_resize(folder, config)
    total = total_steps(config, len(examples))
    finished = storage.join(folder, RESULT)
    if storage.exists(finished) and is_complete(result := storage.read_json(finished), config, total):
        if is_published(result, config):
            logger.warning("run %s is complete (%d steps): nothing to do", config.run, result["step"])
            return result
        logger.warning("run %s is complete (%d steps), and published to %s", config.run, result["step"], config.output)
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
    return storage.read_json(finished)


def _fit(trainer: TorchTrainer, max_failures: int) -> None:
    """Run a trainer to its end. Ray restarts its workers; its controller, which does so, is restarted here."""
    failures = 0
    while True:
        try:
            trainer.fit()
            return
        except ray.exceptions.ActorDiedError as error:
            failures += 1
            if 0 <= max_failures < failures:
                raise
            logger.warning("the controller of the run is lost, and is started again: %s", error)
        except SystemExit as stop:
            # Ctrl-C: Ray Train stops the run, and then exits as after a success or a failure.
            if stop.code in (0, 1):
                raise KeyboardInterrupt from None
            raise


def is_complete(result: dict[str, Any], config: RunSection, total: int) -> bool:
    """Whether a run with this result has nothing left to do: all its steps are done, or it was stopped early."""
    return result["total_steps"] == total and (result["step"] == total or is_stopped(config, result["worse"]))


def is_published(result: dict[str, Any], config: RunSection) -> bool:
    """Whether a complete run's model is where `config` wants it, with the weights that it wants."""
    wanted = (config.output, getattr(config, "publish", None))
    return (result.get("output"), result.get("publish")) == wanted and storage.exists(config.output)


def is_stopped(config: RunSection, worse: int) -> bool:
    """Whether so many validations without a better loss end the run."""
    patience = getattr(config, "patience", 0)
    return bool(patience) and worse >= patience


def begin(folder: str, config: RunSection) -> None:
    """Write down what the run in `folder` is, or make sure that it is the one that was begun there.

    Raises:
        ValueError: it was begun with other values; the message names them.
    """
    uri = storage.join(folder, "run.json")
    values = {name: value for name, value in config.model_dump().items() if name not in CHANGEABLE}
    values["content_of_shards"] = Manifest.read(config.shards).content_hash  # they may be written anew in their place
    if not storage.exists(uri):
        storage.write_json(uri, values)
        return
    before = storage.read_json(uri)
    differing = [
        f"{name} {before.get(name)!r} -> {value!r}" for name, value in values.items() if before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"run {config.run!r} in {config.storage} was begun with other values ({', '.join(differing)}): "
            "choose another --run, or delete its folder"
        )


def check_resize(folder: str, config: RunSection) -> None:
    """Make sure that the run in `folder` moves only between numbers of workers that such moves are tested with.

    Raises:
        ValueError: it would go on with another number, or may on its way, and one of the two is past the largest.
    """
    scaling = config.scaling
    if scaling.min_workers and scaling.min_workers != scaling.workers and scaling.workers > MOST_RESIZED:
        raise ValueError(
            f"scaling: a run that goes on with {scaling.min_workers} to {scaling.workers} workers is tested with "
            f"{MOST_RESIZED} at most: leave min_workers out, or set workers to {MOST_RESIZED}"
        )
    store = CheckpointStore(folder)
    for saved in store.saved()[-1:]:
        before = store.progress_of(saved)["workers"]
        if before != scaling.workers and max(before, scaling.workers) > MOST_RESIZED:
            raise ValueError(
                f"run {config.run!r} stands at step {saved.step} with {before} workers; going on with "
                f"{scaling.workers} is not tested, but up to {MOST_RESIZED} is: set scaling.workers to {before}"
            )


def total_steps(config: RunSection, examples: int) -> int:
    """Return the number of steps of a run.

    Raises:
        ValueError: there is nothing to learn from.
    """
    if not examples:
        raise ValueError(f"{config.shards} has no examples to train on")
    return max(1, round(config.epochs * -(-examples // config.batch)))


def plan_of(config: RunSection, examples: Examples, workers: int) -> StepPlan:
    return StepPlan(config.seed, len(examples), config.batch, config.micro_batch, workers)


def prepare_worker(config: RunSection) -> None:
    """Hold this worker to its CPU threads, and to what is worth saying in a job's log."""
    torch.set_num_threads(config.scaling.threads_per_worker)
    # Ray 2.60 names this logger by its file, so that LoggingConfig does not reach it: a line for every report.
    logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)


def summary(result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what a job prints of a finished run."""
    names = ("step", "loss", "examples_per_second", "audio_seconds_per_second", "redone_steps", "run")
    return {name: result[name] for name in names} | {"seconds": round(seconds, 1)}
