"""Asking a language model behind an endpoint that speaks OpenAI's protocol.

A failure on the way (a full server, its errors, a lost connection) is repeated by the client with growing pauses,
or after the time that the server names. An answer out of form is asked for again. What stays is a failed request if
others were answered in the meantime; if none was, it is the end of the job.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion
from pydantic import SecretStr

from mellow_platform import storage
from mellow_platform.config import SynthesizeConfig
from mellow_platform.synthesis.answers import STOP, Answer, empty_answer
from mellow_platform.synthesis.asked import Request
from mellow_platform.synthesis.forms import FAULTS, BadAnswerError, parse, schema
from mellow_platform.synthesis.prompts import Prompts

URL, MODEL, KEY = "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"
NO_KEY = "no-key-is-set"  # what servers that want none are sent: the client insists on one
HOPELESS = {
    401: f"it does not know the key; check {KEY}",
    402: "the account has no credit left; pay, then submit the job again",
    404: f"there is no such address or model; check {URL} (it ends in /v1) and {MODEL}",
}
LOST = "lost_connection"
REFUSED = (400, 413, 422)  # what the prompt or the body is at fault for
# Of the 4xx, what one request may meet alone; the client repeats the first three, and every 5xx.
PASSING = {408: "timeout", 409: "server_error", 429: "server_full", 403: "forbidden"}
# Refusals past those under way at once that show, where nothing was answered yet, that it is not the prompts' fault.
REFUSALS = 4
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between repeats of an answer whose body cannot be read
TEXT_KEPT = 2000  # characters of an answer out of form, for the table of failed requests


@dataclass(frozen=True)
class Access:
    """Where the model is. The key hides itself, lest it stand in what Ray and errors print."""

    url: str
    model: str
    key: SecretStr

    @classmethod
    def from_environment(cls) -> "Access":
        """Return what the variables say; a server on the own machine may want no key.

        Raises:
            ValueError: URL or model is not set.
        """
        if missing := [name for name in (URL, MODEL) if not os.environ.get(name)]:
            raise ValueError(f"writer: endpoint needs the variable {' and '.join(missing)} in the job's environment")
        return cls(os.environ[URL], os.environ[MODEL], SecretStr(os.environ.get(KEY) or NO_KEY))

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]


class UnreadableError(ValueError):
    """Responses without a completion in them, however often they were asked for."""


class Pace:
    """Lets at most so many calls a minute through, evenly, whichever threads they come from."""

    def __init__(self, calls_per_minute: float):
        self.pause = 60.0 / calls_per_minute  # seconds
        self.next, self.lock = time.monotonic(), threading.Lock()

    def __call__(self, *_: Any) -> None:
        with self.lock:
            turn = max(self.next, time.monotonic())
            self.next = turn + self.pause
        time.sleep(max(0.0, turn - time.monotonic()))


class EndpointWriter:
    """Asks a model, `concurrency` requests at a time, and keeps every answer the moment it comes.

    Args:
        digest: of the corpus to be. With a request's id it makes the key (`Idempotency-Key`) by which a server that
            knows such keys answers what it was asked before without writing, and billing, it again.
    """

    def __init__(self, config: SynthesizeConfig, prompts: Prompts, access: Access, digest: str):
        self.config, self.prompts, self.access, self.digest = config, prompts, access, digest
        limits = config.endpoint
        # A hook sees repeated requests too, which count towards a server's limit as others do.
        rate = limits.requests_per_minute
        hooks: list[Callable] = [Pace(rate / config.workers)] if rate else []
        self.client = openai.OpenAI(
            base_url=access.url,
            api_key=access.key.get_secret_value(),
            max_retries=limits.retries,
            timeout=limits.timeout,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": hooks}),
        )
        self.pool = ThreadPoolExecutor(limits.concurrency)
        self.stopped = ""
        self.lock = threading.Lock()
        self.under_way = 0  # requests
        self.answered, self.refused = 0, 0  # answers that came, whatever their form; requests that were refused
        self.works = False  # an answer came, in this run or one before: the configuration is no fault

    def answers(self, requests: list[Request], kept: str) -> list[Answer]:
        """Return the answers to `requests`; asked are those that are not in `kept` (`answers.Writer`)."""
        uris = [storage.join(kept, name) for name in storage.list_folder(kept) if name.endswith(".json")]
        known = {answer["request"]: answer for answer in self.pool.map(storage.read_json, uris)}
        self.works = self.works or bool(known)
        missing = [request for request in requests if request.id not in known]
        fresh = self.pool.map(partial(self._answer_and_keep, kept), missing)
        return [*(known[request.id] for request in requests if request.id in known), *fresh]

    def _answer_and_keep(self, kept: str, request: Request) -> Answer:
        answer = empty_answer(request) | {"error": STOP, "detail": self.stopped}
        if not self.stopped:
            with self._counted():
                answer = self.ask(request)
            if answer["error"] == STOP:
                self.stopped = answer["detail"]
            elif _is_kept(answer, self.works):
                storage.write_json(storage.join(kept, f"{request.id}.json"), answer)
        return answer

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a request as under way."""
        with self.lock:
            self.under_way += 1
        try:
            yield
        finally:
            with self.lock:
                self.under_way -= 1

    def ask(self, request: Request) -> Answer:
        """Ask until an answer is in form, at most `attempts` times; what fails is said in the answer."""
        answer, prompt, before = empty_answer(request), self.prompts.render(request), self.answered
        for _ in range(self.config.attempts):
            try:
                text = self._complete(request, prompt, answer)
                content = parse(request, text, least=request.pairs)
            except openai.APIStatusError as error:
                return answer | self._refused(error, answer, before)
            except openai.APIConnectionError as error:
                reason = "timeout" if isinstance(error, openai.APITimeoutError) else LOST
                return answer | self._failed(reason, f"{error} ({error.__cause__!r})", answer, before)
            except UnreadableError as error:
                return answer | self._failed("unreadable", str(error), answer, before)
            except BadAnswerError as error:
                answer |= {"error": error.reason, "detail": f"{error}; the last answer: {text[:TEXT_KEPT]}"}
            else:
                return answer | {"content": json.dumps(content, ensure_ascii=False), "error": None, "detail": None}
        return answer

    def _complete(self, request: Request, prompt: str, answer: Answer) -> str:
        """Return the text of one completion; add to the counts of `answer`.

        Raises:
            UnreadableError: no body that came is a completion with a message.
        """
        attempt, pause = answer["completions"], FIRST_PAUSE
        for repeat in range(self.config.endpoint.retries + 1):
            if repeat:  # what was spoilt on the way is asked for again under its key
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.access.model,
                messages=[{"role": "user", "content": prompt}],
                # An answer out of form has to be written anew, so that what follows it has a key of its own.
                extra_headers={"Idempotency-Key": f"{self.digest[:16]}-{request.id}-{attempt}"},
                extra_body=self.config.sampling.extra,
                **self._fields(request, attempt),
            )
            answer["retries"] += raw.retries_taken + bool(repeat)
            if completion := _readable(raw):
                self._count(completion, answer)
                return completion.choices[0].message.content or completion.choices[0].message.refusal or ""
        raise UnreadableError(f"the body of {repeat + 1} responses is no completion with a message: {raw.text}")

    def _count(self, completion: ChatCompletion, answer: Answer) -> None:
        with self.lock:
            self.answered, self.works = self.answered + 1, True
        answer["completions"] += 1
        # Some servers send the usage with nulls in place of counts.
        answer["prompt_tokens"] += getattr(completion.usage, "prompt_tokens", 0) or 0
        answer["completion_tokens"] += getattr(completion.usage, "completion_tokens", 0) or 0

    def _fields(self, request: Request, attempt: int) -> dict[str, Any]:
        """Return what a request's body has by the configuration."""
        sampling = self.config.sampling
        fields: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        fields["seed"] = None if sampling.seed is None else sampling.seed + attempt
        if sampling.response_format == "json_schema":
            described = {"name": request.kind, "strict": True, "schema": schema(request)}
            fields["response_format"] = {"type": "json_schema", "json_schema": described}
        elif sampling.response_format == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return {name: value for name, value in fields.items() if value is not None}

    def _refused(self, error: openai.APIStatusError, answer: Answer, before: int) -> dict[str, str]:
        """Return what a status that stays means: the fault of one request, or the end of the job."""
        status, message = error.status_code, f"status {error.status_code}: {error.message}"
        if status in REFUSED:
            with self.lock:
                self.refused += 1
            if not self.works and self.refused > self.config.endpoint.concurrency + REFUSALS:
                return self._stop(
                    f"{message}; it refused all of the first {self.refused} requests: check sampling, whose fields or "
                    "response_format it may not know"
                )
            return {"error": "refused", "detail": self._without_key(message)}
        if status in PASSING or status >= 500:
            return self._failed(PASSING.get(status, "server_error"), message, answer, before)
        return self._stop(
            f"status {status}, {HOPELESS.get(status, f'check {URL}, {MODEL} and {KEY}')}: {error.message}"
        )

    def _failed(self, reason: str, message: str, answer: Answer, before: int) -> dict[str, str]:
        """Return what a failure after all retries means.

        One prompt that a server trips over must not keep the job from its end; where it has answered nobody since this
        request was first sent, all others would fare the same.
        """
        others = self.answered - before - answer["completions"]
        # The last one left has no others to be told from, unless nobody is there.
        alone = self.works and self.under_way == 1 and reason != LOST
        if others > 0 or alone:
            return {"error": reason, "detail": self._without_key(message)}
        return self._stop(
            f"{message} after {self.config.endpoint.retries} retries, while no other request was answered"
        )

    def _stop(self, message: str) -> dict[str, str]:
        return {"error": STOP, "detail": self._without_key(f"the endpoint at {self.access.host}: {message}")}

    def _without_key(self, text: str) -> str:
        """Servers repeat what they were sent in their errors."""
        return text.replace(self.access.key.get_secret_value(), "***")[:TEXT_KEPT]


def _is_kept(answer: Answer, works: bool) -> bool:
    """Return whether an answer stays until its part is whole: what the model wrote, or surely will not write.

    What failed on the way may be had by the next run, as may what was refused before anything was answered.
    """
    return answer["error"] in (None, *FAULTS) or (answer["error"] == "refused" and works)


def _readable(raw: Any) -> ChatCompletion | None:
    """Return the completion in a response, or None where its body has no message, whatever its headers say."""
    try:
        completion = raw.parse()
    except ValueError:
        return None
    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    # The client does not check what it reads: a content filter may leave the message out.
    return completion if choices and getattr(choices[0], "message", None) else None
