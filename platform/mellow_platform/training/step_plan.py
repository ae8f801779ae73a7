"""Examples of each training step, computed from (seed, epoch).

A step is a fixed range of its epoch's order, divided into micro-batches that do not depend on the number of workers:
a resumed run, on another number of workers too, computes the remaining steps. Processes that collate batches import
this module without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Examples(Protocol):
    """Training examples by number, read in place from Ray's object store."""

    @property
    def ids(self) -> Sequence[str]:
        """Stable name of each example, for the log."""
        ...

    @property
    def loss_weights(self) -> np.ndarray:
        """Weight of each example in the mean loss [count]: the tokens of its answer, or 1."""
        ...

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order [count] of the examples in an epoch, a function of only the arguments."""
        ...

    def collate(self, seed: int, epoch: int, numbers: np.ndarray) -> Arrays:
        """Return the network's input arrays for the numbered examples."""
        ...


@dataclass(frozen=True)
class StepPlan:
    """Assignment of examples to steps, and of a step's micro-batches to workers.

    Attributes:
        count: examples per epoch.
        batch: examples per step; the last step of an epoch has the remaining ones.
        micro_batch: examples per forward pass.
        workers: workers that share a step.
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
    def accumulation_steps(self) -> int:
        """Micro-batches per worker and step (gradient accumulation)."""
        return -(-min(self.batch, self.count) // (self.micro_batch * self.workers))

    def order_range(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step, and the start and stop of the step in the epoch's order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within * self.batch, min((within + 1) * self.batch, self.count)

    def micro_batch_range(self, step: int, micro_step: int, rank: int) -> tuple[int, int] | None:
        """Return start and stop of a worker's micro-batch in the epoch's order; None if no examples are left for it."""
        _, first, last = self.order_range(step)
        start = first + (micro_step * self.workers + rank) * self.micro_batch
        return (start, min(start + self.micro_batch, last)) if start < last else None

    def numbers(self, examples: Examples, step: int) -> np.ndarray:
        """Return the numbers of the examples in a step."""
        epoch, first, last = self.order_range(step)
        return examples.order(self.seed, epoch)[first:last]


def collate_micro_batch(plan: StepPlan, examples: Examples, step: int, micro_step: int, rank: int) -> dict[str, Any]:
    """Return the arrays of a worker's micro-batch, with the other fields of `MicroBatch`."""
    epoch, first, last = plan.order_range(step)
    order = examples.order(plan.seed, epoch)
    share = plan.micro_batch_range(step, micro_step, rank)
    start, stop = share or (first, min(first + plan.micro_batch, last))
    arrays = examples.collate(plan.seed, epoch, order[start:stop])
    # The seed depends on the step and on the micro-batch's position, not on the worker that computes it.
    seed = int(np.random.SeedSequence([plan.seed, step, start]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    step_weight = float(examples.loss_weights[order[first:last]].sum())
    return arrays | {"step_weight": step_weight, "active": share is not None, "seed": seed}
