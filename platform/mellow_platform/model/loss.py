"""Loss of the answers: which labels count, and their cross entropy."""

from collections.abc import Sequence

import torch
from torch import nn

IGNORED_LABEL = -100  # of padding, as everywhere in transformers


def pad_labels(answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return answers as labels [batch, longest], padded with `IGNORED_LABEL`."""
    labels = torch.full((len(answers), max(map(len, answers))), IGNORED_LABEL)
    for row, ids in zip(labels, answers, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    return labels


def loss_mask(labels: torch.Tensor) -> torch.Tensor:
    """Return for labels of any shape whether the loss includes them."""
    return labels >= 0


def answer_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: float | torch.Tensor | None
) -> torch.Tensor:
    """Return the cross entropy of labels [count] under logits [count, vocabulary], summed and divided by the items.

    Args:
        num_items_in_batch: divisor, for a batch in several parts; by default the number of labels.
    """
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
