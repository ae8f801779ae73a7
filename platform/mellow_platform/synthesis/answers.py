"""What writers give back, and what all of them have in common."""

from typing import Any, Protocol

import pyarrow as pa

from mellow_platform.synthesis.asked import Request

STOP = "stop"  # the error of an answer that is none: the job cannot go on

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("request", pa.string(), nullable=False),
        pa.field("content", pa.string()),  # JSON in the form of the request's kind; null where there is an error
        pa.field("error", pa.string()),  # short name to count by
        pa.field("detail", pa.string()),  # of the error, with the last text that came
        # Of a language model, what came and what it cost, answers that were of no use included:
        pa.field("completions", pa.int32(), nullable=False),
        pa.field("retries", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
    ]
)

Answer = dict[str, Any]  # a row of ANSWER_SCHEMA


class Writer(Protocol):
    """Answers requests; one lives in each actor, and several threads call it at the same time."""

    def answers(self, requests: list[Request], kept: str) -> list[Answer]:
        """Return the answers to `requests`, in any order.

        Args:
            kept: folder of these requests' own. What cannot be had again for nothing is written there the moment it
                comes, and what a run before wrote there is taken from it.
        """


def empty_answer(request: Request) -> Answer:
    """Return the answer to a request before anything came."""
    counts = dict.fromkeys(("completions", "retries", "prompt_tokens", "completion_tokens"), 0)
    return {"request": request.id, "content": None, "error": None, "detail": None} | counts
