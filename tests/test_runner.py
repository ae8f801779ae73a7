"""The runner of a synthesis pass: stored answers, retries across runs, and failures that end the job."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from mellow_platform import storage
from tests.llm_server import llm_server
from tests.synthesis_runs import (
    access_to,
    config,
    endpoint_job,
    endpoint_writer,
    parts_of,
    rows_of,
    run,
    some_requests,
)


@pytest.mark.parametrize(("status", "reason"), [(400, "refused"), (500, "server_error")])
def test_max_failed_share_limits_refused_requests(status, reason, tmp_path):
    with llm_server(refuse="barks 3", status=status) as server:
        fields = {"kinds": ["detail"], "rows_per_part": 3, "max_failed_share": 0.2, "endpoint": {"retries": 4}}
        job = config("/c", tmp_path, writer="endpoint", **fields)
        requests = some_requests(job)
        answers = run(job, requests, server)
        assert [answer["error"] for answer in answers] == [None] * 3 + [reason] + [None] * 4
        assert f"status {status}" in answers[3]["detail"]
        count = server.requests.total()
        strict = job.model_copy(update={"max_failed_share": 0.1})
        with pytest.raises(ValueError, match=rf"\b1 of 8 .*write.*{reason} 1\b.*\b0\.1\b"):
            run(strict, requests, server)
        assert server.requests.total() == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": SecretStr("sk-wrong")}, r"\b401\b.*OPENAI_API_KEY.*Bearer \*\*\*"),
        ({"model": "other"}, r"\b404\b.*OPENAI_BASE_URL.*OPENAI_MODEL"),
        ({"url": "http://127.0.0.1:9/v1"}, r"127\.0\.0\.1:9\b"),
    ],
)
def test_invalid_access_ends_the_job_and_keeps_answers(change, message, tmp_path):
    limits = {"retries": 12, "concurrency": 2}
    job = config("/c", tmp_path, writer="endpoint", kinds=["detail"], rows_per_part=4, attempts=8, endpoint=limits)
    without_retries = job.model_copy(update={"endpoint": job.endpoint.model_copy(update={"retries": 0})})
    requests = some_requests(job)
    (first, members), *_ = parts_of(requests, job)
    with llm_server(faults=0.2, malformed=0.15, rejectable=0.2, seed=1) as server:
        endpoint_writer(job, access_to(server)).answers(members[:3], str(tmp_path / "arriving/write" / first), {})
        with pytest.raises(RuntimeError, match=rf"{message}.*\b3 of 8\b.*\bwrite\b"):
            run(without_retries, requests, server, **change)
        before = server.valid_answers("d" * 16)
        assert all(answer["content"] for answer in run(job, requests, server))
        after = server.valid_answers("d" * 16)
    assert {request.id: after[request.id] - before[request.id] for request in requests} == {
        request.id: int(number >= 3) for number, request in enumerate(requests)
    }


def test_resume_after_an_exhausted_limit(tmp_path):
    job = endpoint_job(tmp_path)
    requests = some_requests(job, 40)
    with (  # with this latency, an answer is in flight when the limit is reached
        llm_server(limit=5, latency=0.3) as server,
        pytest.raises(RuntimeError, match=r"\b1[12]\b.*\b400\b.*\b5 of 40\b"),
    ):
        run(job, requests, server)
    refused = [row for row in rows_of(job).values() if row["error"]]
    assert refused and not any(row["final"] for row in refused)
    assert not list(Path(job.output, "arriving").rglob("*.json"))
    with llm_server() as server:
        assert all(answer["content"] for answer in run(job, requests, server))
        assert len(server.answers_sent()) == server.requests.total() == 35
    assert len(rows_of(job)) == 40


def test_resume_replaces_server_errors(tmp_path, monkeypatch):
    job = endpoint_job(tmp_path)
    requests = some_requests(job, 10)
    with llm_server(refuse="barks 3", status=500) as server:
        for _ in range(2):  # the second run has no other request, and does not end
            answers = run(job, requests, server)
            assert {requests[3].id} == {request for request, row in rows_of(job).items() if row["error"]}
            assert (answers[3]["error"], answers[3]["final"]) == ("server_error", False)
        assert server.requests.total() == 9
    before = rows_of(job)
    write = storage.write_json

    def kill(uri: str, value: Any) -> None:
        if "/receipts/" in uri:
            raise KeyboardInterrupt
        write(uri, value)

    with llm_server() as server:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(storage, "write_json", kill)
            run(job, requests, server)
        assert all(answer["content"] for answer in run(job, requests, server))
        assert server.requests.total() == 1
    after = rows_of(job)
    assert {request for request in after if after[request] != before[request]} == {requests[3].id}
    assert sum(row["completions"] for row in after.values()) == 10


@pytest.mark.parametrize("concurrency", [1, 2])
def test_one_failed_prompt_is_not_an_outage(concurrency, tmp_path):
    job = endpoint_job(tmp_path, concurrency=concurrency)
    requests = some_requests(job, 12)
    with llm_server(refuse="barks 3", status=503) as server:
        assert sum(bool(answer["error"]) for answer in run(job, requests, server)) == 1
    job = job.model_copy(update={"output": str(tmp_path / "other")})
    with (
        llm_server(limit=5, status=503) as server,
        pytest.raises(RuntimeError, match=r"\b503\b.*\d of 12\b"),
    ):
        run(job, requests, server)


def test_long_retry_after_ends_the_job(tmp_path):
    job = endpoint_job(tmp_path, retries=8)
    with (
        llm_server(limit=5, status=429, pause=7200) as server,
        pytest.raises(RuntimeError, match=r"\b7200\b"),
    ):
        run(job, some_requests(job, 12), server)


def test_resume_with_more_max_tokens(tmp_path):
    job = endpoint_job(tmp_path)
    short = job.model_copy(update={"sampling": job.sampling.model_copy(update={"max_tokens": 5}), "attempts": 2})
    requests = some_requests(job, 20)
    assert short.identity == job.identity
    with llm_server() as server:
        with pytest.raises(RuntimeError, match=r'\b1[12]\b.*max_tokens.*finish_reason length.*\{"questions'):
            run(short, requests, server)
        assert not list(Path(job.output, "arriving").rglob("*.json"))
        before = server.generated.total()
        answers = run(job, requests, server)
    assert all(answer["content"] for answer in answers)
    assert server.generated.total() == before + 20
    assert sum(answer["completions"] for answer in answers) > 20


def test_json_schema_unbounded(tmp_path):
    job = endpoint_job(tmp_path)
    requests = some_requests(job)
    with llm_server(accepts_bounds=False) as server:
        with pytest.raises(RuntimeError, match="minItems"):
            run(job, some_requests(job, 12), server)
        sampling = job.sampling.model_copy(update={"response_format": "json_schema_unbounded"})
        job = job.model_copy(update={"sampling": sampling, "output": str(tmp_path / "other")})
        assert all(len(json.loads(answer["content"])["questions"]) == 5 for answer in run(job, requests, server))
