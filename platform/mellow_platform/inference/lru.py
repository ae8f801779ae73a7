"""Cache of tensors with a limit in bytes, which evicts the least recently used."""

from collections import OrderedDict
from collections.abc import Hashable

import torch


class TensorLRU:
    """Tensors by key, at most `capacity` bytes in all.

    Attributes:
        hits, misses: counts of `get`.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.bytes = self.hits = self.misses = 0
        self._tensors: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def get(self, key: Hashable) -> torch.Tensor | None:
        tensor = self._tensors.get(key)
        if tensor is None:
            self.misses += 1
            return None
        self.hits += 1
        self._tensors.move_to_end(key)
        return tensor

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Store `tensor`, unless the key exists or the tensor is larger than the cache."""
        if tensor.nbytes > self.capacity or key in self._tensors:
            return
        self._tensors[key] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.capacity:
            self.bytes -= self._tensors.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._tensors.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._tensors)
