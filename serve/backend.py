"""How the endpoint asks models: on the replica that knows the clips, again on another one where a replica is lost.

Every request has a seed of its own before it is sent, so that an answer that is begun again is the same answer, and a
stream goes on with another replica where it was. A request of a client is one call, however many answers it asks for:
Ray's router mixes up calls that are made at the same time for one HTTP request.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mellow_platform.inference.request import EngineClosed, Request
from serve.audio_input import DecodedQuestion
from serve.messages import FRONT_END_CHANGED, MODEL, ChosenAnswer, ClipFormat, Piece, Refusal, WrittenAnswer
from serve.monitoring import EndpointMetrics
from serve.schema import RequestError

ATTEMPTS = 5  # a request that itself ends replicas must not go round for ever
PAUSES = (0.0, 0.1, 0.5, 1.0)  # seconds between them
logger = logging.getLogger("ray.serve")


class FrontEndChanged(Exception):  # noqa: N818 (a state)
    """A version of the model took over that hears clips of another shape."""


class Backend:
    """The replicas of one model."""

    def __init__(self, model: str, metrics: EndpointMetrics):
        self.model = model
        self._metrics = metrics
        self._handle = DeploymentHandle(MODEL, model)  # of replicas that may not be there yet
        self._front_end: ClipFormat | None = None
        self.answered = False  # whether the last call had an answer

    async def front_end(self) -> ClipFormat:
        """Return what the model hears."""
        if self._front_end is None:
            self._front_end = await self._ask("describe", "")
        return self._front_end

    async def probe(self) -> None:
        """Have the model answer a question about silence."""
        await self._ask("probe", "")

    async def answer(self, question: DecodedQuestion, requests: list[Request]) -> list[WrittenAnswer]:
        """Return the whole answers to requests about what is heard in a question."""
        return self._accepted(await self._ask("answer", question.key, requests, await self.front_end()))

    async def choose(self, question: DecodedQuestion, request: Request, choices: list[str]) -> ChosenAnswer:
        """Rank given answers to a request."""
        return self._accepted(await self._ask("choose", question.key, request, choices, await self.front_end()))

    async def stream(
        self, question: DecodedQuestion, requests: list[Request]
    ) -> AsyncGenerator[list[tuple[int, Piece | WrittenAnswer]]]:
        """Yield events, each with the number of its request; the last event of a request is its `WrittenAnswer`."""
        delivered: list[tuple[int, ...]] = [()] * len(requests)
        done: set[int] = set()
        front_end = await self.front_end()
        for attempt in itertools.count():
            calls = self._handle.options(method_name="stream", session_id=question.key, stream=True)
            response = calls.remote(requests, front_end, delivered)
            try:
                async for batch in response:
                    self.answered = True
                    # Of those that were done, another replica was lost before it had done all.
                    news = [(number, event) for number, event in self._accepted(batch) if number not in done]
                    for number, event in news:
                        if isinstance(event, Piece):
                            delivered[number] += (event.token,)
                        else:
                            done.add(number)
                    if news:
                        yield news
                return
            except Exception as error:
                await self._pause_or_raise(error, attempt)
            except asyncio.CancelledError:
                self.answered = self.answered and (any(delivered) or bool(done))
                raise
            finally:  # also where the client went away
                response.cancel()

    async def _ask(self, method: str, key: str, *arguments: Any) -> Any:
        for attempt in itertools.count():
            response = self._handle.options(method_name=method, session_id=key).remote(*arguments)
            try:
                result = await response
                self.answered = True
                return result
            except Exception as error:
                await self._pause_or_raise(error, attempt)
            except asyncio.CancelledError:  # the time was over, or the client went away
                self.answered = False
                raise
            finally:
                response.cancel()

    def _accepted(self, result: Any) -> Any:
        """Return what is no refusal."""
        if isinstance(result, Refusal):
            if result.code == FRONT_END_CHANGED:
                self._front_end = None
                raise FrontEndChanged
            raise RequestError(
                result.message, result.param, result.status, result.code, 1 if result.status == 429 else None
            )
        return result

    async def _pause_or_raise(self, error: Exception, attempt: int) -> None:
        """Wait before the next attempt; raise where another one cannot help."""
        if isinstance(error, BackPressureError):
            raise RequestError(
                f"more requests wait for model {self.model!r} than may: try again", None, 429, "queue_full", 1
            ) from error
        if not _replica_is_lost(error):
            raise error
        self.answered = False
        if attempt + 1 == ATTEMPTS:
            raise RequestError(
                f"model {self.model!r}: {ATTEMPTS} replicas were lost on this request: try again later",
                None,
                503,
                "model_unavailable",
                5,
            ) from error
        logger.warning(f"model {self.model!r} is asked again, after {type(error).__name__}")
        self._metrics.retry(self.model)
        await asyncio.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])


def _replica_is_lost(error: Exception) -> bool:
    """Tell whether another replica may answer what this one did not."""
    if isinstance(error, RayTaskError):
        error = error.cause
        return isinstance(error, EngineClosed) or (isinstance(error, RayError) and _replica_is_lost(error))
    return isinstance(error, (RayError, DeploymentUnavailableError)) and not isinstance(error, TaskCancelledError)
