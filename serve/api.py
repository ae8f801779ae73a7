"""The endpoint's HTTP routes: questions as chat completions and as forms, models, probes, and the page."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from serve.audio_input import DecodedQuestion
from serve.endpoint_state import EndpointState
from serve.error_responses import ErrorBody, RequestError, deadline_exceeded, internal_error
from serve.keys import KeyFile
from serve.messages import AnswerEvent
from serve.middleware import AdmissionMiddleware
from serve.schema import (
    ChatRequest,
    Completion,
    CompletionWriter,
    QuestionAnswer,
    QuestionForm,
    ServedList,
    question_answer,
)

PAGE = Path(__file__).parent / "page"
# The page loads nothing from other hosts, so injected content cannot either.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "malformed request; `param` names the field at fault"},
    401: {"model": ErrorBody, "description": "no valid API key"},
    404: {"model": ErrorBody, "description": "the model is not served"},
    408: {"model": ErrorBody, "description": "the body took too long to arrive"},
    413: {"model": ErrorBody, "description": "the body is too large"},
    429: {"model": ErrorBody, "description": "a request queue is full; Retry-After says when to retry"},
    503: {"model": ErrorBody, "description": "the model is not available"},
    504: {"model": ErrorBody, "description": "no answer within the time limit"},
}
STREAM = {
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
    "description": "a completion; with `stream`, its chunks as server-sent events",
}
logger = logging.getLogger("ray.serve")
router = APIRouter()


async def _state(request: Request) -> EndpointState:
    return request.app.state.endpoint


State = Annotated[EndpointState, Depends(_state)]


def _deadline(endpoint: EndpointState) -> float:
    return asyncio.get_running_loop().time() + endpoint.limits.answer_seconds


@asynccontextmanager
async def _until(deadline: float, endpoint: EndpointState) -> AsyncIterator[None]:
    """Cancel the block at the deadline and raise RequestError."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise deadline_exceeded(endpoint.limits.answer_seconds) from error


@router.post("/v1/chat/completions", response_model=Completion, responses=ERRORS | {200: STREAM})
async def chat(request: ChatRequest, endpoint: State) -> Response:
    """Answer a question about one or two clips."""
    backend = endpoint.backend(request.model)
    text, sources = request.question()
    deadline, answers_each = _deadline(endpoint), request.n or 1

    async def answer(question: DecodedQuestion) -> Response:
        requests = request.engine_requests(text, question.windows, answers_each, request.logprobs)
        if len(requests) > (limit := endpoint.limits.max_answers):
            raise RequestError(
                f"{len(requests)} answers to {len(question.windows)} windows; the limit is {limit} answers",
                "window" if answers_each == 1 else "n",
            )
        writer = CompletionWriter(request.model, question.windows, answers_each)
        if not request.stream:
            return JSONResponse(writer.whole(await backend.answer(question, requests)))
        batches = backend.stream(question, requests)
        # The status is sent before the stream begins, so a refusal must come first.
        first = await anext(batches)
        usage = bool(request.stream_options and request.stream_options.include_usage)
        events = _events(endpoint, writer, first, batches, usage, deadline)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async with _until(deadline, endpoint):
        return await endpoint.ask(backend, sources, request.window, answer)


async def _check_form(request: Request) -> None:
    """Raise RequestError if a form repeats a field that is not a list: FastAPI would use the last value."""
    form = await request.form()
    for name in form:
        if name not in ("file", "choices", "stop") and (times := len(form.getlist(name))) > 1:
            raise RequestError(f"form field {name!r} is repeated {times} times; send it once", name)


@router.post(
    "/v1/audio/questions", response_model=QuestionAnswer, responses=ERRORS, dependencies=[Depends(_check_form)]
)
async def question(form: Annotated[QuestionForm, Form(media_type="multipart/form-data")], endpoint: State) -> Response:
    """Answer a question about one or two audio files, or rank the answers to choose from."""
    backend = endpoint.backend(form.model)
    sources = await form.sources()

    async def answer(decoded: DecodedQuestion) -> Response:
        (window,) = decoded.windows
        (request,) = form.engine_requests(form.question, decoded.windows)
        if form.choices:
            chosen = await backend.choose(decoded, request, form.choices)
            return JSONResponse(question_answer(backend.model, chosen, window))
        (written,) = await backend.answer(decoded, [request])
        return JSONResponse(question_answer(backend.model, written, window))

    async with _until(_deadline(endpoint), endpoint):
        return await endpoint.ask(backend, sources, form.window, answer)


@router.get("/v1/models", responses={401: ERRORS[401], 429: ERRORS[429]})
async def models(endpoint: State) -> ServedList:
    """List the models that are served."""
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": endpoint.created, "owned_by": "mellow-platform"}
            for name in endpoint.backends
        ],
    }


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Report that the endpoint runs."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"model": ErrorBody}})
async def readyz(endpoint: State) -> dict[str, str]:
    """Report whether a model answers."""
    await endpoint.check_ready()
    return {"status": "ready"}


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


async def _events(
    endpoint: EndpointState,
    writer: CompletionWriter,
    first: list[AnswerEvent],
    batches: AsyncGenerator[list[AnswerEvent]],
    usage: bool,
    deadline: float,
) -> AsyncIterator[bytes]:
    """Yield the events of a stream; an error during the stream is its last event."""
    try:
        async with aclosing(batches), _until(deadline, endpoint):
            yield _event(*writer.opening(), *map(writer.chunk, first))
            async for batch in batches:
                yield _event(*map(writer.chunk, batch))
        if usage:
            yield _event(writer.closing())
        yield b"data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body())
    except Exception as error:
        logger.error("an answer failed", exc_info=error)
        yield _event(internal_error().body())


def _event(*data: Mapping[str, Any]) -> bytes:
    return b"".join(f"data: {json.dumps(item)}\n\n".encode() for item in data)


async def _send_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _send_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    return await _send_error(request, RequestError(f"{field or 'body'}: {first['msg']}", field or None))


async def _send_route_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RequestError(f"{request.method} {request.url.path}: {error.detail}", None, error.status_code)
    refused.headers |= error.headers or {}
    return await _send_error(request, refused)


async def _send_internal_error(request: Request, error: Exception) -> Response:
    """Serve logs the exception with the request's id."""
    return await _send_error(request, internal_error())


def create_app(endpoint: EndpointState, keys: KeyFile | None, allow_anonymous: bool) -> FastAPI:
    """Return the endpoint's application."""
    app = FastAPI(title="Mellow", description="Ask questions about one or two sounds.", version="1")
    app.state.endpoint = endpoint
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_exception_handler(RequestError, _send_error)
    app.add_exception_handler(RequestValidationError, _send_validation_error)
    app.add_exception_handler(HTTPException, _send_route_error)
    app.add_exception_handler(Exception, _send_internal_error)
    app.add_middleware(
        AdmissionMiddleware,
        limits=endpoint.limits,
        keys=keys,
        allow_anonymous=allow_anonymous,
        metrics=endpoint.metrics,
    )
    return app
