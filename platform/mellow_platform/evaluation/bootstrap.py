"""How sure a score is: bootstrap intervals over clips, and paired comparison of two runs.

Questions about one clip are right or wrong together more often than chance would have it, so clips are drawn and not
questions (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 8: the unit that was sampled).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mellow_platform.evaluation.metrics import Metric

LEVEL = 0.95
WEIGHTS_AT_ONCE = 1 << 22  # 32 MB of them


@dataclass(frozen=True)
class Estimate:
    """A score with the ends of its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoreDifference(Estimate):
    """How much higher the first of two runs scores on the same questions, and how likely so much is by chance."""

    p: float


class Bootstrap:
    """Draws of the clips that answers are about.

    Args:
        clips: [N] the clip of each answer; of two, the first.
        draws: how many.
    """

    def __init__(self, clips: Sequence[str], draws: int, seed: int):
        self.clips, self.draws, self.seed = np.asarray(clips), draws, seed
        names, self.number = np.unique(self.clips, return_inverse=True)
        self.distinct = len(names)

    def estimate(self, measure: Metric) -> dict[str, Estimate]:
        """Return the scores of a measure with their intervals (percentiles)."""
        point, drawn = self._scores(measure)
        low, high = self._ends(drawn)
        rows = zip(measure.names, point, low, high, strict=True)
        return {name: Estimate(*map(float, values)) for name, *values in rows}

    def compare(self, first: Metric, second: Metric) -> dict[str, ScoreDifference]:
        """Return how two runs' scores on the same questions differ; both are measured on the same draws.

        p is two-sided, of a normal distribution as wide as the draws' differences: counts of draws could not tell
        probabilities as small as many comparisons together need. It is no smaller than where all clips that differ do
        so in one direction by chance (a sign test), which holds for few of them as well.
        """
        differing = (first.each != second.each).reshape(len(self.clips), -1).any(axis=1)
        clips = len(set(self.number[differing].tolist()))
        least = min(1.0, 2.0 ** (1 - clips))
        (point, drawn), (other, other_drawn) = self._scores(first), self._scores(second)
        difference = drawn - other_drawn
        low, high = self._ends(difference)
        p = [max(least, _two_sided(*pair)) for pair in zip(point - other, difference.std(axis=0, ddof=1), strict=True)]
        rows = zip(first.names, point - other, low, high, p, strict=True)
        return {name: ScoreDifference(*map(float, values)) for name, *values in rows}

    def of(self, rows: np.ndarray) -> "Bootstrap":
        """Return draws among the clips of the answers `rows`."""
        return Bootstrap(self.clips[rows], self.draws, self.seed)

    def _scores(self, measure: Metric) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores [names] of all answers, and those of every draw [draws, names]."""
        point = measure(np.ones((1, len(self.clips))))[0]
        return point, np.concatenate([measure(weights) for weights in self._weights()])

    def _weights(self) -> Iterator[np.ndarray]:
        """Yield how often every answer counts in each draw: the same arrays every time."""
        rng = np.random.default_rng(self.seed)
        share = np.full(self.distinct, 1 / self.distinct)
        step = max(1, WEIGHTS_AT_ONCE // len(self.clips))
        for start in range(0, self.draws, step):
            counts = rng.multinomial(self.distinct, share, size=min(step, self.draws - start))
            yield counts[:, self.number].astype(np.float64)

    @staticmethod
    def _ends(drawn: np.ndarray) -> np.ndarray:
        return np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def _two_sided(difference: float, spread: float) -> float:
    """Return how likely a difference so far from 0 is, where that is the mean."""
    if spread == 0:
        return float(difference == 0)
    return math.erfc(abs(difference) / spread / math.sqrt(2))


def holm(p: Sequence[float], level: float = 1 - LEVEL) -> list[bool]:
    """Return which of several differences are significant together, at `level` in all (Holm's step-down rule)."""
    order = np.argsort(p)
    significant = [False] * len(p)
    for rank, place in enumerate(order):
        if p[place] > level / (len(p) - rank):
            break
        significant[place] = True
    return significant
