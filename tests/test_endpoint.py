"""The endpoint and a model replica in this process: each limit of the configuration, and a change of front end."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import RayActorError

from mellow_platform.data.audio import encode
from mellow_platform.inference.request import Request
from serve import backend
from serve.api import create_app
from serve.audio_input import ClipLimits
from serve.endpoint_state import EndpointState
from serve.error_responses import RequestError
from serve.limits import RequestLimits
from serve.messages import ClipFormat, Refusal
from serve.model import Model, ModelArguments
from tests.serve_app import question
from tests.tiny_model import write_tiny_model

SOUND = encode(np.zeros(32_000, np.float32), 32_000, "WAV")
MODEL = "unknown"  # requests within the limits end with 404
FORMAT = ClipFormat(32_000, 320_000)


def state(**limits: Any) -> EndpointState:
    return EndpointState(RequestLimits(**limits), ClipLimits())


def post(limits: dict[str, Any], path: str, **request: Any) -> httpx.Response:
    """Return an endpoint's response, in this process and without a model."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(state(**limits), None, False))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await client.request("POST" if request else "GET", path, **request)

    return asyncio.run(send())


def chat(limits: dict[str, Any], text: str = "what is heard?", parts: int = 0, url: str = "", **fields: Any) -> Any:
    body = json.loads(question(SOUND, text, model=MODEL, **fields))
    content = body["messages"][0]["content"]
    content += [{"type": "text", "text": "x"}] * parts
    content += [{"type": "audio_url", "audio_url": {"url": url}}] if url else []
    return post(limits, "/v1/chat/completions", json=body)


def form(limits: dict[str, Any], *fields: tuple[str, str]) -> Any:
    parts: list[Any] = [("file", ("clip.wav", SOUND)), ("model", (None, MODEL)), ("question", (None, "what?"))]
    return post(limits, "/v1/audio/questions", files=parts + [(name, (None, value)) for name, value in fields])


@pytest.mark.parametrize(
    ("limit", "bound", "fields", "param"),
    [
        ("max_new_tokens", 20, lambda n: {"max_tokens": n}, "max_tokens"),
        ("max_new_tokens", 20, lambda n: {"max_completion_tokens": n}, "max_completion_tokens"),
        ("max_n", 2, lambda n: {"n": n}, "n"),
        ("max_text_chars", 10, lambda n: {"text": "x" * n}, "messages.0.content.list.0.text.text"),
        ("max_parts", 5, lambda n: {"parts": n - 2}, "messages.0.content.list"),
        ("max_url_chars", 20, lambda n: {"url": "u" * n}, "messages.0.content.list.2.audio_url.audio_url.url"),
        ("max_stop_strings", 1, lambda n: {"stop": ["x"] * n}, "stop.list"),
        ("max_stop_chars", 5, lambda n: {"stop": "x" * n}, "stop.string"),
        ("max_stop_chars", 5, lambda n: {"stop": ["x" * n]}, "stop.list.0"),
    ],
)
def test_limits_of_chat_requests(limit: str, bound: int, fields: Any, param: str):
    limits = {limit: bound}
    assert chat(limits, **fields(bound)).json()["error"]["code"] == "model_not_found"
    error = chat(limits, **fields(bound + 1)).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert str(bound) in error["message"]


@pytest.mark.parametrize(
    ("limit", "bound", "fields", "param"),
    [
        ("max_new_tokens", 20, lambda n: [("max_tokens", str(n))], "max_tokens"),
        ("max_choices", 2, lambda n: [("choices", "x")] * n, "choices"),
        ("max_choice_chars", 5, lambda n: [("choices", "x" * n)], "choices.0"),
        ("max_stop_strings", 1, lambda n: [("stop", "x")] * n, "stop"),
        ("max_stop_chars", 5, lambda n: [("stop", "x" * n)], "stop.0"),
    ],
)
def test_limits_of_forms(limit: str, bound: int, fields: Any, param: str):
    limits = {limit: bound}
    assert form(limits, *fields(bound)).json()["error"]["code"] == "model_not_found"
    error = form(limits, *fields(bound + 1)).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert str(bound) in error["message"]


def test_openapi_describes_the_endpoints_limits():
    limits = {"max_new_tokens": 20, "max_text_chars": 100, "max_choices": 3, "max_choice_chars": 7}
    schemas = post(limits, "/openapi.json").json()["components"]["schemas"]
    fields = schemas["QuestionForm"]["properties"]
    assert set(fields) == {
        "file", "question", "choices", "model", "max_tokens", "temperature", "top_p", "seed", "stop", "window",
    }  # fmt: skip
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 20
    assert fields["question"]["maxLength"] == 100
    assert (fields["choices"]["maxItems"], fields["choices"]["items"]["maxLength"]) == (3, 7)
    assert (fields["file"]["type"], fields["file"]["maxItems"]) == ("array", 2)
    assert schemas["ChatRequest"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 20
    assert post({}, "/openapi.json").json()["components"]["schemas"]["QuestionForm"]["properties"] != fields


def test_halves_of_surrogate_pairs_are_refused():
    body = question(SOUND, "what?", model=MODEL).replace(b"what?", b"\\ud800")
    response = post({}, "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, None)


class Replicas:
    """Handle of a model whose replicas die in every call, or never answer."""

    def __init__(self, dead: bool):
        self.dead, self.calls = dead, 0

    def options(self, **_: Any) -> "Replicas":
        return self

    def remote(self, *_: Any) -> "asyncio.Future[Any]":
        self.calls += 1
        response: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.dead:
            response.set_exception(RayActorError())
        return response


def test_attempts_are_limited(monkeypatch: pytest.MonkeyPatch):
    replicas = Replicas(dead=True)
    monkeypatch.setattr(backend, "DeploymentHandle", lambda *_: replicas)
    endpoint = state(max_attempts=2)
    endpoint.serve(["m"])
    with pytest.raises(RequestError, match="model 'm': 2 ") as error:
        asyncio.run(endpoint.backend("m").probe())
    assert (error.value.status, error.value.code, replicas.calls) == (503, "model_unavailable", 2)


def test_time_of_the_readiness_check_is_limited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "DeploymentHandle", lambda *_: Replicas(dead=False))
    endpoint = state(ready_seconds=0.01)
    endpoint.serve(["m"])
    with pytest.raises(RequestError) as error:
        asyncio.run(endpoint.check_ready())
    assert (error.value.status, error.value.code) == (503, "not_ready")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with random weights."""
    folder = str(tmp_path_factory.mktemp("model"))
    write_tiny_model(folder)
    return folder


def replica(folder: str, **arguments: Any) -> Any:
    """Return a model replica in this process."""
    return Model.func_or_class(ModelArguments(folder=folder, cpu_threads=1, **arguments))  # type: ignore[attr-defined]


def answer(model: Any, new_tokens: int = 1, count: int = 1) -> Any:
    clip = np.zeros(FORMAT.clip_samples, np.float32)
    requests = [Request("what is heard?", (clip,), new_tokens) for _ in range(count)]
    return asyncio.run(model.answer(requests, FORMAT))


@contextmanager
def hanging(model: Any) -> Iterator[None]:
    """Stop the loop of a replica's engine."""
    begun, over = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        over.wait()

    model._engine._call(hang)
    begun.wait()
    try:
        yield
    finally:
        over.set()


def test_new_tokens_of_a_model_are_limited(folder: str):
    model = replica(folder, max_new_tokens=2)
    assert answer(model, new_tokens=2)[0].completion_tokens <= 2
    refusal = answer(model, new_tokens=3)
    assert isinstance(refusal, Refusal)
    assert (refusal.param, refusal.status) == ("max_tokens", 400)


def test_queue_of_a_model_is_limited(folder: str):
    model = replica(folder, max_waiting=2)
    with hanging(model):
        refusal = answer(model, count=3)
    assert isinstance(refusal, Refusal)
    assert (refusal.param, refusal.code) == ("model", "queue_full")
    asyncio.run(model.check_health())  # waits for a step, which drops cancelled requests
    assert len(answer(model, count=2)) == 2


@pytest.mark.parametrize("cache", ["clip", "prefix"])
def test_caches_of_a_model_are_limited(folder: str, cache: str):
    held = []
    for arguments in ({}, {f"{cache}_cache_bytes": 0}):
        model = replica(folder, **arguments)
        answer(model)
        held.append(model._engine.stats[f"{cache}_bytes"])
    assert held[0] > held[1] == 0


def test_step_of_a_model_is_limited(folder: str):
    model = replica(folder, step_seconds=2.0)
    asyncio.run(model.check_health())
    with hanging(model), pytest.raises(TimeoutError):
        asyncio.run(model.check_health())


class LocalReplica:
    """Handle of a model whose replica is in this process."""

    def __init__(self, replica: Any, method: str = "", arguments: tuple[Any, ...] = ()):
        self.replica, self.method, self.arguments = replica, method, arguments

    def options(self, method_name: str, **_: Any) -> "LocalReplica":
        return LocalReplica(self.replica, method_name)

    def remote(self, *arguments: Any) -> "LocalReplica":
        return LocalReplica(self.replica, self.method, arguments)

    def __await__(self) -> Any:
        return getattr(self.replica, self.method)(*self.arguments).__await__()

    def __aiter__(self) -> Any:
        return getattr(self.replica, self.method)(*self.arguments)

    def cancel(self) -> None:
        """Called after every response."""


@pytest.mark.parametrize("stream", [False, True])
def test_clips_are_decoded_again_for_a_new_front_end(monkeypatch: pytest.MonkeyPatch, folder: str, stream: bool):
    handle = LocalReplica(replica(folder))
    monkeypatch.setattr(backend, "DeploymentHandle", lambda *_: handle)
    endpoint = state()
    endpoint.serve(["m"])
    app = create_app(endpoint, None, False)

    async def ask(front_end: ClipFormat) -> list[str]:
        parts: list[Any] = [("file", ("clip.wav", SOUND)), ("question", (None, "what?"))]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            endpoint.backend("m")._front_end = front_end
            body = json.loads(question(SOUND, "what?", model="m", stream=stream))
            chat = await client.post("/v1/chat/completions", json=body)
            endpoint.backend("m")._front_end = front_end
            form = await client.post("/v1/audio/questions", files=parts)
        assert (chat.status_code, form.status_code) == (200, 200)
        return [re.sub(r"chatcmpl-\w+|.created.: ?\d+", "", response.text) for response in (chat, form)]

    assert asyncio.run(ask(ClipFormat(16_000, 8_000))) == asyncio.run(ask(FORMAT))
    assert endpoint.backend("m")._front_end == FORMAT
