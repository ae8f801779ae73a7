"""What writers give back, and what all of them have in common."""

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, Protocol

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.synthesis.requests import WritingRequest

STOP = "stop"  # the error of an answer that is none: the job cannot go on
REFUSED = "refused"  # that of a request which the model, or its server, will not answer

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("request", pa.string(), nullable=False),
        pa.field("content", pa.string()),  # JSON in the form of the request's kind; null where there is an error
        pa.field("error", pa.string()),  # short name to count by
        pa.field("detail", pa.string()),  # of the error, with the last text that came
        pa.field("final", pa.bool_(), nullable=False),  # false: the next run asks again
        # Of a language model, what came and what it cost, in all runs, answers that were of no use included:
        pa.field("completions", pa.int32(), nullable=False),
        pa.field("retries", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
    ]
)
SPENT = ("completions", "retries", "prompt_tokens", "completion_tokens")

WriterAnswer = dict[str, Any]  # a row of ANSWER_SCHEMA


class Writer(Protocol):
    """Answers requests; one lives in each actor, and several threads call it at the same time."""

    def answers(
        self, requests: list[WritingRequest], kept: str, earlier: Mapping[str, WriterAnswer]
    ) -> list[WriterAnswer]:
        """Return the answers to `requests`, in any order.

        Args:
            kept: folder of these requests' own. What cannot be had again for nothing is written there the moment it
                comes, and what a run before wrote there is taken from it.
            earlier: by request, what a run before came to where that is not final.
        """


def begin(request: WritingRequest, earlier: WriterAnswer | None = None) -> WriterAnswer:
    """Return the answer to a request before anything comes; it has cost what an earlier one, if any, did."""
    spent = {name: earlier[name] if earlier else 0 for name in SPENT}
    return {"request": request.id, "content": None, "error": None, "detail": None, "final": True} | spent


def keep(folder: str, answer: WriterAnswer) -> None:
    """Write an answer into the folder of its part, before that is whole."""
    storage.write_json(storage.join(folder, f"{answer['request']}.json"), answer)


def arrived(folder: str) -> list[str]:
    """Return the files of answers that were kept in the folder of a part; what a kill left half-written is none."""
    return [storage.join(folder, name) for name in storage.list_folder(folder) if name.endswith(".json")]


def read_arrived(folder: str, pool: Executor) -> dict[str, WriterAnswer]:
    """Return the answers that were kept in the folder of a part, by request."""
    return {answer["request"]: answer for answer in pool.map(storage.read_json, arrived(folder))}
