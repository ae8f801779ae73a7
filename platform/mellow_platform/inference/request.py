"""Requests to an inference engine and its responses: streams of tokens, answers, scores."""

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class ClipFeatures:
    """Features of a clip from the frozen encoder: frames [F, classes] and latent [H]."""

    frames: np.ndarray
    latent: np.ndarray


Clip = np.ndarray | ClipFeatures  # a waveform [samples] at the model's rate, or its stored features


@dataclass(frozen=True, eq=False)
class Request:
    """A question about one or two clips.

    Attributes:
        text: text of the question.
        clips: one or two clips.
        max_new_tokens: length that the answer is cut to, in tokens.
        temperature: randomness of the tokens; 0 takes the most likely token.
        top_p: tokens are drawn from the most likely ones that together have this probability.
        seed: seed of drawn tokens; None for a random seed.
        stop: strings that the answer ends before.
        logprobs: return the log-probability of every token.

    Raises:
        ValueError: a field is out of range.
    """

    text: str
    clips: tuple[Clip, ...]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        if len(self.clips) not in (1, 2):
            raise ValueError(f"the request has {len(self.clips)} clips; expected one or two")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) to 10")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0, at most 1")
        if not all(self.stop):
            raise ValueError("a stop string is empty; remove it")


@dataclass(frozen=True)
class Token:
    """A token of an answer and the text that it completes.

    The text is empty while a character is incomplete, or while it may become a stop string or trailing space.
    """

    id: int
    text: str
    logprob: float | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: text of the answer.
        tokens: token ids, end marker included.
        prompt_tokens: number of tokens of the question, end marker included.
        finish_reason: `stop` (end marker or stop string) or `length` (`max_new_tokens`).
        logprobs: log-probability of each token, if requested.
        seconds: time from the request to the answer, including the wait for a slot.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...] | None = None
    seconds: float = field(default=0.0, compare=False)  # equal answers can take different times


@dataclass(frozen=True)
class ChoiceScore:
    """Score of an answer: its log-probability, and its probability among the choices."""

    choice: str
    logprob: float
    probability: float


class QueueFull(RuntimeError):  # noqa: N818 (a state, as in queue)
    """Too many requests wait for a slot; retry later."""


class EngineClosed(RuntimeError):  # noqa: N818
    """The engine was closed, or failed; then the cause is chained."""


class Cancelled(Exception):  # noqa: N818 (a state, as in concurrent.futures)
    """The stream was cancelled before its answer was complete."""


class Stream:
    """Tokens of one answer as they are written. Iterate it (`for` or `async for`), or wait for `result()`."""

    def __init__(self) -> None:
        self.cancelled = False
        self.created = time.monotonic()
        self.first_token_seconds: float | None = None  # from creation to the first token
        self._events: queue.SimpleQueue[Token | Answer | Exception] = queue.SimpleQueue()
        self._notify: Callable[[], object] | None = None
        self._wake_at_end = False  # the reader waits for the whole answer, so tokens need not wake it
        self._end: Answer | Exception | None = None

    def cancel(self) -> None:
        """Cancel the answer; its slot is free before the next token is computed. Iteration ends with `Cancelled`."""
        self.cancelled = True

    def put(self, event: Token | Answer | Exception) -> None:
        """Deliver an event; an answer or an exception is the last event. Called by the engine."""
        if self.first_token_seconds is None and isinstance(event, Token):
            self.first_token_seconds = time.monotonic() - self.created
        self._events.put(event)
        if self._notify and not (self._wake_at_end and isinstance(event, Token)):
            self._notify()

    def result(self) -> Answer:
        """Wait for the whole answer.

        Raises:
            Cancelled: the stream was cancelled.
            Exception: the answer failed.
        """
        for _ in self:
            pass
        assert isinstance(self._end, Answer)
        return self._end

    def __iter__(self) -> Iterator[Token]:
        while self._end is None:
            event = self._events.get()
            if isinstance(event, Token):
                yield event
            else:
                self._end = event
        if isinstance(self._end, Exception):
            raise self._end

    async def __aiter__(self) -> AsyncIterator[Token]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._notify = lambda: loop.call_soon_threadsafe(arrived.set)
        while self._end is None:
            arrived.clear()
            while self._end is None and not self._events.empty():
                event = self._events.get()
                if isinstance(event, Token):
                    yield event
                else:
                    self._end = event
            if self._end is None:
                await arrived.wait()
        if isinstance(self._end, Exception):
            raise self._end

    async def answer(self) -> Answer:
        """Wait for the whole answer without blocking the event loop; raises as `result` does."""
        self._wake_at_end = True
        async for _ in self:
            pass
        return self.result()
