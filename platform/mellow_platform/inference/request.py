"""What is asked of an engine, and what comes back: requests, tokens as they are written, answers."""

import asyncio
import hashlib
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class ClipFeatures:
    """What the frozen encoder makes of a clip: frames [F, classes] and latent [H]."""

    frames: np.ndarray
    latent: np.ndarray


Clip = np.ndarray | ClipFeatures  # a waveform [samples] at the model's rate, or its stored features


@dataclass(frozen=True, eq=False)
class Request:
    """A question about one or two clips.

    Attributes:
        text: the question.
        clips: one or two.
        max_new_tokens: length an answer is cut to.
        temperature: 0 takes the most likely token; above 0 tokens are drawn.
        top_p: drawn from the most likely tokens that together have this probability.
        seed: the same seed draws the same answer; None draws anew.
        stop: the answer ends before the first of these strings.
        logprobs: report the log-probability of every token.

    Raises:
        ValueError: a value out of range, named.
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
            raise ValueError(f"the request has {len(self.clips)} clips: give one or two")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) to 10")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give more than 0, at most 1")
        if not all(self.stop):
            raise ValueError("a stop string is empty: leave it out")


@dataclass(frozen=True)
class Token:
    """A token of an answer and the text that it completes: empty while a character, or a possible stop string or
    trailing space, is not yet decided."""

    id: int
    text: str
    logprob: float | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        tokens: as written, the end marker included.
        prompt_tokens: of the question, the end marker included.
        finish_reason: `stop` (end marker or stop string) or `length` (`max_new_tokens`).
        logprobs: of each token, when asked for.
        seconds: from the request to the whole answer, waiting for a slot included.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...] | None = None
    seconds: float = field(default=0.0, compare=False)  # equal answers may take different times


@dataclass(frozen=True)
class ChoiceScore:
    """How likely an answer is: its log-probability, and its share among the choices it was scored with."""

    choice: str
    logprob: float
    probability: float


class QueueFull(RuntimeError):  # noqa: N818 (a state, as in queue)
    """Too many requests wait already; try again later."""


class EngineClosed(RuntimeError):  # noqa: N818
    """The engine was closed, or broke down; its cause is chained."""


class Cancelled(Exception):  # noqa: N818 (a state, as in concurrent.futures)
    """The stream was cancelled before its answer was whole."""


class Stream:
    """Tokens of one answer as they are written. Iterate it (`for` or `async for`), or wait for `result()`."""

    def __init__(self) -> None:
        self.cancelled = False
        self.created = time.monotonic()
        self.first_token_seconds: float | None = None  # from its creation to the first token
        self._events: queue.SimpleQueue[Token | Answer | Exception] = queue.SimpleQueue()
        self._notify: Callable[[], object] | None = None
        self._end_alone = False  # the reader waits for the whole answer, and is not to be woken for every token
        self._end: Answer | Exception | None = None

    def cancel(self) -> None:
        """Give up the answer; its slot is free before the next token is computed. Iterating ends with `Cancelled`."""
        self.cancelled = True

    def put(self, event: Token | Answer | Exception) -> None:
        """Deliver an event; an answer or an exception is the last one. Called by the engine."""
        if self.first_token_seconds is None and isinstance(event, Token):
            self.first_token_seconds = time.monotonic() - self.created
        self._events.put(event)
        if self._notify and not (self._end_alone and isinstance(event, Token)):
            self._notify()

    def result(self) -> Answer:
        """Wait for the whole answer.

        Raises:
            Cancelled: it was cancelled.
            Exception: whatever failed in answering.
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
        """`result()` without blocking the event loop."""
        self._end_alone = True
        async for _ in self:
            pass
        return self.result()


def parts_of(clip: Clip) -> tuple[np.ndarray, ...]:
    """Return the arrays that make up a clip."""
    return (clip,) if isinstance(clip, np.ndarray) else (clip.frames, clip.latent)


def content_key(clip: Clip) -> bytes:
    """Return a hash of what is heard: equal for equal clips, whoever sent them."""
    digest = hashlib.sha256()
    for part in parts_of(clip):
        digest.update(f"{part.dtype}{part.shape}".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.digest()
