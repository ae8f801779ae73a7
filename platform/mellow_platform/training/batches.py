"""Training batches in an order that is computed from (seed, epoch), never remembered from a stream.

A step is a fixed stretch of its epoch's order, cut into micro-batches that do not depend on how many workers share
them: a run that is resumed, on other workers too, builds the rest of the list and goes on.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch

Arrays = dict[str, np.ndarray]

WINDOW, TASK = 64, 16  # micro-batches made ahead, and of them in one Ray task
# Such tasks at a time for a training worker: the first of each starts a process, which loads torch for seconds.
TASKS = 2


class Examples(Protocol):
    """What a training job learns from, by number; read in place from Ray's object store."""

    @property
    def ids(self) -> Sequence[str]:
        """A stable name of each example, for the log."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """What each example counts [count] in the mean loss: its answer's tokens, or 1."""
        ...

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order [count] of the examples in one epoch, a function of the arguments alone."""
        ...

    def collate(self, seed: int, epoch: int, numbers: np.ndarray) -> Arrays:
        """Return the arrays that the network reads of the numbered examples."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which examples are in a step, and which of its micro-batches a worker computes.

    Attributes:
        count: examples in an epoch.
        batch: examples of a step; the last step of an epoch has what is left.
        micro_batch: examples of one forward pass.
        workers: that share a step.
    """

    seed: int
    count: int
    batch: int
    micro_batch: int
    workers: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.batch)

    @property
    def turns(self) -> int:
        """Micro-batches that every worker computes in a step (gradient accumulation)."""
        return -(-min(self.batch, self.count) // (self.micro_batch * self.workers))

    def stretch(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step, and where in its order the step starts and stops."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within * self.batch, min((within + 1) * self.batch, self.count)

    def micro(self, step: int, turn: int, rank: int) -> tuple[int, int] | None:
        """Return the stretch of the epoch's order that a worker computes in a turn; None where none is left for it."""
        _, first, last = self.stretch(step)
        start = first + (turn * self.workers + rank) * self.micro_batch
        return (start, min(start + self.micro_batch, last)) if start < last else None

    def numbers(self, examples: Examples, step: int) -> np.ndarray:
        """Return the numbers of the examples in a step."""
        epoch, first, last = self.stretch(step)
        return examples.order(self.seed, epoch)[first:last]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    Attributes:
        arrays: of `Examples.collate`.
        size: what the whole step's examples count, over all workers: losses are sums divided by it.
        counts: false for a stand-in, computed where a worker has no share of the step, so that all keep in step.
        draw: seed of its dropout and its other draws.
    """

    arrays: dict[str, torch.Tensor]
    size: float
    counts: bool
    draw: int


def batches(plan: Plan, source: ray.ObjectRef, rank: int, first: int, last: int) -> Iterator[list[MicroBatch]]:
    """Yield this worker's micro-batches of the steps `first` to `last` (excluded), a list a step.

    They are made a window at a time, the next one while this one is trained on. One endless pipeline would be simpler,
    but while its output waits to be consumed, Ray Data's scheduling loop spins in this very process (2.60): it took
    half of the tagger's speed on two cores.

    Args:
        source: the `Examples`, in Ray's object store.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    steps = max(1, WINDOW // plan.turns)

    def window(start: int) -> ray.data.Dataset:
        count = (min(start + steps, last) - start) * plan.turns

        def make(row: dict[str, int]) -> dict[str, Any]:
            torch.set_num_threads(1)
            step, turn = divmod(row["id"], plan.turns)
            return _collated(plan, ray.get(source), start + step, turn, rank)

        rows = [{"id": number} for number in range(count)]
        # The workers may hold every CPU there is; what makes their batches must not wait for one.
        tasks = -(-count // TASK)
        pool = ray.data.TaskPoolStrategy(size=min(TASKS, tasks))
        return ray.data.from_items(rows, override_num_blocks=tasks).map(make, num_cpus=0, compute=pool).materialize()

    starts = range(first, last, steps)
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(window, first) if starts else None
        for start in starts:
            assert following
            made = following.result()
            following = ahead.submit(window, start + steps) if start + steps < last else None
            turns: list[MicroBatch] = []
            for row in made.iter_rows():
                size, counts, draw = row.pop("size"), row.pop("counts"), row.pop("draw")
                tensors = {name: torch.from_numpy(np.array(array)) for name, array in row.items()}
                turns.append(MicroBatch(tensors, size, counts, draw))
                if len(turns) == plan.turns:
                    yield turns
                    turns = []


def _collated(plan: Plan, examples: Examples, step: int, turn: int, rank: int) -> dict[str, Any]:
    epoch, first, last = plan.stretch(step)
    order = examples.order(plan.seed, epoch)
    own = plan.micro(step, turn, rank)
    start, stop = own or (first, min(first + plan.micro_batch, last))
    arrays = examples.collate(plan.seed, epoch, order[start:stop])
    # A draw depends on the step and on the micro-batch's first example, not on who computes it.
    draw = int(np.random.SeedSequence([plan.seed, step, start]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    size = float(examples.sizes[order[first:last]].sum())
    return arrays | {"size": size, "counts": own is not None, "draw": draw}
