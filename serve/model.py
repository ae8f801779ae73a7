"""A served model: an application with autoscaling replicas, named as requests name their `model`.

Each replica has an inference engine with continuous batching. Only the endpoint calls replicas: it checks requests and
decodes clips.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from mellow_platform import storage
from mellow_platform.data.audio import decode
from mellow_platform.data.records import read_records
from mellow_platform.evaluation.gate_config import GateSection
from mellow_platform.evaluation.matching import is_right
from mellow_platform.inference.engine_protocol import InferenceEngine
from mellow_platform.inference.request import Answer, QueueFull, Request, Stream, Token
from mellow_platform.option_values import Dtype
from serve.messages import MODEL, AnswerEvent, ChosenAnswer, ClipFormat, Piece, Refusal, WrittenAnswer
from serve.monitoring import ModelMetrics
from serve.placement import preferably_on

# Seconds between two messages of a stream. A message costs three processes more time than a small model needs for a
# token, and people do not read faster.
STREAM_PAUSE = 0.02
logger = logging.getLogger("ray.serve")
Event = TypeVar("Event")


class Diverged(Exception):  # noqa: N818 (a state)
    """An answer that is written again differs from its beginning."""


class ModelArguments(BaseModel):
    """`args` of a model's application in the Serve configuration file."""

    model_config = ConfigDict(extra="forbid")

    folder: str = Field(
        default_factory=lambda: os.environ.get("MELLOW_MODEL", ""),
        description="model folder; default: environment variable MELLOW_MODEL",
    )
    gate: GateSection = Field(GateSection(), description="questions that a replica must answer first; default: none")
    dtype: Dtype | None = Field(None, description="precision; default: float32 on CPU, bfloat16 on GPU; int8: CPU only")
    slots: int = Field(16, ge=1, description="answers that a replica writes at the same time")
    max_new_tokens: int = Field(300, ge=1, description="longest answer, in tokens; it sets the memory of a slot")
    max_waiting: int = Field(256, ge=1, description="requests that wait for a slot of a replica; then 429")
    clip_cache_bytes: int = Field(64 << 20, ge=0, description="size of the cache of encoded clips, in bytes")
    prefix_cache_bytes: int = Field(256 << 20, ge=0, description="size of the cache of keys and values, in bytes")
    cpu_threads: int | None = Field(None, ge=1, description="threads for computation; default: torch's number")
    step_seconds: float = Field(20.0, gt=0, description="longest step of an engine, in seconds; then a new replica")
    gpus: float = Field(
        default_factory=lambda: float(os.environ.get("MELLOW_GPUS_PER_REPLICA", "0")),
        ge=0,
        description="GPUs per replica; default: environment variable MELLOW_GPUS_PER_REPLICA, else 0",
    )

    @model_validator(mode="after")
    def _a_folder_is_named(self) -> "ModelArguments":
        if not self.folder:
            raise ValueError("no model folder; set `folder` in the application's args, or MELLOW_MODEL on the nodes")
        return self


# Tried twice, in case the storage fails for a moment.
@serve.deployment(name=MODEL, max_constructor_retry_count=2)
class Model:
    """A model replica."""

    def __init__(self, arguments: ModelArguments):
        # Imported here because it takes seconds, and building the application does not need it.
        from mellow_platform.inference.engine import Engine

        options = ("dtype", "slots", "max_new_tokens", "max_waiting", "clip_cache_bytes", "prefix_cache_bytes")
        self._engine: InferenceEngine = Engine.load(
            arguments.folder, cpu_threads=arguments.cpu_threads, **arguments.model_dump(include=set(options))
        )
        self._front_end = ClipFormat(self._engine.sampling_rate, self._engine.clip_samples)
        self._metrics = ModelMetrics()
        self._step_seconds = arguments.step_seconds
        # If this raises, Serve keeps the replicas of the previous version.
        if arguments.gate.records:
            check_gate(arguments.gate, self._engine, arguments.folder)
        else:
            self._engine.generate([self._probe()])

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.close()

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose engine hangs or failed."""
        await asyncio.to_thread(self._engine.check, self._step_seconds)
        self._metrics.watch(self._engine.stats)

    async def describe(self) -> ClipFormat:
        """Return the format of the model's clips."""
        return self._front_end

    async def probe(self) -> None:
        """Answer a question about silence."""
        await self._engine.submit(self._probe()).answer()

    async def answer(self, requests: list[Request], front_end: ClipFormat) -> list[WrittenAnswer] | Refusal:
        """Answer requests whose clips have the format `front_end`."""
        if refusal := self._refusal(requests, front_end):
            return refusal
        try:
            with self._submitted(requests) as streams:
                pairs = zip(requests, streams, strict=True)
                return [self._written(request, stream, await stream.answer()) for request, stream in pairs]
        except QueueFull as error:
            return Refusal(str(error), "model", "queue_full")

    async def stream(
        self, requests: list[Request], front_end: ClipFormat, delivered: list[tuple[int, ...]]
    ) -> AsyncGenerator[list[AnswerEvent] | Refusal]:
        """Answer requests token by token; the last event of a request is its `WrittenAnswer`.

        Args:
            delivered: per request, ids of the tokens that another replica delivered before it was lost. They are
                written again, compared and not delivered again.
        """
        if refusal := self._refusal(requests, front_end):
            yield refusal
            return
        try:
            with self._submitted(requests) as streams:
                answers = [self._answer(*args) for args in zip(requests, streams, delivered, strict=True)]
                async with aclosing(merged(answers, STREAM_PAUSE)) as events:
                    async for batch in events:
                        yield batch
        except QueueFull as error:
            yield Refusal(str(error), "model", "queue_full")
        except Diverged as error:
            yield Refusal(str(error), "stream", "replica_lost", 500)

    async def choose(self, request: Request, choices: list[str], front_end: ClipFormat) -> ChosenAnswer | Refusal:
        """Rank offered answers to a request."""
        if refusal := self._refusal([request], front_end):
            return refusal
        scores = await asyncio.wrap_future(self._engine.submit_score(request, choices))
        return ChosenAnswer(tuple(scores), self._engine.prompt_tokens(request.text))

    def _probe(self) -> Request:
        silence = np.zeros(self._engine.clip_samples, np.float32)
        return Request("what is heard?", (silence,), max_new_tokens=1)

    def _refusal(self, requests: list[Request], front_end: ClipFormat) -> Refusal | None:
        if front_end != self._front_end:
            return Refusal(f"the model expects {self._front_end}, not {front_end}", "model", "front_end_changed")
        request = requests[0]  # the others differ only in clips and seed
        tokens, limit = self._engine.prompt_tokens(request.text), self._engine.prompt_length
        if tokens > limit:
            message = f"the question has {tokens} tokens, the model's limit is {limit}; shorten it"
            return Refusal(message, "question", "context_length_exceeded")
        if request.max_new_tokens > (limit := self._engine.max_new_tokens):
            return Refusal(f"max_tokens is {request.max_new_tokens}, the model's limit is {limit}", "max_tokens", None)
        return None

    @contextmanager
    def _submitted(self, requests: list[Request]) -> Iterator[list[Stream]]:
        """Submit requests; at the end of the block cancel those without an answer, which frees their slots."""
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self._engine.submit(request))
            yield streams
        finally:
            for stream in streams:
                stream.cancel()

    async def _answer(
        self, request: Request, stream: Stream, delivered: tuple[int, ...]
    ) -> AsyncGenerator[Piece | WrittenAnswer]:
        expected = iter(delivered)
        async for token in stream:
            known = next(expected, None)
            if known is None:
                yield self._piece(token)
            elif token.id != known:
                raise Diverged(f"a replica was lost after {len(delivered)} tokens and another writes others; retry")
        yield self._written(request, stream, stream.result())

    def _written(self, request: Request, stream: Stream, answer: Answer) -> WrittenAnswer:
        """Return an answer as a message to the endpoint, and record it in metrics and log."""
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
        spelled = None if token.logprob is None else self._engine.token_text(token.id)
        if spelled is None:  # the end marker is not a part of the answer, but can complete its text
            return Piece(token.id, "", token.text, None)
        return Piece(token.id, spelled, token.text, token.logprob)


def check_gate(gate: GateSection, engine: InferenceEngine, folder: str) -> None:
    """Ask `engine`, which runs the model of `folder`, the questions of a gate.

    Raises:
        RuntimeError: too few answers are correct; the message shows wrong ones.
        ValueError: there are no questions.
    """
    records = read_records(str(gate.records))
    if not records:
        raise ValueError(f"{gate.records} has no questions; a gate needs at least one question with its answer")
    paths = {path for record in records for path in record.filepaths}
    clips = {
        path: decode(storage.read_bytes(storage.join(str(gate.audio_root), path)), engine.sampling_rate)
        for path in paths
    }
    answers = engine.generate(
        [Request(record.input, tuple(clips[path] for path in record.filepaths)) for record in records]
    )
    wrong = [
        f"{record.input!r}: answer {answer.text!r}, expected {record.answer!r}"
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
    """Yield batches of events of several sources, each with the number of its source, as they arrive.

    The first error of a source ends all sources, and so does closing the generator.

    Args:
        pause: seconds between two batches; shorter at the end of the sources.
    """
    events: list[tuple[int, Event]] = []
    arrived = asyncio.Event()

    async def drain(number: int) -> None:
        async for event in sources[number]:
            events.append((number, event))
            arrived.set()

    tasks = [asyncio.create_task(drain(number)) for number in range(len(sources))]
    drained = asyncio.gather(*tasks)

    def finish(_: asyncio.Future) -> None:
        drained.cancelled() or drained.exception()  # retrieved here, or Python logs it if the reader stops early
        arrived.set()

    drained.add_done_callback(finish)
    try:
        while events or not drained.done():
            if events:
                batch, events[:] = events[:], []
                yield batch
                await asyncio.wait([drained], timeout=pause)
            else:
                arrived.clear()
                await arrived.wait()
        drained.result()
    finally:
        for task in tasks:
            task.cancel()


def build(arguments: ModelArguments) -> serve.Application:
    """Build a model's application; `import_path` in the Serve configuration file names this function."""
    options = {"num_cpus": 1, "num_gpus": arguments.gpus} | preferably_on("serving")
    return Model.options(ray_actor_options=options).bind(arguments)  # type: ignore[attr-defined]  # of the decorator
