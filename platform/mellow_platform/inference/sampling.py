"""Selection of the next token."""

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from mellow_platform.inference.request import Request

MIN_TEMPERATURE = 1e-5  # below it, the most likely token is taken: logits divided by it would overflow float32


class Sampler:
    """Selects tokens for a request: the most likely, or sampled by temperature and top-p with the request's seed."""

    def __init__(self, request: Request, device: torch.device | str):
        self._warpers = []
        self._generator = None
        if request.temperature > MIN_TEMPERATURE:
            self._warpers = [TemperatureLogitsWarper(request.temperature)]
            if request.top_p < 1:
                self._warpers.append(TopPLogitsWarper(request.top_p))
            self._generator = torch.Generator(device)
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)
        self._logprobs = request.logprobs

    def choose(self, logits: torch.Tensor, likeliest: int) -> tuple[int, float | None]:
        """Return a token and, if requested, its log-probability under the model (before temperature and top-p).

        Args:
            logits: float32 [vocabulary].
            likeliest: their arg max, computed for the whole batch at once.
        """
        token = likeliest
        if self._generator is not None:
            scores = logits[None]
            for warp in self._warpers:
                scores = warp(None, scores)
            token = int(torch.multinomial(scores.softmax(dim=-1)[0], 1, generator=self._generator))
        return token, float(logits[token] - logits.logsumexp(dim=-1)) if self._logprobs else None
