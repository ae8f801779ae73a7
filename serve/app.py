"""The HTTP endpoint: questions about sounds in OpenAI's chat completions shape, on autoscaling Ray Serve replicas.

python jobs/deploy.py --model /data/model          # deploys serve/config.yaml on the running cluster
"""

import asyncio
import time
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from mellow_platform.config import Dtype
from mellow_platform.data.audio import AudioError, decode
from mellow_platform.inference.engine import Engine, QueueFull
from mellow_platform.inference.request import Stream
from mellow_platform.inference.windows import windows
from serve.schema import MAX_NEW_TOKENS, ChatRequest, RequestError, clip_param, completion

api = FastAPI(title="Mellow", description="Ask questions about one or two sounds.")


@api.exception_handler(RequestError)
async def refuse(request: Request, error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


@api.exception_handler(RequestValidationError)
async def refuse_malformed(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return JSONResponse(RequestError(f"{where or 'body'}: {first['msg']}", where).body(), 400)


@serve.deployment
@serve.ingress(api)
class MellowEndpoint:
    """A replica: checks and decodes requests, and answers them with an engine that batches continuously."""

    def __init__(self, arguments: "Arguments"):
        self.name = arguments.name
        self.created = int(time.time())
        self.engine = Engine.load(
            arguments.model,
            dtype=arguments.dtype,
            slots=arguments.slots,
            max_waiting=arguments.max_waiting,
            max_new_tokens=MAX_NEW_TOKENS,
            cpu_threads=arguments.cpu_threads,
        )

    @api.post("/v1/chat/completions")
    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        """Answer a question about one or two clips."""
        if request.model != self.name:
            raise RequestError(
                f"model {request.model!r} is not served here; {self.name!r} is",
                "model",
                404,
                "model_not_found",
            )
        text, files = request.question()
        tokens, limit = self.engine.prompt_tokens(text), self.engine.processor.prompt_length
        if tokens > limit:
            raise RequestError(
                f"the question takes {tokens} tokens, the model reads {limit}: shorten it",
                "messages.0.content",
                code="context_length_exceeded",
            )
        recordings = [await asyncio.to_thread(self._decode, file, number) for number, file in enumerate(files)]
        extractor = self.engine.processor.feature_extractor
        try:
            heard = windows(recordings, extractor.clip_samples, extractor.sampling_rate, request.window)
        except ValueError as error:
            raise RequestError(str(error), "window") from error
        streams: list[Stream] = []
        try:
            for window in heard:
                streams.append(self.engine.submit(request.for_engine(text, window.clips)))
            answers = [await stream.answer() for stream in streams]
        except QueueFull as error:
            raise RequestError(str(error), "messages", 429, "queue_full") from error
        finally:  # also where the client went away
            for stream in streams:
                stream.cancel()
        return completion(self.name, answers, heard)

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """List the served model."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "mellow-platform"}
        return {"object": "list", "data": [model]}

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Tell that a replica with a loaded model is alive."""
        return {"status": "ok"}

    def _decode(self, file: bytes, number: int) -> np.ndarray:
        try:
            return decode(file, self.engine.processor.feature_extractor.sampling_rate)
        except AudioError as error:
            raise RequestError(f"clip {number}: {error}", clip_param(number), code=error.reason) from error


class Arguments(BaseModel):
    """`args` of the application in the Serve configuration file."""

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str = "mellow"
    dtype: Dtype | None = None
    slots: int = Field(16, ge=1)
    max_waiting: int = Field(64, ge=1)
    cpu_threads: int | None = None


def build(arguments: Arguments) -> serve.Application:
    """Build the application; what `import_path` in the Serve configuration file names."""
    return MellowEndpoint.bind(arguments)  # type: ignore[attr-defined]  # the decorators give it
