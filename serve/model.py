"""A served model: an application of its own, whose name is what requests call `model`, with autoscaling replicas.

Each replica holds the inference engine and batches continuously. Nothing here is reached from outside: the endpoint
decodes and checks, and asks.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from mellow_platform import storage
from mellow_platform.data.audio import decode
from mellow_platform.data.records import read_records
from mellow_platform.evaluation.gate_config import GateSection
from mellow_platform.evaluation.matching import is_right
from mellow_platform.inference.request import Answer, QueueFull, Request, Stream, Token
from mellow_platform.option_values import Dtype
from serve.messages import FRONT_END_CHANGED, MODEL, ChosenAnswer, ClipFormat, Piece, Refusal, WrittenAnswer
from serve.monitoring import ModelMetrics
from serve.placement import preferably_on
from serve.schema import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from mellow_platform.inference.engine import Engine

HEALTHY_SECONDS = 20.0  # within which the engine has to get through a step; reading 26 long choices takes some
# Between two messages of a stream: each costs three processes more than a token of a small model does, and nobody
# reads faster.
STREAM_PAUSE = 0.02
logger = logging.getLogger("ray.serve")
Event = TypeVar("Event")


class Diverged(Exception):  # noqa: N818 (a state)
    """An answer that is written again is not the one that was begun."""


class ModelArguments(BaseModel):
    """`args` of a model's application in the Serve configuration file."""

    model_config = ConfigDict(extra="forbid")

    folder: str = Field(
        default_factory=lambda: os.environ.get("MELLOW_MODEL", ""),
        description="the model's folder; default: environment variable MELLOW_MODEL",
    )
    gate: GateSection = Field(
        GateSection(), description="what a replica has to answer before it serves; default: any answer"
    )
    dtype: Dtype | None = Field(
        None, description="float32 or int8 on CPU, bfloat16 on a GPU; by default the device's own"
    )
    slots: int = Field(16, ge=1, description="answers written at once")
    cpu_threads: int | None = Field(None, ge=1, description="threads to compute with")
    gpus: float = Field(
        default_factory=lambda: float(os.environ.get("MELLOW_GPUS_PER_REPLICA", "0")),
        ge=0,
        description="GPUs of a replica; default: environment variable MELLOW_GPUS_PER_REPLICA, else 0",
    )

    @model_validator(mode="after")
    def _a_folder_is_named(self) -> "ModelArguments":
        if not self.folder:
            raise ValueError("no model folder: set `folder` in the application's args, or MELLOW_MODEL on the nodes")
        return self


# A model that cannot be loaded, or does not pass its gate, is tried twice, in case storage had a bad moment.
@serve.deployment(name=MODEL, max_constructor_retry_count=2)
class Model:
    """A replica: answers requests of the endpoint with an engine that batches continuously."""

    def __init__(self, arguments: ModelArguments):
        from mellow_platform.inference.engine import (
            Engine,  # loads for seconds, and building the application needs none
        )

        self._engine = Engine.load(
            arguments.folder,
            dtype=arguments.dtype,
            slots=arguments.slots,
            max_new_tokens=MAX_NEW_TOKENS,
            cpu_threads=arguments.cpu_threads,
        )
        extractor = self._engine.processor.feature_extractor
        self._front_end = ClipFormat(extractor.sampling_rate, extractor.clip_samples)
        self._metrics = ModelMetrics()
        # Raised here, an error keeps the replicas of the version before: Serve gives up a new one that does not start.
        if arguments.gate.records:
            check_gate(arguments.gate, self._engine, arguments.folder)
        else:
            self._engine.generate([self._probe()])

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.close()

    async def check_health(self) -> None:
        """Called by Serve; a replica whose engine hangs or broke down is replaced."""
        await asyncio.to_thread(self._engine.check, HEALTHY_SECONDS)
        self._metrics.watch(self._engine.stats)

    async def describe(self) -> ClipFormat:
        """Return what the model hears."""
        return self._front_end

    async def probe(self) -> None:
        """Answer a question about silence."""
        await self._engine.submit(self._probe()).answer()

    async def answer(self, requests: list[Request], front_end: ClipFormat) -> list[WrittenAnswer] | Refusal:
        """Answer requests whose clips were made for `front_end`."""
        streams = self._submit(requests, front_end)
        if isinstance(streams, Refusal):
            return streams
        try:
            return [self._written(request, stream, await stream.answer()) for request, stream in streams]
        finally:  # also where the endpoint went away: the slots are free again
            for _, stream in streams:
                stream.cancel()

    async def stream(
        self, requests: list[Request], front_end: ClipFormat, delivered: list[tuple[int, ...]]
    ) -> AsyncGenerator[list[tuple[int, Piece | WrittenAnswer]] | Refusal]:
        """Answer requests token by token: events, each with the number of its request, the last a `WrittenAnswer`.

        Args:
            delivered: ids of tokens of each request that another replica wrote before it was lost. They are written
                again, compared and left out.
        """
        streams = self._submit(requests, front_end)
        if isinstance(streams, Refusal):
            yield streams
            return
        answers = [self._answer(*of_one, known) for of_one, known in zip(streams, delivered, strict=True)]
        try:
            async with aclosing(merged(answers, STREAM_PAUSE)) as events:
                async for batch in events:
                    yield batch
        except Diverged as error:
            yield Refusal(str(error), "stream", "replica_lost", 500)
        finally:
            for _, stream in streams:
                stream.cancel()

    async def choose(self, request: Request, choices: list[str], front_end: ClipFormat) -> ChosenAnswer | Refusal:
        """Rank given answers to a request."""
        if refusal := self._refusal(request, front_end):
            return refusal
        scores = await asyncio.wrap_future(self._engine.submit_score(request, choices))
        return ChosenAnswer(tuple(scores), self._engine.prompt_tokens(request.text))

    def _probe(self) -> Request:
        silence = np.zeros(self._engine.processor.feature_extractor.clip_samples, np.float32)
        return Request("what is heard?", (silence,), max_new_tokens=1)

    def _refusal(self, request: Request, front_end: ClipFormat) -> Refusal | None:
        if front_end != self._front_end:
            return Refusal(f"the model hears {self._front_end}, the clips are {front_end}", "model", FRONT_END_CHANGED)
        tokens, limit = self._engine.prompt_tokens(request.text), self._engine.processor.prompt_length
        if tokens > limit:
            return Refusal(
                f"the question takes {tokens} tokens, the model reads {limit}: shorten it",
                "question",
                "context_length_exceeded",
            )
        return None

    def _submit(self, requests: list[Request], front_end: ClipFormat) -> list[tuple[Request, Stream]] | Refusal:
        for request in requests:
            if refusal := self._refusal(request, front_end):
                return refusal
        streams: list[tuple[Request, Stream]] = []
        try:
            for request in requests:
                streams.append((request, self._engine.submit(request)))
        except QueueFull as error:
            for _, stream in streams:
                stream.cancel()
            return Refusal(str(error), "model", "queue_full", 429)
        return streams

    async def _answer(
        self, request: Request, stream: Stream, delivered: tuple[int, ...]
    ) -> AsyncGenerator[Piece | WrittenAnswer]:
        place = 0
        async for token in stream:
            if place >= len(delivered):
                yield self._piece(token)
            elif token.id != delivered[place]:
                raise Diverged(
                    f"a replica was lost after {len(delivered)} tokens, and another one does not write the same: "
                    "ask again"
                )
            place += 1
        yield self._written(request, stream, stream.result())

    def _written(self, request: Request, stream: Stream, answer: Answer) -> WrittenAnswer:
        """Return an answer as the endpoint hears of it, and keep count."""
        first = stream.first_token_seconds or 0.0
        self._metrics.answered(answer, first, self._engine.stats)
        logger.info(
            "answered",
            extra={
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": len(answer.tokens),
                "first_token_s": round(first, 4),
                "answer_s": round(time.monotonic() - stream.created, 4),
                "finish_reason": answer.finish_reason,
            },
        )
        pieces: tuple[Piece, ...] = ()
        if request.logprobs:
            tokens = zip(answer.tokens, answer.logprobs or (), strict=True)
            written = (self._piece(Token(token, "", logprob)) for token, logprob in tokens)
            pieces = tuple(piece for piece in written if piece.logprob is not None)
        return WrittenAnswer(answer.text, answer.finish_reason, answer.prompt_tokens, len(answer.tokens), pieces)

    def _piece(self, token: Token) -> Piece:
        tokenizer = self._engine.processor.tokenizer
        # The end marker is no part of an answer, and comes with the text that was held back until it did.
        if token.logprob is None or token.id == tokenizer.eos_token_id:
            return Piece(token.id, "", token.text, None)
        return Piece(token.id, tokenizer.decode([token.id]), token.text, token.logprob)


def check_gate(gate: GateSection, engine: "Engine", folder: str) -> None:
    """Ask `engine`, which holds the model of `folder`, the questions of a gate.

    Raises:
        RuntimeError: too few answers were right; the message shows those that were not.
        ValueError: there are no questions.
    """
    records = read_records(str(gate.records))
    if not records:
        raise ValueError(f"{gate.records} has no questions: a gate needs at least one, with its answer")
    rate = engine.processor.feature_extractor.sampling_rate
    paths = {path for record in records for path in record.filepaths}
    clips = {path: decode(storage.read_bytes(storage.join(str(gate.audio_root), path)), rate) for path in paths}
    answers = engine.generate(
        [Request(record.input, tuple(clips[path] for path in record.filepaths)) for record in records]
    )
    wrong = [
        f"{record.input!r} is {record.answer!r}, answered {answer.text!r}"
        for record, answer in zip(records, answers, strict=True)
        if not is_right(record, answer.text)
    ]
    accuracy = 1 - len(wrong) / len(records)
    if accuracy < gate.min_accuracy:
        raise RuntimeError(
            f"{folder} does not pass the gate {gate.records}: accuracy {accuracy:.3f} is below "
            f"{gate.min_accuracy:g}; {'; '.join(wrong[:3])}"
        )


async def merged(sources: Sequence[AsyncGenerator[Event]], pause: float) -> AsyncGenerator[list[tuple[int, Event]]]:
    """Yield (number of the source, event) of several sources as they come: all that have come, at a time.

    The first error ends all; so does the reader who goes away.

    Args:
        pause: seconds between two batches, cut short by the end of the sources.
    """
    events: list[tuple[int, Event]] = []
    come = asyncio.Event()

    async def drain(number: int) -> None:
        async for event in sources[number]:
            events.append((number, event))
            come.set()

    tasks = [asyncio.create_task(drain(number)) for number in range(len(sources))]
    drained = asyncio.gather(*tasks)

    def over(_: asyncio.Future) -> None:
        drained.cancelled() or drained.exception()  # looked at, or Python logs it where the reader went away
        come.set()

    drained.add_done_callback(over)
    try:
        while events or not drained.done():
            if events:
                batch, events[:] = events[:], []
                yield batch
                await asyncio.wait([drained], timeout=pause)
            else:
                come.clear()
                await come.wait()
        drained.result()
    finally:
        for task in tasks:
            task.cancel()


def build(arguments: ModelArguments) -> serve.Application:
    """Build the application of a model; what `import_path` in the Serve configuration file names."""
    options = {"num_cpus": 1, "num_gpus": arguments.gpus} | preferably_on("serving")
    return Model.options(ray_actor_options=options).bind(arguments)  # type: ignore[attr-defined]  # of the decorator
