"""A server on loopback that speaks OpenAI's chat protocol, writes questions of a kind, and fails as real ones do.

It takes a request's kind and the questions wanted from the JSON schema that comes along, and writes about the words of
the caption in the prompt, at most `max_tokens` words. It knows `Idempotency-Key` as gateways do: what was written once
under a key is not written again, but sent again. A share of its answers is out of form, and of its questions some are
such as filters are there for. Everything is drawn from a seed and the request, in whatever order requests come.
"""

import contextlib
import hashlib
import json
import math
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

MODEL, KEY = "test-writer", "sk-test-5ecret-0f-this-run"
# Of the way an answer takes: refused by a full server, an error, a connection that ends in the middle of the body, and
# a body that is no JSON. And of the answer: content that is no JSON, and one with a question too few.
ON_THE_WAY = ("full", "error", "cut", "broken_body")
IN_CONTENT = ("broken_content", "wrong_count")
RETRY_MILLISECONDS = 30

DETAIL = [
    ("audio events", "what is heard after the beginning?", "{a} is heard, followed by {b}"),
    ("objects", "what is the source of the main sound?", "the main sound is made by {a}, near {b}"),
    ("acoustic scenes", "where was this probably recorded?", "it may be a place with {c}, since {a} is there"),
    ("signal properties", "how does the level develop?", "{b} grows louder while {c} fades"),
    ("semantics", "what is going on here?", "somebody deals with {c} and {a} at once"),
    ("listener emotions", "how might one feel on hearing it?", "tense because of {b}, then calm with {c}"),
]
CHOICE = [
    ("audio events", "which of these can be made out?", "{a}"),
    ("objects", "what stands out as a source?", "{b}"),
    ("acoustic scenes", "what does the surrounding contain?", "{c}"),
    ("signal properties", "which part is the most prominent?", "{a} and {b}"),
    ("semantics", "what do the events belong to?", "{b} and {c}"),
    ("listener emotions", "what is most likely to move one?", "{c} and {a}"),
]
WRONG = ("a distant gong", "somebody whistling", "crackling paper", "a ticking metronome")
GERMAN = "man hört in dieser aufnahme ein lautes und gleichmäßiges geräusch"


@dataclass
class LLMServer:
    """A running server and what it has done, by idempotency key where nothing else is said.

    Attributes:
        url: what OPENAI_BASE_URL is set to.
        asked: requests that arrived.
        written: answers that a model would have been paid for, by what was asked, whatever the key: more than one is
            more than was needed.
        sent: answers that left whole, as far as a server can tell.
        in_form: of these, such as have the form that was asked for.
        faults: what went wrong, by name.
        tokens: of prompts, and of answers, in all usage that was reported.
        most_at_once: requests that were under way at the same time.
    """

    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    in_form: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def env(self) -> dict[str, str]:
        return {"OPENAI_BASE_URL": self.url, "OPENAI_MODEL": MODEL, "OPENAI_API_KEY": KEY}

    def set_env(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set the variables by which a job finds this server."""
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)

    def answered(self, digest: str = "") -> Counter[str]:
        """Return how often each request, whatever the attempt, got an answer in form."""
        return _by_request(self.in_form, digest)

    def replied(self, digest: str = "") -> Counter[str]:
        """Return how often each request, whatever the attempt, got an answer in whatever form."""
        return _by_request(self.sent, digest)


def _by_request(counts: Counter[str], digest: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for key, count in list(counts.items()):
        if key.startswith(digest):
            found[key.split("-", 1)[1].rsplit("-", 1)[0]] += count
    return found


@contextlib.contextmanager
def llm_server(
    faults: float = 0.0,
    out_of_form: float = 0.0,
    slips: float = 0.0,
    seed: int = 0,
    latency: float = 0.0,
    refuse: str = "",
    status: int = 400,
    limit: float = math.inf,
    pause: float = 0.0,
    bounds: bool = True,
) -> Iterator[LLMServer]:
    """Serve until the end of the block.

    Args:
        faults: share of requests that meet one of `ON_THE_WAY`.
        out_of_form: share of answers that have one of `IN_CONTENT`.
        slips: share of questions that a filter is there for.
        latency: seconds that writing an answer takes.
        refuse: requests with this in their prompt are answered by `status`.
        limit: answers after which all requests are answered by `status`.
        pause: seconds in the header `Retry-After` of such answers; 0 leaves it at that of other failures.
        bounds: whether it takes schemas with lengths of lists.
    """
    server = LLMServer()
    begun: set[str] = set()
    stored: dict[str, tuple[bytes, bool]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                self.complete(body)
            finally:
                with server.lock:
                    server.at_once -= 1

        def complete(self, body: dict[str, Any]) -> None:
            prompt, key = body["messages"][0]["content"], self.headers["Idempotency-Key"]
            if refusal := self.refusal(body, prompt, key):
                self.answer(refusal[0], {"error": {"message": refusal[1]}}, pause)
                return
            with server.lock:
                server.asked[key] += 1
                arrival = server.asked[key]
            # What is wrong with an answer is the same whenever it is sent; what happens on the way is not.
            draws = random.Random(f"{seed} {key} {arrival}")
            fault = draws.choice(ON_THE_WAY) if draws.random() < faults else ""
            if fault in ("full", "error"):
                server.faults[fault] += 1
                self.answer({"full": 429, "error": 500}[fault], {"error": {"message": fault}})
                return
            if key not in stored:
                time.sleep(latency)
                data, in_form, content_fault = _completion(
                    body, prompt, random.Random(f"{seed} {key}"), out_of_form, slips
                )
                with server.lock:
                    server.written[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
                    server.faults.update([content_fault] if content_fault else [])
                    stored[key] = data, in_form
            self.deliver(key, fault)

        def refusal(self, body: dict[str, Any], prompt: str, key: str) -> tuple[int, str] | None:
            if self.headers["Authorization"] != f"Bearer {KEY}":
                return 401, f"{self.headers['Authorization']} is no key of ours"
            if body["model"] != MODEL:
                return 404, f"there is no model {body['model']}"
            if not bounds and "Items" in json.dumps(body["response_format"]):
                return 400, "minItems and maxItems are not supported"
            if refuse and refuse in prompt:
                return status, "this prompt is refused"
            with server.lock:
                if len(begun) < limit:
                    begun.add(key)
                return None if key in begun else (status, "the limit of this account is reached")

        def deliver(self, key: str, fault: str) -> None:
            data, in_form = stored[key]
            if fault:
                server.faults[fault] += 1
            if fault == "cut":
                self.start(200, len(data))
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault == "broken_body":
                data = data[: len(data) // 2]
            self.start(200, len(data))
            self.wfile.write(data)
            if not fault:
                with server.lock:
                    server.sent[key] += 1
                    server.in_form.update([key] if in_form else [])
                    server.tokens.update(json.loads(data)["usage"])

        def answer(self, status: int, value: Any, pause: float = 0.0) -> None:
            data = json.dumps(value).encode()
            self.start(status, len(data), pause)
            self.wfile.write(data)

        def start(self, status: int, size: int, pause: float = 0.0) -> None:
            self.send_response_only(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(size))
            if pause:
                self.send_header("Retry-After", f"{pause:g}")
            elif status in (429, 500):
                self.send_header("Retry-After", "1")
                self.send_header("Retry-After-Ms", str(RETRY_MILLISECONDS))
            self.end_headers()

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

        def handle_error(self, request, client_address) -> None:
            """Say nothing of clients that were killed in the middle of a request."""

    http = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def _completion(
    body: dict[str, Any], prompt: str, rng: random.Random, out_of_form: float, slips: float
) -> tuple[bytes, bool, str]:
    """Return a completion, whether its content is in form, and what is wrong with it otherwise."""
    described = body["response_format"]["json_schema"]
    properties = described["schema"]["properties"]
    numbers = re.findall(r"\d+", prompt)  # in a prompt, the first one is that of the questions
    wanted = next((value["maxItems"] for value in properties.values() if "maxItems" in value), int([*numbers, 0][0]))
    content = _content(described["name"], wanted, prompt, rng, slips)
    fault = rng.choice(IN_CONTENT) if rng.random() < out_of_form else ""
    if fault == "wrong_count":
        content.pop("paragraph", None)
        content.pop("false", None)
        for value in content.values():
            if isinstance(value, list):
                value.pop()
    text = json.dumps(content)
    if fault == "broken_content":
        text = text[: len(text) * 2 // 3].rstrip("}")
    is_cut = len(text.split()) > body.get("max_tokens", math.inf)
    if is_cut:
        text = " ".join(text.split()[: body["max_tokens"]])
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
    completion = {
        "id": "chatcmpl",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length" if is_cut else "stop",
            }
        ],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }
    return json.dumps(completion).encode(), not fault and not is_cut, fault


def _content(kind: str, wanted: int, prompt: str, rng: random.Random, slips: float) -> dict[str, Any]:
    captions = re.findall(r"wrote down:\n+(.+)", prompt)
    words = [word for word in re.findall(r"\w{3,}", captions[-1] if captions else "") if word != "the"]
    a, b, c = (f"the {word}" for word in rng.sample(words, 3)) if len(words) > 2 else ("a cat", "a car", "a bell")
    if kind in ("detail", "mcq"):
        templates, write = (DETAIL, _detail) if kind == "detail" else (CHOICE, _choice)
        places = [place % len(templates) for place in rng.sample(range(max(wanted, len(templates))), wanted)]
        questions = [write(templates[place], (a, b, c), rng, slips) for place in places]
        if rng.random() < slips:
            questions[-1] = questions[0] | {"question": f"{questions[0]['question'].rstrip('?')} now?"}
        return {"questions": questions}
    if kind == "difference":
        sentence = f"the first audio has {a}, while the second audio has {b} and {c}."
        return {"few_words": f"{a} versus {b}", "sentence": sentence, "paragraph": f"{sentence} one hears {c} longer."}
    if kind == "entailment":
        return {"true": f"there is {a}", "plausible": f"there is {a} on a tuesday", "false": "there is a distant gong"}
    if kind == "blind":
        shown = [
            re.findall(r"\n   - (.+)", part) for part in re.split(r"\n\d+\. ", prompt.partition("questions:")[2])[1:]
        ]
        guesses = [rng.choice(choices) if choices else "nothing" for choices in shown]
        return {"answers": [{"number": n, "answer": g, "sure": rng.random() < 0.2} for n, g in enumerate(guesses, 1)]}
    return {"verdicts": [{"number": n, "supported": rng.random() < 0.95} for n in range(1, wanted + 1)]}


def _detail(
    template: tuple[str, str, str], sounds: tuple[str, ...], rng: random.Random, slips: float
) -> dict[str, Any]:
    aspect, question, answer = template
    answer = answer.format(a=sounds[0], b=sounds[1], c=sounds[2])
    slip = rng.choice(("leak", "language", "too_long")) if rng.random() < slips else ""
    question = f"why does one hear that {answer}?" if slip == "leak" else question
    answer = {"language": GERMAN, "too_long": f"{answer} and so on" * 60}.get(slip, answer)
    return {"aspect": aspect, "question": question, "answer": answer}


def _choice(
    template: tuple[str, str, str], sounds: tuple[str, ...], rng: random.Random, slips: float
) -> dict[str, Any]:
    aspect, question, right = template
    right = right.format(a=sounds[0], b=sounds[1], c=sounds[2])
    slip = rng.choice(("leak", "not_there", "twice")) if rng.random() < slips else ""
    question = f"what is there besides {right}?" if slip == "leak" else question
    choices = rng.sample([*rng.sample(WRONG, 2), right if slip == "twice" else "a closing lid", right], 4)
    return {
        "aspect": aspect,
        "question": question,
        "choices": choices,
        "answer": "a bell" if slip == "not_there" else right,
    }
