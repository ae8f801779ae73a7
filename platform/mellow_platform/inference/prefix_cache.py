"""Caches of the engine: encoded clips by clip, and prefixes by their pair of clips; the key is a clip's content."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import torch

from mellow_platform.inference.request import Clip


def clip_arrays(clip: Clip) -> tuple[np.ndarray, ...]:
    """Return the arrays that make up a clip."""
    return (clip,) if isinstance(clip, np.ndarray) else (clip.frames, clip.latent)


def content_key(clip: Clip) -> bytes:
    """Return a hash of a clip's content."""
    digest = hashlib.sha256()
    for part in clip_arrays(clip):
        digest.update(f"{part.dtype}{part.shape}".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


class TensorLRU:
    """Tensors by key, at most `capacity` bytes in all; the least recently used are evicted.

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
