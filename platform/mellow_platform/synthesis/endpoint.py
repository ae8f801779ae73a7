"""Writer that sends requests to an OpenAI-compatible endpoint.

The client retries transport failures (a full server, a server error, a lost connection) with exponential back-off, or
after the server's Retry-After. Malformed answers are requested again. If a request fails after all retries, the job
continues if other requests received answers meanwhile, and ends otherwise.
"""

import contextlib
import email.utils
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice
from pydantic import SecretStr

from mellow_platform.completion import read_completion, said
from mellow_platform.synthesis.prompts import Prompts
from mellow_platform.synthesis.requests import WritingRequest
from mellow_platform.synthesis.schemas import BadAnswerError, parse, schema, unbounded_schema
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import REFUSED, STOP, WriterAnswer, empty_answer, read_stored, store_answer

URL, MODEL, KEY = "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"
PLACEHOLDER_KEY = "no-key-is-set"  # for servers without authentication: the client requires a key
FATAL_STATUSES = {
    401: f"the key is invalid; check {KEY}",
    402: "the account has no credit; pay, then submit the job again",
    404: f"unknown address or model; check {URL} (it ends in /v1) and {MODEL}",
}
LOST = "lost_connection"
REFUSED_STATUSES = (400, 413, 422)  # the prompt or the body is invalid
# Other 4xx that fail one request only; the client retries 408, 409, 429 and every 5xx.
REQUEST_STATUSES = {408: "timeout", 409: "server_error", 429: "server_full", 403: "forbidden"}
LONGEST_WAIT = 120.0  # seconds: the client does not retry after a longer Retry-After
# Consecutive requests without a valid answer, in addition to `concurrency`, after which the job ends: their prompts are
# not the cause.
MAX_UNUSABLE = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between retries of a response with an unreadable body
STORED_TEXT, QUOTED_TEXT = 2000, 500  # characters of a malformed answer in the table of failed requests, in an error


@dataclass(frozen=True)
class Access:
    """URL, model and key of an endpoint. Output of Ray and error messages do not contain the key."""

    url: str
    model: str
    key: SecretStr

    @classmethod
    def from_environment(cls) -> "Access":
        """Return the access in the environment variables; the key is optional.

        Raises:
            ValueError: URL or model is not set.
        """
        if missing := [name for name in (URL, MODEL) if not os.environ.get(name)]:
            raise ValueError(f"writer endpoint requires {' and '.join(missing)} in the environment of the job")
        return cls(os.environ[URL], os.environ[MODEL], SecretStr(os.environ.get(KEY) or PLACEHOLDER_KEY))

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]


class UnreadableError(ValueError):
    """All responses to a request lack a completion."""


@dataclass
class UnusableReply:
    """A request that the server refused, or whose last answer is malformed.

    Attributes:
        folder: folder of the request's part; empty when the part is complete.
        failed_before: the request also failed in an earlier run, which did not end the job: it does not end this one.
        time: arrival of the reply, in seconds of the monotonic clock.
    """

    folder: str
    answer: WriterAnswer
    failed_before: bool
    time: float = field(default_factory=time.monotonic)


class RateLimiter:
    """Delays calls of all threads so that at most `calls_per_minute` pass, evenly spaced."""

    def __init__(self, calls_per_minute: float):
        self.pause = 60.0 / calls_per_minute  # seconds
        self.next, self.lock = time.monotonic(), threading.Lock()

    def __call__(self, *_: Any) -> None:
        with self.lock:
            turn = max(self.next, time.monotonic())
            self.next = turn + self.pause
        time.sleep(max(0.0, turn - time.monotonic()))


class EndpointWriter:
    """Sends up to `concurrency` requests at a time to a model, and stores each answer as soon as it arrives.

    Args:
        digest: digest of the corpus. The `Idempotency-Key` of a request contains it and the request's id: a gateway
            that supports such keys sends a stored answer instead of generating, and billing, it again.
    """

    def __init__(self, config: SynthesizeConfig, prompts: Prompts, access: Access, digest: str):
        self.config, self.prompts, self.access, self.digest = config, prompts, access, digest
        limits = config.endpoint
        # The hook also delays retries, which count towards a server's limit.
        rate = limits.requests_per_minute
        hooks: list[Callable] = [RateLimiter(rate / config.workers)] if rate else []
        self.client = openai.OpenAI(
            base_url=access.url,
            api_key=access.key.get_secret_value(),
            max_retries=limits.retries,
            timeout=limits.timeout,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": hooks}),
        )
        self.threads = ThreadPoolExecutor(limits.concurrency)
        self.stop_message = ""
        self.lock = threading.Lock()
        self.pending = 0  # requests without an outcome
        self.completions = 0  # completions received, malformed ones included
        self.is_working = False  # a completion arrived in this run, or an earlier one stored an answer
        self.has_failure = False  # a request failed in transport after the last completion
        self.unusable: list[UnusableReply] = []  # causes unknown: the prompt, or the server

    def answers(
        self, requests: list[WritingRequest], folder: str, earlier: Mapping[str, WriterAnswer]
    ) -> list[WriterAnswer]:
        """Return the answers to `requests`; send those without a stored answer in `folder` (`writer.Writer`)."""
        stored = read_stored(folder, self.threads)
        missing = [request for request in requests if request.id not in stored]
        with self.lock:
            self.is_working = self.is_working or bool(stored)
            self.pending += len(missing)
        new = list(self.threads.map(partial(self._process, folder, earlier), missing))
        with self.lock:  # later valid answers cannot confirm unusable replies of this part any more
            for reply in self.unusable:
                if reply.folder == folder:
                    reply.folder, reply.answer["final"] = "", False
        return [*(stored[request.id] for request in requests if request.id in stored), *new]

    def _process(self, folder: str, earlier: Mapping[str, WriterAnswer], request: WritingRequest) -> WriterAnswer:
        previous, start, before, stop = earlier.get(request.id), time.monotonic(), self.completions, self.stop_message
        try:
            answer = empty_answer(request, previous) | _stop_error(stop) if stop else self.answer(request, previous)
        finally:
            with self.lock:
                self.pending -= 1
        if not answer["error"]:
            store_answer(folder, answer)
            self._confirm_unusable(start)
        elif answer["final"]:
            answer |= self._unusable_outcome(UnusableReply(folder, answer, failed_before=bool(previous)))
        elif answer["error"] != STOP:
            of_request = answer["completions"] - (previous["completions"] if previous else 0)
            others = self.completions - before - of_request
            answer |= self._failure_outcome(answer, others, failed_before=bool(previous))
        if answer["error"] == STOP:
            self.stop_message = answer["detail"]
        return answer

    def _confirm_unusable(self, start: float) -> None:
        """Store the unusable replies that arrived before a request with a valid answer was sent, at `start`.

        Later ones remain unconfirmed: a server that starts to refuse everything still completes running requests.
        """
        with self.lock:  # no part of these replies completes while they are stored
            for reply in self.unusable:
                if reply.time < start and reply.folder:
                    store_answer(reply.folder, reply.answer)
            self.unusable = [reply for reply in self.unusable if reply.time >= start]

    def _unusable_outcome(self, reply: UnusableReply) -> dict[str, Any]:
        """Return the changes to an unusable answer: none, or the error that ends the job.

        The prompt is the cause if a later request receives a valid answer; the reply is stored then. Many consecutive
        unusable replies are not caused by prompts.
        """
        with self.lock:
            count = sum(not other.failed_before for other in self.unusable) + 1
            if reply.failed_before or count <= self.config.endpoint.concurrency + MAX_UNUSABLE:
                self.unusable.append(reply)
                return {}
        return self._stop(
            f"none of the last {count} requests received a valid answer; check sampling (max_tokens, response_format, "
            "fields that the server may not support), the model and the account's limits; last error: "
            f"{reply.answer['error']}, {reply.answer['detail'][:QUOTED_TEXT]}"
        )

    def _failure_outcome(self, answer: WriterAnswer, others: int, failed_before: bool) -> dict[str, Any]:
        """Return the changes to an answer whose request failed after all retries: none, or the error that ends the job.

        A single prompt that crashes a server must not end the job; if no other request received a completion
        meanwhile, all requests would fail.

        Args:
            others: completions of other requests since this one was first sent.
            failed_before: the request also failed in an earlier run, which did not end the job.
        """
        with self.lock:
            # The next request shows whether the first failure is an outage; no request follows the last one. A lost
            # connection is an outage in both cases.
            first, self.has_failure = not self.has_failure, True
            single = self.is_working and (first or self.pending == 0) and answer["error"] != LOST
        if others > 0 or failed_before or single:
            return {}
        return self._stop(
            f"{answer['detail']} after {self.config.endpoint.retries} retries, and no other request received an answer"
        )

    def answer(self, request: WritingRequest, earlier: WriterAnswer | None = None) -> WriterAnswer:
        """Return a valid answer after at most `attempts` completions, or the error.

        The last attempt may contain fewer questions than requested.
        """
        answer, prompt = empty_answer(request, earlier), self.prompts.render(request)
        for further_attempts in reversed(range(self.config.attempts)):
            try:
                choice = self._complete(request, prompt, answer)
                if (text := said(choice)) is None:
                    message = f"completion without a message, finish_reason {choice.finish_reason}"
                    return answer | self._failure(REFUSED, message, final=True)
                content = parse(request, text, min_questions=request.pairs if further_attempts else 1)
            except openai.APIStatusError as error:
                return answer | self._status_failure(error)
            except openai.APIConnectionError as error:
                reason = "timeout" if isinstance(error, openai.APITimeoutError) else LOST
                return answer | self._failure(reason, f"{error} ({error.__cause__!r})")
            except UnreadableError as error:
                return answer | self._failure("unreadable", str(error))
            except BadAnswerError as error:
                answer |= {"error": error.reason, "detail": _error_detail(error, choice)}
            else:
                return answer | {"content": json.dumps(content, ensure_ascii=False), "error": None, "detail": None}
        return answer

    def _complete(self, request: WritingRequest, prompt: str, answer: WriterAnswer) -> Choice:
        """Return the choice of one completion; add its usage to `answer`.

        Raises:
            UnreadableError: no response contains a completion.
        """
        attempt, pause = answer["completions"], FIRST_PAUSE
        for repeat in range(self.config.endpoint.retries + 1):
            if repeat:  # the same key: a gateway may resend the completion
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.access.model,
                messages=[{"role": "user", "content": prompt}],
                extra_headers={"Idempotency-Key": self._idempotency_key(request, attempt)},
                extra_body=self.config.sampling.extra,
                **self._body_fields(request, attempt),
            )
            answer["retries"] += raw.retries_taken + bool(repeat)
            if completion := read_completion(raw):
                self._count(completion, answer)
                return completion.choices[0]
        raise UnreadableError(f"{repeat + 1} responses without a completion; the last body: {raw.text}")

    def _idempotency_key(self, request: WritingRequest, attempt: int) -> str:
        """Return the key of an attempt: an attempt after a malformed answer, or with other max_tokens, has another."""
        return f"{self.digest[:16]}-{request.id}-{attempt}.{self.config.sampling.max_tokens}"

    def _count(self, completion: ChatCompletion, answer: WriterAnswer) -> None:
        with self.lock:
            self.completions, self.is_working, self.has_failure = self.completions + 1, True, False
        answer["completions"] += 1
        # Some servers send null counts.
        answer["prompt_tokens"] += getattr(completion.usage, "prompt_tokens", 0) or 0
        answer["completion_tokens"] += getattr(completion.usage, "completion_tokens", 0) or 0

    def _body_fields(self, request: WritingRequest, attempt: int) -> dict[str, Any]:
        """Return the fields of a request's body that `sampling` sets."""
        sampling = self.config.sampling
        fields: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        fields["seed"] = None if sampling.seed is None else sampling.seed + attempt
        if sampling.response_format in ("json_schema", "json_schema_unbounded"):
            answer_schema = schema(request) if sampling.response_format == "json_schema" else unbounded_schema(request)
            json_schema = {"name": request.kind, "strict": True, "schema": answer_schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        elif sampling.response_format == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return {name: value for name, value in fields.items() if value is not None}

    def _status_failure(self, error: openai.APIStatusError) -> dict[str, Any]:
        """Return the error for a status that remains after all retries: a failed request, or the end of the job."""
        status, message = error.status_code, f"status {error.status_code}: {error.message}"
        if status in REFUSED_STATUSES:
            return self._failure(REFUSED, message, final=True)
        if status not in REQUEST_STATUSES and status < 500:
            advice = FATAL_STATUSES.get(status, f"check {URL}, {MODEL} and {KEY}")
            return self._stop(f"status {status}, {advice}: {error.message}")
        if (pause := _retry_after(error.response.headers)) > LONGEST_WAIT:
            return self._stop(f"{message}; Retry-After is {pause:.0f} seconds: submit the job again after that")
        return self._failure(REQUEST_STATUSES.get(status, "server_error"), message)

    def _failure(self, reason: str, message: str, final: bool = False) -> dict[str, Any]:
        return {"error": reason, "detail": self._redacted(message)[:STORED_TEXT], "final": final}

    def _stop(self, message: str) -> dict[str, Any]:
        return _stop_error(self._redacted(f"endpoint {self.access.host}: {message}")[:STORED_TEXT])

    def _redacted(self, text: str) -> str:
        """Return a text without the key: servers repeat request headers in their errors."""
        return text.replace(self.access.key.get_secret_value(), "***")


def _stop_error(message: str) -> dict[str, Any]:
    return {"error": STOP, "detail": message, "final": False}


def _error_detail(error: BadAnswerError, choice: Choice) -> str:
    """Return the error of a malformed answer, with its text."""
    finish = "" if choice.finish_reason == "stop" else f"finish_reason {choice.finish_reason}; "
    return f"{error}; {finish}the last answer: {(said(choice) or '')[:STORED_TEXT]}"


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds in the Retry-After headers; 0 if they are missing or malformed."""
    for header, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(header, "")) / divisor
            return seconds if math.isfinite(seconds) else 0.0
    with contextlib.suppress(ValueError, OverflowError):
        return email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
    return 0.0
