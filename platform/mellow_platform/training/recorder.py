"""Recorder of a run on a worker: losses, metrics, validations, background checkpoints, early stopping."""

import concurrent.futures
import dataclasses
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray.train
import ray.train.collective
import torch
import torch.distributed
from tqdm import tqdm

from mellow_platform import storage
from mellow_platform.training.checkpoints import POSITION, CheckpointStore, SavedCheckpoint, Tensors
from mellow_platform.training.run_config import RunSection
from mellow_platform.training.step_plan import Examples, StepPlan
from mellow_platform.training.tracking import Tracker
from mellow_platform.training.trainer import RESULT, is_stopped, total_steps

logger = logging.getLogger(__name__)

POSITION_SECONDS, PREEMPTION_SECONDS = 1.0, 1.0
# A report to Ray blocks until its controller, which polls every two seconds, has read the previous one.
REPORT_SECONDS = 10.0


@dataclasses.dataclass
class Counters:
    """Counts of this worker since metrics were last logged."""

    since: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    examples: int = 0
    loss: float = 0.0
    work: dict[str, float] = dataclasses.field(default_factory=dict)  # sums over all workers
    waited: float = 0.0  # seconds without a batch


@dataclasses.dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written in the background.

    Attributes:
        rows: log rows that it commits; empty after they are written.
    """

    written: concurrent.futures.Future[None]
    step: int
    best: dict[str, float] | None
    rows: list[dict[str, Any]]


class Recorder:
    """Recorder of a run on a worker: position, loss of each step, metrics, background checkpoints, early stopping.

    Only rank 0 writes; the other ranks take part in collective operations.
    """

    def __init__(
        self,
        config: RunSection,
        plan: StepPlan,
        examples: Examples,
        clip_seconds: float,
        peak_flops: float = math.nan,
    ):
        """
        Args:
            clip_seconds: seconds of audio per example.
            peak_flops: peak floating-point operations per second of all workers, for the utilization.
        """
        context = ray.train.get_context()
        self.config, self.plan, self.examples, self.clip_seconds = config, plan, examples, clip_seconds
        self.peak_flops = peak_flops
        self.total = total_steps(config, len(examples))
        self.rank = context.get_world_rank()
        self.is_first = self.rank == 0
        self.folder = storage.join(config.storage, config.run)
        self.store = CheckpointStore(self.folder)
        self.attempt = uuid.uuid4().hex[:8]
        self.step = self.resumed_from = 0
        # Progress in checkpoints: names of log files, best validation, number of validations since then, metrics.
        self.log: list[str] = []
        self.best: dict[str, float] | None = None
        self.worse = 0
        self.metrics: dict[str, float] = {}
        self.kept_best: dict[str, float] | None = None  # best validation with a complete checkpoint, on rank 0
        self.redone = 0  # steps that were repeated after kills
        self.rows: list[dict[str, Any]] = []  # of the log, since the last checkpoint
        self.counters = Counters()
        self.writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.writing: PendingCheckpoint | None = None
        self.position_writer = concurrent.futures.ThreadPoolExecutor(1, "position")
        self.position_write: concurrent.futures.Future[None] | None = None
        # Times of the last position, look for preemption notices, and report to Ray.
        self.position_time = self.preemption_time = self.report_time = 0.0
        self.preempted: set[str] = set()
        self.tracker: Tracker | None = None
        self.bar: tqdm | None = None

    def resume(self) -> Tensors | None:
        """Load progress and tensors of the latest complete checkpoint, and return the tensors; None without one."""
        found = self.store.load_latest() if self.is_first else None
        latest = ray.train.collective.broadcast_from_rank_zero((found[0].step, found[0].uri) if found else None)
        tensors = None
        if latest:
            tensors, progress = found[1:] if found else self.store.load(SavedCheckpoint(*latest))
            self.step, self.log = progress["step"], progress["log"]
            self.resumed_from = self.step
            self.best, self.worse = self.kept_best, _ = progress["best"], progress["worse"]
            self.metrics = progress["metrics"]
            logger.info("run %s resumes from step %d", self.config.run, self.step)
        if self.is_first:
            self._count_redone()
            self.tracker = Tracker(self.config, self.folder, self.step)
            self.bar = tqdm(
                total=self.total,
                initial=self.step,
                desc=self.config.run,
                unit="step",
                mininterval=5,
                ascii=True,
            )
        self.counters = Counters()
        return tensors

    def checkpoint_to_publish(self, best: bool) -> tuple[SavedCheckpoint, Tensors | None]:
        """Return the checkpoint to publish, the same on all workers, and on rank 0 its tensors.

        Args:
            best: take the step with the best validation loss, if any, instead of the last step.

        Raises:
            RuntimeError: the last step has no complete checkpoint.
        """
        found = None
        if self.is_first:
            if best and self.best:
                found = self.store.load_latest(int(self.best["step"]))
                if not found:
                    logger.warning(
                        "best step %d has no complete checkpoint; publishing the last step", self.best["step"]
                    )
            found = found or self.store.load_latest(self.step)
            if not found:
                raise RuntimeError(
                    f"{self.folder} has no complete checkpoint of step {self.step}; submit the run again"
                )
        selected = ray.train.collective.broadcast_from_rank_zero((found[0].step, found[0].uri) if found else None)
        return SavedCheckpoint(*selected), found[1] if found else None

    def until_done(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Yield from `steps` until the run is done, and measure the time spent waiting for them."""
        while not self.is_done:
            start = time.perf_counter()
            step = next(steps)
            self.counters.waited += time.perf_counter() - start
            yield step

    @property
    def is_done(self) -> bool:
        return self.step >= self.total or is_stopped(self.config, self.worse)

    def advance(
        self,
        loss: torch.Tensor,
        learning_rate: float,
        snapshot: Callable[[bool], Tensors],
        validate: Callable[[], dict[str, float]] | None = None,
        work: dict[str, float] | None = None,
    ) -> None:
        """Record a finished step; report, validate and checkpoint if due. All workers call it together.

        Args:
            loss: this worker's share of the step's mean loss.
            snapshot: returns the tensors of a checkpoint, or nothing if its argument is false.
            validate: returns `val_loss` and other scores, if the run validates.
            work: this worker's counts in the step, reported as rates per second; all workers use the same names.

        Raises:
            RuntimeError: the loss is not finite.
        """
        now = time.monotonic()
        mean, look, report = self._sum_over_workers(loss, work or {}, now)
        if not math.isfinite(mean):
            raise RuntimeError(
                f"step {self.step + 1}: the loss is {mean}; lower learning_rate, or inspect the step's examples: "
                f"{', '.join(self._ids()[:8])}, ..."
            )
        self._record(mean, learning_rate)
        notice = look and self._is_preempted()
        better = False
        if validate and (self.step >= self.total or self.step % self.validate_every == 0):
            better = self._record_validation(validate())
        checkpoint = self.is_done or notice or better or self.step % self.config.checkpoint_every == 0
        if checkpoint or self.step % self.config.log_every == 0:
            self._log(learning_rate)
        if report or self.is_done:
            ray.train.report(self.metrics | {"step": self.step, "total_steps": self.total})
        if checkpoint:
            self._checkpoint(snapshot, wait=notice or self.is_done)
        elif self.is_first and now - self.position_time >= POSITION_SECONDS:
            self._write_position()

    @property
    def validate_every(self) -> int:
        return getattr(self.config, "validate_every", 0)

    def finish(self) -> None:
        """Write the result on rank 0: the last file of a run, which marks it as complete."""
        if not self.is_first:
            return
        if self.bar:
            self.bar.close()
        if self.tracker:
            self.tracker.close()
        result = self.metrics | {
            "run": self.folder,
            "output": self.config.output,
            "publish": getattr(self.config, "publish", None),
            "step": self.step,
            "total_steps": self.total,
            "resumed_from": self.resumed_from,
            "redone_steps": self.redone,
            "best": self.best,
            "worse": self.worse,
        }
        storage.write_json(storage.join(self.folder, RESULT), result)

    def _sum_over_workers(self, loss: torch.Tensor, work: dict[str, float], now: float) -> tuple[float, bool, bool]:
        """Sum losses and work over the workers; return the mean loss, and whether notices and a report are due.

        Both are collective calls, so the clock of rank 0 decides for all workers.
        """
        look = self.is_first and now - self.preemption_time >= PREEMPTION_SECONDS
        report = self.is_first and now - self.report_time >= REPORT_SECONDS
        counts = torch.tensor([look, report, *work.values()], dtype=torch.float64, device=loss.device)
        sums = torch.cat([loss.detach().double()[None], counts])
        torch.distributed.all_reduce(sums)
        mean, look, report, *totals = sums.tolist()
        for name, total in zip(work, totals, strict=True):
            self.counters.work[name] = self.counters.work.get(name, 0.0) + total
        if look:
            self.preemption_time = now
        if report:
            self.report_time = now
        return mean, bool(look), bool(report)

    def _ids(self) -> list[str]:
        ids = self.examples.ids
        return [ids[number] for number in self.plan.numbers(self.examples, self.step)]

    def _record(self, loss: float, learning_rate: float) -> None:
        epoch, first, last = self.plan.order_range(self.step)
        ids = self._ids() if self.is_first else []
        self.step += 1
        self.counters.steps += 1
        self.counters.examples += last - first
        self.counters.loss += loss
        if self.is_first:
            self.rows.append(
                {"step": self.step, "epoch": epoch, "loss": loss, "learning_rate": learning_rate, "examples": ids}
            )
        if self.bar:
            self.bar.update()

    def _is_preempted(self) -> bool:
        """Return whether a node of this run has had a preemption notice since the last call, on all workers alike."""
        notice = ray.train.get_preemption_info()
        new = set(notice.preempted_node_ids) - self.preempted if notice else set()
        self.preempted |= new
        if new and self.is_first:
            logger.warning(
                "step %d: nodes %s will be preempted; saving a checkpoint", self.step, ", ".join(sorted(new))
            )
        return bool(new)

    def _record_validation(self, scores: dict[str, float]) -> bool:
        """Record the scores of a validation; return whether its loss is the lowest so far."""
        self.metrics |= scores
        if self.tracker:
            self.tracker.log(scores, self.step)
        if self.best is None or scores["val_loss"] < self.best["val_loss"]:
            self.best, self.worse = scores | {"step": self.step}, 0
            return True
        self.worse += 1
        return False

    def _log(self, learning_rate: float) -> None:
        counters, self.counters = self.counters, Counters()
        seconds = max(self.counters.since - counters.since, 1e-9)
        rate = counters.examples / seconds
        self.metrics |= {
            "loss": counters.loss / max(1, counters.steps),
            "learning_rate": learning_rate,
            "examples_per_second": rate,
            "audio_seconds_per_second": rate * self.clip_seconds,
            "data_wait_share": counters.waited / seconds,
            **{f"{name}_per_second": count / seconds for name, count in counters.work.items()},
        }
        if "model_flops" in counters.work:
            self.metrics["model_flop_utilization"] = self.metrics["model_flops_per_second"] / self.peak_flops
        if self.tracker and self.bar:
            self.tracker.log(self.metrics, self.step)
            self.bar.set_postfix(loss=f"{self.metrics['loss']:.4f}", ex_s=f"{rate:.0f}", refresh=False)

    def _checkpoint(self, snapshot: Callable[[bool], Tensors], wait: bool) -> None:
        self._wait_for_writer(final=False)
        tensors = snapshot(self.is_first)
        if self.is_first:
            progress: dict[str, Any] = {
                "step": self.step,
                "best": self.best,
                "worse": self.worse,
                "metrics": dict(self.metrics),
                "workers": self.plan.workers,
            }
            rows, self.rows = self.rows, []
            written = self.writer.submit(self._write, tensors, progress, rows)
            self.writing = PendingCheckpoint(written, self.step, self.best, rows)
            self._write_position()
        if wait:
            self._wait_for_writer(final=self.is_done)

    def _write(self, tensors: Tensors, progress: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write the log rows, clear them, and write a checkpoint that commits them."""
        if rows:
            self.log.append(self.store.write_log(rows))
            rows.clear()
        self.store.write(progress["step"], self.attempt, tensors, progress | {"log": list(self.log)})
        try:
            best = progress["best"]
            self.store.prune(self.config.keep_checkpoints, [int(best["step"])] if best else [])
            if self.tracker:
                self.tracker.upload()
        except Exception:  # the next checkpoint repeats both
            logger.exception("older checkpoints were not deleted, or metrics not uploaded")

    def _wait_for_writer(self, final: bool) -> None:
        """Wait for the background checkpoint; its failure is an error only if no later checkpoint follows.

        Unless `final`, all workers then have the same best step, one with a complete checkpoint.
        """
        writing, self.writing = self.writing, None
        if writing:
            try:
                writing.written.result()
                self.kept_best = writing.best
            except Exception:
                if final:
                    raise
                self.rows = writing.rows + self.rows
                if self.best and self.best["step"] == writing.step:
                    self.best = self.kept_best
                logger.exception("a checkpoint was not written; the next one will contain its steps")
        if self.validate_every and not final:
            self.best = ray.train.collective.broadcast_from_rank_zero(self.best)

    def _count_redone(self) -> None:
        uri = storage.join(self.folder, POSITION)
        if storage.exists(uri):
            last = storage.read_json(uri)
            self.redone = last["redone"] + max(0, last["step"] - self.step)
            if last["step"] > self.step:
                logger.info("repeating %d steps after the checkpoint", last["step"] - self.step)
        storage.write_json(uri, {"step": self.step, "redone": self.redone})

    def _write_position(self) -> None:
        """Write the step of the run in the background, so that steps lost by a kill can be counted."""
        self.position_time = time.monotonic()
        if self.position_write and not self.position_write.done():
            return
        position = {"step": self.step, "redone": self.redone}

        def write() -> None:
            try:
                storage.write_json(storage.join(self.folder, POSITION), position)
            except Exception as error:  # affects only the count of repeated steps
                logger.warning("position of the run was not written: %r", error)

        self.position_write = self.position_writer.submit(write)
