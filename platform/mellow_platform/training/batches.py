"""Training batches in an order that is computed from (seed, epoch), never remembered from a stream.

Every worker builds Ray Data pipelines over its own positions in that order; a run that is resumed builds the rest of
the list.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import ray
import torch

Arrays = dict[str, np.ndarray]

WINDOW, TASK = 64, 16  # micro-batches made ahead, and of them in one Ray task


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
    plan: Plan, gather: Callable[[np.ndarray, ray.ObjectRef], Arrays], source: ray.ObjectRef, first: int, last: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this worker's micro-batches `first` to `last` (excluded), in order.

    They are made a window at a time, the next one while this one is trained on. One endless pipeline would be simpler,
    but while its output waits to be consumed, Ray Data's scheduling loop spins in this very process (2.60): it took
    half of the tagger's speed on two cores.

    Args:
        gather: makes arrays [examples, ...] of example numbers and the data behind `source`.
        source: the examples, in Ray's object store.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    size = plan.micro_batch

    def window(start: int) -> ray.data.Dataset:
        stop = min(start + WINDOW, last)

        def make(rows: Arrays) -> Arrays:
            torch.set_num_threads(1)
            return gather(plan.examples(rows["id"] + start * size), source)

        positions = ray.data.range((stop - start) * size, override_num_blocks=-(-(stop - start) // TASK))
        return positions.map_batches(make, batch_size=size).materialize()

    starts = range(first, last, WINDOW)
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(window, first) if starts else None
        for start in starts:
            assert following
            made = following.result()
            following = ahead.submit(window, start + WINDOW) if start + WINDOW < last else None
            yield from made.iter_torch_batches(batch_size=size, drop_last=True)
