"""Calls from the endpoint to a model's replicas: routed by the clips, retried on another replica if one is lost.

Every request to the engine has a seed, so another replica writes the same answer again and a stream resumes at its next
token. A client's request is one call, whatever its number of answers: Ray's router mixes up calls that are made at the
same time for one HTTP request.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mellow_platform.inference.request import EngineClosed, Request
from serve.audio_input import DecodedQuestion
from serve.error_responses import RequestError, queue_full, replicas_lost
from serve.messages import MODEL, AnswerEvent, ChosenAnswer, ClipFormat, Piece, Refusal, WrittenAnswer
from serve.monitoring import EndpointMetrics

PAUSES = (0.0, 0.1, 0.5, 1.0)  # seconds between attempts
logger = logging.getLogger("ray.serve")


class FrontEndChanged(Exception):  # noqa: N818 (a state)
    """A version of the model took over that takes clips of another format as input."""


class Backend:
    """The replicas of one model."""

    def __init__(self, model: str, metrics: EndpointMetrics, max_attempts: int):
        self.model = model
        self._metrics, self._max_attempts = metrics, max_attempts
        self._handle = DeploymentHandle(MODEL, model)  # the replicas may not exist yet
        self._front_end: ClipFormat | None = None
        self.answered = False  # whether the last call succeeded

    async def front_end(self) -> ClipFormat:
        """Return the format of the model's clips."""
        if self._front_end is None:
            self._front_end = await self._ask("describe", "")
        return self._front_end

    async def probe(self) -> None:
        """Call the model with a question about silence."""
        await self._ask("probe", "")

    async def answer(self, question: DecodedQuestion, requests: list[Request]) -> list[WrittenAnswer]:
        """Return the whole answers to requests about a question's clips."""
        return self._accepted(await self._ask("answer", question.key, requests, await self.front_end()))

    async def choose(self, question: DecodedQuestion, request: Request, choices: list[str]) -> ChosenAnswer:
        """Rank offered answers to a request."""
        return self._accepted(await self._ask("choose", question.key, request, choices, await self.front_end()))

    async def stream(self, question: DecodedQuestion, requests: list[Request]) -> AsyncGenerator[list[AnswerEvent]]:
        """Yield the events of all requests; the last event of a request is its `WrittenAnswer`."""
        delivered: list[tuple[int, ...]] = [()] * len(requests)
        done: set[int] = set()
        front_end = await self.front_end()
        for attempt in itertools.count():
            calls = self._handle.options(method_name="stream", session_id=question.key, stream=True)
            response = calls.remote(requests, front_end, delivered)
            async with self._attempt(attempt, response, delivered):
                async for batch in response:
                    self.answered = True
                    # A second replica writes answers again that the first one finished before it was lost.
                    news = [(number, event) for number, event in self._accepted(batch) if number not in done]
                    for number, event in news:
                        if isinstance(event, Piece):
                            delivered[number] += (event.token,)
                        else:
                            done.add(number)
                    if news:
                        yield news
                return

    async def _ask(self, method: str, key: str, *arguments: Any) -> Any:
        for attempt in itertools.count():
            response = self._handle.options(method_name=method, session_id=key).remote(*arguments)
            async with self._attempt(attempt, response):
                result = await response
                self.answered = True
                return result

    @asynccontextmanager
    async def _attempt(self, number: int, response: Any, delivered: Sequence[Any] = ()) -> AsyncIterator[None]:
        """Wait for the response in the block; the block ends without an error if another attempt must follow."""
        try:
            yield
        except Exception as error:
            await self._pause_or_raise(error, number)
        except asyncio.CancelledError:  # at the deadline, or because the client disconnected
            self.answered = self.answered and any(delivered)
            raise
        finally:
            response.cancel()

    def _accepted(self, result: Any) -> Any:
        """Return the result, or raise if the replica refused the request."""
        if not isinstance(result, Refusal):
            return result
        if result.code == "front_end_changed":
            self._front_end = None
            raise FrontEndChanged
        if result.code == "queue_full":
            raise queue_full(self.model)
        raise RequestError(result.message, result.param, result.status, result.code)

    async def _pause_or_raise(self, error: Exception, attempt: int) -> None:
        """Wait before the next attempt, or raise if another attempt cannot help."""
        if isinstance(error, BackPressureError):
            raise queue_full(self.model) from error
        if not _replica_is_lost(error):
            raise error
        self.answered = False
        if attempt + 1 == self._max_attempts:
            raise replicas_lost(self.model, self._max_attempts) from error
        logger.warning(f"request to model {self.model!r} is retried after {type(error).__name__}")
        self._metrics.retry(self.model)
        await asyncio.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])


def _replica_is_lost(error: Exception) -> bool:
    """Return whether the call failed because of its replica, so that another replica may answer."""
    if isinstance(error, RayTaskError):
        error = error.cause
        return isinstance(error, EngineClosed) or (isinstance(error, RayError) and _replica_is_lost(error))
    return isinstance(error, (RayError, DeploymentUnavailableError)) and not isinstance(error, TaskCancelledError)
