"""Micro-batches of a step plan from Ray Data, collated one window ahead of the training worker."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from mellow_platform.training.step_plan import StepPlan, collate_micro_batch

WINDOW, TASK = 64, 16  # micro-batches per window, and per Ray task
TASKS = 2  # simultaneous tasks per training worker


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass.

    Attributes:
        arrays: of `Examples.collate`.
        step_weight: sum of `Examples.loss_weights` in the whole step, over all workers; divisor of its losses.
        active: false for a filler, whose loss counts 0: a worker without a share of the step computes one, because
            collective operations need all workers.
        seed: of dropout and other random operations.
    """

    arrays: dict[str, torch.Tensor]
    step_weight: float
    active: bool
    seed: int


def batches(plan: StepPlan, source: ray.ObjectRef, rank: int, first: int, last: int) -> Iterator[list[MicroBatch]]:
    """Yield this worker's micro-batches of the steps `first` to `last` (excluded), one list per step.

    The next window is collated while the worker trains on this one. A single pipeline would be simpler, but while its
    output waits, Ray Data's scheduling loop (2.60) spins in this process: it halved the tagger's speed on two cores.

    Args:
        source: the `Examples`, in Ray's object store.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    steps = max(1, WINDOW // plan.accumulation_steps)

    def window(start: int) -> ray.data.Dataset:
        count = (min(start + steps, last) - start) * plan.accumulation_steps

        def collate(row: dict[str, int]) -> dict[str, Any]:
            step, micro_step = divmod(row["id"], plan.accumulation_steps)
            return collate_micro_batch(plan, ray.get(source), start + step, micro_step, rank)

        rows = [{"id": number} for number in range(count)]
        # Zero CPUs: training workers may reserve every CPU, and their batches must not wait for one.
        tasks = -(-count // TASK)
        pool = ray.data.TaskPoolStrategy(size=min(TASKS, tasks))
        return ray.data.from_items(rows, override_num_blocks=tasks).map(collate, num_cpus=0, compute=pool).materialize()

    starts = range(first, last, steps)
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(window, first) if starts else None
        for start in starts:
            assert following
            current = following.result()
            following = executor.submit(window, start + steps) if start + steps < last else None
            micro_batches: list[MicroBatch] = []
            for row in current.iter_rows():
                step_weight, active, seed = row.pop("step_weight"), row.pop("active"), row.pop("seed")
                tensors = {name: torch.from_numpy(np.array(array)) for name, array in row.items()}
                micro_batches.append(MicroBatch(tensors, step_weight, active, seed))
                if len(micro_batches) == plan.accumulation_steps:
                    yield micro_batches
                    micro_batches = []
