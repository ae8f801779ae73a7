"""Decoding steps as CUDA graphs (not run on a GPU yet)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mellow_platform.inference.cached_decoder import CachedDecoder, KeyValueCache


@dataclass
class _StepGraph:
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor  # [sequences, 1]; read, as lengths are, at every replay
    lengths: torch.Tensor
    logits: torch.Tensor  # [sequences, vocabulary]; written at every replay


class StepGraphs:
    """`CachedDecoder.step` on a GPU, with one graph per number of sequences, captured at first use.

    A step is a few hundred small kernels: starting them one by one takes longer than running them. Prefixes and prompts
    have no fixed shape and enough work per kernel, and are not captured.
    """

    def __init__(self, decoder: CachedDecoder, cache: KeyValueCache):
        self._decoder, self._cache = decoder, cache
        self._graphs: dict[int, _StepGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Return logits [sequences, vocabulary], valid until the next call."""
        device = self._cache.data.device
        token_ids, positions = (torch.tensor(values, device=device)[:, None] for values in (tokens, lengths))
        if len(tokens) not in self._graphs:
            self._graphs[len(tokens)] = self._capture(token_ids, positions)
        step = self._graphs[len(tokens)]
        step.tokens.copy_(token_ids)
        step.lengths.copy_(positions)
        step.graph.replay()
        return step.logits

    def _capture(self, tokens: torch.Tensor, lengths: torch.Tensor) -> _StepGraph:
        # Capturing requires a warm-up outside of the graph; the replay writes the same values again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._decoder.static_step(self._cache, tokens, lengths)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._decoder.static_step(self._cache, tokens, lengths)
        return _StepGraph(graph, tokens, lengths, logits)
