"""Asking a language model behind an endpoint that speaks OpenAI's protocol.

A failure on the way (a full server, its errors, a lost connection) is repeated by the client with growing pauses,
or after the time that the server names. An answer out of form is asked for again. What stays is a failed request if
others were answered in the meantime; if none was, it is the end of the job.
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
from mellow_platform.synthesis.schemas import BadAnswerError, parse, schema, unbounded
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.writer import REFUSED, STOP, WriterAnswer, begin, keep, read_arrived

URL, MODEL, KEY = "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"
NO_KEY = "no-key-is-set"  # what servers that want none are sent: the client insists on one
HOPELESS = {
    401: f"it does not know the key; check {KEY}",
    402: "the account has no credit left; pay, then submit the job again",
    404: f"there is no such address or model; check {URL} (it ends in /v1) and {MODEL}",
}
LOST = "lost_connection"
REFUSALS = (400, 413, 422)  # what the prompt or the body is at fault for
# Of the 4xx, what one request may meet alone; the client repeats the first three, and every 5xx.
PASSING = {408: "timeout", 409: "server_error", 429: "server_full", 403: "forbidden"}
LONGEST_WAIT = 120.0  # seconds: where a server names more, the client does not repeat at all
# Requests past those under way at once that were refused, or answered out of form, one after another: that is no fault
# of the prompts.
IN_VAIN = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between repeats of an answer whose body cannot be read
TEXT_KEPT, TEXT_QUOTED = 2000, 500  # characters of an answer out of form: in the table of failed requests, in an error


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


@dataclass
class InVain:
    """A request that the server refused, or answered out of form to the last.

    Attributes:
        kept: folder of its part; empty once that is whole.
        again: it fared the same in a run before, which went on: that nothing else is left to ask is no reason to end.
        time: when the reply came, in seconds of the monotonic clock.
    """

    kept: str
    answer: WriterAnswer
    again: bool
    time: float = field(default_factory=time.monotonic)


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
        self.left = 0  # requests that were handed over and have not ended
        self.answered = 0  # answers that came, whatever their form
        self.works = False  # an answer came, in this run or one before: the configuration is no fault
        self.failed = False  # a request has failed on the way since the last answer
        self.in_vain: list[InVain] = []  # what may yet turn out to be no prompt's fault

    def answers(
        self, requests: list[WritingRequest], kept: str, earlier: Mapping[str, WriterAnswer]
    ) -> list[WriterAnswer]:
        """Return the answers to `requests`; asked are those that are not in `kept` (`writer.Writer`)."""
        known = read_arrived(kept, self.pool)
        missing = [request for request in requests if request.id not in known]
        with self.lock:
            self.works = self.works or bool(known)
            self.left += len(missing)
        fresh = list(self.pool.map(partial(self._answer_and_keep, kept, earlier), missing))
        with self.lock:  # an answer in form that comes later is too late for this part
            for reply in self.in_vain:
                if reply.kept == kept:
                    reply.kept, reply.answer["final"] = "", False
        return [*(known[request.id] for request in requests if request.id in known), *fresh]

    def _answer_and_keep(self, kept: str, earlier: Mapping[str, WriterAnswer], request: WritingRequest) -> WriterAnswer:
        begun, sent, before = earlier.get(request.id), time.monotonic(), self.answered
        try:
            answer = begin(request, begun) | _end(self.stopped) if self.stopped else self.ask(request, begun)
        finally:
            with self.lock:
                self.left -= 1
        if not answer["error"]:
            keep(kept, answer)
            self._prove(sent)
        elif answer["final"]:
            answer |= self._replied_in_vain(InVain(kept, answer, again=bool(begun)))
        elif answer["error"] != STOP:
            own = answer["completions"] - (begun["completions"] if begun else 0)
            answer |= self._failed_on_the_way(answer, self.answered - before - own, again=bool(begun))
        if answer["error"] == STOP:
            self.stopped = answer["detail"]
        return answer

    def _prove(self, sent: float) -> None:
        """Keep what was replied to in vain before a request was sent that got an answer in form.

        One that was on its way already proves nothing: a server that comes to refuse all ends what it has begun.
        """
        with self.lock:  # while they are written, none of their parts becomes whole
            for reply in self.in_vain:
                if reply.time < sent and reply.kept:
                    keep(reply.kept, reply.answer)
            self.in_vain = [reply for reply in self.in_vain if reply.time >= sent]

    def _replied_in_vain(self, reply: InVain) -> dict[str, Any]:
        """Return what a request's refusal, or a last answer out of form, means for it: nothing yet, or the job's end.

        It is the prompt's own fault if a later request gets an answer in form, and is kept then. Of many in a row no
        prompt is at fault.
        """
        with self.lock:
            count = sum(not other.again for other in self.in_vain) + 1
            if reply.again or count <= self.config.endpoint.concurrency + IN_VAIN:
                self.in_vain.append(reply)
                return {}
        return self._stop(
            f"none of the last {count} requests had an answer in form: check sampling (max_tokens, response_format, "
            "fields that the server may not know), the model and the account's limits; the last: "
            f"{reply.answer['error']}, {reply.answer['detail'][:TEXT_QUOTED]}"
        )

    def _failed_on_the_way(self, answer: WriterAnswer, others: int, again: bool) -> dict[str, Any]:
        """Return what a failure after all retries means: nothing more, or the job's end.

        One prompt that a server trips over must not keep the job from its end; where it has answered no other request
        in the meantime, all would fare the same.

        Args:
            others: answers to other requests that came since this one was first sent.
            again: it failed in a run before, which went on.
        """
        with self.lock:
            # The first to fail is told from an outage by the next request, and the last one left by none; unless no
            # connection is made, as then nobody is there.
            first, self.failed = not self.failed, True
            alone = self.works and (first or self.left == 0) and answer["error"] != LOST
        if others > 0 or again or alone:
            return {}
        return self._stop(
            f"{answer['detail']} after {self.config.endpoint.retries} retries, while no other request was answered"
        )

    def ask(self, request: WritingRequest, earlier: WriterAnswer | None = None) -> WriterAnswer:
        """Ask until an answer is in form, at most `attempts` times; what fails is said in the answer.

        Of the last attempt, fewer questions are taken than were asked for.
        """
        answer, prompt = begin(request, earlier), self.prompts.render(request)
        for left in reversed(range(self.config.attempts)):
            try:
                choice = self._complete(request, prompt, answer)
                if (text := said(choice)) is None:
                    message = f"a completion without a message, finish_reason {choice.finish_reason}"
                    return answer | self._without(REFUSED, message, final=True)
                content = parse(request, text, least=request.pairs if left else 1)
            except openai.APIStatusError as error:
                return answer | self._status(error)
            except openai.APIConnectionError as error:
                reason = "timeout" if isinstance(error, openai.APITimeoutError) else LOST
                return answer | self._without(reason, f"{error} ({error.__cause__!r})")
            except UnreadableError as error:
                return answer | self._without("unreadable", str(error))
            except BadAnswerError as error:
                answer |= {"error": error.reason, "detail": _described(error, choice)}
            else:
                return answer | {"content": json.dumps(content, ensure_ascii=False), "error": None, "detail": None}
        return answer

    def _complete(self, request: WritingRequest, prompt: str, answer: WriterAnswer) -> Choice:
        """Return the choice of one completion; add to the counts of `answer`.

        Raises:
            UnreadableError: no body that came is a completion.
        """
        attempt, pause = answer["completions"], FIRST_PAUSE
        for repeat in range(self.config.endpoint.retries + 1):
            if repeat:  # what was spoilt on the way is asked for again under its key
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.access.model,
                messages=[{"role": "user", "content": prompt}],
                extra_headers={"Idempotency-Key": self._key(request, attempt)},
                extra_body=self.config.sampling.extra,
                **self._fields(request, attempt),
            )
            answer["retries"] += raw.retries_taken + bool(repeat)
            if completion := read_completion(raw):
                self._count(completion, answer)
                return completion.choices[0]
        raise UnreadableError(f"the body of {repeat + 1} responses is no completion: {raw.text}")

    def _key(self, request: WritingRequest, attempt: int) -> str:
        """Return what an answer is known by: out of form, or cut at another length, it has to be written anew."""
        return f"{self.digest[:16]}-{request.id}-{attempt}.{self.config.sampling.max_tokens}"

    def _count(self, completion: ChatCompletion, answer: WriterAnswer) -> None:
        with self.lock:
            self.answered, self.works, self.failed = self.answered + 1, True, False
        answer["completions"] += 1
        # Some servers send the usage with nulls in place of counts.
        answer["prompt_tokens"] += getattr(completion.usage, "prompt_tokens", 0) or 0
        answer["completion_tokens"] += getattr(completion.usage, "completion_tokens", 0) or 0

    def _fields(self, request: WritingRequest, attempt: int) -> dict[str, Any]:
        """Return what a request's body has by the configuration."""
        sampling = self.config.sampling
        fields: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        fields["seed"] = None if sampling.seed is None else sampling.seed + attempt
        if sampling.response_format in ("json_schema", "json_schema_unbounded"):
            bounded = sampling.response_format == "json_schema"
            described = {"name": request.kind, "strict": True, "schema": (schema if bounded else unbounded)(request)}
            fields["response_format"] = {"type": "json_schema", "json_schema": described}
        elif sampling.response_format == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return {name: value for name, value in fields.items() if value is not None}

    def _status(self, error: openai.APIStatusError) -> dict[str, Any]:
        """Return what a status that stays means: the fault of one request, or the end of the job."""
        status, message = error.status_code, f"status {error.status_code}: {error.message}"
        if status in REFUSALS:
            return self._without(REFUSED, message, final=True)
        if status not in PASSING and status < 500:
            return self._stop(
                f"status {status}, {HOPELESS.get(status, f'check {URL}, {MODEL} and {KEY}')}: {error.message}"
            )
        if (pause := _pause(error.response.headers)) > LONGEST_WAIT:
            return self._stop(f"{message}; it asks for a pause of {pause:.0f} seconds: submit the job again after that")
        return self._without(PASSING.get(status, "server_error"), message)

    def _without(self, reason: str, message: str, final: bool = False) -> dict[str, Any]:
        return {"error": reason, "detail": self._without_key(message)[:TEXT_KEPT], "final": final}

    def _stop(self, message: str) -> dict[str, Any]:
        return _end(self._without_key(f"the endpoint at {self.access.host}: {message}")[:TEXT_KEPT])

    def _without_key(self, text: str) -> str:
        """Servers repeat what they were sent in their errors."""
        return text.replace(self.access.key.get_secret_value(), "***")


def _end(message: str) -> dict[str, Any]:
    return {"error": STOP, "detail": message, "final": False}


def _described(error: BadAnswerError, choice: Choice) -> str:
    """Return what is wrong with an answer, and the answer."""
    how = "" if choice.finish_reason == "stop" else f"finish_reason {choice.finish_reason}; "
    return f"{error}; {how}the last answer: {(said(choice) or '')[:TEXT_KEPT]}"


def _pause(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to be left alone for; 0 where it names none that can be read."""
    for header, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(header, "")) / divisor
            return seconds if math.isfinite(seconds) else 0.0
    with contextlib.suppress(ValueError, OverflowError):
        return email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
    return 0.0
