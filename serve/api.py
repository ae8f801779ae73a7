"""The endpoint's HTTP routes: questions in OpenAI's shape and as forms, models, probes, and the page."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from mellow_platform.inference import request as engine
from serve.audio_input import DecodedQuestion
from serve.backend import FrontEndChanged
from serve.messages import WrittenAnswer
from serve.middleware import AdmissionMiddleware
from serve.schema import (
    MAX_CHOICES,
    MAX_CLIPS,
    SEED_LIMIT,
    ChatRequest,
    ClipSource,
    Completion,
    CompletionWriter,
    ErrorBody,
    QuestionAnswer,
    QuestionForm,
    RequestError,
    ServedList,
    question_answer,
)

if TYPE_CHECKING:
    from serve.ingress import Endpoint

PAGE = Path(__file__).parent / "page"
# The page needs nothing from elsewhere, and nothing else may be slipped into it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the request is at fault; `param` names the field"},
    401: {"model": ErrorBody, "description": "no valid API key"},
    404: {"model": ErrorBody, "description": "no such model"},
    408: {"model": ErrorBody, "description": "the body took too long to arrive"},
    413: {"model": ErrorBody, "description": "the body is too large"},
    429: {"model": ErrorBody, "description": "too many requests wait; Retry-After says when to come back"},
    503: {"model": ErrorBody, "description": "the model is not available"},
    504: {"model": ErrorBody, "description": "no answer within the time that is allowed"},
}
STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "with `stream`: chunks"}


def create_app(endpoint: "Endpoint") -> FastAPI:
    """Return the application that answers for `endpoint`."""
    app = FastAPI(title="Mellow", description="Ask questions about one or two sounds.", version="1")
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_malformed)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(
        AdmissionMiddleware,
        limits=endpoint.limits,
        keys=endpoint.keys,
        allow_anonymous=endpoint.allow_anonymous,
        metrics=endpoint.metrics,
    )

    @app.post("/v1/chat/completions", response_model=Completion, responses=ERRORS | {200: STREAM})
    async def chat(request: ChatRequest) -> Response:
        """Answer a question about one or two clips."""
        backend = endpoint.backend(request.model)
        text, sources = request.question()
        answers = request.n or 1
        seed = request.seed if request.seed is not None else random.randrange(SEED_LIMIT)

        def drawn(question: DecodedQuestion) -> list[engine.Request]:
            return [
                engine.Request(
                    text,
                    heard.clips,
                    max_new_tokens=request.new_tokens,
                    temperature=request.temperature or 0.0,
                    top_p=request.top_p or 1.0,
                    seed=(seed + number) % SEED_LIMIT,
                    stop=request.stops,
                    logprobs=bool(request.logprobs),
                )
                for heard in question.heard
                for number in range(answers)
            ]

        deadline = asyncio.get_running_loop().time() + endpoint.limits.answer_seconds
        async with _until(deadline, endpoint):
            # Decoded again where a model took over, in between, that hears clips of another shape.
            while True:
                question = await endpoint.clips.read(sources, await backend.front_end(), request.window)
                if (choices := len(question.heard) * answers) > (limit := endpoint.limits.max_answers):
                    raise RequestError(
                        f"{choices} answers to {len(question.heard)} windows: at most {limit} at once",
                        "window" if answers == 1 else "n",
                    )
                writer = CompletionWriter(request.model, question.heard, answers)
                try:
                    if not request.stream:
                        return JSONResponse(writer.whole(await backend.answer(question, drawn(question))))
                    batches = backend.stream(question, drawn(question))
                    # What is refused is refused with a status, which is sent before the stream begins.
                    first = await anext(batches)
                    break
                except FrontEndChanged:
                    continue
        usage = bool(request.stream_options and request.stream_options.include_usage)
        chunks = _chunks(endpoint, writer, first, batches, usage, deadline)
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.post("/v1/audio/questions", response_model=QuestionAnswer, responses=ERRORS)
    async def question(
        request: Request,
        file: Annotated[list[UploadFile], File(description="one or two clips")],
        question: Annotated[str, Form(description="what to answer")],
        choices: Annotated[list[str], Form(description="given answers to choose among", max_length=MAX_CHOICES)] = [],  # noqa: B006
        model: Annotated[str | None, Form(description="default: the first that is served")] = None,
        max_tokens: Annotated[int | None, Form()] = None,
        temperature: Annotated[float | None, Form(description="0, the default: the most likely token")] = None,
        top_p: Annotated[float | None, Form()] = None,
        seed: Annotated[int | None, Form(description="the same seed draws the same answer")] = None,
        stop: Annotated[list[str] | None, Form(description="the answer ends before any of these")] = None,
        window: Annotated[str | None, Form(description="what is heard of a long recording: first or pair")] = None,
    ) -> Response:
        """Answer a question about the sounds in one or two files, or rank given answers to it."""
        form = await _form(request)
        backend = endpoint.backend(form.model or endpoint.first_model())
        if len(file) > MAX_CLIPS:
            raise RequestError(f"{len(file)} files: send one or two", "file")
        sources = [ClipSource(await part.read(), None, f"file[{number}]") for number, part in enumerate(file)]
        deadline = asyncio.get_running_loop().time() + endpoint.limits.answer_seconds
        async with _until(deadline, endpoint):
            while True:
                asked = await endpoint.clips.read(sources, await backend.front_end(), form.window)
                (heard,) = asked.heard
                call = engine.Request(
                    form.question,
                    heard.clips,
                    max_new_tokens=form.max_tokens,
                    temperature=form.temperature,
                    top_p=form.top_p,
                    seed=form.seed if form.seed is not None else random.randrange(SEED_LIMIT),
                    stop=tuple(form.stop),
                )
                try:
                    answer = (
                        await backend.choose(asked, call, form.choices)
                        if form.choices
                        else (await backend.answer(asked, [call]))[0]
                    )
                except FrontEndChanged:
                    continue
                return JSONResponse(question_answer(backend.model, answer, heard))

    @app.get("/v1/models", response_model=ServedList, responses={401: ERRORS[401], 429: ERRORS[429]})
    async def models() -> Response:
        """List the models that are served."""
        data = [
            {"id": name, "object": "model", "created": endpoint.created, "owned_by": "mellow-platform"}
            for name in endpoint.backends
        ]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the endpoint is alive."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": ErrorBody}})
    async def readyz() -> dict[str, str]:
        """Tell that a model answered."""
        await endpoint.check_ready()
        return {"status": "ready"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


async def _form(request: Request) -> QuestionForm:
    """Return the checked fields of a form, of which only those may stand twice that are lists."""
    fields = await request.form()
    lists = ("choices", "stop")
    values: dict[str, Any] = {name: fields.getlist(name) for name in lists if name in fields}
    for name in fields:
        if name in ("file", *lists):
            continue
        if len(fields.getlist(name)) > 1:
            raise RequestError(f"{name} stands in the form {len(fields.getlist(name))} times: send it once", name)
        if fields[name] != "":
            values[name] = fields[name]
    try:
        return QuestionForm(**values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def _chunks(
    endpoint: "Endpoint",
    writer: CompletionWriter,
    first: list[tuple[int, Any]],
    batches: AsyncGenerator[list[tuple[int, Any]]],
    usage: bool,
    deadline: float,
) -> AsyncIterator[bytes]:
    """Yield a stream's events; whatever ends it early is an event too."""
    answers: dict[int, WrittenAnswer] = {}

    def written(batch: list[tuple[int, Any]]) -> bytes:
        answers.update((number, event) for number, event in batch if isinstance(event, WrittenAnswer))
        return b"".join(
            _event(writer.last(number, event) if isinstance(event, WrittenAnswer) else writer.piece(number, event))
            for number, event in batch
        )

    try:
        async with aclosing(batches), asyncio.timeout_at(deadline):
            opening = b"".join(_event(writer.first(number)) for number in range(writer.choices))
            yield opening + written(first)
            async for batch in batches:
                yield written(batch)
        if usage:
            yield _event(writer.usage([answers[number] for number in range(writer.choices)]))
        yield b"data: [DONE]\n\n"
    except TimeoutError:
        yield _event(_too_late(endpoint).body())
    except RequestError as error:
        yield _event(error.body())
    except Exception as error:
        endpoint.log_failure(error)
        yield _event(_failure().body())


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


@asynccontextmanager
async def _until(deadline: float, endpoint: "Endpoint") -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise _too_late(endpoint) from error


def _too_late(endpoint: "Endpoint") -> RequestError:
    seconds = endpoint.limits.answer_seconds
    return RequestError(f"no answer within {seconds:g} s: try again, with fewer max_tokens", None, 504, "deadline")


def _failure() -> RequestError:
    return RequestError("the answer failed inside the server; its log has the reason", None, 500, "internal_error")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    """The reason is in the log, where Serve writes it with the request's id."""
    return await _refuse(request, _failure())


async def _refuse_malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return await _refuse(request, RequestError(f"{where or 'body'}: {first['msg']}", where or None))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RequestError(f"{request.method} {request.url.path}: {error.detail}", None, error.status_code)
    refused.headers |= error.headers or {}
    return await _refuse(request, refused)
