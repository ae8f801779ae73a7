"""Which examples are in a step, computed from (seed, epoch) and never remembered from a stream.

A step is a fixed stretch of its epoch's order, cut into micro-batches that do not depend on how many workers share
them: a run that is resumed, on other workers too, builds the rest of the list and continues. The processes that put
batches together load this module, and not torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


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
class StepPlan:
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


def collated(plan: StepPlan, examples: Examples, step: int, turn: int, rank: int) -> dict[str, Any]:
    """Return the arrays of a worker's micro-batch in a turn of a step, with the fields of `MicroBatch`."""
    epoch, first, last = plan.stretch(step)
    order = examples.order(plan.seed, epoch)
    own = plan.micro(step, turn, rank)
    start, stop = own or (first, min(first + plan.micro_batch, last))
    arrays = examples.collate(plan.seed, epoch, order[start:stop])
    # A draw depends on the step and on the micro-batch's first example, not on who computes it.
    draw = int(np.random.SeedSequence([plan.seed, step, start]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    size = float(examples.sizes[order[first:last]].sum())
    return arrays | {"size": size, "counts": own is not None, "draw": draw}
