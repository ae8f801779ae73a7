"""Who is let in: keys in a file, and requests of other machines where there are none."""

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
from serve.middleware import AdmissionMiddleware, RequestLimits
from serve.monitoring import EndpointMetrics
from tests.conftest import REPOSITORY


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


def test_a_made_key_lets_its_holder_in_and_its_line_does_not_tell_it(tmp_path: Path):
    made = subprocess.run(
        [sys.executable, "-m", "serve.keys", "alice"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    key = made.stderr.rsplit(" ", 1)[1].strip()
    file = tmp_path / "keys.txt"
    file.write_text(f"# who may ask\n\n{made.stdout}{line('bob', 'his')}")
    assert key not in made.stdout
    assert KeyFile(str(file)).holder(key) == "alice"
    assert KeyFile(str(file)).holder("his") == "bob"
    assert KeyFile(str(file)).holder("another") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice secret\n", "line 1: expected a name and the SHA-256"),
        ("\n" + line("a", "x") + "bob\n", "line 3"),
        ("# none\n", "no key"),
    ],
)
def test_a_damaged_key_file_is_named_with_its_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "keys.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        KeyFile(str(tmp_path / "keys.txt"))


def test_keys_come_and_go_while_the_endpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "RELOAD_SECONDS", 0.0)
    file = tmp_path / "keys.txt"
    file.write_text(line("alice", "hers"))
    known = KeyFile(str(file))
    file.write_text(line("bob", "his"))
    assert (known.holder("hers"), known.holder("his")) == (None, "bob")
    file.write_text("half a li")  # while it is edited, those who were let in still are
    assert known.holder("his") == "bob"
    file.write_text("# nobody any more\n")
    assert known.holder("his") is None


async def status_for(client: str, allow_anonymous: bool, path: str = "/v1/models") -> int:
    """Return the status that a request from an address gets of an endpoint without keys."""
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
def test_without_keys_only_this_machine_is_answered(client: str, allow_anonymous: bool, path: str, status: int):
    assert asyncio.run(status_for(client, allow_anonymous, path)) == status
