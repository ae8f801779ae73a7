"""Scores as functions of how often each answer counts, so that what gives a score gives its interval too."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Metric(ABC):
    """One score, or several that are computed together, of a fixed list of N answers.

    Attributes:
        names: of the scores.
        each: [N] or [N, values] what they are computed from of each answer: where it is the same, so are they.
    """

    names: tuple[str, ...]
    each: np.ndarray

    @abstractmethod
    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Return the scores [B, names] of the answers where each counts as often as `weights` [B, N] say."""

    @abstractmethod
    def of(self, rows: np.ndarray) -> "Metric":
        """Return the measure of the answers `rows` alone, which are in ascending order."""


class Mean(Metric):
    """The mean of a value of every answer, such as 1 where it is right.

    Args:
        scale: what the mean is multiplied with.
    """

    def __init__(self, name: str, values: np.ndarray, scale: float = 1.0):
        self.names = (name,)
        self.each = np.asarray(values, np.float64)
        self.scale = scale

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return (self.scale * (weights @ self.each) / weights.sum(axis=1))[:, None]

    def of(self, rows: np.ndarray) -> "Mean":
        return Mean(self.names[0], self.each[rows], self.scale)


class MeanOverFamilies(Metric):
    """The mean over families of the mean in each: a family counts the same, however many questions it has."""

    def __init__(self, name: str, values: np.ndarray, families: Sequence[str]):
        self.names = (name,)
        self.each, self.families = np.asarray(values, np.float64), np.asarray(families)
        _, number = np.unique(self.families, return_inverse=True)
        self.member = np.eye(number.max() + 1)[number]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        counts = weights @ self.member
        sums = weights @ (self.member * self.each[:, None])
        # A family that none of the drawn clips has questions of is left out of that draw's mean.
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        return (means.sum(axis=1) / (counts > 0).sum(axis=1))[:, None]

    def of(self, rows: np.ndarray) -> "MeanOverFamilies":
        return MeanOverFamilies(self.names[0], self.each[rows], self.families[rows])


class Expected(Metric):
    """What a measure comes to where each question's answer is drawn from several, all of them as likely.

    Args:
        measure: of all answers that can be drawn, one after another.
        question: [answers] the number of the question that each is an answer to.
    """

    def __init__(self, measure: Metric, question: np.ndarray):
        self.names, self.measure, self.question = measure.names, measure, question
        self.share = 1 / np.bincount(question)[question]
        columns = measure.each.reshape(len(question), -1).T
        self.each = np.stack([np.bincount(question, self.share * values) for values in columns], axis=1)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return self.measure(weights[:, self.question] * self.share)

    def of(self, rows: np.ndarray) -> "Expected":
        kept = np.flatnonzero(np.isin(self.question, rows))
        return Expected(self.measure.of(kept), np.searchsorted(rows, self.question[kept]))


class Classification(Metric):
    """Accuracy, macro precision, recall and F1, and the accuracy of every class, as scikit-learn defines them.

    Args:
        truth: [N] number of each answer's class in `classes`.
        predicted: [N] number of the class that was answered; `len(classes)` for an answer that names none.
    """

    def __init__(self, truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str]):
        self.truth, self.predicted, self.classes = np.asarray(truth), np.asarray(predicted), tuple(classes)
        self.each = np.eye(len(classes) + 1)[self.predicted]
        self.names = ("accuracy", "precision", "recall", "F1", *(f"accuracy of {name!r}" for name in classes))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        classes = np.arange(len(self.classes))
        is_class, is_answered = self.truth[:, None] == classes, self.predicted[:, None] == classes
        right = weights @ (is_class & is_answered)  # [draws, classes], as are the others
        asked, answered = weights @ is_class, weights @ is_answered
        precision, recall, f1 = _ratio(right, answered), _ratio(right, asked), _ratio(2 * right, asked + answered)
        accuracy = right.sum(axis=1) / weights.sum(axis=1)
        means = [measure.mean(axis=1) for measure in (precision, recall, f1)]
        # The share of a class's questions that are answered right is its recall.
        return np.column_stack([accuracy, *means, recall])

    def of(self, rows: np.ndarray) -> "Classification":
        return Classification(self.truth[rows], self.predicted[rows], self.classes)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return `part / whole`, and 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
