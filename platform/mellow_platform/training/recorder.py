"""How far a run is, on a worker: losses, metrics, validations, checkpoints in the background, early stop."""

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
# A report to Ray waits until its controller, which looks every two seconds, has taken the one before.
REPORT_SECONDS = 10.0


@dataclasses.dataclass
class Counters:
    """What happened since metrics were last logged, on this worker."""

    since: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    examples: int = 0
    loss: float = 0.0
    work: dict[str, float] = dataclasses.field(default_factory=dict)  # counts over all workers
    waited: float = 0.0  # seconds in which the loop had no batch


@dataclasses.dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is written in the background.

    Attributes:
        rows: of the log that it commits; none once these are written.
    """

    written: concurrent.futures.Future[None]
    step: int
    best: dict[str, float] | None
    rows: list[dict[str, Any]]


class Recorder:
    """Follows a run on a worker: position, loss of every step, metrics, checkpoints in the background, early stop.

    Rank 0 writes; the others take part in what all must do together.
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
            clip_seconds: audio of an example.
            peak_flops: floating-point operations a second of all workers, which `model_flops` are held against.
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
        # What a checkpoint carries besides tensors.
        self.log: list[str] = []
        self.best: dict[str, float] | None = None
        self.kept_best: dict[str, float] | None = None  # the best that has a whole checkpoint, on rank 0
        self.worse = 0
        self.redone = 0
        self.rows: list[dict[str, Any]] = []  # of the log, since the last checkpoint
        self.metrics: dict[str, float] = {}
        self.counters = Counters()
        self.writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.writing: PendingCheckpoint | None = None
        self.positions = concurrent.futures.ThreadPoolExecutor(1, "position")
        self.noting: concurrent.futures.Future[None] | None = None
        self.noted = self.watched = self.reported = 0.0
        self.preempted: set[str] = set()
        self.tracker: Tracker | None = None
        self.bar: tqdm | None = None

    def resume(self) -> Tensors | None:
        """Find the run's latest whole checkpoint, take its progress over, and return its tensors; None at the start."""
        found = self.store.load_latest() if self.is_first else None
        place = ray.train.collective.broadcast_from_rank_zero((found[0].step, found[0].uri) if found else None)
        tensors = None
        if place:
            tensors, progress = found[1:] if found else self.store.load(SavedCheckpoint(*place))
            self.step, self.log = progress["step"], progress["log"]
            self.resumed_from = self.step
            self.best, self.worse = self.kept_best, _ = progress["best"], progress["worse"]
            self.metrics = progress["metrics"]
            logger.info("run %s goes on from step %d", self.config.run, self.step)
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

    def choose(self, best: bool) -> tuple[SavedCheckpoint, Tensors | None]:
        """Return the checkpoint to publish, the same on all workers, and on the first one its tensors.

        Args:
            best: of the step that validated best, where there is one; else of the last step.

        Raises:
            RuntimeError: the last step has no whole checkpoint.
        """
        found = None
        if self.is_first:
            if best and self.best:
                found = self.store.load_latest(int(self.best["step"]))
                if not found:
                    logger.warning(
                        "step %d, the best, has no whole checkpoint: the last is published", self.best["step"]
                    )
            found = found or self.store.load_latest(self.step)
            if not found:
                raise RuntimeError(f"{self.folder} has no whole checkpoint of step {self.step}: submit the run again")
        place = ray.train.collective.broadcast_from_rank_zero((found[0].step, found[0].uri) if found else None)
        return SavedCheckpoint(*place), found[1] if found else None

    def waiting(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Pass `steps` on until the run is over, and count the time in which none is there."""
        while not self.over:
            start = time.perf_counter()
            step = next(steps)
            self.counters.waited += time.perf_counter() - start
            yield step

    @property
    def over(self) -> bool:
        return self.step >= self.total or is_stopped(self.config, self.worse)

    def advance(
        self,
        loss: torch.Tensor,
        learning_rate: float,
        snapshot: Callable[[bool], Tensors],
        validate: Callable[[], dict[str, float]] | None = None,
        work: dict[str, float] | None = None,
    ) -> None:
        """Count a finished step; report, validate and checkpoint when it is time. Called by all workers together.

        Args:
            loss: this worker's share of the step's mean loss.
            snapshot: returns the tensors to go on from, where its argument says to keep them.
            validate: returns `val_loss` and more, where the run validates.
            work: this worker's counts in the step, of the same names everywhere, that are reported as rates a second.
        """
        now = time.monotonic()
        mean, look, report = self._together(loss, work or {}, now)
        if not math.isfinite(mean):
            raise RuntimeError(
                f"step {self.step + 1}: the loss is {mean}; lower learning_rate, or look at the step's examples: "
                f"{', '.join(self._ids()[:8])}, ..."
            )
        self._record(mean, learning_rate)
        notice = look and self._is_preempted()
        better = False
        if validate and (self.step >= self.total or self.step % self.validate_every == 0):
            better = self._validated(validate())
        checkpoint = self.over or notice or better or self.step % self.config.checkpoint_every == 0
        if checkpoint or self.step % self.config.log_every == 0:
            self._log(learning_rate)
        if report or self.over:
            ray.train.report(self.metrics | {"step": self.step, "total_steps": self.total})
        if checkpoint:
            self._checkpoint(snapshot, wait=notice or self.over)
        elif self.is_first and now - self.noted >= POSITION_SECONDS:
            self._note_position()

    @property
    def validate_every(self) -> int:
        return getattr(self.config, "validate_every", 0)

    def finish(self) -> None:
        """Write what the run came to, on rank 0: the last file of a run, and the sign that it is complete."""
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

    def _together(self, loss: torch.Tensor, work: dict[str, float], now: float) -> tuple[float, bool, bool]:
        """Sum losses and work over the workers; return the mean loss, and what it is time for.

        What the first worker's clock says is time for (a look for notices, a report) is done by all: both are
        collective calls.
        """
        look = self.is_first and now - self.watched >= PREEMPTION_SECONDS
        report = self.is_first and now - self.reported >= REPORT_SECONDS
        counts = torch.tensor([look, report, *work.values()], dtype=torch.float64, device=loss.device)
        sums = torch.cat([loss.detach().double()[None], counts])
        torch.distributed.all_reduce(sums)
        mean, looking, reporting, *done = sums.tolist()
        for name, count in zip(work, done, strict=True):
            self.counters.work[name] = self.counters.work.get(name, 0.0) + count
        if looking:
            self.watched = now
        if reporting:
            self.reported = now
        return mean, bool(looking), bool(reporting)

    def _ids(self) -> list[str]:
        ids = self.examples.ids
        return [ids[number] for number in self.plan.numbers(self.examples, self.step)]

    def _record(self, loss: float, learning_rate: float) -> None:
        epoch, first, last = self.plan.stretch(self.step)
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
        """Whether a node of this run was given notice since the last look; all workers get the same answer."""
        notice = ray.train.get_preemption_info()
        new = set(notice.preempted_node_ids) - self.preempted if notice else set()
        self.preempted |= new
        if new and self.is_first:
            logger.warning("step %d: nodes %s are about to go; saving a checkpoint", self.step, ", ".join(sorted(new)))
        return bool(new)

    def _validated(self, scores: dict[str, float]) -> bool:
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
            self._note_position()
        if wait:
            self._wait_for_writer(final=self.over)

    def _write(self, tensors: Tensors, progress: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write the log's `rows`, which it empties, and a checkpoint that commits them."""
        if rows:
            self.log.append(self.store.write_log(rows))
            rows.clear()
        self.store.write(progress["step"], self.attempt, tensors, progress | {"log": list(self.log)})
        try:
            best = progress["best"]
            self.store.prune(self.config.keep_checkpoints, [int(best["step"])] if best else [])
            if self.tracker:
                self.tracker.upload()
        except Exception:  # the next checkpoint does both again
            logger.exception("older checkpoints were not deleted, or metrics not sent on")

    def _wait_for_writer(self, final: bool) -> None:
        """Wait for the checkpoint in the background; a failure ends the run only where no later one will make up.

        All workers then know the same best step, one whose checkpoint is kept.
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
                logger.exception("a checkpoint was not written; the run goes on, and the next one will hold its steps")
        if self.validate_every and not final:
            self.best = ray.train.collective.broadcast_from_rank_zero(self.best)

    def _count_redone(self) -> None:
        uri = storage.join(self.folder, POSITION)
        if storage.exists(uri):
            before = storage.read_json(uri)
            self.redone = before["redone"] + max(0, before["step"] - self.step)
            if before["step"] > self.step:
                logger.info("%d steps after the checkpoint are run again", before["step"] - self.step)
        storage.write_json(uri, {"step": self.step, "redone": self.redone})

    def _note_position(self) -> None:
        """Write down how far the run is, in the background: what is lost by a kill can then be counted."""
        self.noted = time.monotonic()
        if self.noting and not self.noting.done():
            return
        position = {"step": self.step, "redone": self.redone}

        def note() -> None:
            try:
                storage.write_json(storage.join(self.folder, POSITION), position)
            except Exception as error:  # the count of repeated steps is all that it costs
                logger.warning("the position of the run was not written: %r", error)

        self.noting = self.positions.submit(note)
