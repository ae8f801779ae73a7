"""Bootstrap intervals over clips, and paired comparison of two runs.

Answers about the same clip are correlated, so clips are resampled, not questions (Efron and Tibshirani, An Introduction
to the Bootstrap, chapter 8: resample the unit that was sampled).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mellow_platform.evaluation.metrics import Metric

LEVEL = 0.95
WEIGHTS_PER_BATCH = 1 << 22  # 32 MB


@dataclass(frozen=True)
class Estimate:
    """A score with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoreDifference(Estimate):
    """Score of the first run minus that of the second on the same questions, with a two-sided p-value."""

    p: float


class Bootstrap:
    """Bootstrap draws over the clips of N answers.

    Args:
        clips: clip of each answer [N]; the first of two.
        draws: number of draws.
    """

    def __init__(self, clips: Sequence[str], draws: int, seed: int):
        self.clips, self.draws, self.seed = np.asarray(clips), draws, seed
        names, self.clip_index = np.unique(self.clips, return_inverse=True)
        self.clip_count = len(names)

    def estimate(self, metric: Metric) -> dict[str, Estimate]:
        """Return the scores of a metric with percentile intervals."""
        point, drawn = self._scores(metric)
        low, high = self._ends(drawn)
        rows = zip(metric.names, point, low, high, strict=True)
        return {name: Estimate(*map(float, values)) for name, *values in rows}

    def compare(self, first: Metric, second: Metric) -> dict[str, ScoreDifference]:
        """Return the score differences of two runs on the same questions, measured on the same draws.

        p is two-sided, from a normal distribution with the standard deviation of the drawn differences: counting draws
        cannot resolve the small p-values that many comparisons need. Its lower bound is the p-value of a sign test in
        which all differing clips agree, which also holds for few clips.
        """
        differing = (first.values != second.values).reshape(len(self.clips), -1).any(axis=1)
        count = len(set(self.clip_index[differing].tolist()))
        least = min(1.0, 2.0 ** (1 - count))
        (point, drawn), (other_point, other_drawn) = self._scores(first), self._scores(second)
        difference = drawn - other_drawn
        low, high = self._ends(difference)
        p = [
            max(least, _two_sided(*pair))
            for pair in zip(point - other_point, difference.std(axis=0, ddof=1), strict=True)
        ]
        rows = zip(first.names, point - other_point, low, high, p, strict=True)
        return {name: ScoreDifference(*map(float, values)) for name, *values in rows}

    def subset(self, rows: np.ndarray) -> "Bootstrap":
        """Return draws over the clips of the answers `rows`."""
        return Bootstrap(self.clips[rows], self.draws, self.seed)

    def _scores(self, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of all answers [names], and of every draw [draws, names]."""
        point = metric(np.ones((1, len(self.clips))))[0]
        return point, np.concatenate([metric(weights) for weights in self._weights()])

    def _weights(self) -> Iterator[np.ndarray]:
        """Yield the weight of every answer in each draw [draws, N], in batches; deterministic by seed."""
        rng = np.random.default_rng(self.seed)
        share = np.full(self.clip_count, 1 / self.clip_count)
        step = max(1, WEIGHTS_PER_BATCH // len(self.clips))
        for start in range(0, self.draws, step):
            counts = rng.multinomial(self.clip_count, share, size=min(step, self.draws - start))
            yield counts[:, self.clip_index].astype(np.float64)

    @staticmethod
    def _ends(drawn: np.ndarray) -> np.ndarray:
        return np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def _two_sided(difference: float, spread: float) -> float:
    """Return the two-sided p-value of a difference under a normal distribution around 0 with this `spread`."""
    if spread == 0:
        return float(difference == 0)
    return math.erfc(abs(difference) / spread / math.sqrt(2))


def holm(p: Sequence[float], level: float = 1 - LEVEL) -> list[bool]:
    """Return which p-values are significant at a family-wise error rate of `level` (Holm's step-down method)."""
    order = np.argsort(p)
    significant = [False] * len(p)
    for rank, place in enumerate(order):
        if p[place] > level / (len(p) - rank):
            break
        significant[place] = True
    return significant
