"""Interface of an inference engine, for its callers: serving, prediction, evaluation and `mellow ask`."""

from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np

from mellow_platform.inference.request import Answer, ChoiceScore, ClipFeatures, Request, Stream


@runtime_checkable
class InferenceEngine(Protocol):
    """Answers questions about clips. All methods can be called from several threads at the same time."""

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of waveforms, in Hz."""

    @property
    def clip_samples(self) -> int:
        """Length of a clip in samples; longer waveforms are cut, shorter ones are filled."""

    @property
    def prompt_length(self) -> int:
        """Length that a question is cut to, in tokens."""

    @property
    def max_new_tokens(self) -> int:
        """Largest `max_new_tokens` of a request."""

    @property
    def stats(self) -> dict[str, int]:
        """Current counts: `active` and `waiting` requests, and per cache (`clip`, `prefix`) hits, misses and bytes."""

    def prompt_tokens(self, text: str) -> int:
        """Return the number of tokens of a question, end marker included."""

    def token_text(self, token: int) -> str | None:
        """Return the text of one token id, or None for the end marker."""

    def submit(self, request: Request) -> Stream:
        """Queue a request; its tokens arrive in the stream.

        Raises:
            QueueFull: too many requests wait.
            ValueError: `max_new_tokens` is too large, or a clip is not a waveform or not finite.
            EngineClosed: the engine was closed or failed.
        """

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests; wait while the queue is full.

        Raises:
            Exception: that of the first request that failed.
        """

    def submit_score(self, request: Request, choices: Sequence[str]) -> Future[list[ChoiceScore]]:
        """Queue a request to `score`; it is skipped if the future is cancelled before its turn.

        Raises:
            ValueError: there are no choices.
        """

    def score(self, request: Request, choices: Sequence[str]) -> list[ChoiceScore]:
        """Rank choices as answers to a request by their log-probability, the most likely first.

        Raises:
            ValueError: there are no choices.
        """

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[ClipFeatures]:
        """Return the encoder's features of waveforms [samples], in fp16 as shards store them."""

    def check(self, timeout: float) -> None:
        """Check that the engine's loop completes a step within `timeout` seconds.

        Raises:
            TimeoutError: it did not.
            EngineClosed: the engine was closed or failed.
        """

    def close(self) -> None:
        """Stop the engine; unanswered requests end with `EngineClosed`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
