"""Asking a language model behind an endpoint that speaks OpenAI's protocol.

A failure on the way (a full server, its errors, a lost connection) is repeated by the client with growing pauses,
or after the time that the server names. An answer out of form is asked for again. What stays is a failed request, or,
where every other request would fare the same, the end of the job.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable
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
from mellow_platform.synthesis.forms import BadAnswerError, parse, schema
from mellow_platform.synthesis.prompts import Prompts

URL, MODEL, KEY = "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"
NO_KEY = "no-key-is-set"  # what servers that want none are sent: the client insists on one
HOPELESS = {
    401: f"it does not know the key; check {KEY}",
    403: f"the key may not do this; check {KEY} and {MODEL}",
    404: f"there is no such address or model; check {URL} (it ends in /v1) and {MODEL}",
}
PASSING = (408, 409, 429)  # of the 4xx; the client repeats these and every 5xx
# Seconds: less than the retries of a request take, so that a server that is down has answered none for longer.
ALIVE = 10.0
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
        self.stopped, self.answered = "", -math.inf  # when another request was, in seconds of the monotonic clock

    def answers(self, requests: list[Request], kept: str) -> list[Answer]:
        """Return the answers to `requests`; asked are those that are not in `kept` (`answers.Writer`)."""
        uris = [storage.join(kept, name) for name in storage.list_folder(kept) if name.endswith(".json")]
        known = {answer["request"]: answer for answer in self.pool.map(storage.read_json, uris)}
        missing = [request for request in requests if request.id not in known]
        fresh = self.pool.map(partial(self._answer_and_keep, kept), missing)
        return [*(known[request.id] for request in requests if request.id in known), *fresh]

    def _answer_and_keep(self, kept: str, request: Request) -> Answer:
        answer = empty_answer(request) | {"error": STOP, "detail": self.stopped}
        if not self.stopped:
            answer = self.ask(request)
            if answer["error"] == STOP:
                self.stopped = answer["detail"]
            else:
                storage.write_json(storage.join(kept, f"{request.id}.json"), answer)
        return answer

    def ask(self, request: Request) -> Answer:
        """Ask until an answer is in form, at most `attempts` times; what fails is said in the answer."""
        answer, prompt = empty_answer(request), self.prompts.render(request)
        for _ in range(self.config.attempts):
            try:
                text = self._complete(request, prompt, answer)
                content = parse(request, text, least=request.pairs)
            except openai.APIStatusError as error:
                return answer | self._refused(error)
            except openai.APIConnectionError as error:
                return answer | self._stop(f"{error} ({error.__cause__!r})")
            except BadAnswerError as error:
                answer |= {"error": error.reason, "detail": f"{error}; the last answer: {text[:TEXT_KEPT]}"}
            else:
                return answer | {"content": json.dumps(content, ensure_ascii=False), "error": None, "detail": None}
        return answer

    def _complete(self, request: Request, prompt: str, answer: Answer) -> str:
        """Return the text of one completion, "" where none can be read; add to the counts of `answer`."""
        attempt = answer["completions"]
        for _ in range(self.config.endpoint.retries + 1):
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.access.model,
                messages=[{"role": "user", "content": prompt}],
                seed=self.config.seed + attempt,
                # An answer out of form has to be written anew, so that what follows it has a key of its own.
                extra_headers={"Idempotency-Key": f"{self.digest[:16]}-{request.id}-{attempt}"},
                extra_body=self.config.sampling.extra,
                **self._fields(request),
            )
            answer["retries"] += raw.retries_taken
            if completion := _readable(raw):
                break
            answer["retries"] += 1  # spoilt on the way, and asked for again under its key
        else:
            return ""
        answer["completions"] += 1
        self.answered = time.monotonic()
        if completion.usage:
            answer["prompt_tokens"] += completion.usage.prompt_tokens
            answer["completion_tokens"] += completion.usage.completion_tokens
        return completion.choices[0].message.content or completion.choices[0].message.refusal or ""

    def _fields(self, request: Request) -> dict[str, Any]:
        """Return what a request's body has by the configuration."""
        sampling = self.config.sampling
        fields: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        if sampling.response_format == "json_schema":
            described = {"name": request.kind, "strict": True, "schema": schema(request)}
            fields["response_format"] = {"type": "json_schema", "json_schema": described}
        elif sampling.response_format == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return {name: value for name, value in fields.items() if value is not None}

    def _refused(self, error: openai.APIStatusError) -> dict[str, str]:
        """Return what a status that stays means: the fault of one request, or the end of the job."""
        status = error.status_code
        if status >= 500 and time.monotonic() - self.answered < ALIVE:
            # One prompt that a server trips over must not keep the job from its end, however often it is submitted.
            return {"error": "server_error", "detail": self._without_key(f"status {status}: {error.message}")}
        if status in HOPELESS:
            return self._stop(f"status {status}, {HOPELESS[status]}: {error.message}")
        if status in PASSING or status >= 500:
            return self._stop(f"status {status} after {self.config.endpoint.retries} retries: {error.message}")
        return {"error": "refused", "detail": self._without_key(f"status {status}: {error.message}")}

    def _stop(self, message: str) -> dict[str, str]:
        return {"error": STOP, "detail": self._without_key(f"the endpoint at {self.access.host}: {message}")}

    def _without_key(self, text: str) -> str:
        """Servers repeat what they were sent in their errors."""
        return text.replace(self.access.key.get_secret_value(), "***")[:TEXT_KEPT]


def _readable(raw: Any) -> ChatCompletion | None:
    """Return the completion in a response, or None where its body is none, whatever its headers say."""
    try:
        completion = raw.parse()
    except ValueError:
        return None
    return completion if isinstance(completion, ChatCompletion) and completion.choices else None
