"""What both training loops share: steps, schedule, run state, and the trainer that Ray runs them with."""

import contextlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mellow_platform import storage
from mellow_platform.config import RunSection

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
# Muon's matrix products are bfloat16, which on a CPU that announces AMX without granting it end the process; this
# keeps oneDNN to instructions that such machines have. It has to stand before torch is loaded.
WORKER_ENVIRONMENT = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}


def run_training(loop: Callable[[dict], None], config: RunSection) -> Result:
    """Run `loop` on the workers that `config` asks for; a run of the same name goes on from its last checkpoint."""
    scaling = config.scaling
    fs, path = storage.arrow_filesystem(config.storage)
    trainer = TorchTrainer(
        loop,
        train_loop_config=config.model_dump(),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=bool(scaling.gpus_per_worker),
            resources_per_worker={"CPU": scaling.cpus_per_worker}
            | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=config.run,
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(scaling.threads_per_worker)}},
        ),
    )
    return trainer.fit()


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Return the share of the peak learning rate at `step`: linear warm-up, then a cosine to 0."""
    warm = max(1, round(total * warmup))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def total_steps(config: RunSection, examples: int, examples_per_step: int) -> int:
    """Return the number of steps of a run.

    Raises:
        ValueError: the split does not fill one step.
    """
    steps = int(config.epochs * examples) // examples_per_step
    if steps < 1:
        raise ValueError(
            f"{examples} examples x {config.epochs:g} epochs do not fill one step of {examples_per_step}: "
            "lower micro_batch or the number of workers, or raise epochs"
        )
    return steps


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the draws of a step (dropout, SpecAugment) a function of these numbers, resumed or not."""
    torch.manual_seed((seed * 1_000_003 + step) * 1009 + rank)


class Progress:
    """Follows a run on rank 0: progress bar, TensorBoard, throughput; and saves the state every run resumes from."""

    def __init__(self, config: RunSection, total: int, examples_per_step: int, clip_seconds: float):
        context = ray.train.get_context()
        self.config, self.total, self.examples_per_step = config, total, examples_per_step
        self.clip_seconds = clip_seconds
        self.is_first = context.get_world_rank() == 0
        self.step = 0
        self.losses: list[float] = []
        self.folder = tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.folder.name) if self.is_first else None
        self.bar: tqdm | None = None
        self.since = (time.perf_counter(), 0)

    def resume(self, load: Callable[[Path], None]) -> int:
        """Load the last checkpoint, when there is one, with `load(folder)`; return the step to go on from."""
        if checkpoint := ray.train.get_checkpoint():
            with checkpoint.as_directory() as folder:
                load(Path(folder))
                self.step = json.loads((Path(folder) / PROGRESS).read_text())["step"]
            logger.info("run %s goes on from step %d", self.config.run, self.step)
        if self.is_first:
            self.bar = tqdm(
                total=self.total,
                initial=self.step,
                desc=self.config.run,
                unit="step",
                mininterval=5,
                ascii=True,
            )
        self.since = (time.perf_counter(), self.step)
        return self.step

    def advance(self, loss: torch.Tensor, learning_rate: float, save: Callable[[Path], None]) -> None:
        """Count a finished step; report every `log_every` steps, checkpoint every `checkpoint_every` and at the end."""
        self.step += 1
        self.losses.append(loss.detach().item())
        if self.bar:
            self.bar.update()
        last = self.step == self.total
        checkpoint = last or self.step % self.config.checkpoint_every == 0
        if not (checkpoint or self.step % self.config.log_every == 0):
            return
        metrics = self._metrics(learning_rate)
        if self.writer and self.bar:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)
            self.bar.set_postfix(
                loss=f"{metrics['loss']:.4f}", ex_s=f"{metrics['examples_per_second']:.0f}", refresh=False
            )
        if not checkpoint:
            return
        with self._checkpoint(save) as saved:
            ray.train.report(metrics | {"step": self.step, "total_steps": self.total}, checkpoint=saved)
        if self.writer:
            self.writer.flush()
            storage.upload(self.folder.name, storage.join(self.config.storage, self.config.run, "tensorboard"))
        if last and self.bar:
            self.bar.close()

    def _metrics(self, learning_rate: float) -> dict[str, float]:
        now, (then, step) = time.perf_counter(), self.since
        self.since = (now, self.step)
        rate = (self.step - step) * self.examples_per_step / max(now - then, 1e-9)
        loss = sum(self.losses) / len(self.losses)
        self.losses.clear()
        return {
            "loss": loss,
            "learning_rate": learning_rate,
            "examples_per_second": rate,
            "audio_seconds_per_second": rate * self.clip_seconds,
        }

    @contextlib.contextmanager
    def _checkpoint(self, save: Callable[[Path], None]) -> Iterator[Checkpoint | None]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(folder)
            if self.is_first:
                (folder / PROGRESS).write_text(json.dumps({"step": self.step}))
            yield Checkpoint.from_directory(folder) if any(folder.iterdir()) else None


def worker_threads(config: RunSection) -> None:
    """Hold this worker to its CPU threads."""
    torch.set_num_threads(config.scaling.threads_per_worker)


def summary(result: Result, seconds: float) -> dict[str, Any]:
    """Return what a job prints of a finished run.

    Raises:
        RuntimeError: the run reported nothing.
    """
    if not result.metrics:
        raise RuntimeError(f"the run in {result.path} ended without a report; see its log above")
    names = ("step", "loss", "examples_per_second", "audio_seconds_per_second")
    return {name: result.metrics[name] for name in names} | {"seconds": round(seconds, 1), "run": result.path}
