"""Decoding steps as CUDA graphs (not run on a GPU yet)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mellow_platform.inference.cached_decoder import CachedDecoder, KeyValueCache


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor  # [sequences, 1]; read, as lengths are, at every replay
    lengths: torch.Tensor
    logits: torch.Tensor  # [sequences, vocabulary]; written at every replay


class StepGraphs:
    """`CachedDecoder.step` on a GPU, one graph for every number of sequences, captured when it is first needed.

    A step is a few hundred small kernels: to start them one by one takes longer than to run them. What is read in has
    no fixed shape and enough work in it, and stays ungraphed.
    """

    def __init__(self, decoder: CachedDecoder, cache: KeyValueCache):
        self._decoder, self._cache = decoder, cache
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Return logits [sequences, vocabulary], valid until the next call."""
        device = self._cache.data.device
        token_ids, places = (torch.tensor(values, device=device)[:, None] for values in (tokens, lengths))
        if len(tokens) not in self._captured:
            self._captured[len(tokens)] = self._capture(token_ids, places)
        step = self._captured[len(tokens)]
        step.tokens.copy_(token_ids)
        step.lengths.copy_(places)
        step.graph.replay()
        return step.logits

    def _capture(self, tokens: torch.Tensor, lengths: torch.Tensor) -> _Captured:
        # A warm-up outside of the graph, as capturing asks for; it writes what the replay writes once more.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._decoder.static_step(self._cache, tokens, lengths)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._decoder.static_step(self._cache, tokens, lengths)
        return _Captured(graph, tokens, lengths, logits)
