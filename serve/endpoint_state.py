"""State that the routes of an endpoint replica share: limits, clip reader, metrics, and the models that it serves."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from serve.audio_input import ClipLimits, ClipReader, DecodedQuestion
from serve.backend import Backend, FrontEndChanged
from serve.error_responses import RequestError, not_ready
from serve.limits import RequestLimits
from serve.monitoring import EndpointMetrics
from serve.schema import ClipSource

Result = TypeVar("Result")


class EndpointState:
    """State of an endpoint replica."""

    def __init__(self, limits: RequestLimits, clips: ClipLimits):
        self.created = int(time.time())
        self.limits = limits
        self.metrics = EndpointMetrics()
        self.backends: dict[str, Backend] = {}  # by model
        self._clips = ClipReader(clips)

    def serve(self, models: Sequence[str]) -> None:
        """Serve these models; those that are served already keep their state."""
        attempts = self.limits.max_attempts
        self.backends = {name: self.backends.get(name) or Backend(name, self.metrics, attempts) for name in models}

    def backend(self, model: str | None) -> Backend:
        """Return the replicas of a model, or by default of the first.

        Raises:
            RequestError: the model is not served.
        """
        name = next(iter(self.backends)) if model is None else model
        if name not in self.backends:
            message = f"model {name!r} is not served; served models: {', '.join(map(repr, self.backends))}"
            raise RequestError(message, "model", 404, "model_not_found")
        return self.backends[name]

    async def ask(
        self,
        backend: Backend,
        sources: Sequence[ClipSource],
        rule: str,
        answer: Callable[[DecodedQuestion], Awaitable[Result]],
    ) -> Result:
        """Decode the clips for the model's front end and return what `answer` returns for them.

        Both are repeated if a version of the model with another front end took over in between.
        """
        while True:
            question = await self._clips.read(sources, await backend.front_end(), rule)
            with contextlib.suppress(FrontEndChanged):
                return await answer(question)

    async def check_ready(self) -> None:
        """Check that a model answers; a model whose last call succeeded is not called again.

        Raises:
            RequestError: no model answers.
        """
        if any(backend.answered for backend in self.backends.values()):
            return
        probes = [asyncio.create_task(backend.probe()) for backend in self.backends.values()]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.ready_seconds):
                    for probe in asyncio.as_completed(probes):
                        with contextlib.suppress(Exception):
                            return await probe
            raise not_ready()
        finally:
            for task in probes:
                task.cancel()
