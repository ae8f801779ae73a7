"""OpenAI-compatible test server on loopback that writes questions, and fails like real servers.

The JSON schema of a request sets the kind and the number of questions; their words are those of the caption in the
prompt, up to `max_tokens` words. The server supports `Idempotency-Key` like gateways: an answer is generated once per
key, and sent again for repeated requests. A share of the answers is malformed, and filters reject a share of the
questions. All faults depend on a seed and the request, independent of the order of requests.
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
# Faults in transport: a full server, a server error, a connection that ends in the middle of the body, and a body that
# is not JSON. Faults in content: content that is not JSON, and one question less than requested.
TRANSPORT_FAULTS = ("full", "error", "cut", "broken_body")
CONTENT_FAULTS = ("broken_content", "wrong_count")
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
    """A running server and its counts, by idempotency key unless stated otherwise.

    Attributes:
        url: value of OPENAI_BASE_URL.
        requests: requests received, without refused ones.
        generated: answers generated, which a provider would bill, by hash of the request's body: more than one is a
            waste.
        sent: answers sent completely, as far as the server can tell.
        valid: answers sent completely that match the schema.
        faults: faults by name.
        tokens: tokens by kind, over all usage in sent answers.
        max_active: largest number of simultaneous requests.
    """

    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    generated: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    valid: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    max_active: int = 0
    active: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def env(self) -> dict[str, str]:
        return {"OPENAI_BASE_URL": self.url, "OPENAI_MODEL": MODEL, "OPENAI_API_KEY": KEY}

    def set_env(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set the environment variables of this server."""
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)

    def valid_answers(self, digest: str = "") -> Counter[str]:
        """Return the number of valid answers per request, over all attempts."""
        return _by_request(self.valid, digest)

    def answers_sent(self, digest: str = "") -> Counter[str]:
        """Return the number of answers per request, valid or malformed, over all attempts."""
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
    malformed: float = 0.0,
    rejectable: float = 0.0,
    seed: int = 0,
    latency: float = 0.0,
    refuse: str = "",
    status: int = 400,
    limit: float = math.inf,
    pause: float = 0.0,
    accepts_bounds: bool = True,
) -> Iterator[LLMServer]:
    """Serve until the end of the block.

    Args:
        faults: share of requests with one of `TRANSPORT_FAULTS`.
        malformed: share of answers with one of `CONTENT_FAULTS`.
        rejectable: share of questions that a filter rejects.
        latency: seconds per generated answer.
        refuse: text; requests whose prompt contains it receive `status`.
        limit: number of answers after which all other requests receive `status`.
        pause: seconds in the header `Retry-After` of refused requests; 0 for the default of other failures.
        accepts_bounds: whether schemas may contain lengths of lists.
    """
    server = LLMServer()
    admitted: set[str] = set()
    stored: dict[str, tuple[bytes, bool]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.active += 1
                server.max_active = max(server.max_active, server.active)
            try:
                self.complete(body)
            finally:
                with server.lock:
                    server.active -= 1

        def complete(self, body: dict[str, Any]) -> None:
            prompt, key = body["messages"][0]["content"], self.headers["Idempotency-Key"]
            if refusal := self.refusal(body, prompt, key):
                self.answer(refusal[0], {"error": {"message": refusal[1]}}, pause)
                return
            with server.lock:
                server.requests[key] += 1
                arrival = server.requests[key]
            # Faults in content are the same for every arrival of a request; faults in transport are not.
            draws = random.Random(f"{seed} {key} {arrival}")
            fault = draws.choice(TRANSPORT_FAULTS) if draws.random() < faults else ""
            if fault in ("full", "error"):
                server.faults[fault] += 1
                self.answer({"full": 429, "error": 500}[fault], {"error": {"message": fault}})
                return
            if key not in stored:
                time.sleep(latency)
                data, in_form, content_fault = _completion(
                    body, prompt, random.Random(f"{seed} {key}"), malformed, rejectable
                )
                with server.lock:
                    server.generated[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
                    server.faults.update([content_fault] if content_fault else [])
                    stored[key] = data, in_form
            self.deliver(key, fault)

        def refusal(self, body: dict[str, Any], prompt: str, key: str) -> tuple[int, str] | None:
            if self.headers["Authorization"] != f"Bearer {KEY}":
                return 401, f"unknown key {self.headers['Authorization']}"
            if body["model"] != MODEL:
                return 404, f"unknown model {body['model']}"
            if not accepts_bounds and "Items" in json.dumps(body["response_format"]):
                return 400, "minItems and maxItems are not supported"
            if refuse and refuse in prompt:
                return status, "this prompt is refused"
            with server.lock:
                if len(admitted) < limit:
                    admitted.add(key)
                return None if key in admitted else (status, "the limit of this account is reached")

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
                    server.valid.update([key] if in_form else [])
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
            """Ignore clients that were killed in the middle of a request."""

    http = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def _completion(
    body: dict[str, Any], prompt: str, rng: random.Random, malformed: float, rejectable: float
) -> tuple[bytes, bool, str]:
    """Return a completion, whether its content is valid, and its fault in content or ""."""
    answer_schema = body["response_format"]["json_schema"]
    properties = answer_schema["schema"]["properties"]
    numbers = re.findall(r"\d+", prompt)  # the first number in a prompt is that of the questions
    count = next((value["maxItems"] for value in properties.values() if "maxItems" in value), int([*numbers, 0][0]))
    content = _content(answer_schema["name"], count, prompt, rng, rejectable)
    fault = rng.choice(CONTENT_FAULTS) if rng.random() < malformed else ""
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


def _content(kind: str, count: int, prompt: str, rng: random.Random, rejectable: float) -> dict[str, Any]:
    captions = re.findall(r"wrote down:\n+(.+)", prompt)
    words = [word for word in re.findall(r"\w{3,}", captions[-1] if captions else "") if word != "the"]
    a, b, c = (f"the {word}" for word in rng.sample(words, 3)) if len(words) > 2 else ("a cat", "a car", "a bell")
    if kind in ("detail", "mcq"):
        templates, write = (DETAIL, _detail) if kind == "detail" else (CHOICE, _choice)
        indices = [index % len(templates) for index in rng.sample(range(max(count, len(templates))), count)]
        questions = [write(templates[index], (a, b, c), rng, rejectable) for index in indices]
        if rng.random() < rejectable:
            questions[-1] = questions[0] | {"question": f"{questions[0]['question'].rstrip('?')} now?"}
        return {"questions": questions}
    if kind == "difference":
        sentence = f"the first audio has {a}, while the second audio has {b} and {c}."
        return {"few_words": f"{a} versus {b}", "sentence": sentence, "paragraph": f"{sentence} one hears {c} longer."}
    if kind == "entailment":
        return {"true": f"there is {a}", "plausible": f"there is {a} on a tuesday", "false": "there is a distant gong"}
    if kind == "blind":
        choices_of_questions = [
            re.findall(r"\n   - (.+)", part) for part in re.split(r"\n\d+\. ", prompt.partition("questions:")[2])[1:]
        ]
        guesses = [rng.choice(choices) if choices else "nothing" for choices in choices_of_questions]
        return {"answers": [{"number": n, "answer": g, "sure": rng.random() < 0.2} for n, g in enumerate(guesses, 1)]}
    return {"verdicts": [{"number": n, "supported": rng.random() < 0.95} for n in range(1, count + 1)]}


def _detail(
    template: tuple[str, str, str], sounds: tuple[str, ...], rng: random.Random, rejectable: float
) -> dict[str, Any]:
    aspect, question, answer = template
    answer = answer.format(a=sounds[0], b=sounds[1], c=sounds[2])
    defect = rng.choice(("leak", "language", "too_long")) if rng.random() < rejectable else ""
    question = f"why does one hear that {answer}?" if defect == "leak" else question
    answer = {"language": GERMAN, "too_long": f"{answer} and so on" * 60}.get(defect, answer)
    return {"aspect": aspect, "question": question, "answer": answer}


def _choice(
    template: tuple[str, str, str], sounds: tuple[str, ...], rng: random.Random, rejectable: float
) -> dict[str, Any]:
    aspect, question, right = template
    right = right.format(a=sounds[0], b=sounds[1], c=sounds[2])
    defect = rng.choice(("leak", "wrong_answer", "duplicate")) if rng.random() < rejectable else ""
    question = f"what is there besides {right}?" if defect == "leak" else question
    choices = rng.sample([*rng.sample(WRONG, 2), right if defect == "duplicate" else "a closing lid", right], 4)
    return {
        "aspect": aspect,
        "question": question,
        "choices": choices,
        "answer": "a bell" if defect == "wrong_answer" else right,
    }
