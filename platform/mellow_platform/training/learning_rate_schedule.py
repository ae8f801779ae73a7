"""The learning rate of a training step, as a share of its peak."""

import math


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Return the share of the peak learning rate at `step`: linear warm-up, then a cosine to 0."""
    warm = max(1, round(total * warmup))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
