"""Micro-batches of a plan on Ray Data, a window ahead of the worker that trains on them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from mellow_platform.training.step_plan import StepPlan, collated

WINDOW, TASK = 64, 16  # micro-batches made ahead, and of them in one Ray task
TASKS = 2  # such tasks at a time for a training worker


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


def batches(plan: StepPlan, source: ray.ObjectRef, rank: int, first: int, last: int) -> Iterator[list[MicroBatch]]:
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
            step, turn = divmod(row["id"], plan.turns)
            return collated(plan, ray.get(source), start + step, turn, rank)

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
