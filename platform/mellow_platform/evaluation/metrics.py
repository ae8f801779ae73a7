"""Scores as functions of the answers' weights, so that the same code gives a score and its bootstrap interval."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Metric(ABC):
    """One score, or several that are computed together, of a fixed list of N answers.

    Attributes:
        names: names of the scores.
        values: per-answer values [N] or [N, values] that the scores are computed from; equal values, equal scores.
    """

    names: tuple[str, ...]
    values: np.ndarray

    @abstractmethod
    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Return the scores [B, names] with `weights` [B, N], the count of each answer in each draw."""

    @abstractmethod
    def subset(self, rows: np.ndarray) -> "Metric":
        """Return the metric of the answers `rows` only, indices in ascending order."""


class Mean(Metric):
    """Mean over answers of one value per answer, such as 1 for right and 0 for wrong.

    Args:
        scale: factor of the mean.
    """

    def __init__(self, name: str, values: np.ndarray, scale: float = 1.0):
        self.names = (name,)
        self.values = np.asarray(values, np.float64)
        self.scale = scale

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return (self.scale * (weights @ self.values) / weights.sum(axis=1))[:, None]

    def subset(self, rows: np.ndarray) -> "Mean":
        return Mean(self.names[0], self.values[rows], self.scale)


class MeanOverFamilies(Metric):
    """Mean over families of the mean within each family: every family has the same weight."""

    def __init__(self, name: str, values: np.ndarray, families: Sequence[str]):
        self.names = (name,)
        self.values, self.families = np.asarray(values, np.float64), np.asarray(families)
        _, number = np.unique(self.families, return_inverse=True)
        self.member = np.eye(number.max() + 1)[number]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        counts = weights @ self.member
        sums = weights @ (self.member * self.values[:, None])
        # A family without questions among the drawn clips is excluded from that draw's mean.
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        return (means.sum(axis=1) / (counts > 0).sum(axis=1))[:, None]

    def subset(self, rows: np.ndarray) -> "MeanOverFamilies":
        return MeanOverFamilies(self.names[0], self.values[rows], self.families[rows])


class ExpectedMetric(Metric):
    """Expected value of a metric if each question's answer is drawn uniformly from several candidates.

    Args:
        metric: of all candidate answers, question by question.
        question: index of the question of each candidate [candidates].
    """

    def __init__(self, metric: Metric, question: np.ndarray):
        self.names, self.metric, self.question = metric.names, metric, question
        self.share = 1 / np.bincount(question)[question]
        columns = metric.values.reshape(len(question), -1).T
        self.values = np.stack([np.bincount(question, self.share * column) for column in columns], axis=1)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return self.metric(weights[:, self.question] * self.share)

    def subset(self, rows: np.ndarray) -> "ExpectedMetric":
        kept = np.flatnonzero(np.isin(self.question, rows))
        return ExpectedMetric(self.metric.subset(kept), np.searchsorted(rows, self.question[kept]))


class Classification(Metric):
    """Accuracy, macro precision, recall and F1, and per-class accuracy, as scikit-learn defines them.

    Args:
        truth: class index of each reference [N].
        predicted: class index of each prediction [N]; `len(classes)` if it names no class.
    """

    def __init__(self, truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str]):
        self.truth, self.predicted, self.classes = np.asarray(truth), np.asarray(predicted), tuple(classes)
        self.values = np.eye(len(classes) + 1)[self.predicted]
        self.names = ("accuracy", "precision", "recall", "F1", *(f"accuracy of {name!r}" for name in classes))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        classes = np.arange(len(self.classes))
        is_true, is_predicted = self.truth[:, None] == classes, self.predicted[:, None] == classes
        right = weights @ (is_true & is_predicted)  # [draws, classes], like the two below
        actual, predicted = weights @ is_true, weights @ is_predicted
        precision, recall, f1 = _ratio(right, predicted), _ratio(right, actual), _ratio(2 * right, actual + predicted)
        accuracy = right.sum(axis=1) / weights.sum(axis=1)
        means = [score.mean(axis=1) for score in (precision, recall, f1)]
        # The accuracy of a class is its recall.
        return np.column_stack([accuracy, *means, recall])

    def subset(self, rows: np.ndarray) -> "Classification":
        return Classification(self.truth[rows], self.predicted[rows], self.classes)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return `part / whole`, and 0 if `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
