"""Admission to the endpoint: API keys in a file, and the address of a client if there are no keys."""

import asyncio
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve import keys
from serve.keys import KeyFile
from serve.limits import RequestLimits
from serve.middleware import AdmissionMiddleware
from serve.monitoring import EndpointMetrics
from tests.conftest import REPOSITORY


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


def test_key_file_stores_hashes(tmp_path: Path):
    made = subprocess.run(
        [sys.executable, "-m", "serve.keys", "alice"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    key = made.stderr.rsplit(" ", 1)[1].strip()
    file = tmp_path / "keys.txt"
    file.write_text(f"# a comment\n\n{made.stdout}{line('bob', 'his')}")
    assert key not in made.stdout
    assert KeyFile(str(file)).holder(key) == "alice"
    assert KeyFile(str(file)).holder("his") == "bob"
    assert KeyFile(str(file)).holder("another") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice secret\n", r"keys\.txt, line 1:"),
        ("\n" + line("a", "x") + "bob\n", r"keys\.txt, line 3:"),
        ("# none\n", r"keys\.txt contains no key"),
    ],
)
def test_error_of_a_key_file_names_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "keys.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        KeyFile(str(tmp_path / "keys.txt"))


def test_key_file_is_reloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "RELOAD_SECONDS", 0.0)
    file = tmp_path / "keys.txt"
    file.write_text(line("alice", "hers"))
    known = KeyFile(str(file))
    file.write_text(line("bob", "his"))
    assert (known.holder("hers"), known.holder("his")) == (None, "bob")
    file.write_text("half a li")  # while the file is edited, the previous keys stay valid
    assert known.holder("his") == "bob"
    file.write_text("# no keys\n")
    assert known.holder("his") is None


async def status_for(client: str, allow_anonymous: bool, path: str = "/v1/models") -> int:
    """Return the status of a request from an address to an endpoint without keys."""
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    guard = AdmissionMiddleware(application, RequestLimits(), None, allow_anonymous, EndpointMetrics())
    prefix = path.partition("/v1/")[0] if "/v1/" in path else ""  # the application's route_prefix
    scope = {"type": "http", "path": path, "root_path": prefix, "headers": [], "client": (client, 5)}
    await guard(scope, receive, send)
    if sent[0]["status"] != 200:
        assert json.loads(sent[1]["body"])["error"]["type"] == "authentication_error"
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("client", "allow_anonymous", "path", "status"),
    [
        ("127.0.0.1", False, "/v1/models", 200),
        ("::1", False, "/v1/models", 200),
        ("192.0.2.7", False, "/v1/models", 401),
        ("192.0.2.7", True, "/v1/models", 200),
        ("192.0.2.7", False, "/healthz", 200),
        ("", False, "/v1/models", 401),
        ("192.0.2.7", False, "/prefix/v1/models", 401),
    ],
)
def test_without_keys_only_loopback_is_answered(client: str, allow_anonymous: bool, path: str, status: int):
    assert asyncio.run(status_for(client, allow_anonymous, path)) == status
