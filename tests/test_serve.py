"""Submitted jobs and the endpoint they deploy: a cluster of its own, `ray job submit`, and real HTTP."""

import base64
import functools
import hashlib
import http.server
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml

from mellow_platform.cli import main
from mellow_platform.data.audio import encode
from mellow_platform.data.records import Record, write_records
from mellow_platform.local_ray import JobError, LocalRay
from tests.conftest import REPOSITORY
from tests.serve_app import replicas_of, serve_details
from tests.tiny_model import write_tiny_model

RATE = 32_000
Reading = TypeVar("Reading")


@pytest.fixture(scope="module")
def client(endpoint: str) -> openai.OpenAI:
    """The official client of the endpoint."""
    return openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0)


def clip(container: str = "WAV", seconds: float = 1.0, seed: int = 0) -> dict[str, Any]:
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    return audio_part(encode(noise, RATE, container), container.lower())


def audio_part(data: bytes, container: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": container}}


def long_header() -> dict[str, Any]:
    """A clip whose header claims two hours."""
    data = bytearray(encode(np.zeros(8000, np.float32), 8000, "FLAC"))
    frames = 8000 * 7200
    data[21] = (data[21] & 0xF0) | (frames >> 32)
    data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return audio_part(bytes(data), "flac")


def many_channels() -> dict[str, Any]:
    return audio_part(encode(np.zeros((RATE, 9), np.float32), RATE, "WAV"))


def loud() -> dict[str, Any]:
    """A clip of float samples, one of which no file has that was recorded."""
    samples = np.zeros(RATE, np.float32)
    samples[5] = 1e20
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    return audio_part(file.getvalue())


def text_part(text: str = "what is heard?") -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(client: openai.OpenAI, *parts: dict[str, Any], **options: Any) -> Any:
    message: Any = {"role": "user", "content": list(parts)}
    create: Any = client.chat.completions.create
    return create(**{"model": "mellow", "messages": [message], "max_tokens": 8} | options)


@pytest.mark.extended
def test_a_submitted_corpus_job_writes_the_corpus(demo: LocalRay):
    arguments = ["--train-clips", "3", "--val-clips", "1", "--test-clips", "2", "--rounds", "1"]
    printed = demo.submit("make_corpus", "--output", demo.uri("corpus"), *arguments)
    assert set(printed["questions"]) == {"train", "val", "test"}
    assert len(list(Path(demo.uri("corpus", "audio")).rglob("*.flac"))) == 6


@pytest.mark.extended
def test_workers_run_the_submitted_code_and_not_the_installed_one(demo: LocalRay, tmp_path: Path):
    for part in ("platform", "infra"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    (tmp_path / "platform/mellow_platform/__init__.py").write_text('"""Changed."""\nMARK = "of the submitted copy"\n')
    (tmp_path / "job.py").write_text(
        "import json, ray, mellow_platform\n"
        "@ray.remote\n"
        "def mark():\n"
        "    import mellow_platform\n"
        "    return mellow_platform.MARK\n"
        "print(json.dumps([mellow_platform.MARK, ray.get(mark.remote())]))\n"
    )
    command = [
        "ray", "job", "submit", "--address", demo.dashboard, "--working-dir", str(tmp_path),
        "--runtime-env", str(tmp_path / "infra/runtime_env.yaml"), "--", "python", "job.py",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, env=demo.environment, capture_output=True, text=True)
    assert json.dumps(["of the submitted copy"] * 2) in result.stdout, result.stdout + result.stderr


def test_a_taken_port_is_refused_with_its_option(demo: LocalRay, tmp_path: Path):
    second = LocalRay(tmp_path, cpus=2, dashboard_port=demo.dashboard_port)
    with pytest.raises(OSError, match=rf"{demo.dashboard_port} is in use.* --dashboard-port"), second.running():
        pass


def test_a_failed_job_raises_its_last_words_and_names_its_log(demo: LocalRay):
    with pytest.raises(JobError, match="--trainclips is not an option; did you mean --train-clips") as error:
        demo.submit("make_corpus", "--output", demo.uri("x"), "--trainclips", "3")
    assert demo.uri("make_corpus.log") in str(error.value)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_question_about_a_clip_is_answered_in_openais_shape(client: openai.OpenAI, container: str):
    completion = ask(client, text_part(), clip(container))
    assert completion.object == "chat.completion"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].finish_reason in ("stop", "length")
    usage = completion.usage
    assert 0 < usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_two_clips_are_answered_and_their_order_counts(client: openai.OpenAI):
    one, two = clip(seed=1), audio_part(encode(np.zeros(RATE, np.float32), RATE, "WAV"))
    options = {"temperature": 1.0, "seed": 0, "max_tokens": 40}  # untrained, it repeats itself when it is greedy
    pairs = ((one, two), (two, one))
    first, second = (ask(client, text_part(), *pair, **options).choices[0].message.content for pair in pairs)
    assert first != second


def test_requests_at_once_get_the_answers_of_requests_alone(client: openai.OpenAI):
    parts = [clip(seed=seed) for seed in range(6)]
    alone = [ask(client, text_part(), part).choices[0].message.content for part in parts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda part: ask(client, text_part(), part).choices[0].message.content, parts))
    assert together == alone


def test_drawn_answers_follow_their_seed_and_end_before_a_stop_string(client: openai.OpenAI):
    def draw(seed: int, **options: Any) -> Any:
        parts = (text_part(), clip())
        return ask(client, *parts, temperature=2.0, top_p=0.9, seed=seed, max_tokens=40, **options).choices[0]

    whole = draw(1).message.content
    assert draw(1).message.content == whole
    assert any(draw(seed).message.content != whole for seed in range(2, 5))
    stop = whole[4:7]
    stopped = draw(1, stop=[stop])
    assert stopped.message.content == whole[: whole.index(stop)].rstrip()
    assert stopped.finish_reason == "stop"


def test_a_long_recording_is_answered_by_windows_that_are_named(client: openai.OpenAI):
    recording = clip(seconds=25.0)

    def heard(rule: str) -> list[Any]:
        choices = ask(client, text_part(), recording, extra_body={"window": rule}).choices
        return [[(part["start"], part["end"]) for part in choice.model_extra["heard"]] for choice in choices]

    assert heard("first") == [[(0.0, 10.0)]]
    assert heard("each") == [[(0.0, 10.0)], [(10.0, 20.0)], [(20.0, 25.0)]]
    assert heard("pair") == [[(0.0, 10.0), (15.0, 25.0)]]


def test_a_stream_is_the_whole_answer_token_by_token(client: openai.OpenAI):
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 5}
    whole = ask(client, text_part(), clip(), **options)
    usage = {"include_usage": True}
    chunks = list(ask(client, text_part(), clip(), **options, stream=True, stream_options=usage))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert len(deltas) > 10
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_several_answers_are_drawn_apart_and_the_question_counts_once(client: openai.OpenAI):
    options = {"max_tokens": 12, "temperature": 1.5, "seed": 7}
    one = ask(client, text_part(), clip(), **options)
    three = ask(client, text_part(), clip(), **options, n=3)
    answers = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert answers[0] == one.choices[0].message.content
    assert len(set(answers)) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(client, text_part(), clip(), **options, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == answers


def test_log_probabilities_come_with_every_token(client: openai.OpenAI):
    choice = ask(client, text_part(), clip(), logprobs=True).choices[0]
    tokens = choice.logprobs.content
    assert 0 < len(tokens) <= 8
    assert all(token.logprob < 0 for token in tokens)
    assert [token.token for token in tokens if token.bytes] == [
        bytes(token.bytes).decode() for token in tokens if token.bytes
    ]
    chunks = ask(client, text_part(), clip(), logprobs=True, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [lp.content[0].logprob for lp in streamed if lp] == pytest.approx([token.logprob for token in tokens])


def post_form(endpoint: str, *fields: tuple[str, Any]) -> httpx.Response:
    files = [(name, (None, value) if isinstance(value, str) else ("clip.wav", value)) for name, value in fields]
    return httpx.post(f"{endpoint}/v1/audio/questions", files=files, timeout=60)


def sound(seed: int = 0) -> bytes:
    return base64.b64decode(clip(seed=seed)["input_audio"]["data"])


def test_a_form_is_answered_as_the_chat_is(client: openai.OpenAI, endpoint: str):
    body = post_form(endpoint, ("file", sound()), ("question", "what is heard?"), ("max_tokens", "8")).json()
    assert body["answer"] == ask(client, text_part(), clip()).choices[0].message.content
    assert body["model"] == "mellow"
    assert body["heard"] == [{"start": 0.0, "end": 1.0}]
    two = post_form(endpoint, ("file", sound(1)), ("file", sound(2)), ("question", "what differs?")).json()
    assert len(two["heard"]) == 2


def test_a_form_with_a_field_that_is_no_text_is_refused_with_its_name_escaped(endpoint: str):
    parts = [("file", sound()), ("question", b"what is heard?"), ("\\ud800", b"1"), ("\\ud800", b"2")]
    lines = [f'--x\r\nContent-Disposition: form-data; name="{name}"' for name, _ in parts]
    lines[0] += '; filename="a.wav"'
    body = b"".join(line.encode() + b"\r\n\r\n" + part + b"\r\n" for line, (_, part) in zip(lines, parts, strict=True))
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    response = httpx.post(f"{endpoint}/v1/audio/questions", content=body + b"--x--\r\n", headers=headers, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "\\ud800"


def test_given_choices_come_back_with_probabilities_the_likeliest_first(endpoint: str):
    choices = ["tone", "noise burst", "a loud tone"]
    fields = [("file", sound()), ("question", "which of these is heard?"), *(("choices", choice) for choice in choices)]
    body = post_form(endpoint, *fields).json()
    assert sorted(item["choice"] for item in body["choices"]) == sorted(choices)
    probabilities = [item["probability"] for item in body["choices"]]
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities, reverse=True)
    assert body["answer"] == body["choices"][0]["choice"]
    assert body["finish_reason"] == "choice"


def test_mellow_ask_prints_the_same_for_the_endpoint_and_its_folder(
    demo: LocalRay, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    file = tmp_path / "long.wav"
    file.write_bytes(base64.b64decode(clip(seconds=12)["input_audio"]["data"]))
    drawn = ["--window", "each", "--temperature", "1", "--seed", "3", "--max-new-tokens", "8"]
    for options in ([], drawn, ["--choice", "tone", "--choice", "noise burst"]):
        for model in (f"{endpoint}/v1", demo.uri("model")):
            main(["ask", str(file), "which of these is heard?", "--model", model, *options])
        lines = capsys.readouterr().out.split("\n")[:-1]
        assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ([("question", "what is heard?")], "file", "required"),
        ([("file", b"RIFF"), ("question", "what is heard?")], "file[0]", "clip 0: not decodable"),
        ([("file", b"x")] * 3 + [("question", "what is heard?")], "file", "3 files: send one or two"),
        ([("file", b"x"), ("question", "  ")], "question", "is empty"),
        ([("file", b"x"), ("question", "what?"), ("choices", "")], "choices.0", "at least 1 character"),
        ([("file", b"x"), ("question", "what?"), ("question", "why?")], "question", "2 times: send it once"),
        ([("file", b"x"), ("question", "what?"), ("colour", "red")], "colour", "not permitted"),
        ([("file", b"x"), ("question", "what?"), ("seed", str(2**70))], "seed", "less than"),
    ],
)
def test_a_bad_form_is_refused_with_the_field_named(endpoint: str, fields: list, param: str, message: str):
    response = post_form(endpoint, *fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert message in error["message"]


def test_models_probes_and_schema_are_served(client: openai.OpenAI, endpoint: str):
    assert [model.id for model in client.models.list().data] == ["mellow"]
    assert httpx.get(f"{endpoint}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{endpoint}/readyz").json() == {"status": "ready"}
    schema = httpx.get(f"{endpoint}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/audio/questions", "/v1/models"} <= set(schema["paths"])
    refused = httpx.post(f"{endpoint}/v1/models")
    assert refused.status_code == 405
    assert refused.json()["error"]["type"] == "invalid_request_error"


def readme_blocks(language: str, holds: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.S)
    return [block for block in blocks if holds in block]


def test_the_readmes_curl_commands_and_client_are_answered(endpoint: str, tmp_path: Path):
    (tmp_path / "clip.flac").write_bytes(encode(np.zeros(RATE, np.float32), RATE, "FLAC"))
    commands, (program,) = readme_blocks("sh", "curl http")[0], readme_blocks("python", "OpenAI(")

    def here(text: str) -> str:
        asked = text.replace("runs/demo/corpus/audio/test/000000.flac", str(tmp_path / "clip.flac"))
        return asked.replace("http://127.0.0.1:8000", endpoint)

    curls = [command for command in here(commands).replace("\\\n", "").splitlines() if command.startswith("curl")]
    assert len(curls) == 2
    for command in curls:
        quiet = command.replace("curl ", "curl --silent --show-error ", 1)
        curled = subprocess.run(["sh", "-c", quiet], capture_output=True)
        assert "answer" in json.loads(curled.stdout), curled
    ran = subprocess.run([sys.executable, "-c", here(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_a_url_is_refused_where_no_host_is_allowed(client: openai.OpenAI):
    part = {"type": "audio_url", "audio_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    with pytest.raises(openai.BadRequestError, match="not fetched from this address"):
        ask(client, text_part(), part)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([clip()], {}, "no text"),
        ([text_part()], {}, "0 clips: send one or two"),
        ([text_part(), clip(), clip(), clip()], {}, "3 clips: send one or two"),
        ([text_part(), audio_part(b"")], {}, "clip 0: the file has 0 bytes"),
        ([text_part(), audio_part(b"not audio at all")], {}, "clip 0: not decodable as wav, flac, ogg or mp3"),
        ([text_part(), clip(), audio_part(b"RIFF")], {}, "clip 1: not decodable"),
        (
            [text_part(), {"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}],
            {},
            "clip 0 is not base64",
        ),
        ([text_part("what? " * 100), clip()], {}, "the model reads 24: shorten it"),
        ([text_part(), clip()], {"temperature": 2.5}, "temperature"),
        ([text_part(), clip()], {"top_p": 0.0}, "top_p"),
        ([text_part(), clip()], {"stop": [""]}, "stop"),
        ([text_part(), clip(), clip()], {"extra_body": {"window": "pair"}}, "makes two clips of one recording"),
        ([text_part(), clip()], {"stream": "soon"}, "stream"),
        ([text_part(), clip()], {"n": 0}, "n: "),
        ([text_part(), clip()], {"seed": 2**64}, "seed"),
        ([text_part(), clip()], {"presence_penalty": 1}, "presence_penalty"),
        ([text_part(), long_header()], {}, "s long: the limit is 600 s"),
        ([text_part(), many_channels()], {}, "9 channels at 32000 Hz: expected 1 to 8"),
        ([text_part(), loud()], {}, "NaN, infinity or a value above 1e+10"),
        (
            [text_part(), clip("FLAC", seconds=90)],
            {"n": 8, "extra_body": {"window": "each"}},
            "72 answers to 9 windows: at most 64 at once",
        ),
        ([text_part(), clip()], {"max_tokens": 0}, "max_tokens"),
        ([text_part(), {"type": "image_url", "image_url": {"url": "x"}}], {}, "messages.0.content"),
    ],
)
def test_a_bad_request_is_refused_with_the_fault_named(
    client: openai.OpenAI, parts: list[dict[str, Any]], options: dict[str, Any], message: str
):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, *parts, **options)
    body: Any = error.value.body
    assert message in body["message"]
    assert body["type"] == "invalid_request_error"
    assert body["param"]


def test_an_unknown_model_is_not_found(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="'whisper' is not served here; 'mellow' is"):
        ask(client, text_part(), clip(), model="whisper")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"model": "mellow", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "mellow", "messages": [{"role": "user", "content": "what?"}], "\\ud800": 1}',
    ],
)
def test_a_body_that_is_no_request_is_refused_in_openais_shape(endpoint: str, body: bytes):
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{endpoint}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


def metric(demo: LocalRay, name: str, **tags: str) -> dict[str, float]:
    """Return what Prometheus would see of a metric by replica, of those whose tags are these."""
    found: dict[str, float] = {}
    for line in httpx.get(f"http://127.0.0.1:{demo.metrics_port}/metrics").text.splitlines():
        if line.startswith(f"ray_{name}{{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if tags.items() <= labels.items():
                found[labels["replica"]] = found.get(labels["replica"], 0.0) + float(line.split()[-1])
    return found


def eventually(check: Callable[[], bool], seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not check() and time.monotonic() < until:
        time.sleep(0.25)
    return check()


def settled(read: Callable[[], Reading], seconds: float = 12.0) -> Reading:
    """Return what is read once it has been the same for so long: reports of earlier requests have all arrived."""
    last, since = read(), time.monotonic()
    while time.monotonic() < since + seconds:
        time.sleep(0.5)
        if (now := read()) != last:
            last, since = now, time.monotonic()
    return last


def test_prometheus_sees_requests_tokens_first_tokens_caches_and_queue(demo: LocalRay, client: openai.OpenAI):
    def counts() -> list[float]:
        names = (
            "mellow_requests_total",
            "mellow_tokens_total",
            "mellow_first_token_seconds_count",
            "mellow_cache_total",
        )
        return [sum(metric(demo, name).values()) for name in names]

    before = counts()
    ask(client, text_part(), clip(seed=99))
    assert eventually(lambda: all(new > old for new, old in zip(counts(), before, strict=True)))
    gauges = ("mellow_batch_size", "mellow_queue", "mellow_in_flight")
    assert eventually(lambda: all(metric(demo, name) for name in gauges))


@pytest.mark.extended
def test_clients_that_go_away_free_their_slots(demo: LocalRay, client: openai.OpenAI):
    busy = {"max_tokens": 300, "temperature": 2.0, "stream": True}

    def leave(seed: int) -> None:
        stream = ask(client, text_part(), clip(seed=seed), **busy, seed=seed, n=8)
        next(iter(stream))
        stream.response.close()

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(leave, range(24)))
    names = ("mellow_in_flight", "mellow_batch_size", "mellow_queue")
    idle = eventually(lambda: all(set(metric(demo, name).values()) == {0.0} for name in names), seconds=60)
    assert idle, {name: metric(demo, name) for name in names}
    assert ask(client, text_part(), clip()).choices


def deploy(demo: LocalRay, *arguments: str) -> dict[str, Any]:
    return demo.submit("deploy", "--port", str(demo.port), *arguments)


def known_answers(demo: LocalRay, client: openai.OpenAI, folder: Path, answer: str | None = None) -> list[str]:
    """Write a gate: what the served model says of two clips, or a given answer; return the options that name it."""
    records = []
    for seed in range(2):
        (folder / f"{seed}.wav").write_bytes(sound(seed))
        said = ask(client, text_part(), clip(seed=seed), max_tokens=64).choices[0].message.content
        records.append(Record("t", f"{seed}.wav", "", "", "", "what is heard?", answer or said, "gate"))
    write_records(str(folder / "gate.json"), records)
    return ["--gate.records", str(folder / "gate.json"), "--gate.audio-root", str(folder)]


@pytest.mark.extended
def test_a_version_takes_over_without_a_failed_request_and_one_that_fails_the_gate_never_answers(
    demo: LocalRay, client: openai.OpenAI, tmp_path: Path
):
    folders = {name: tmp_path / name for name in ("right", "wrong")}
    for folder in folders.values():
        folder.mkdir()
    write_tiny_model(demo.uri("next"), seed=1)
    options = {"temperature": 1.5, "seed": 0, "max_tokens": 16}
    before = ask(client, text_part(), clip(), **options).choices[0].message.content
    right, wrong = (
        known_answers(demo, client, folders["right"]),
        known_answers(demo, client, folders["wrong"], "a thing that no random model says"),
    )
    answers: list[str] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            answers.append(ask(client, text_part(), clip(), **options).choices[0].message.content)
            time.sleep(0.05)  # leaves two cores time to start replicas

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load) for _ in range(2)]
        try:
            with pytest.raises(JobError, match="does not pass the gate"):
                deploy(demo, "--model", demo.uri("next"), *wrong)
            assert set(answers) == {before}
            deploy(demo, "--model", demo.uri("model"), *right)
            assert set(answers) == {before}
            deploy(demo, "--model", demo.uri("next"))
            after = ask(client, text_part(), clip(), **options).choices[0].message.content
        finally:
            over.set()
        for done in loads:
            done.result()  # raises what any request raised
    assert after != before
    assert set(answers) == {before, after}


@pytest.mark.extended
def test_the_endpoint_is_judged_as_the_folder_that_it_serves_is(demo: LocalRay, client: openai.OpenAI, tmp_path: Path):
    records = []
    for seed in range(3):
        (tmp_path / f"{seed}.wav").write_bytes(sound(seed))
        records.append(Record("t", f"{seed}.wav", "", "", "", "is there a tone?", "yes", "Served-Presence"))
    write_records(str(tmp_path / "test.json"), records)
    write_tiny_model(demo.uri("judged"), seed=3)
    deploy(demo, "--model", demo.uri("judged"))
    fields = ["--benchmark", "clotho-aqa", "--corpus", str(tmp_path), "--audio-root", str(tmp_path), "--workers", "1"]
    fields += ["--max-new-tokens", "16", "--conditions", "audio,noise,text_only", "--endpoint.text-only", "silence"]
    said = {}
    for name, model in (("folder", demo.uri("judged")), ("endpoint", f"http://127.0.0.1:{demo.port}/v1")):
        demo.submit("evaluate", *fields, "--model", model, "--output", demo.uri("judged-by", name))
        table = pq.read_table(demo.uri("judged-by", name, "predictions.parquet"))
        rows = table.select(["condition", "prediction", "error"]).to_pylist()
        said[name] = [row for row in rows if row["condition"] == "audio"]
        assert len(rows) == 9
    assert said["folder"] == said["endpoint"]


@pytest.mark.extended
def test_another_name_is_served_beside(demo: LocalRay, client: openai.OpenAI):
    write_tiny_model(demo.uri("other"), seed=2)
    deploy(demo, "--model", demo.uri("other"), "--name", "other")
    assert [model.id for model in client.models.list().data] == ["mellow", "other"]
    options = {"temperature": 1.5, "seed": 0, "max_tokens": 16}
    says = [ask(client, text_part(), clip(), model=model, **options) for model in ("mellow", "other")]
    assert says[0].choices[0].message.content != says[1].choices[0].message.content
    assert says[1].model == "other"


@pytest.mark.extended
def test_a_model_that_nobody_asks_has_no_replica_and_wakes_for_a_question(demo: LocalRay, client: openai.OpenAI):
    config = yaml.safe_load((REPOSITORY / "serve/config.yaml").read_text())
    scaling = config["applications"][1]["deployments"][0]["autoscaling_config"]
    scaling |= {"min_replicas": 0, "downscale_delay_s": 1, "look_back_period_s": 11}
    Path(demo.uri("asleep.yaml")).write_text(yaml.safe_dump(config))
    deploy(demo, "--model", demo.uri("other"), "--name", "other", "--serve", demo.uri("asleep.yaml"))
    assert eventually(lambda: not replicas_of(serve_details(demo.dashboard), "other"), seconds=120)
    assert ask(client, text_part(), clip(), model="other").choices
    assert replicas_of(serve_details(demo.dashboard), "other")


@pytest.fixture(scope="module")
def strict(demo: LocalRay, endpoint: str) -> str:
    """The same endpoint with small limits and keys, and two replicas of its model; what follows is asked of it."""
    keys = Path(demo.uri("keys.txt"))
    keys.write_text(f"# who may ask\nalice {hashlib.sha256(b'open sesame').hexdigest()}\n")
    config = yaml.safe_load((REPOSITORY / "serve/config.yaml").read_text())
    application, model = config["applications"]
    application["args"] = {
        "api_keys_file": str(keys),
        "requests": {"max_body_bytes": 200_000, "body_seconds": 1.0, "answer_seconds": 1.0, "max_in_flight": 8},
        "clips": {"max_seconds": 1.5, "url_hosts": ["127.0.0.1"]},
    }
    model["deployments"][0]["autoscaling_config"]["min_replicas"] = 2
    Path(demo.uri("strict.yaml")).write_text(yaml.safe_dump(config))
    deploy(demo, "--model", demo.uri("model"), "--serve", demo.uri("strict.yaml"))
    return endpoint


@pytest.fixture(scope="module")
def alice(strict: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{strict}/v1", api_key="open sesame", max_retries=0)


def test_only_a_known_key_is_let_in(strict: str, alice: openai.OpenAI, client: openai.OpenAI):
    assert ask(alice, text_part(), clip()).choices
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        ask(client, text_part(), clip())
    assert httpx.get(f"{strict}/v1/models").status_code == 401
    assert httpx.get(f"{strict}/healthz").status_code == 200


def test_a_body_past_its_size_is_refused_before_it_is_read(strict: str, alice: openai.OpenAI):
    with pytest.raises(openai.APIStatusError, match="more than 200000 bytes") as error:
        ask(alice, text_part(), clip(seconds=5))
    assert error.value.status_code == 413


def test_a_clip_past_its_length_is_refused(alice: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match=r"clip 0: 2\.0 s long: the limit is 1\.5 s"):
        ask(alice, text_part(), clip(seconds=2))


def test_a_client_that_sends_slowly_is_given_up(strict: str):
    host, port = strict.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer open sesame\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_what_takes_too_long_ends_with_a_504_or_an_error_event(alice: openai.OpenAI):
    # Answers that seldom end before their length: 64 at once are some 17,000 tokens, more than a second's.
    busy = {"max_tokens": 300, "temperature": 0.3, "n": 8}

    def whole(seed: int) -> int:
        try:
            ask(alice, text_part(), clip(seed=seed), **busy)
        except openai.APIStatusError as error:
            return error.status_code
        return 200

    def streamed(seed: int) -> str | None:
        try:
            for _ in ask(alice, text_part(), clip(seed=seed), **busy, stream=True):
                pass
        except openai.APIError as error:
            return error.code
        return None

    with ThreadPoolExecutor(14) as pool:
        codes = list(pool.map(whole, range(14)))
        events = list(pool.map(streamed, range(3)))
    assert set(codes) <= {200, 429, 504}
    assert 429 in codes  # of fourteen at once, eight are let in, with more answers than there are slots
    assert 504 in codes or "deadline" in events
    assert set(events) <= {None, "deadline"}


def test_a_url_is_fetched_from_a_host_that_is_allowed_and_no_further(alice: openai.OpenAI, tmp_path: Path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:1/secret")
                self.end_headers()
            else:
                super().do_GET()

    (tmp_path / "clip.wav").write_bytes(sound())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:

        def from_url(path: str) -> Any:
            url = f"http://127.0.0.1:{server.server_port}/{path}"
            return ask(alice, text_part(), {"type": "audio_url", "audio_url": {"url": url}})

        expected = ask(alice, text_part(), clip()).choices[0].message.content
        assert from_url("clip.wav").choices[0].message.content == expected
        with pytest.raises(openai.BadRequestError, match="host answered 404"):
            from_url("none.wav")
        with pytest.raises(openai.BadRequestError, match="host answered 302"):
            from_url("away")
        with pytest.raises(openai.BadRequestError, match="not fetched"):
            ask(alice, text_part(), {"type": "audio_url", "audio_url": {"url": "http://localhost/clip.wav"}})
    finally:
        server.shutdown()


@pytest.mark.extended
def test_the_same_clips_go_to_the_replica_that_has_them_cached(demo: LocalRay, alice: openai.OpenAI):
    def misses() -> float:
        return sum(metric(demo, "mellow_cache_total", cache="prefix", outcome="miss", application="mellow").values())

    def hits() -> float:
        return sum(metric(demo, "mellow_cache_total", cache="prefix", outcome="hit", application="mellow").values())

    before = settled(lambda: (hits(), misses()))
    for _ in range(6):
        for seed in range(200, 204):
            ask(alice, text_part(), clip(seed=seed), max_tokens=1)
    assert eventually(lambda: hits() - before[0] + misses() - before[1] == 24), (before, hits(), misses())
    assert misses() - before[1] == 4  # each pair of clips is read by one of the two replicas, once
    assert len(metric(demo, "mellow_tokens_total", application="mellow")) >= 2
