"""Training batches in an order that is computed from (seed, epoch), never remembered from a stream.

Every worker builds a Ray Data pipeline over its own positions in that order; a run that is resumed builds the rest of
the list.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import ray
import torch

Arrays = dict[str, np.ndarray]


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order [count] of the examples in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Plan:
    """Which examples a worker sees: micro-batch `m` of all workers covers one stretch of the endless epochs.

    Attributes:
        count: examples in an epoch.
        micro_batch: examples a worker and micro-batch.
    """

    seed: int
    count: int
    micro_batch: int
    rank: int
    world_size: int

    def examples(self, positions: np.ndarray) -> np.ndarray:
        """Return the example at each of this worker's `positions` (0 is its first in the run)."""
        micro, within = np.divmod(positions, self.micro_batch)
        everyones = (micro * self.world_size + self.rank) * self.micro_batch + within
        epochs, places = np.divmod(everyones, self.count)
        return np.array(
            [epoch_order(self.seed, int(e), self.count)[p] for e, p in zip(epochs, places, strict=True)],
            np.int64,
        )


def batches(
    plan: Plan,
    gather: Callable[[np.ndarray, ray.ObjectRef], Arrays],
    source: ray.ObjectRef,
    first: int,
    last: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this worker's micro-batches `first` to `last` (excluded), in order.

    Args:
        gather: makes arrays [examples, ...] of example numbers and the data behind `source`.
        source: the examples, in Ray's object store.
    """
    if first >= last:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    offset = first * plan.micro_batch

    def make(rows: Arrays) -> Arrays:
        torch.set_num_threads(1)
        return gather(plan.examples(rows["id"] + offset), source)

    # About 16 micro-batches a task: few enough tasks to schedule, small enough blocks to hold.
    positions = ray.data.range(
        (last - first) * plan.micro_batch, override_num_blocks=max(1, (last - first) // 16), concurrency=1
    )
    made = positions.map_batches(make, batch_size=plan.micro_batch, concurrency=1)
    yield from made.iter_torch_batches(batch_size=plan.micro_batch, prefetch_batches=2, drop_last=True)
