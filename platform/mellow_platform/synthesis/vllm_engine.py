"""Asking a language model that vLLM runs on the cluster's own GPUs, through `ray.data.llm`.

Not run on a GPU yet: what is tested is that the requests, and what becomes of the answers, are those of an endpoint.

Answers come back to the driver, which keeps each as it comes and writes whole parts: a kill takes what the engine has
in hand.
"""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import ray

from mellow_platform import storage
from mellow_platform.config import SynthesizeConfig
from mellow_platform.synthesis.answers import Answer, empty_answer
from mellow_platform.synthesis.asked import Request
from mellow_platform.synthesis.forms import BadAnswerError, parse, schema
from mellow_platform.synthesis.passes import ARRIVING, Answering, Part
from mellow_platform.synthesis.prompts import Prompts

FAILURE = "__inference_error__"  # the column in which Ray says what an engine did not answer


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

    def answering(name: str, parts: list[Part]) -> Iterator[tuple[str, list[Answer]]]:
        folder = storage.join(config.output, ARRIVING, name)
        part_of = {request.id: part for part, requests in parts for request in requests}
        requests = {request.id: request for _, part in parts for request in part}
        for part, _ in parts:
            for file in storage.list_folder(f"{folder}/{part}"):
                answer = storage.read_json(f"{folder}/{part}/{file}")
                del requests[answer["request"]]
                yield part, [answer]
        answers = {request.id: empty_answer(request) for request in requests.values()}
        for attempt in range(config.attempts):
            # In the order of the requests, so that parts become whole one after another.
            rows = [engine_row(request, prompts, config, attempt) for request in requests.values()]
            for output in _run(rows, config) if rows else ():
                request = requests[output["request"]]
                answer = settle(answers[request.id], request, output)
                if not answer["error"] or attempt == config.attempts - 1:
                    del requests[request.id]
                    part = part_of[request.id]
                    storage.write_json(f"{folder}/{part}/{request.id}.json", answer)
                    yield part, [answer]

    return answering


def engine_row(request: Request, prompts: Prompts, config: SynthesizeConfig, attempt: int) -> dict[str, Any]:
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


def settle(answer: Answer, request: Request, output: dict[str, Any]) -> Answer:
    """Add what the engine wrote to the answer: its content, or why there is none."""
    answer["completions"] += 1
    answer["prompt_tokens"] += output["num_input_tokens"]
    answer["completion_tokens"] += output["num_generated_tokens"]
    if output.get(FAILURE):
        return answer | {"error": "refused", "detail": output[FAILURE]}
    try:
        content = parse(request, output["generated_text"], least=request.pairs)
    except BadAnswerError as error:
        return answer | {"error": error.reason, "detail": f"{error}; the last answer: {output['generated_text']}"}
    return answer | {"content": json.dumps(content, ensure_ascii=False), "error": None, "detail": None}


def _run(rows: list[dict[str, Any]], config: SynthesizeConfig) -> Iterator[dict[str, Any]]:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # imports what only such a cluster has

    assert config.vllm.model
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=config.vllm.model,
            engine_kwargs=config.vllm.engine,
            batch_size=config.vllm.batch_size,
            concurrency=config.workers,
            should_continue_on_error=True,
        ),
    )
    columns = ["request", "generated_text", "num_input_tokens", "num_generated_tokens", FAILURE]
    for row in processor(ray.data.from_items(rows)).iter_rows():
        yield {name: row.get(name) for name in columns}
