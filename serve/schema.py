"""Requests and responses of the HTTP routes: the supported part of OpenAI's chat completions API, and forms.

Responses are typed dictionaries: mypy checks the code that builds them, the OpenAPI description is made from them, and
a streamed chunk needs no conversion before it is written as JSON.
"""

import base64
import binascii
import random
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict

from mellow_platform.inference.request import Request
from mellow_platform.inference.windows import Window
from serve.error_responses import RequestError
from serve.limits import AtMost, current_limits
from serve.messages import AnswerEvent, ChosenAnswer, Piece, WrittenAnswer

MAX_CLIPS = 2
DEFAULT_NEW_TOKENS = 64
SEED_LIMIT = 2**63


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected text")
    return text


# A constraint of its own makes pydantic refuse halves of surrogate pairs, which tokenizers cannot read.
Text = Annotated[str, Field(min_length=0), AtMost("max_text_chars")]
StopString = Annotated[str, Field(min_length=1), AtMost("max_stop_chars")]
StopStrings = Annotated[list[StopString], AtMost("max_stop_strings")]
NewTokens = Annotated[int, Field(ge=1), AtMost("max_new_tokens")]
Choice = Annotated[str, Field(min_length=1), AtMost("max_choice_chars"), AfterValidator(_not_blank)]
# The error of a bad list item is that of the item, not "expected a string".
BY_TYPE = Discriminator(lambda value: "string" if isinstance(value, str) else "list")


@dataclass(frozen=True)
class ClipSource:
    """An audio file: its bytes or its URL, and the name of its field in errors."""

    data: bytes | None
    url: str | None
    param: str


class QuestionOptions(BaseModel):
    """Fields that chat requests and forms share. Unknown fields are refused, since they could change the answer."""

    model_config = ConfigDict(extra="forbid")

    max_tokens: NewTokens | None = Field(None, description=f"longest answer, in tokens; default: {DEFAULT_NEW_TOKENS}")
    temperature: float | None = Field(None, ge=0, le=2, description="randomness; default: 0, the most likely token")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the most likely tokens up to this probability")
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT, description="seed of drawn tokens; default: random")
    stop: Annotated[Annotated[StopString, Tag("string")] | Annotated[StopStrings, Tag("list")], BY_TYPE] | None = Field(
        None, description="strings that an answer ends before; default: none"
    )

    @property
    def new_tokens(self) -> int:
        return self.max_tokens or min(DEFAULT_NEW_TOKENS, current_limits.get().max_new_tokens)

    def engine_requests(
        self, text: str, windows: Sequence[Window], answers_each: int = 1, logprobs: bool | None = False
    ) -> list[Request]:
        """Return the engine's requests: `answers_each` about each window, each with a seed of its own."""
        seed = self.seed if self.seed is not None else random.randrange(SEED_LIMIT)
        return [
            Request(
                text,
                window.clips,
                max_new_tokens=self.new_tokens,
                temperature=self.temperature or 0.0,
                top_p=self.top_p or 1.0,
                seed=(seed + number) % SEED_LIMIT,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                logprobs=bool(logprobs),
            )
            for window in windows
            for number in range(answers_each)
        ]


class TextPart(BaseModel):
    """A part of the question's text."""

    type: Literal["text"]
    text: Text


class AudioData(BaseModel):
    """An audio file in base64."""

    data: str
    format: Literal["wav", "flac", "ogg", "mp3"]


class AudioPart(BaseModel):
    """A clip in the message."""

    type: Literal["input_audio"]
    input_audio: AudioData


class AudioUrl(BaseModel):
    """URL of an audio file; its host must be in `url_hosts` of the endpoint's configuration."""

    url: Annotated[str, Field(min_length=0), AtMost("max_url_chars")]


class AudioUrlPart(BaseModel):
    """A clip that the endpoint fetches."""

    type: Literal["audio_url"]
    audio_url: AudioUrl


Part = Annotated[TextPart | AudioPart | AudioUrlPart, Field(discriminator="type")]
Parts = Annotated[list[Part], AtMost("max_parts")]


class Message(BaseModel):
    """The user's message: text, or parts of text and audio."""

    role: Literal["user"]
    content: Annotated[Annotated[Text, Tag("string")] | Annotated[Parts, Tag("list")], BY_TYPE]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = Field(False, description="end the stream with a chunk that counts tokens; default: false")


class ChatRequest(QuestionOptions):
    """A question about one or two clips, as a chat completion request."""

    model: str = Field(description="name of the model")
    messages: list[Message] = Field(description="one user message")
    max_completion_tokens: NewTokens | None = Field(None, description="takes precedence over `max_tokens`")
    n: Annotated[int, Field(ge=1), AtMost("max_n")] | None = Field(None, description="answers per window; default: 1")
    logprobs: bool | None = Field(None, description="return the log-probability of every token; default: false")
    stream: bool | None = Field(None, description="send the answer token by token; default: false")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="ignored")
    window: Literal["first", "each", "pair"] = Field(
        "first",
        description="windows of a recording longer than 10 s: the first; each, with an answer per window; or the first "
        "and the last as a pair of clips (an addition to OpenAI's API)",
    )

    @property
    def new_tokens(self) -> int:
        return self.max_completion_tokens or super().new_tokens

    def question(self) -> tuple[str, list[ClipSource]]:
        """Return the question's text and its clips.

        Raises:
            RequestError: there is not one message, the message has no text, or not one or two clips, or a clip is not
                base64.
        """
        if len(self.messages) != 1:
            raise RequestError(f"{len(self.messages)} messages; expected one user message", "messages")
        content = self.messages[0].content
        parts: Sequence[Part] = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        text = " ".join(part.text for part in parts if isinstance(part, TextPart)).strip()
        audio = [part for part in parts if not isinstance(part, TextPart)]
        if not text:
            raise RequestError("the message has no text; add a text part with the question", "messages.0.content")
        if not 1 <= len(audio) <= MAX_CLIPS:
            raise RequestError(f"the message has {len(audio)} clips; expected one or two", "messages.0.content")
        return text, [_source(part, number) for number, part in enumerate(audio)]


def _source(part: AudioPart | AudioUrlPart, number: int) -> ClipSource:
    if isinstance(part, AudioUrlPart):
        return ClipSource(None, part.audio_url.url, f"audio_url[{number}].url")
    param = f"input_audio[{number}].data"
    try:
        return ClipSource(base64.b64decode(part.input_audio.data, validate=True), None, param)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"clip {number} is not base64: {error}", param) from error


class QuestionForm(QuestionOptions):
    """A question about one or two clips, as a form."""

    file: Annotated[list[UploadFile], Field(max_length=MAX_CLIPS)] = Field(description="one or two audio files")
    question: Annotated[Text, AfterValidator(_not_blank)] = Field(description="text of the question")
    choices: Annotated[list[Choice], AtMost("max_choices")] = Field(
        [], description="answers to choose from; default: none, the model writes an answer"
    )
    model: str | None = Field(None, description="name of the model; default: the first that is served")
    stop: StopStrings = Field([], description="strings that an answer ends before; default: none")
    window: Literal["first", "pair"] = Field(
        "first",
        description="windows of a recording longer than 10 s: the first, or the first and the last as a pair of clips",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, fields: Any) -> Any:
        """Browsers send the inputs of a page that the user left empty."""
        return {name: value for name, value in fields.items() if value != ""} if isinstance(fields, dict) else fields

    async def sources(self) -> list[ClipSource]:
        return [ClipSource(await part.read(), None, f"file[{number}]") for number, part in enumerate(self.file)]


class Seconds(TypedDict):
    """A window's place in its recording, in seconds."""

    start: float
    end: float


class Usage(TypedDict):
    """Tokens of the question and of the answers; audio is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChoiceProbability(TypedDict):
    """An offered answer and its probability among those that were offered."""

    choice: str
    probability: float


class QuestionAnswer(TypedDict):
    """The answer to a form. Of offered answers it is the most likely, and `choices` has all, most likely first."""

    model: str
    answer: str
    finish_reason: Literal["stop", "length", "choice"]
    choices: list[ChoiceProbability] | None
    heard: list[Seconds]
    usage: Usage


class TokenLogprob(TypedDict):
    """Log-probability of a token; `bytes` is null if the token is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[dict[str, Any]]


class ChoiceLogprobs(TypedDict):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AnswerMessage(TypedDict):
    """The model's message."""

    role: Literal["assistant"]
    content: str


class CompletionChoice(TypedDict):
    """An answer, and the windows that it is about (`heard`, an addition to OpenAI's API)."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None
    heard: list[Seconds]


class CompletionHead(TypedDict):
    """Fields that a completion shares with its chunks."""

    id: str
    created: int
    model: str


class Completion(CompletionHead):
    """A chat completion."""

    object: Literal["chat.completion"]
    choices: list[CompletionChoice]
    usage: Usage


class Delta(TypedDict, total=False):
    """What a chunk adds to its message."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(TypedDict):
    """A chunk's part of an answer; the first of an answer has `heard`."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChoiceLogprobs | None
    heard: NotRequired[list[Seconds]]


class CompletionChunk(CompletionHead):
    """A chunk of a streamed chat completion; `usage` is in the last one, if it was requested."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]


class Served(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ServedList(TypedDict):
    """All models that are served."""

    object: Literal["list"]
    data: list[Served]


def _usage(prompt: int, completion: int) -> Usage:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _seconds(window: Window) -> list[Seconds]:
    return [{"start": start, "end": end} for start, end in window.seconds]


def _logprobs(pieces: Iterable[Piece]) -> ChoiceLogprobs | None:
    content = [
        TokenLogprob(
            token=piece.spelled,
            logprob=piece.logprob,
            bytes=None if "\ufffd" in piece.spelled else list(piece.spelled.encode()),
            top_logprobs=[],
        )
        for piece in pieces
        if piece.logprob is not None
    ]
    return {"content": content} if content else None


def question_answer(model: str, answer: WrittenAnswer | ChosenAnswer, window: Window) -> QuestionAnswer:
    """Return the response to a form."""
    reason: Literal["stop", "length", "choice"] = "choice"
    if isinstance(answer, WrittenAnswer):
        text, reason, choices, completion = answer.text, answer.finish_reason, None, answer.completion_tokens
    else:
        choices = [ChoiceProbability(choice=score.choice, probability=score.probability) for score in answer.scores]
        text, completion = choices[0]["choice"], 0
    heard, usage = _seconds(window), _usage(answer.prompt_tokens, completion)
    return QuestionAnswer(model=model, answer=text, finish_reason=reason, choices=choices, heard=heard, usage=usage)


class CompletionWriter:
    """Builds a chat completion from `answers_each` answers per window, whole or chunk by chunk."""

    def __init__(self, model: str, windows: Sequence[Window], answers_each: int):
        self._head = CompletionHead(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=model)
        self._heard = [_seconds(window) for window in windows for _ in range(answers_each)]  # by choice
        self._answers_each = answers_each
        self._answers: dict[int, WrittenAnswer] = {}  # of a stream so far, by choice

    def whole(self, answers: Sequence[WrittenAnswer]) -> Completion:
        """Return the completion with a choice per answer."""
        choices = [
            CompletionChoice(
                index=index,
                message={"role": "assistant", "content": answer.text},
                finish_reason=answer.finish_reason,
                logprobs=_logprobs(answer.pieces),
                heard=self._heard[index],
            )
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage(answers)}

    def opening(self) -> list[CompletionChunk]:
        """Return the chunks that open all choices."""
        delta = Delta(role="assistant", content="")
        return [
            self._chunk(ChunkChoice(index=index, delta=delta, finish_reason=None, logprobs=None, heard=heard))
            for index, heard in enumerate(self._heard)
        ]

    def chunk(self, event: AnswerEvent) -> CompletionChunk:
        """Return the chunk of a token, or the one that closes a choice."""
        index, piece = event
        if isinstance(piece, WrittenAnswer):
            self._answers[index] = piece
            reason = piece.finish_reason
            return self._chunk({"index": index, "delta": {}, "finish_reason": reason, "logprobs": None})
        delta, logprobs = Delta(content=piece.text), _logprobs([piece])
        return self._chunk({"index": index, "delta": delta, "finish_reason": None, "logprobs": logprobs})

    def closing(self) -> CompletionChunk:
        """Return the chunk that counts the tokens of a stream that has ended."""
        usage = self._usage([self._answers[index] for index in range(len(self._heard))])
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(self, choice: ChunkChoice) -> CompletionChunk:
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _usage(self, answers: Sequence[WrittenAnswer]) -> Usage:
        # Answers to one window share a prompt, which counts once.
        prompt = sum(answer.prompt_tokens for answer in answers[:: self._answers_each])
        return _usage(prompt, sum(answer.completion_tokens for answer in answers))
