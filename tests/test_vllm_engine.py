"""The writer that runs vLLM on the cluster, with a test engine."""

import json
from typing import Any

import pytest
import ray

from mellow_platform.synthesis import vllm_engine
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.runner import run_pass
from mellow_platform.synthesis.schemas import schema
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.vllm_engine import answer_on_vllm, engine_row, parse_row
from mellow_platform.synthesis.writer import empty_answer
from tests.synthesis_runs import GOOD, QUESTION, REQUEST, config, parts_of, rows_of, some_requests


def test_vllm_has_the_prompts_and_schemas_of_an_endpoint():
    job = config("/c", "/o", writer="vllm", vllm={"model": "m"}, kinds=["detail"], questions=2)
    prompts = Prompts.read(job.kinds, None)
    row = engine_row(REQUEST, prompts, job, attempt=1)
    assert row["messages"] == [{"role": "user", "content": prompts.render(REQUEST)}]
    assert json.loads(row["sampling_params"]["structured_outputs"]["json"]) == schema(REQUEST)
    assert row["sampling_params"]["seed"] == 1
    empty = empty_answer(REQUEST)
    output = {"request": REQUEST.id, "num_input_tokens": 7, "num_generated_tokens": 5, "__inference_error__": ""}
    good = parse_row(empty, REQUEST, output | {"generated_text": json.dumps({"questions": [QUESTION, QUESTION]})}, 2)
    assert (good["error"], good["prompt_tokens"], good["completion_tokens"]) == (None, 7, 5)
    assert parse_row(empty, REQUEST, output | {"generated_text": "{"}, 2)["error"] == "broken_json"
    failed_row = {"request": REQUEST.id, "num_input_tokens": None, "__inference_error__": "too long"}
    failed = parse_row(empty, REQUEST, failed_row, 2)
    assert (failed["error"], failed["detail"], failed["completions"]) == ("refused", "too long", 0)


def test_vllm_retries_only_invalid_answers(cluster, tmp_path, monkeypatch):
    job = config("/c", tmp_path, writer="vllm", vllm={"model": "m"}, kinds=["detail"], rows_per_part=3, attempts=2)
    job = job.model_copy(update={"max_failed_share": 1.0})
    requests = some_requests(job)
    rows_sent: list[tuple[str, int]] = []
    engines: list[SynthesizeConfig] = []

    def text(row: dict[str, Any]) -> str:
        """Return an answer that is malformed at first for one request, and always for another."""
        number, seed = int(row["request"].split("-")[1]), row["sampling_params"]["seed"]
        return "{" if number == 6 or (number == 4 and seed == 0) else GOOD

    def engine(dataset: ray.data.Dataset) -> ray.data.Dataset:
        rows = dataset.take_all()
        rows_sent.extend((row["request"], row["sampling_params"]["seed"]) for row in rows)
        tokens = {"num_input_tokens": 10, "num_generated_tokens": 2, "__inference_error__": ""}
        return ray.data.from_items([{"request": row["request"], "generated_text": text(row)} | tokens for row in rows])

    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda _: True)

    def build(config: SynthesizeConfig) -> vllm_engine.Engine:
        engines.append(config)
        return engine

    monkeypatch.setattr(vllm_engine, "_engine", build)
    answer_parts = answer_on_vllm(job, Prompts.read(job.kinds, None))
    parts = parts_of(requests, job)
    answers_stream = answer_parts("write", parts, {})
    for _ in range(2):  # a kill after this loses answers being stored, and no stored answer
        next(answers_stream)
    answers_stream.close()  # type: ignore[attr-defined]
    stored = {file.stem for file in (tmp_path / "arriving/write").rglob("*.json")}
    assert len(stored) >= 2
    (tmp_path / "arriving/write" / parts[0][0] / f".{requests[0].id}.json.{'0' * 32}").write_text('{"request"')
    rows_sent.clear()
    answers, _ = run_pass("write", requests, answer_parts, job)
    assert [answer["error"] for answer in answers] == [None] * 6 + ["broken_json", None]
    assert [answer["completions"] for answer in answers] == [1] * 4 + [2, 1, 2, 1]
    repeated = {(request.id, 0) for request in requests if request.id not in stored}
    assert sorted(rows_sent) == sorted(repeated | {(requests[4].id, 1), (requests[6].id, 1)})
    assert len(engines) == 1
    assert sorted(rows_of(job)) == [request.id for request in requests]


def test_missing_vllm_names_the_package():
    job = config("/c", "/o", writer="vllm", vllm={"model": "m"})
    with pytest.raises(ValueError, match=r"ray\[llm\]"):
        answer_on_vllm(job, Prompts.read(job.kinds, None))
