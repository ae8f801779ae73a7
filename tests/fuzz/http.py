"""Send malformed requests to the endpoint until enough were refused, and count faults.

python tests/fuzz/http.py                           # ten thousand, a few minutes on two cores
python tests/fuzz/http.py --requests 500 --seed 1   # a short one, other requests

A third of the requests break the OpenAPI schema (by schemathesis); a third are valid requests with one fault, from a
field to the framing of HTTP; a third have hostile audio: truncated, empty, with forged headers or flipped bits, or not
audio. Prints the statuses by kind of request. The endpoint passes if there is no 500 and no 502, every request ends, no
replica restarts, and memory grows by at most 5 % in the second half.
"""

import sys
from pathlib import Path

sys.path.pop(0)  # this file's folder, in which `http` is this file
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tests  # noqa: F401  # its token for Ray, before Ray is imported

# isort: split
import argparse
import json
import random
import socket
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import hypothesis
import numpy as np
import requests
import schemathesis
from schemathesis import GenerationMode

from mellow_platform.data.audio import encode
from tests.serve_app import ServedModel, clip, question

AT_ONCE = 8
# 503 and 504 with these codes are limits, not faults.
LIMITS = {"deadline", "queue_full"}
JUNK: list[Any] = [
    None, True, -1, 0, 2**63, 2**64, 1e308, -1e308, 1e-40, "", " ", "x", "x" * 10_000, "\x00", "\u202e", [], [[]],
    [None], {}, {"a": {}}, ["x"] * 1000, "NaN", "-0", "1e400", "'; drop table clips; --", "../../etc/passwd",
    "{{7*7}}", "%s%n",
]  # fmt: skip

Send = Callable[[], httpx.Response | None]


class Fuzz:
    """Makes requests from a seed; each method returns a function that sends one request."""

    def __init__(self, url: str, seed: int):
        self._rng = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._client = httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=AT_ONCE))
        self._address = (url.split("/")[2].split(":")[0], int(url.rsplit(":", 1)[1]))
        self._sound = clip(seconds=0.5)
        self._containers = {
            name: encode(self._noise(8000), 8000, name.upper()) for name in ("wav", "flac", "ogg", "mp3")
        }
        self.schema = self._client.get("/openapi.json").json()

    def _noise(self, samples: int, channels: int = 1) -> np.ndarray:
        shape = (samples, channels) if channels > 1 else samples
        return self._numbers.normal(0, 0.1, shape).astype(np.float32)

    def _post(self, body: bytes, path: str = "/v1/chat/completions", kind: str = "application/json") -> httpx.Response:
        return self._client.post(path, content=body, headers={"Content-Type": kind})

    # Valid requests with one fault.

    def broken_field(self) -> Send:
        body = json.loads(question(self._sound, max_tokens=1))
        more = ("seed", "temperature", "top_p", "stop", "n", "stream", "logprobs", "window")
        places = [(body, name) for name in (*body, *more)]
        message = body["messages"][0]
        places += [(message, "role"), (message, "content"), (body["messages"], 0)]
        places += [(part, name) for part in message["content"] for name in part]
        places += [(message["content"][1]["input_audio"], name) for name in ("data", "format")]
        holder, name = self._rng.choice(places)
        holder[name] = self._rng.choice(JUNK)
        if self._rng.random() < 0.2:
            body[self._rng.choice(["", "messages ", "Model", "__proto__", "tools"])] = self._rng.choice(JUNK)
        return lambda: self._post(json.dumps(body).encode())

    def broken_json(self) -> Send:
        body = bytearray(question(self._sound, max_tokens=1))
        kind = self._rng.randrange(6)
        if kind == 0:
            body = body[: self._rng.randrange(len(body))]
        elif kind == 1:
            for _ in range(self._rng.randint(1, 50)):
                body[self._rng.randrange(100)] = self._rng.randrange(256)
        elif kind == 2:
            body = bytearray(self._rng.randbytes(self._rng.randrange(1000)))
        elif kind == 3:
            body = bytearray(self._rng.choice([b"[", b'{"a":', b"-"]) * self._rng.randrange(1, 50_000))
        elif kind == 4:
            body = body.replace(
                b'"max_tokens": 1', b'"max_tokens": ' + self._rng.choice([b"NaN", b"1e999", b"9" * 5000])
            )
        else:
            body = bytearray(json.dumps(json.loads(body)).replace("what", "\\ud800").encode())
        return lambda: self._post(bytes(body))

    def broken_form(self) -> Send:
        boundary = "x"
        parts = []
        names = ["file", "question", "choices", "model", "seed", "stop", "window", "", "\x00", "\\ud800"]
        for _ in range(self._rng.choice([0, 1, 2, 3, 200])):
            name = self._rng.choice(names)
            filename = self._rng.choice(["", '; filename="a.wav"', '; filename="../../a"', "; filename"])
            value = self._rng.choice([b"", b"x", b"\xff", self._sound[:100], b"9" * 100])
            parts.append(
                f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + value
            )
        end = self._rng.choice([f"\r\n--{boundary}--\r\n", "", f"--{boundary}", "\r\n--y--\r\n"]).encode()
        body = b"\r\n".join(parts) + end
        form = f"multipart/form-data; boundary={boundary}"
        kind = self._rng.choice([form, f"{form}; charset=unicode_escape", "multipart/form-data", "text/plain", ""])
        return lambda: self._post(body, "/v1/audio/questions", kind)

    def broken_route(self) -> Send:
        method = self._rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST", "BREW"])
        path = self._rng.choice(
            ["/v1/chat/completions", "/v1/models/x", "/v1/", "/v1//models", "/v1/%2e%2e/", "/page/../ingress.py",
             "/%00", "/page/%2e%2e/keys.py", "/v1/audio/questions", "/docs/x", "/-/x", "/v1/chat/completions/"]
        )  # fmt: skip
        headers = {
            "Content-Type": self._rng.choice(["application/json", "text/xml", "x", "application/json; charset=x"])
        }
        headers["Accept-Encoding"] = self._rng.choice(["br", "*;q=0", "identity"])
        body = self._rng.choice([b"", b"{}", b"null"])
        return lambda: self._client.request(method, path, content=body, headers=headers)

    def broken_framing(self) -> Send:
        good = question(self._sound, max_tokens=1)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        raw = self._rng.choice([
            self._rng.randbytes(self._rng.randint(1, 500)) + b"\r\n\r\n",
            f"{head}Content-Length: -1\r\n\r\n".encode() + good,
            f"{head}Content-Length: {10**18}\r\n\r\n".encode() + good[:50],
            f"{head}Content-Length: 10\r\nContent-Length: 20\r\n\r\n".encode() + good,
            f"{head}Content-Length: 10\r\n\r\n".encode() + good,
            f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode() + good,
            f"{head}Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n".encode() + good[:20],
            f"{head}{'X: ' + 'y' * 100_000}\r\n\r\n".encode(),
            f"{head}Content-Length: {len(good)}\r\n\r\n".encode() + good[: len(good) // 2],
            b"GET /v1/models HTTP/9.9\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: \xff\r\nAuthorization: \xff\xfe\r\nContent-Length: 0\r\n\r\n",
        ])  # fmt: skip
        return lambda: self._raw(raw)

    def _raw(self, data: bytes) -> httpx.Response | None:
        """Send bytes, close the sending side, and return the response, or None without a valid response."""
        with socket.create_connection(self._address, timeout=60) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65536)
            except TimeoutError:
                raise
            except OSError:  # the server closed it
                return None
        if not answer.startswith(b"HTTP/1.1 ") or not answer[9:12].isdigit():
            return None
        return httpx.Response(int(answer[9:12]), content=answer.partition(b"\r\n\r\n")[2])

    # Valid requests with hostile audio.

    def hostile_audio(self) -> Send:
        sounds, second = self._hostile_sound(), self._rng.random() < 0.2
        body = json.loads(question(sounds, max_tokens=1))
        if second:
            body["messages"][0]["content"].append(json.loads(question(self._sound))["messages"][0]["content"][1])
        if self._rng.random() < 0.5:
            return lambda: self._post(json.dumps(body).encode())
        files = [("file", ("a", sounds)), ("question", (None, b"what?")), ("max_tokens", (None, b"1"))]
        return lambda: self._client.post("/v1/audio/questions", files=files)

    def _hostile_sound(self) -> bytes:
        rng, good = self._rng, self._containers[self._rng.choice(list(self._containers))]
        return rng.choice([
            lambda: good[: rng.randrange(len(good))],
            lambda: b"",
            lambda: self._flipped(good),
            lambda: encode(self._noise(rng.randint(1, 2000), 9), 32_000, "WAV"),
            lambda: encode(self._noise(0), 32_000, "WAV"),
            lambda: self._wav(rng.choice([8, 200, 65535]), 192_000, 16),
            lambda: self._wav(1, rng.choice([0, 1, 3999, 192_001, 2**31, 2**32 - 1]), 16),
            lambda: self._wav(1, 32_000, rng.choice([0, 1, 7, 64, 255])),
            lambda: self._float_wav(rng.choice([np.nan, np.inf, -np.inf, 1e20, 3e38])),
            lambda: self._nested_wav(),
            lambda: self._hours(),
            lambda: b"PK\x03\x04" + rng.randbytes(500),
            lambda: b"\x1f\x8b\x08" + rng.randbytes(500),
            lambda: rng.randbytes(rng.randrange(3000)),
            lambda: good[:4] + rng.randbytes(rng.randrange(3000)),
            lambda: b"<svg onload=alert(1)>",
        ])()  # fmt: skip

    def _flipped(self, good: bytes) -> bytes:
        data = bytearray(good)
        for _ in range(self._rng.randint(1, 40)):
            data[self._rng.randrange(min(len(data), 200))] ^= 1 << self._rng.randrange(8)
        return bytes(data)

    def _wav(self, channels: int, rate: int, bits: int) -> bytes:
        """A WAV whose header does not fit its 100 bytes of data."""
        block = max(1, channels * bits // 8)
        form = struct.pack("<HHIIHH", 1, channels, rate, rate * block % 2**32, block % 2**16, bits)
        data = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 100) + bytes(100)
        return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WAVE" + data

    def _float_wav(self, value: float) -> bytes:
        samples = self._noise(1000)
        samples[self._rng.randrange(1000)] = value
        form = struct.pack("<HHIIHH", 3, 1, 32_000, 128_000, 4, 32)
        data = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 4000) + samples.tobytes()
        return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WAVE" + data

    def _nested_wav(self) -> bytes:
        """A WAV whose samples are inside another chunk, and that ends with the start of a second format chunk."""
        data = b"data" + struct.pack("<I", 800) + bytes(800)
        form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
        chunks = form + b"LIST" + struct.pack("<I", len(data)) + data + b"fmt " + struct.pack("<I", 16)
        return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks

    def _hours(self) -> bytes:
        """A FLAC of one second whose header claims hours."""
        data = bytearray(self._containers["flac"])
        frames = 8000 * self._rng.randint(601, 2_000_000)
        data[21] = (data[21] & 0xF0) | (frames >> 32)
        data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
        return bytes(data)

    # Requests that break the schema.

    def against_schema(self, count: int, seed: int) -> list[Send]:
        """Return senders of schemathesis' requests that break the OpenAPI schema."""
        loaded = schemathesis.openapi.from_dict(self.schema)
        senders: list[Send] = []
        for path in ("/v1/chat/completions", "/v1/audio/questions"):
            strategy = loaded[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE)

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=count // 2,
                database=None,
                deadline=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(strategy)
            def collect(case: schemathesis.Case) -> None:
                try:
                    # The case is in the form of the package requests; a case that requests refuses is skipped.
                    made = requests.Request(**case.as_transport_kwargs(base_url=str(self._client.base_url))).prepare()
                    body = made.body.encode() if isinstance(made.body, str) else made.body
                    if not isinstance(body, bytes | None) or not made.method:
                        return
                    headers = {str(name): str(value) for name, value in made.headers.items()}
                    request = self._client.build_request(made.method, str(made.url), content=body, headers=headers)
                except (UnicodeError, TypeError, ValueError, AttributeError, httpx.InvalidURL):
                    return
                senders.append(lambda: self._client.send(request))

            collect()
        return senders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--requests", type=int, default=10_000, help="number of refused requests to reach (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ServedModel(Path(folder)) as served:
        result = run(served, arguments.requests, arguments.seed)
    print(json.dumps(result))
    grown = result["memory_mib"][3] / result["memory_mib"][1]
    if result["status_5xx"] or result["restarts"] or grown > 1.05 or not result["still_answers"]:
        sys.exit(1)


def run(served: ServedModel, enough: int, seed: int) -> dict[str, Any]:
    """Send requests until `enough` were refused; return the counts."""
    fuzz = Fuzz(served.url, seed)
    rng = random.Random(seed)
    kinds = [fuzz.broken_field, fuzz.broken_json, fuzz.broken_form, fuzz.broken_route, fuzz.broken_framing]
    # Some requests are valid by chance, such as a clip with a harmless flipped bit.
    stock = fuzz.against_schema(enough // 3, seed)
    print(f"{len(stock)} requests that break the schema")

    def senders() -> Iterator[tuple[str, Send]]:
        yield from (("schema", sender) for sender in stock)
        while True:
            kind = rng.choice([*kinds, *[fuzz.hostile_audio] * len(kinds)])
            yield kind.__name__, kind()

    statuses: dict[str, Counter[int | str]] = {}
    faults: list[str] = []

    def send(kind: str, sender: Send) -> bool:
        try:
            response = sender()
        except (httpx.TimeoutException, TimeoutError) as error:
            faults.append(f"{kind}: {error!r}")
            return False
        except httpx.HTTPError as error:  # the server closed the connection because of malformed HTTP
            statuses.setdefault(kind, Counter())[type(error).__name__] += 1
            return True
        status: int | str = "closed" if response is None else response.status_code
        statuses.setdefault(kind, Counter())[status] += 1
        if response is not None and response.status_code >= 500:
            try:
                code = response.json()["error"]["code"]
            except (ValueError, KeyError, TypeError):
                code = None
            if response.status_code in (500, 502) or code not in LIMITS:
                faults.append(f"{kind}: {response.status_code} {response.text[:300]}")
        return response is None or response.status_code >= 400

    before = served.processes()
    sent = refused = 0
    memory: list[float] = []
    supply = senders()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while refused < enough:
            batch = [next(supply) for _ in range(min(200, enough - refused + 20))]
            sent += len(batch)
            refused += sum(pool.map(lambda item: send(*item), batch))
            memory.append(sum(process.memory_info().rss for process in before.values()) / 2**20)
    after = served.processes()
    for kind, counts in statuses.items():
        print(f"{kind:15s} {dict(sorted(counts.items(), key=str))}")
    for fault in faults[:10]:
        print("FAULT", fault)
    good = httpx.post(
        f"{served.url}/v1/chat/completions",
        content=question(clip(seconds=0.5)),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    return {
        "requests": sent,
        "refused": refused,
        "status_5xx": len(faults),
        "restarts": len(before.keys() ^ after.keys()),
        # After each quarter. Caches and thread pools fill in the first.
        "memory_mib": [round(memory[len(memory) * quarter // 4 - 1], 1) for quarter in range(1, 5)],
        "still_answers": good.status_code == 200,
    }


if __name__ == "__main__":
    main()
