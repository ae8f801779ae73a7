"""Writer on the cluster's GPUs: vLLM through `ray.data.llm`.

Not run on a GPU yet: tests check that prompts, schemas and the parsing of answers are those of an endpoint.

The driver stores each answer as soon as it arrives, and writes complete parts: a kill loses the requests in the engine.
"""

import functools
import importlib.util
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import ray

from mellow_platform import storage
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.runner import ARRIVING, AnswerParts, Part
from mellow_platform.synthesis.schemas import BadAnswerError, parse, schema
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import REFUSED, WriterAnswer, empty_answer, read_stored, store_answer

FAILURE = "__inference_error__"  # column with Ray's error of a failed row
CONCURRENT_WRITES = 16  # answers being stored

Engine = Callable[[ray.data.Dataset], ray.data.Dataset]


def answer_on_vllm(config: SynthesizeConfig, prompts: Prompts) -> AnswerParts:
    """Return a function that answers parts with engines on GPUs; each further round retries malformed answers.

    Raises:
        ValueError: vLLM is not installed.
    """
    if not importlib.util.find_spec("vllm"):
        raise ValueError(
            "writer vllm requires vLLM in the cluster's image, and it is not installed. Run pip install 'ray[llm]', or "
            "use writer endpoint with your own server"
        )

    engine = functools.cache(functools.partial(_engine, config))  # built when there are requests

    def answer_parts(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        folder = storage.join(config.output, ARRIVING, name)
        pending = {request.id: (part, request) for part, requests in parts for request in requests}
        with ThreadPoolExecutor(CONCURRENT_WRITES) as threads:
            for part, requests in parts:
                stored = read_stored(f"{folder}/{part}", threads)
                for request in requests:
                    if request.id in stored:
                        del pending[request.id]
                        yield part, [stored[request.id]]
            answers = {request.id: empty_answer(request, earlier.get(request.id)) for _, request in pending.values()}
            for further_attempts in reversed(range(config.attempts)):
                # In the order of the requests, so that parts become complete one after another.
                rows = [engine_row(r, prompts, config, answers[r.id]["completions"]) for _, r in pending.values()]
                outputs = _run(rows, engine()) if rows else iter(())
                yield from _stored(folder, _completed(outputs, pending, answers, bool(further_attempts)), threads)

    return answer_parts


def _completed(
    outputs: Iterable[dict[str, Any]],
    pending: dict[str, tuple[str, WritingRequest]],
    answers: dict[str, WriterAnswer],
    retry: bool,
) -> Iterator[tuple[str, WriterAnswer]]:
    """Yield answers that are not retried, each with its part, and remove their requests from `pending`.

    Args:
        retry: whether a further round can retry failed requests.
    """
    for output in outputs:
        part, request = pending[output["request"]]
        answer = answers[request.id] = parse_row(answers[request.id], request, output, request.pairs if retry else 1)
        if not answer["error"] or not retry:
            del pending[request.id]
            yield part, answer


def _stored(
    folder: str, answers: Iterable[tuple[str, WriterAnswer]], threads: Executor
) -> Iterator[tuple[str, list[WriterAnswer]]]:
    """Store answers, several at a time; yield each when it is stored."""
    writes: deque[tuple[str, WriterAnswer, Future[None]]] = deque()

    def oldest() -> tuple[str, list[WriterAnswer]]:
        part, answer, future = writes.popleft()
        future.result()
        return part, [answer]

    for part, answer in answers:
        writes.append((part, answer, threads.submit(store_answer, f"{folder}/{part}", answer)))
        if len(writes) == CONCURRENT_WRITES:
            yield oldest()
    while writes:
        yield oldest()


def engine_row(request: WritingRequest, prompts: Prompts, config: SynthesizeConfig, attempt: int) -> dict[str, Any]:
    """Return a row for the engine: messages, and sampling parameters with the schema of the answer."""
    sampling = config.sampling
    parameters: dict[str, Any] = {"max_tokens": sampling.max_tokens}
    if sampling.seed is not None:
        parameters["seed"] = sampling.seed + attempt
    if sampling.temperature is not None:
        parameters["temperature"] = sampling.temperature
    # As text: in Arrow, the schema of each kind would be another type.
    parameters["structured_outputs"] = {"json": json.dumps(schema(request))}
    return {
        "request": request.id,
        "messages": [{"role": "user", "content": prompts.render(request)}],
        "sampling_params": parameters | sampling.extra,
    }


def parse_row(answer: WriterAnswer, request: WritingRequest, row: dict[str, Any], min_questions: int) -> WriterAnswer:
    """Return the answer with the content in a row of the engine's output, or with its error.

    Args:
        min_questions: smallest number of valid questions (`schemas.parse`).
    """
    if row.get(FAILURE):  # no completion, and no usage
        return answer | {"error": REFUSED, "detail": row[FAILURE]}
    answer = answer | {
        "completions": answer["completions"] + 1,
        "prompt_tokens": answer["prompt_tokens"] + row["num_input_tokens"],
        "completion_tokens": answer["completion_tokens"] + row["num_generated_tokens"],
    }
    try:
        content = parse(request, row["generated_text"], min_questions)
    except BadAnswerError as error:
        return answer | {"error": error.reason, "detail": f"{error}; the last answer: {row['generated_text']}"}
    return answer | {"content": json.dumps(content, ensure_ascii=False), "error": None, "detail": None}


def _engine(config: SynthesizeConfig) -> Engine:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # requires vLLM

    assert config.vllm.model
    return build_processor(
        vLLMEngineProcessorConfig(
            model_source=config.vllm.model,
            engine_kwargs=config.vllm.engine,
            batch_size=config.vllm.batch_size,
            concurrency=config.workers,
            should_continue_on_error=True,
        ),
    )


def _run(rows: list[dict[str, Any]], engine: Engine) -> Iterator[dict[str, Any]]:
    columns = ["request", "generated_text", "num_input_tokens", "num_generated_tokens", FAILURE]
    for row in engine(ray.data.from_items(rows)).iter_rows():
        yield {name: row.get(name) for name in columns}
