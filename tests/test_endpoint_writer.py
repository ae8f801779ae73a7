"""The writer behind an OpenAI-compatible endpoint: responses, retries, rate limit."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

from mellow_platform.synthesis.endpoint import Access, EndpointWriter, RateLimiter
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import empty_answer
from tests.llm_server import KEY, LLMServer, llm_server
from tests.synthesis_runs import GOOD, access_to, config, endpoint_job, endpoint_writer, some_requests


def stub_writer(job: SynthesizeConfig, body: Any) -> EndpointWriter:
    """Return a writer whose server sends `body` in response to every request."""
    writer = endpoint_writer(job, Access("http://x/v1", "m", SecretStr("k")))
    respond = httpx.MockTransport(lambda _: httpx.Response(200, json=body))
    writer.client = openai.OpenAI(base_url="http://x", api_key="x", http_client=httpx.Client(transport=respond))  # type: ignore[arg-type]
    return writer


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": "x"}, "broken_json"),
        ({"content": [{"type": "thinking", "thinking": "{}"}, {"type": "text", "text": GOOD[:9]},
                      {"type": "text", "text": GOOD[9:]}]}, None),
        ({"content": [{"type": "image"}, "x", 5]}, "broken_json"),
        ({"content": {"text": GOOD}}, "broken_json"),
        ({"content": None, "refusal": ["x"]}, "broken_json"),
        (None, "refused"),
    ],
)  # fmt: skip
def test_message_content_types(message, reason, tmp_path):
    job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], attempts=2, endpoint={"retries": 1})
    choice = {"finish_reason": "content_filter"} | ({"message": message} if message else {})
    answer = stub_writer(job, {"choices": [choice], "usage": {"prompt_tokens": 7}}).answer(some_requests(job)[0])
    assert (answer["error"], answer["completions"]) == (reason, 2 if reason == "broken_json" else 1)
    assert answer["prompt_tokens"] == 7 * answer["completions"]
    assert not reason or "finish_reason content_filter" in answer["detail"]


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": [5]}, {"error": "busy"}, []])
def test_invalid_completions_are_retried(body, tmp_path):
    job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], endpoint={"retries": 1})
    answer = stub_writer(job, body).answer(some_requests(job)[0])
    assert (answer["error"], answer["completions"], answer["final"]) == ("unreadable", 0, False)
    assert re.search(r"\b2\b", answer["detail"])


def test_invalid_answer_fails_with_its_last_text(tmp_path):
    with llm_server(malformed=1.0) as server:
        job = config("/c", tmp_path, writer="endpoint", kinds=["mcq"], attempts=2, max_failed_share=1.0)
        job = job.model_copy(update={"endpoint": job.endpoint.model_copy(update={"retries": 40})})
        answer = endpoint_writer(job, access_to(server)).answer(some_requests(job)[0])
        assert answer["completions"] == 2
        assert answer["error"] in ("broken_json", "wrong_form") and answer["content"] is None
        assert '{"questions' in answer["detail"]
        assert answer["completion_tokens"] > 0


def test_refusal_is_final_after_a_later_answer(tmp_path):
    job = endpoint_job(tmp_path, concurrency=1)
    requests = some_requests(job)
    with llm_server(refuse="barks 2") as server:
        writer = endpoint_writer(job, access_to(server))
        folder = str(tmp_path / "part")
        assert [a["final"] for a in writer.answers(requests[:3], folder, {})] == [True, True, False]
        assert [a["final"] for a in writer.answers(requests[:4], folder, {})] == [True] * 4
    assert len(list(Path(folder).iterdir())) == 4


def test_earlier_cost_of_a_failed_request_is_counted(tmp_path):
    job = endpoint_job(tmp_path)
    (request,) = some_requests(job, 1)
    earlier = empty_answer(request) | {"error": "server_error", "final": False, "completions": 2, "prompt_tokens": 50}
    with llm_server() as server:
        writer = endpoint_writer(job, access_to(server))
        (answer,) = writer.answers([request], str(tmp_path / "part"), {request.id: earlier})
        assert answer["completions"] == 3
        assert answer["prompt_tokens"] == 50 + server.tokens["prompt_tokens"]
        assert [key.rsplit("-", 1)[1] for key in server.requests] == ["2.2048"]


def test_server_counts_answers_generated_for_two_keys(tmp_path):
    job = endpoint_job(tmp_path)
    (request,) = some_requests(job, 1)
    with llm_server() as server:
        for digest in ("d" * 64, "d" * 64, "e" * 64):
            EndpointWriter(job, Prompts.read(job.kinds, None), access_to(server), digest).answer(request)
        assert server.requests.total() == 3
        assert list(server.generated.values()) == [2]


def test_calls_per_minute_across_threads():
    limiter, start = RateLimiter(calls_per_minute=1200), time.monotonic()
    with ThreadPoolExecutor(5) as threads:
        list(threads.map(limiter, range(5)))
    assert time.monotonic() - start >= 4 * 0.05


def test_job_without_an_answer_ends_and_stores_nothing(tmp_path):
    for status, message in ((500, "500"), (402, "402"), (400, "sampling")):
        with llm_server(refuse="barks", status=status) as server:
            job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], endpoint={"retries": 0, "concurrency": 1})
            writer = endpoint_writer(job, access_to(server))
            answers = writer.answers(some_requests(job, 12), str(tmp_path / "part"), {})
            assert answers[-1]["error"] == "stop" and message in answers[-1]["detail"]
            assert not (tmp_path / "part").exists()


def test_repr_hides_the_key(monkeypatch):
    LLMServer("http://x/v1").set_env(monkeypatch)
    access = Access.from_environment()
    assert KEY not in repr(access)
    assert access.key.get_secret_value() == KEY
