"""The part of OpenAI's chat completions API that the endpoint speaks, and its errors."""

import base64
import binascii
import time
import uuid
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mellow_platform.inference.request import Answer, Request
from mellow_platform.inference.windows import Heard

MAX_CLIPS = 2
MAX_NEW_TOKENS = 300


class RequestError(Exception):
    """A request that cannot be answered, in OpenAI's terms: HTTP status, message, and the parameter at fault."""

    def __init__(self, message: str, param: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }


class TextPart(BaseModel):
    """A piece of the question."""

    type: Literal["text"]
    text: str


class AudioData(BaseModel):
    """A clip: base64 of a wav, flac, ogg or mp3 file."""

    data: str
    format: Literal["wav", "flac", "ogg", "mp3"]


class AudioPart(BaseModel):
    """A clip in a message."""

    type: Literal["input_audio"]
    input_audio: AudioData


class Message(BaseModel):
    """The user's message: text, or parts of text and audio."""

    role: Literal["user"]
    content: str | list[Annotated[TextPart | AudioPart, Field(discriminator="type")]]


class ChatRequest(BaseModel):
    """A question about one or two clips. Fields that would change the answer and are not listed are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message]
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the most likely token")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, description="the same seed draws the same answer")
    stop: (
        Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
    ) = []
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    window: Literal["first", "each", "pair"] = Field(
        "first",
        description="what is heard of a recording longer than 10 s: its first window; each window in turn, an answer "
        "each; or its first and its last window as two clips (not of OpenAI's API)",
    )

    def question(self) -> tuple[str, list[bytes]]:
        """Return the question's text and the clips' files.

        Raises:
            RequestError: not one message, no text, no clip, more than two, or a clip that is not base64.
        """
        if len(self.messages) != 1:
            raise RequestError(
                f"{len(self.messages)} messages: the model answers one question, so send one user message",
                "messages",
            )
        content = self.messages[0].content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        text = " ".join(part.text for part in parts if isinstance(part, TextPart)).strip()
        audio = [part for part in parts if isinstance(part, AudioPart)]
        if not text:
            raise RequestError("the message has no text: add a text part with the question", "messages.0.content")
        if not 1 <= len(audio) <= MAX_CLIPS:
            raise RequestError(
                f"the message has {len(audio)} input_audio parts: send one or two clips", "messages.0.content"
            )
        return text, [_decode(part.input_audio.data, number) for number, part in enumerate(audio)]

    def for_engine(self, text: str, clips: tuple[np.ndarray, ...]) -> Request:
        """Return the request in the engine's terms, with the question's `text` and decoded `clips`."""
        return Request(
            text,
            clips,
            max_new_tokens=self.max_completion_tokens or self.max_tokens or 64,
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
        )


def _decode(data: str, number: int) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"clip {number} is not base64: {error}", clip_param(number)) from error


def clip_param(number: int) -> str:
    """Return how an error names the request's clip `number`."""
    return f"input_audio[{number}].data"


def completion(model: str, answers: list[Answer], heard: list[Heard]) -> dict[str, Any]:
    """Return a chat completion in OpenAI's shape, a choice for everything `heard`, with its seconds (not OpenAI's)."""
    prompt, written = (sum(counts) for counts in zip(*((a.prompt_tokens, len(a.tokens)) for a in answers), strict=True))
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": None,
                "heard": [{"start": start, "end": end} for start, end in window.seconds],
            }
            for index, (answer, window) in enumerate(zip(answers, heard, strict=True))
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written},
    }
