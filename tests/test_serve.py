"""Submitted jobs and the endpoint they deploy: a cluster of its own, `ray job submit`, and real HTTP."""

import base64
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from jobs.demo import CLUSTER_LOG, Demo, clear, free_port
from mellow_platform.config import DemoConfig
from mellow_platform.data.audio import encode
from mellow_platform.model import MellowConfig, MellowFeatureExtractor, MellowForConditionalGeneration, MellowProcessor
from mellow_platform.model.folder import save_pretrained
from mellow_platform.model.tokenizer import train_tokenizer
from tests.conftest import REPOSITORY

RATE = 32_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A cluster as the demo starts it, to submit jobs to."""
    ports = {"port": free_port(), "dashboard_port": free_port()}
    demo = Demo(DemoConfig(output=str(tmp_path_factory.mktemp("demo")), corpus=None, keep=False, cpus=8, **ports))
    with demo.cluster():
        yield demo


@pytest.fixture(scope="module")
def client(demo: Demo) -> openai.OpenAI:
    """The official client of an endpoint that serves an untrained tiny model."""
    tokenizer = train_tokenizer(["which of these is heard? a) tone b) noise burst", "a loud tone"])
    processor = MellowProcessor(MellowFeatureExtractor.from_size("mellow-tiny"), tokenizer, prompt_length=24)
    torch.manual_seed(0)
    model = MellowForConditionalGeneration(MellowConfig.from_size("mellow-tiny", vocab_size=len(tokenizer)))
    for part in (model, processor):
        save_pretrained(part, demo.uri("model"))
    deployed = demo.submit("deploy", "--model", demo.uri("model"), "--port", str(demo.config.port))
    assert deployed["applications"] == {"mellow": "RUNNING"}
    return openai.OpenAI(base_url=f"http://127.0.0.1:{demo.config.port}/v1", api_key="none", max_retries=0)


def clip(container: str = "WAV", seconds: float = 1.0, seed: int = 0) -> dict[str, Any]:
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    return audio_part(encode(noise, RATE, container), container.lower())


def audio_part(data: bytes, container: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": container}}


def text_part(text: str = "what is heard?") -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(client: openai.OpenAI, *parts: dict[str, Any], **options: Any) -> Any:
    message: Any = {"role": "user", "content": list(parts)}
    create: Any = client.chat.completions.create
    return create(**{"model": "mellow", "messages": [message], "max_tokens": 8} | options)


def test_a_submitted_corpus_job_writes_the_corpus(demo: Demo):
    arguments = ["--train-clips", "3", "--val-clips", "1", "--test-clips", "2", "--rounds", "1"]
    printed = demo.submit("make_corpus", "--output", demo.uri("corpus"), *arguments)
    assert set(printed["questions"]) == {"train", "val", "test"}
    assert len(list(Path(demo.uri("corpus", "audio")).rglob("*.flac"))) == 6


def test_workers_run_the_submitted_code_and_not_the_installed_one(demo: Demo, tmp_path: Path):
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


def test_a_second_demo_on_the_same_ports_is_refused(demo: Demo):
    second = Demo(demo.config.model_copy(update={"port": free_port()}))
    message = rf"port {demo.config.dashboard_port} is in use: .* --dashboard-port N"
    with pytest.raises(SystemExit, match=message), second.cluster():
        pass


def test_the_demo_deletes_only_what_a_demo_wrote(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds files that no demo wrote"):
        clear(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / CLUSTER_LOG).touch()
    clear(tmp_path)
    assert not tmp_path.exists()


def test_a_job_with_a_wrong_option_fails_and_says_so(demo: Demo, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="job make_corpus failed"):
        demo.submit("make_corpus", "--output", demo.uri("x"), "--trainclips", "3")
    assert "--trainclips is not an option; did you mean --train-clips?" in capsys.readouterr().out


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


def test_models_and_health_are_served(client: openai.OpenAI):
    assert [model.id for model in client.models.list().data] == ["mellow"]
    health = str(client.base_url).removesuffix("/v1/") + "/healthz"
    with urllib.request.urlopen(health, timeout=10) as response:
        assert json.load(response) == {"status": "ok"}


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([clip()], {}, "no text"),
        ([text_part()], {}, "0 input_audio parts: send one or two clips"),
        ([text_part(), clip(), clip(), clip()], {}, "3 input_audio parts: send one or two clips"),
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
        ([text_part(), clip()], {"stream": True}, "stream"),
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


def test_a_body_that_is_not_json_is_refused(client: openai.OpenAI):
    request = urllib.request.Request(
        f"{client.base_url}chat/completions", b"{", {"Content-Type": "application/json"}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == 400
    assert json.load(error.value)["error"]["type"] == "invalid_request_error"
