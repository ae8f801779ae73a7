"""What goes over HTTP: the part of OpenAI's chat completions API that the endpoint speaks, forms, and errors."""

import base64
import binascii
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mellow_platform.inference.windows import Window
from serve.messages import ChosenAnswer, Piece, WrittenAnswer

MAX_CLIPS = 2
MAX_NEW_TOKENS = 300
MAX_CHOICES = 26
DEFAULT_NEW_TOKENS = 64
SEED_LIMIT = 2**63


class RequestError(Exception):
    """A request that is not answered, in OpenAI's terms: HTTP status, message, and the parameter at fault."""

    def __init__(
        self,
        message: str,
        param: str | None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code = _sendable(message), param and _sendable(param), status, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}

    def body(self) -> dict[str, Any]:
        """Return what is sent, in OpenAI's shape."""
        if self.status < 500:
            kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        else:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _sendable(text: str) -> str:
    """Return `text` with halves of surrogate pairs escaped, which a request can hold and no response can."""
    return text.encode(errors="backslashreplace").decode()


class ErrorDetail(BaseModel):
    """What was wrong: `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 and above."""

    error: ErrorDetail


def _visible(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write something")
    return text


Text = Annotated[str, Field(max_length=8192)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
NewTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=2, description="0, the default, takes the most likely token")]
TopP = Annotated[float, Field(gt=0, le=1, description="drawn from the likeliest tokens that together have this share")]
Seed = Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT, description="the same seed draws the same answer")]
Choice = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_visible)]


class TextPart(BaseModel):
    """A piece of the question."""

    type: Literal["text"]
    text: Text


class AudioData(BaseModel):
    """A clip: base64 of a wav, flac, ogg or mp3 file."""

    data: str
    format: Literal["wav", "flac", "ogg", "mp3"]


class AudioPart(BaseModel):
    """A clip in a message."""

    type: Literal["input_audio"]
    input_audio: AudioData


class AudioUrl(BaseModel):
    """Where a clip is; its host must be one that the endpoint was allowed to fetch from."""

    url: Annotated[str, Field(max_length=2048)]


class AudioUrlPart(BaseModel):
    """A clip that the endpoint is to fetch."""

    type: Literal["audio_url"]
    audio_url: AudioUrl


Part = Annotated[TextPart | AudioPart | AudioUrlPart, Field(discriminator="type")]


class Message(BaseModel):
    """The user's message: text, or parts of text and audio."""

    role: Literal["user"]
    content: Text | Annotated[list[Part], Field(max_length=64)]


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


@dataclass(frozen=True)
class ClipSource:
    """Where the file of a clip is: in the request, or at a URL; and how an error names it."""

    data: bytes | None
    url: str | None
    param: str


class ChatRequest(BaseModel):
    """A question about one or two clips. Fields that would change the answer and are not listed are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message]
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=8, description="answers to draw")] | None = None
    logprobs: bool | None = Field(None, description="report the log-probability of every token")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    window: Literal["first", "each", "pair"] = Field(
        "first",
        description="what is heard of a recording longer than 10 s: its first window; each window in turn, an answer "
        "each; or its first and its last window as two clips (not of OpenAI's API)",
    )

    def question(self) -> tuple[str, list[ClipSource]]:
        """Return the question's text and the clips.

        Raises:
            RequestError: not one message, no text, no clip, more than two, or a clip that is not base64.
        """
        if len(self.messages) != 1:
            raise RequestError(
                f"{len(self.messages)} messages: the model answers one question, so send one user message",
                "messages",
            )
        content = self.messages[0].content
        parts: Sequence[Part] = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        text = " ".join(part.text for part in parts if isinstance(part, TextPart)).strip()
        audio = [part for part in parts if not isinstance(part, TextPart)]
        if not text:
            raise RequestError("the message has no text: add a text part with the question", "messages.0.content")
        if not 1 <= len(audio) <= MAX_CLIPS:
            raise RequestError(f"the message has {len(audio)} clips: send one or two", "messages.0.content")
        return text, [_source(part, number) for number, part in enumerate(audio)]

    @property
    def new_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _source(part: AudioPart | AudioUrlPart, number: int) -> ClipSource:
    if isinstance(part, AudioUrlPart):
        return ClipSource(None, part.audio_url.url, f"audio_url[{number}].url")
    param = f"input_audio[{number}].data"
    try:
        return ClipSource(base64.b64decode(part.input_audio.data, validate=True), None, param)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"clip {number} is not base64: {error}", param) from error


class QuestionForm(BaseModel):
    """The fields of a form beside its files: a question, and given answers to choose among."""

    model_config = ConfigDict(extra="forbid")

    question: Annotated[Text, AfterValidator(_visible)]
    choices: Annotated[list[Choice], Field(max_length=MAX_CHOICES)] = []
    model: str | None = None
    max_tokens: NewTokens = DEFAULT_NEW_TOKENS
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed | None = None
    stop: Annotated[list[StopString], Field(max_length=4)] = []
    window: Literal["first", "pair"] = "first"


class ChoiceProbability(BaseModel):
    """A given answer, and how likely it is among those that were given."""

    choice: str
    probability: float


class Seconds(BaseModel):
    """What was heard of a recording."""

    start: float
    end: float


class Usage(BaseModel):
    """Tokens of the question and of the answer; audio is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class QuestionAnswer(BaseModel):
    """The answer to a form; of given choices it is the likeliest, and `choices` has all, the likeliest first."""

    model: str
    answer: str
    finish_reason: Literal["stop", "length", "choice"]
    choices: list[ChoiceProbability] | None
    heard: list[Seconds]
    usage: Usage


class TokenLogprob(BaseModel):
    """The log-probability of a token; `bytes` is null where the token is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[dict[str, Any]] = []


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str


class CompletionChoice(BaseModel):
    """One answer, and the seconds of the recordings that it is about (not of OpenAI's API)."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None
    heard: list[Seconds]


class Completion(BaseModel):
    """A chat completion in OpenAI's shape."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Served(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ServedList(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[Served]


def usage(prompt: int, written: int) -> dict[str, int]:
    """Return counts of tokens in OpenAI's terms."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def seconds(heard: Window) -> list[dict[str, float]]:
    """Return which seconds of the recordings were heard."""
    return [{"start": start, "end": end} for start, end in heard.seconds]


def logprobs(pieces: Iterable[Piece]) -> dict[str, Any] | None:
    """Return the log-probabilities of tokens in OpenAI's shape; None where they were not asked for."""
    content = [
        {
            "token": piece.spelled,
            "logprob": piece.logprob,
            "bytes": None if "\ufffd" in piece.spelled else list(piece.spelled.encode()),
            "top_logprobs": [],
        }
        for piece in pieces
        if piece.logprob is not None
    ]
    return {"content": content} if content else None


def question_answer(model: str, answer: WrittenAnswer | ChosenAnswer, heard: Window) -> dict[str, Any]:
    """Return the answer to a form, written or chosen."""
    if isinstance(answer, WrittenAnswer):
        said: dict[str, Any] = {"answer": answer.text, "finish_reason": answer.finish_reason, "choices": None}
        tokens = usage(answer.prompt_tokens, answer.completion_tokens)
    else:
        choices = [{"choice": score.choice, "probability": score.probability} for score in answer.scores]
        said = {"answer": choices[0]["choice"], "finish_reason": "choice", "choices": choices}
        tokens = usage(answer.prompt_tokens, 0)
    return {"model": model, **said, "heard": seconds(heard), "usage": tokens}


class CompletionWriter:
    """Puts answers into OpenAI's shape: whole, or chunk by chunk; all of one completion share its id."""

    def __init__(self, model: str, heard: Sequence[Window], answers_each: int):
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._heard = [window for window in heard for _ in range(answers_each)]  # of each choice
        self._answers_each = answers_each  # choices of the same question, whose prompt counts once
        self.choices = len(self._heard)

    def whole(self, answers: Sequence[WrittenAnswer]) -> dict[str, Any]:
        """Return a chat completion, a choice for every answer, with the seconds it is about."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": logprobs(answer.pieces),
                "heard": seconds(self._heard[index]),
            }
            for index, answer in enumerate(answers)
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self._usage(answers)}

    def first(self, index: int) -> dict[str, Any]:
        """Return the chunk that opens a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""}, heard=seconds(self._heard[index]))

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a token."""
        return self._chunk(index, {"content": piece.text}, logprobs=logprobs([piece]))

    def last(self, index: int, answer: WrittenAnswer) -> dict[str, Any]:
        """Return the chunk that closes a choice."""
        return self._chunk(index, {}, finish_reason=answer.finish_reason)

    def usage(self, answers: Sequence[WrittenAnswer]) -> dict[str, Any]:
        """Return the chunk with the tokens of the whole completion."""
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage(answers)}

    def _usage(self, answers: Sequence[WrittenAnswer]) -> dict[str, int]:
        prompt = sum(answer.prompt_tokens for answer in answers[:: self._answers_each])
        return usage(prompt, sum(answer.completion_tokens for answer in answers))

    def _chunk(self, index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None} | fields
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}
