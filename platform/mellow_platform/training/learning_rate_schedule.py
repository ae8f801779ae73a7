"""Learning-rate schedule: linear warm-up, then cosine decay to 0."""

import math


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Return the share of the peak learning rate at `step` of `total`; `warmup` is the share of warm-up steps."""
    warmup_steps = max(1, round(total * warmup))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))
