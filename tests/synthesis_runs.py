"""Small runs of synthesis for tests: configuration, requests, questions, and passes in this process."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import SecretStr

from mellow_platform import storage
from mellow_platform.data.caption_tables import Caption
from mellow_platform.synthesis.endpoint import Access, EndpointWriter
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.requests import WritingRequest, plan
from mellow_platform.synthesis.runner import Part, read_parts, run_pass
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import WriterAnswer
from tests.llm_server import KEY, MODEL, LLMServer

KINDS = ["detail", "mcq", "difference", "entailment"]
QUESTION = {"aspect": "objects", "question": "what is it?", "answer": "a dog"}
REQUEST = WritingRequest("write-00000000", "detail", 2, {"captions": ["a dog barks"]}, ("a.wav",), "train", "audiocaps")
GOOD = json.dumps({"questions": [QUESTION] * 5})


def config(captions: str | list[str], output: Path | str, **fields: Any) -> SynthesizeConfig:
    """Return the configuration of a job with one worker."""
    values = {"captions": captions, "output": str(output), "workers": 1, "rows_per_part": 16}
    return SynthesizeConfig(**values | fields)


def endpoint_job(tmp_path: Path, **limits: Any) -> SynthesizeConfig:
    """Return the configuration of a job that gets questions of one kind from an endpoint, without retries."""
    limits = {"concurrency": 2, "retries": 0} | limits
    fields = {"kinds": ["detail"], "rows_per_part": 4, "max_failed_share": 1.0}
    return config("/c", tmp_path / "out", writer="endpoint", endpoint=limits, **fields)


def candidate(
    question: str, answer: str, choices: tuple[str, ...] = (), kind: str = "", **fields: Any
) -> dict[str, Any]:
    """Return a written question that no filter has rejected yet; its kind is mcq if it has choices."""
    values = {"id": f"{question} {answer}", "kind": kind or ("mcq" if choices else "detail"), "clips": ["a.wav"]}
    values |= {"subtype": kind, "question": question, "choices": list(choices), "answer": answer, "reason": ""}
    return values | fields


def some_requests(job: SynthesizeConfig, count: int = 8) -> list[WritingRequest]:
    """Return the requests of a job for `count` clips; the prompt of clip n contains "barks n"."""
    return plan([Caption(f"{n}.wav", f"a red dog barks {n}", "train", "x") for n in range(count)], job)


def access_to(server: LLMServer) -> Access:
    return Access(server.url, MODEL, SecretStr(KEY))


def endpoint_writer(job: SynthesizeConfig, access: Access) -> EndpointWriter:
    return EndpointWriter(job, Prompts.read(job.kinds, None), access, "d" * 64)


def run(job: SynthesizeConfig, requests: list[WritingRequest], server: LLMServer, **access: Any) -> list[WriterAnswer]:
    """Run the pass `write` in this process against a server; return the answer to each request.

    Args:
        access: fields of `Access` that differ from those that the server accepts.
    """
    writer = endpoint_writer(job, replace(access_to(server), **access))

    def answer_parts(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        for part, requests in parts:
            yield part, writer.answers(requests, storage.join(job.output, "arriving", name, part), earlier)

    return run_pass("write", requests, answer_parts, job)[0]


def parts_of(requests: list[WritingRequest], job: SynthesizeConfig) -> list[Part]:
    """Return the parts into which `run_pass` divides requests."""
    received: list[Part] = []

    def answer_parts(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        received.extend(parts)
        return iter(())

    with pytest.raises(RuntimeError, match=r"\bwrite\b"):
        run_pass("write", requests, answer_parts, job)
    return received


def rows_of(job: SynthesizeConfig) -> dict[str, WriterAnswer]:
    """Return the stored answers of the pass `write` by request; assert that each is stored once."""
    rows = [row for rows in read_parts("write", job).values() for row in rows]
    files = [row for file in Path(job.output, "answers/write").iterdir() for row in pq.read_table(file).to_pylist()]
    assert sorted(row["request"] for row in files) == sorted(row["request"] for row in rows)
    found = {row["request"]: row for row in rows}
    assert len(found) == len(rows)
    return found
