"""`mellow ask` with a model folder and an endpoint; help, errors and Ctrl-C of every command."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellow_platform import storage
from mellow_platform.cli import WINDOWS, main
from mellow_platform.cluster import free_port
from mellow_platform.data.audio import decode, encode
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.request import Request
from mellow_platform.inference.windows import RULES
from tests.tiny_model import write_tiny_model

RATE = 32_000
MELLOW = [sys.executable, "-m", "mellow_platform.cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, and clips of 1 s and 25 s."""
    folder = tmp_path_factory.mktemp("ask")
    write_tiny_model(str(folder / "model"))
    rng = np.random.default_rng(0)
    for name, seconds in (("one.flac", 1), ("two.wav", 1), ("three.ogg", 1), ("long.flac", 25)):
        noise = rng.normal(0, 0.1, seconds * RATE).astype(np.float32)
        (folder / name).write_bytes(encode(noise, RATE, name.rpartition(".")[2].upper()))
    (folder / "text.wav").write_bytes(b"a question is not audio " * 10)
    (folder / "empty.wav").touch()
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text('{"model_type": "mellow_htsat"}')
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text('{"model_type": "mellow"}')
    return folder


@pytest.fixture(autouse=True)
def working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)


def waveform(name: str) -> np.ndarray:
    return decode(Path(name).read_bytes(), RATE)


def fail(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run a command that must fail with status 1 and one line on stderr; return the line."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    output = capsys.readouterr()
    assert (exit.value.code, output.out, output.err.count("\n")) == (1, "", 1)
    return output.err


def test_ask_folder_prints_the_engines_answer(capsys: pytest.CaptureFixture):
    options = ["--model", "model", "--temperature", "0.8", "--seed", "3", "--max-new-tokens", "12"]
    main(["ask", "one.flac", *options, "two.wav", "which is louder?"])
    with Engine.load("model") as engine:
        request = Request("which is louder?", (waveform("one.flac"), waveform("two.wav")), 12, 0.8, seed=3)
        answer = engine.generate([request])[0]
    output = capsys.readouterr()
    assert output.out == f"{answer.text}\n"
    assert ("cut" in output.err) == (answer.finish_reason == "length")


def test_ask_folder_prints_windows_with_their_seconds(capsys: pytest.CaptureFixture):
    main(["ask", "long.flac", "a tone?", "--model", "model", "--window", "each", "--max-new-tokens", "6"])
    recording = waveform("long.flac")
    with Engine.load("model") as engine:
        parts = [recording[start : start + 10 * RATE] for start in range(0, len(recording), 10 * RATE)]
        answers = engine.generate([Request("a tone?", (part,), 6) for part in parts])
    names = ("0-10 s", "10-20 s", "20-25 s")
    expected = "".join(f"{name}\t{answer.text}\n" for name, answer in zip(names, answers, strict=True))
    assert capsys.readouterr().out == expected


def test_ask_folder_scores_choices(capsys: pytest.CaptureFixture):
    choices = ["a loud tone", "noise burst"]
    main(["ask", "one.flac", "a tone?", "--model", "model", *(word for text in choices for word in ("--choice", text))])
    with Engine.load("model") as engine:
        scores = engine.score(Request("a tone?", (waveform("one.flac"),)), choices)
    assert capsys.readouterr().out == "".join(f"{score.probability:.4f}\t{score.choice}\n" for score in scores)


def test_ask_output_and_imports():
    code = (
        "import sys; from mellow_platform.cli import main;"
        "main(['ask', 'one.flac', 'a tone?', '--model', 'model', '--max-new-tokens', '300']);"
        "print(*{'ray', 'deepspeed', 'peft', 'openai', 's3fs'} & sys.modules.keys(), file=sys.stderr)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"(note: .*--max-new-tokens\n)?\n", result.stderr)
    assert result.stdout.count("\n") == 1


def test_ask_reads_a_clip_and_a_model_in_s3(bucket: str, capsys: pytest.CaptureFixture):
    if not bucket:
        pytest.skip("no S3 server can be started")
    storage.upload("model", f"{bucket}/model")
    storage.write_bytes(f"{bucket}/one.flac", Path("one.flac").read_bytes())
    main(["ask", "one.flac", "a tone?", "--model", "model"])
    main(["ask", f"{bucket}/one.flac", "a tone?", "--model", f"{bucket}/model"])
    local, remote, _ = capsys.readouterr().out.split("\n")
    assert local == remote
    assert f"{bucket}/gone.wav" in fail(capsys, "ask", f"{bucket}/gone.wav", "a tone?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.wav", "a tone?"], r"gone\.wav"),
        (["text.wav", "a tone?"], r"text\.wav"),
        (["empty.wav", "a tone?"], r"empty\.wav.*\b0\b"),
        (["encoder", "a tone?"], r"encoder.*directory"),
        (["one.flac"], r"question.*'one\.flac'"),
        (["one.flac", "gone.wav"], r"question.*'gone\.wav'"),
        (["one.flac", " "], "question.*' '"),
        (["what is heard?"], r"clip.*'what is heard\?'"),
        (["one.flac", "two.wav", "three.ogg", "a tone?"], r"\b3\b.*one\.flac, two\.wav, three\.ogg"),
        (["one.flac", "is", "it", "loud?"], r"\b4\b.*mellow ask"),
        (["one.flac", "two.wav", "a tone?", "--window", "pair"], "'pair'"),
        (["one.flac", "a tone?", "--temperature", "11"], r"temperature.*\b11\b"),
        (["one.flac", "a tone?", "--max-new-tokens", "0"], r"max_new_tokens.*\b0\b"),
        (["one.flac", "a tone?", "--model", "gone"], "gone .*--model"),
        (["one.flac", "a tone?", "--model", "."], r"config\.json"),
        (["one.flac", "a tone?", "--model", "encoder"], "'mellow_htsat'"),
        (["one.flac", "a tone?", "--model", "damaged"], "damaged .*--model"),
        (["one.flac", "a tone?", "--model", "http://127.0.0.1:9/v1"], r"http://127\.0\.0\.1:9/v1"),
        (["one.flac", "a tone?", "--model", "http://model.invalid/v1"], "OPENAI_API_KEY"),
    ],
)
def test_ask_error_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture):
    assert re.search(message, fail(capsys, "ask", *words))


def test_default_model_is_of_the_demo(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("mellow_platform.inference.ask.URL", f"http://127.0.0.1:{free_port()}/v1")
    message = fail(capsys, "ask", "one.flac", "a tone?")
    assert "runs/demo/model" in message
    assert "make demo" in message
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/model").symlink_to(folder / "model")
    main(["ask", str(folder / "one.flac"), "a tone?"])
    with endpoint() as server:
        monkeypatch.setattr("mellow_platform.inference.ask.URL", server.url)
        monkeypatch.chdir(folder)
        main(["ask", "one.flac", "a tone?"])
    by_folder, by_endpoint, _ = capsys.readouterr().out.split("\n")
    assert by_endpoint == "a loud tone"
    assert by_folder != by_endpoint


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that streams `a loud tone`, one answer per window.

    Attributes:
        requests: bodies of chat completions.
        refusal: status and headers of refused chat completions, if any.
        ending: end of streams: `whole`, `error` (an error event), `cut` (closed without an end), `hang` (left open).
        owner: owner of the listed model.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.ending, self.owner = "whole", "mellow-platform"
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.send(404, {"error": {"message": "no such page"}})
        if self.headers["Authorization"] not in ("Bearer none", "Bearer a-key"):
            return self.send(401, {"error": {"message": "unknown key"}})
        self.send(200, {"object": "list", "data": [{"id": "ears", "object": "model", "owned_by": self.server.owner}]})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            return self.send(404, {"error": {"message": "Not Found"}})
        self.server.requests.append(json.loads(data))
        if self.server.refusal:
            status, headers = self.server.refusal
            return self.send(status, {"error": {"message": "too loud"}}, headers)
        self.start(200, {"Content-Type": "text/event-stream"})
        windows = [(0, 10), (10, 20.5)] if self.server.requests[-1].get("window") == "each" else [(0, 10)]
        for number, (start, end) in enumerate(windows):
            self.event(number, {"content": ""}, heard=[{"start": start, "end": end}])
        for piece in ("a ", "loud ", "tone"):  # answers for several windows are interleaved
            for number in range(len(windows)):
                self.event(number, {"content": piece})
        if self.server.ending == "hang":
            self.server.released.wait(60)
        if self.server.ending == "error":
            self.write({"error": {"message": "model gone"}})
        if self.server.ending == "whole":
            for number in range(len(windows)):
                self.event(number, {}, finish_reason="stop")
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, number: int, delta: dict[str, str], **fields: Any) -> None:
        choice = {"index": number, "delta": delta, "finish_reason": None} | fields
        self.write({"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "ears", "choices": [choice]})

    def write(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def send(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.start(status, {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {}))
        self.wfile.write(data)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def endpoint() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with endpoint() as server:
        yield server


def test_ask_endpoint_sends_clips_and_options(server: Server, capsys: pytest.CaptureFixture):
    options = ["--seed", "7", "--temperature", "0.5", "--max-new-tokens", "9"]
    main(["ask", "one.flac", "two.wav", "which?", "--model", server.url.removesuffix("/v1"), *options])
    assert capsys.readouterr().out == "a loud tone\n"
    (body,) = server.requests
    text, *clips = body.pop("messages")[0]["content"]
    assert body == {"model": "ears", "stream": True, "seed": 7, "temperature": 0.5, "max_tokens": 9}
    assert text == {"type": "text", "text": "which?"}
    sent = [(clip["input_audio"]["format"], base64.b64decode(clip["input_audio"]["data"])) for clip in clips]
    assert sent == [("flac", Path("one.flac").read_bytes()), ("wav", Path("two.wav").read_bytes())]


def test_ask_another_endpoint_sends_wav(server: Server):
    server.owner = "somebody"
    main(["ask", "three.ogg", "a tone?", "--model", server.url])
    sent = server.requests[0]["messages"][0]["content"][1]["input_audio"]
    assert sent["format"] == "wav"
    np.testing.assert_allclose(decode(base64.b64decode(sent["data"]), RATE), waveform("three.ogg"), atol=1e-4)


def test_ask_endpoint_sorts_interleaved_windows(server: Server, capsys: pytest.CaptureFixture):
    main(["ask", "long.flac", "a tone?", "--model", server.url, "--window", "each"])
    assert capsys.readouterr().out == "0-10 s\ta loud tone\n10-20.5 s\ta loud tone\n"


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((400, {}), r"\b400\b"),
        ((404, {}), r"\b404\b.*URL"),
        ((429, {"Retry-After": "7", "x-should-retry": "false"}), r"\b429\b.*\b7 s\b"),
        ((503, {"x-should-retry": "false"}), r"\b503\b"),
    ],
)
def test_ask_endpoint_refusal_is_named(refusal, message: str, server: Server, capsys: pytest.CaptureFixture):
    server.refusal = refusal
    line = fail(capsys, "ask", "one.flac", "a tone?", "--model", server.url)
    assert server.url in line and "too loud" in line and re.search(message, line)


def test_ask_endpoint_wrong_key_is_not_printed(server: Server, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    message = fail(capsys, "ask", "one.flac", "a tone?", "--model", server.url)
    assert re.search(r"\b401\b.*unknown key.*OPENAI_API_KEY", message)
    assert "wrong-key" not in message
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    main(["ask", "one.flac", "a tone?", "--model", server.url])
    assert capsys.readouterr().out == "a loud tone\n"


@pytest.mark.parametrize(("ending", "message"), [("error", "model gone"), ("cut", "response")])
def test_ask_endpoint_broken_stream_fails(ending: str, message: str, server: Server, capsys: pytest.CaptureFixture):
    server.ending = ending
    with pytest.raises(SystemExit):
        main(["ask", "one.flac", "a tone?", "--model", server.url])
    output = capsys.readouterr()
    assert output.out == "a loud tone\n"
    assert message in output.err


def test_ask_endpoint_without_scores_fails(server: Server, capsys: pytest.CaptureFixture):
    choices = ["--model", server.url, "--choice", "yes"]
    assert "--choice" in fail(capsys, "ask", "one.flac", "a tone?", *choices)
    assert "--window each" in fail(capsys, "ask", "one.flac", "a tone?", *choices, "--window", "each")


def test_ctrl_c_ends_with_status_130(server: Server):
    server.ending = "hang"
    command = [*MELLOW, "ask", "one.flac", "a tone?", "--model", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read(6) == b"a loud"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


def test_ctrl_c_during_generation_ends_with_status_130():
    command = [
        *MELLOW,
        "ask",
        "long.flac",
        "a tone?",
        "--model",
        "model",
        "--window",
        "each",
        "--max-new-tokens",
        "300",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


def test_closed_output_causes_no_message(server: Server):
    command = [*MELLOW, "ask", "long.flac", "a tone?", "--model", server.url, "--window", "each"]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


def test_unknown_options_are_rejected(capsys: pytest.CaptureFixture):
    for arguments in (["ask", "one.flac", "a tone?", "--modle", "x"], ["doctor", "machine"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["ask"], ["doctor"], ["convert"], ["push"], ["cluster", "up"]])
def test_help_imports_the_standard_library_only(command: list[str]):
    code = (
        "import atexit, sys; from mellow_platform.cli import main;"
        "atexit.register(lambda: print(sorted({name.partition('.')[0] for name in sys.modules} - before"
        " - sys.stdlib_module_names), file=sys.stderr));"
        "before = {name.partition('.')[0] for name in sys.modules};"
        f"main({[*command, '--help']!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "usage: mellow" in result.stdout
    assert result.stderr.strip() == "[]"


def test_window_rules_of_command_line_and_engine_are_equal():
    assert WINDOWS == RULES
