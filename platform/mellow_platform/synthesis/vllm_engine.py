"""Asking a language model that vLLM runs on the cluster's own GPUs, through `ray.data.llm`.

Not run on a GPU yet: what is tested is that the requests, and what becomes of the answers, are those of an endpoint.

Answers come back to the driver, which keeps each as it comes and writes whole parts: a kill takes what the engine has
in hand.
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
from mellow_platform.synthesis.runner import ARRIVING, Answering, Part
from mellow_platform.synthesis.schemas import BadAnswerError, parse, schema
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import REFUSED, WriterAnswer, begin, keep, read_arrived

FAILURE = "__inference_error__"  # the column in which Ray says what an engine did not answer
WRITTEN_AT_ONCE = 16  # answers on their way to the folder

Engine = Callable[[ray.data.Dataset], ray.data.Dataset]


def ask_vllm(config: SynthesizeConfig, prompts: Prompts) -> Answering:
    """Return how parts are answered by engines on GPUs; answers out of form are asked for again in a further round.

    Raises:
        ValueError: vLLM is not installed.
    """
    if not importlib.util.find_spec("vllm"):
        raise ValueError(
            "writer: vllm needs vLLM in the cluster's image, and it is not installed: pip install 'ray[llm]', or take "
            "writer: endpoint with a server of your own"
        )

    engine = functools.cache(functools.partial(_engine, config))  # built when there is something to ask

    def answering(
        name: str, parts: list[Part], earlier: Mapping[str, WriterAnswer]
    ) -> Iterator[tuple[str, list[WriterAnswer]]]:
        folder = storage.join(config.output, ARRIVING, name)
        left = {request.id: (part, request) for part, requests in parts for request in requests}
        with ThreadPoolExecutor(WRITTEN_AT_ONCE) as pool:
            for part, requests in parts:
                known = read_arrived(f"{folder}/{part}", pool)
                for request in requests:
                    if request.id in known:
                        del left[request.id]
                        yield part, [known[request.id]]
            answers = {request.id: begin(request, earlier.get(request.id)) for _, request in left.values()}
            for again in reversed(range(config.attempts)):
                # In the order of the requests, so that parts become whole one after another.
                rows = [engine_row(r, prompts, config, answers[r.id]["completions"]) for _, r in left.values()]
                outputs = _run(rows, engine()) if rows else iter(())
                yield from _keeping(folder, _settled(outputs, left, answers, bool(again)), pool)

    return answering


def _settled(
    outputs: Iterable[dict[str, Any]],
    left: dict[str, tuple[str, WritingRequest]],
    answers: dict[str, WriterAnswer],
    again: bool,
) -> Iterator[tuple[str, WriterAnswer]]:
    """Yield what need not be asked again, each with its part, and take it from `left`.

    Args:
        again: what is out of form can be asked for again.
    """
    for output in outputs:
        part, request = left[output["request"]]
        answer = answers[request.id] = settle(answers[request.id], request, output, request.pairs if again else 1)
        if not answer["error"] or not again:
            del left[request.id]
            yield part, answer


def _keeping(
    folder: str, answers: Iterable[tuple[str, WriterAnswer]], pool: Executor
) -> Iterator[tuple[str, list[WriterAnswer]]]:
    """Yield answers when they are written, several of which are at a time."""
    writing: deque[tuple[str, WriterAnswer, Future[None]]] = deque()

    def written() -> tuple[str, list[WriterAnswer]]:
        part, answer, future = writing.popleft()
        future.result()
        return part, [answer]

    for part, answer in answers:
        writing.append((part, answer, pool.submit(keep, f"{folder}/{part}", answer)))
        if len(writing) == WRITTEN_AT_ONCE:
            yield written()
    while writing:
        yield written()


def engine_row(request: WritingRequest, prompts: Prompts, config: SynthesizeConfig, attempt: int) -> dict[str, Any]:
    """Return what the engine is given: the messages, and sampling parameters that hold it to the answer's form."""
    sampling = config.sampling
    parameters: dict[str, Any] = {"max_tokens": sampling.max_tokens}
    if sampling.seed is not None:
        parameters["seed"] = sampling.seed + attempt
    if sampling.temperature is not None:
        parameters["temperature"] = sampling.temperature
    # As text: each kind's schema would be another type to Arrow.
    parameters["structured_outputs"] = {"json": json.dumps(schema(request))}
    return {
        "request": request.id,
        "messages": [{"role": "user", "content": prompts.render(request)}],
        "sampling_params": parameters | sampling.extra,
    }


def settle(answer: WriterAnswer, request: WritingRequest, output: dict[str, Any], least: int) -> WriterAnswer:
    """Return the answer with what the engine wrote: its content, or why there is none.

    Args:
        least: written questions that it has to hold (`schemas.parse`).
    """
    if output.get(FAILURE):  # nothing was written, nor counted
        return answer | {"error": REFUSED, "detail": output[FAILURE]}
    answer = answer | {
        "completions": answer["completions"] + 1,
        "prompt_tokens": answer["prompt_tokens"] + output["num_input_tokens"],
        "completion_tokens": answer["completion_tokens"] + output["num_generated_tokens"],
    }
    try:
        content = parse(request, output["generated_text"], least)
    except BadAnswerError as error:
        return answer | {"error": error.reason, "detail": f"{error}; the last answer: {output['generated_text']}"}
    return answer | {"content": json.dumps(content, ensure_ascii=False), "error": None, "detail": None}


def _engine(config: SynthesizeConfig) -> Engine:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # imports what only such a cluster has

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
