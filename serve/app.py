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
from pydantic import BaseModel, ConfigDict
from ray import serve

from mellow_platform.data.audio import AudioError, decode
from mellow_platform.inference.answerer import Answer, Answerer, Question
from serve.schema import ChatRequest, RequestError, clip_param, completion

MAX_CLIP_SECONDS = 600.0

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
    """A replica: checks and decodes requests, and answers those that wait together in one batch."""

    def __init__(self, model: str, name: str, cpu_threads: int | None):
        self.name = name
        self.created = int(time.time())
        self.answerer = Answerer(model, cpu_threads)

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
        tokens, limit = self.answerer.prompt_tokens(text), self.answerer.processor.prompt_length
        if tokens > limit:
            raise RequestError(
                f"the question takes {tokens} tokens, the model reads {limit}: shorten it",
                "messages.0.content",
                code="context_length_exceeded",
            )
        waveforms = [await asyncio.to_thread(self._decode, file, number) for number, file in enumerate(files)]
        answer: Answer = await self.answer((text, waveforms, request.new_tokens))
        return completion(self.name, answer.text, answer.prompt_tokens, answer.completion_tokens, answer.finished)

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """List the served model."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "mellow-platform"}
        return {"object": "list", "data": [model]}

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Tell that a replica with a loaded model is alive."""
        return {"status": "ok"}

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def answer(self, requests: list[tuple[str, list[np.ndarray], int]]) -> list[Answer]:
        return await asyncio.to_thread(self._answer, requests)

    def _answer(self, requests: list[tuple[str, list[np.ndarray], int]]) -> list[Answer]:
        features = iter(self.answerer.encode([clip for _, clips, _ in requests for clip in clips]))
        questions = [Question(text, tuple(next(features) for _ in clips), limit) for text, clips, limit in requests]
        return self.answerer.answer(questions)

    def _decode(self, file: bytes, number: int) -> np.ndarray:
        try:
            waveform = decode(file, self.answerer.sampling_rate, MAX_CLIP_SECONDS)
        except AudioError as error:
            raise RequestError(f"clip {number}: {error}", clip_param(number), code=error.reason) from error
        return self.answerer.processor.feature_extractor.fit(waveform)


class Arguments(BaseModel):
    """`args` of the application in the Serve configuration file."""

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str = "mellow"
    cpu_threads: int | None = None


def build(arguments: Arguments) -> serve.Application:
    """Build the application; what `import_path` in the Serve configuration file names."""
    return MellowEndpoint.bind(  # type: ignore[attr-defined]  # the decorators give it
        arguments.model, arguments.name, arguments.cpu_threads
    )
