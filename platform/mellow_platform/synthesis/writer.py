"""Interface of writers, the table of their answers, and the files of answers of unfinished parts."""

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, Protocol

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.synthesis.requests import WritingRequest

STOP = "stop"  # error of an unanswered request after which the job ends
REFUSED = "refused"  # error of a request that the model or its server rejects

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("request", pa.string(), nullable=False),
        pa.field("content", pa.string()),  # JSON in the schema of the request's kind; null with an error
        pa.field("error", pa.string()),  # reason, a short name
        pa.field("detail", pa.string()),  # error message, and the last malformed text
        pa.field("final", pa.bool_(), nullable=False),  # false: the next run retries the request
        # Usage of a language model over all runs, including malformed answers:
        pa.field("completions", pa.int32(), nullable=False),
        pa.field("retries", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
    ]
)
SPENT = ("completions", "retries", "prompt_tokens", "completion_tokens")

WriterAnswer = dict[str, Any]  # a row of ANSWER_SCHEMA


class Writer(Protocol):
    """Answers requests; each actor has one, and several threads call it at the same time."""

    def answers(
        self, requests: list[WritingRequest], folder: str, earlier: Mapping[str, WriterAnswer]
    ) -> list[WriterAnswer]:
        """Return the answers to `requests`, in any order.

        Args:
            folder: folder of this part. Answers that cost money are stored there as soon as they arrive; answers that
                an earlier run stored are read from it.
            earlier: answers of earlier runs that are not final, by request.
        """


def empty_answer(request: WritingRequest, earlier: WriterAnswer | None = None) -> WriterAnswer:
    """Return an answer without content; its usage is that of the earlier answer, or 0."""
    spent = {name: earlier[name] if earlier else 0 for name in SPENT}
    return {"request": request.id, "content": None, "error": None, "detail": None, "final": True} | spent


def store_answer(folder: str, answer: WriterAnswer) -> None:
    """Write an answer to a file in the folder of an unfinished part."""
    storage.write_json(storage.join(folder, f"{answer['request']}.json"), answer)


def stored_files(folder: str) -> list[str]:
    """Return the answer files in the folder of a part; partial files of a killed run are ignored."""
    return [storage.join(folder, name) for name in storage.list_folder(folder) if name.endswith(".json")]


def read_stored(folder: str, threads: Executor) -> dict[str, WriterAnswer]:
    """Return the answers stored in the folder of a part, by request."""
    return {answer["request"]: answer for answer in threads.map(storage.read_json, stored_files(folder))}
