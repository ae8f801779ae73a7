"""Evaluation on Ray Data: model folder, endpoint, conditions, failures, and resume."""

import base64
import io
import json
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mellow_platform import storage
from mellow_platform.data.audio import decode, encode
from mellow_platform.data.records import Record, read_records, write_records
from mellow_platform.data.shards import read_records as read_shard_records
from mellow_platform.evaluation.dataset import QuestionSource
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.evaluation.evaluate_job import evaluate, select
from mellow_platform.evaluation.models import noise_for
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.request import Clip, ClipFeatures, Request
from mellow_platform.model import HTSATEncoder
from mellow_platform.model.folder import load_model, save_pretrained
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from tests.conftest import REPOSITORY
from tests.shared_ray import kill_when
from tests.small_corpus import write_features
from tests.tiny_model import write_tiny_model

FIELDS = {"split": "train", "max_new_tokens": 6, "batch_size": 16, "workers": 1, "rows_per_part": 8, "resamples": 100}


@pytest.fixture(scope="module")
def made(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A corpus, its features, and an untrained model with the encoder of the features."""
    root = tmp_path_factory.mktemp("evaluate")
    write_features(root)
    write_tiny_model(str(root / "model"))
    model, _ = load_model(str(root / "model"))
    model.audio_encoder.load_state_dict(HTSATEncoder.from_pretrained(str(root / "encoder")).state_dict())
    save_pretrained(model, str(root / "model"))
    return SimpleNamespace(root=root, model=str(root / "model"), corpus=str(root / "corpus"))


def configured(made: SimpleNamespace, name: str, **fields: Any) -> EvaluateConfig:
    return EvaluateConfig(**FIELDS | {"model": made.model, "output": str(made.root / name)} | fields)


@pytest.fixture(scope="module")
def whole(made: SimpleNamespace) -> EvaluateConfig:
    """An uninterrupted evaluation from shards."""
    config = configured(made, "whole", shards=str(made.root / "features"))
    evaluate(config)
    return config


def rows_of(config: EvaluateConfig, condition: str = "audio") -> list[dict[str, Any]]:
    rows = pq.read_table(storage.join(config.output, "predictions.parquet")).to_pylist()
    return [row for row in rows if row["condition"] == condition]


def test_answers_equal_engine_under_all_conditions(made: SimpleNamespace, whole: EvaluateConfig):
    records = read_records(f"{made.corpus}/train.json")
    by_file = {path: f"{made.corpus}/audio/{path}" for record in records for path in record.filepaths}
    with Engine.load(made.model, max_new_tokens=6, cpu_threads=1) as engine:
        samples = engine.processor.feature_extractor.clip_samples
        waveforms = {path: decode(Path(uri).read_bytes(), 32_000)[:samples] for path, uri in by_file.items()}
        ids = FeatureStore.load(str(made.root / "features"))
        id_of = dict(zip(ids.filepaths, ids.rows, strict=True))
        noise = {path: noise_for(id_of[path], samples) for path in by_file}
        rows = [ids.rows[id_of[path]] for path in by_file]
        mean = ClipFeatures(
            *(ids.arrays[name][rows].astype(float).mean(0).astype("f2") for name in ("frames", "latent"))
        )
        by_condition: list[tuple[str, dict[str, Clip]]] = [
            ("audio", {**waveforms}), ("noise", {**noise}), ("text_only", dict.fromkeys(by_file, mean)),
        ]  # fmt: skip
        for condition, clips in by_condition:
            requests = [Request(record.input, tuple(clips[path] for path in record.filepaths), 6) for record in records]
            expected = [answer.text for answer in engine.generate(requests)]
            answered = rows_of(whole, condition)
            assert [row["prediction"] for row in answered] == expected, condition
            assert [row["question"] for row in answered] == [record.input for record in records]
            assert all(row["seconds"] > 0 for row in answered)
    assert {row["prediction"] for row in rows_of(whole)} != {row["prediction"] for row in rows_of(whole, "noise")}


def test_files_and_shards_give_same_answers(made: SimpleNamespace, whole: EvaluateConfig):
    files = configured(made, "files", corpus=made.corpus, conditions=["audio"])
    evaluate(files)
    assert [row["prediction"] for row in rows_of(files)] == [row["prediction"] for row in rows_of(whole)]
    assert [row["clips"] for row in rows_of(files)] == [row["clips"] for row in rows_of(whole)]


def test_cut_questions_and_answers_are_counted(whole: EvaluateConfig):
    report = storage.read_json(storage.join(whole.output, "report.json"))
    cut = [row["detail"] for row in rows_of(whole) if row["detail"]]
    assert report["cut"]["audio"] == dict(Counter(cut))
    assert any("answer cut to 6 tokens" in detail for detail in cut)
    assert any("prompt cut to 24 tokens" in detail for detail in cut)
    assert report["seconds_an_answer"]["audio"]["max"] >= report["seconds_an_answer"]["audio"]["median"] > 0


@pytest.mark.extended
def test_killed_job_resumes(whole: EvaluateConfig, tmp_path: Path, capsys):
    job = whole.model_copy(update={"output": str(tmp_path / "out")})
    (tmp_path / "job.yaml").write_text(json.dumps(job.model_dump()))
    command = [sys.executable, str(REPOSITORY / "jobs/evaluate.py"), "--config", str(tmp_path / "job.yaml")]
    receipts, answers = tmp_path / "out/receipts/answers", tmp_path / "out/answers"
    kill_when(lambda: receipts.exists() and any(receipts.glob("*.json")), command, tmp_path / "log")
    assert not (tmp_path / "out/report.json").exists()
    done = {file.stem: (answers / f"{file.stem}.parquet").stat().st_mtime_ns for file in receipts.glob("[a-z]*.json")}
    capsys.readouterr()
    report = evaluate(job)
    assert "are done already" in capsys.readouterr().out
    assert {name: (answers / f"{name}.parquet").stat().st_mtime_ns for name in done} == done
    for condition in ("audio", "noise", "text_only", "chance"):
        again, before = rows_of(job, condition), rows_of(whole, condition)
        assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in before]
    # A finished job sends no requests, and recomputes its scores.
    files = {file: file.stat().st_mtime_ns for file in answers.iterdir()}
    compared = evaluate(job.model_copy(update={"against": whole.output}))
    assert {file: file.stat().st_mtime_ns for file in answers.iterdir()} == files
    assert compared["benchmarks"] == report["benchmarks"]
    assert all(row["p"] == 1 for row in compared["comparison"]["differences"])


def test_output_of_other_configuration_raises(whole: EvaluateConfig):
    with pytest.raises(ValueError, match=r"different: max_new_tokens\)"):
        evaluate(whole.model_copy(update={"max_new_tokens": 7}))
    with pytest.raises(ValueError, match=r"different: questions\)"):
        evaluate(whole.model_copy(update={"limit": 3}))


@pytest.mark.extended
def test_unreadable_clips_count_as_failures(made: SimpleNamespace):
    records = [
        Record("c", clip, "", "", "", "is there a tone?", "yes", "X-Presence")
        for clip in ("train/000000.flac", "gone.flac", "train/000001.flac", "text.flac")
    ]
    folder = made.root / "failing"
    write_records(str(folder / "train.json"), records)
    (Path(made.corpus) / "audio/text.flac").write_text("not a sound")
    fields = {"corpus": str(folder), "audio_root": f"{made.corpus}/audio", "benchmark": ["clotho-aqa"]}
    config = configured(made, "some-failed", **fields, conditions=["audio", "noise"], max_failed_share=0.5)
    report = evaluate(config)
    assert report["no_answer"] == {"audio": {"missing": 1, "not_audio": 1}, "noise": {}}
    rows = rows_of(config)
    assert [row["error"] for row in rows] == [None, "missing", None, "not_audio"]
    assert [rows[number]["prediction"] for number in (1, 3)] == ["", ""]
    assert rows[1]["detail"] == f"{made.corpus}/audio/gone.flac does not exist"
    strict = configured(made, "too-many-failed", **fields, conditions=["audio", "noise"], max_failed_share=0.25)
    with pytest.raises(ValueError, match=r"2 of 4 questions .*\(missing 1, not_audio 1\)"):
        evaluate(strict)


class Listener(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint with audio input that answers `yes` if a clip is loud.

    Every request fails twice, with 429 and with 500, before it is answered.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.requests: list[dict[str, Any]] = []
        self.down = False
        self.tries: Counter[str] = Counter()
        self.keys: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Answering(BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "ears", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(data)
        self.server.keys.add(self.headers["Authorization"])
        self.server.tries[data.decode()] += 1
        tries = self.server.tries[data.decode()]
        if tries < 3:
            return self._send(429 if tries == 1 else 500, {"error": {"message": "later"}}, {"retry-after-ms": "5"})
        self.server.requests.append(body)
        parts = body["messages"][0]["content"]
        if "forbidden" in parts[0]["text"] or ("insist" in parts[0]["text"] and len(parts) == 1):
            return self._send(400, {"error": {"message": "this is not answered"}})
        if "poison" in parts[0]["text"] or self.server.down:
            return self._send(500, {"error": {"message": "tripped"}}, {"retry-after-ms": "5"})
        sounds = [part["input_audio"] for part in parts if part["type"] == "input_audio"]
        levels = [np.abs(decode(base64.b64decode(sound["data"]), 32_000)).max() for sound in sounds]
        text = "yes" if levels and max(levels) > 0.3 else "no"
        text, reason = ("y", "length") if "length" in parts[0]["text"] else (text, "stop")
        text = "" if "silent" in parts[0]["text"] else text
        text = "yes \ud83d" if "half" in parts[0]["text"] else text
        if "gateway" in parts[0]["text"]:
            return self._send(200, "<html>sign in</html>", {"Content-Type": "text/html"})
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        self._send(
            200, {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        )

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    server = Listener()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def loud_and_soft(made: SimpleNamespace) -> Path:
    """Questions about a loud clip, a soft clip in another container, and the pair; the endpoint refuses one."""
    folder = made.root / "levels"
    time_line = np.arange(32_000) / 32_000
    for name, level in (("loud.wav", 0.8), ("soft.flac", 0.05)):
        waveform = (level * np.sin(2 * np.pi * 440 * time_line)).astype(np.float32)
        data = encode(waveform, 32_000, name.partition(".")[2].upper())
        storage.write_bytes(str(folder / "audio" / name), data)
    asked = [
        ("loud.wav", "", "is it loud?", "yes"),
        ("soft.flac", "", "is it loud?", "no"),
        ("soft.flac", "loud.wav", "is one of them loud?", "yes"),
        ("loud.wav", "", "forbidden?", "yes"),
    ]
    records = [Record("c", one, two, "", "", text, answer, "Levels-Presence") for one, two, text, answer in asked]
    write_records(str(folder / "test.json"), records)
    return folder


def test_endpoint_is_evaluated(
    made: SimpleNamespace, listener: Listener, loud_and_soft: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    config = EvaluateConfig(
        benchmark=["clotho-aqa"], model=listener.url, corpus=str(loud_and_soft), output=str(made.root / "listened"),
        max_failed_share=0.5, resamples=100, workers=1,
    )  # fmt: skip
    report = evaluate(config)
    summary = report["benchmarks"]["clotho-aqa"]["scores"]
    assert [row["prediction"] for row in rows_of(config)] == ["yes", "no", "yes", ""]
    assert summary["audio"]["accuracy"]["value"] == 0.75
    assert summary["text_only"]["accuracy"]["value"] == 0.25
    assert [row["error"] for row in rows_of(config)] == [None, None, None, "refused"]
    assert "this is not answered" in rows_of(config)[3]["detail"]
    assert listener.keys == {"Bearer secret-of-the-test"}
    # Each request was retried until it was answered: four questions under three conditions.
    assert len(listener.requests) == 12
    assert listener.tries.total() == 12 + 2 * len(listener.tries)
    sent = Counter(
        tuple(part["input_audio"]["format"] for part in body["messages"][0]["content"][1:])
        for body in listener.requests
    )
    assert sent[("wav",)] + sent[("wav", "wav")] == 8  # FLAC is sent as WAV, as is noise
    assert sent[()] == 4  # text only
    assert {(body["model"], body["temperature"]) for body in listener.requests} == {("ears", 0.0)}
    files = [file for file in (made.root / "listened").rglob("*") if file.is_file()]
    assert not any(b"secret-of-the-test" in file.read_bytes() for file in files)


@pytest.mark.extended
def test_failing_question_does_not_stop_endpoint_job(made: SimpleNamespace, listener: Listener, loud_and_soft: Path):
    texts = ["is it loud?", "poison?", "silent?", "length?", "half?", "gateway?"]
    records = [Record("c", "loud.wav", "", "", "", text, "yes", "Levels-Presence") for text in texts]
    folder = made.root / "tripping"
    write_records(str(folder / "test.json"), records)
    fields = {"audio_root": str(loud_and_soft / "audio"), "workers": 1, "conditions": ["audio"], "resamples": 100}
    config = EvaluateConfig(
        model=listener.url, corpus=str(folder), output=str(made.root / "tripped"), endpoint={"retries": 3},
        max_failed_share=0.5, **fields,
    )  # fmt: skip
    report = evaluate(config)
    rows = rows_of(config)
    assert [row["error"] for row in rows] == [None, "unanswered", "empty", None, None, "unanswered"]
    assert rows[3]["detail"] == "answer cut to 256 tokens"
    assert rows[4]["prediction"] == "yes ?"
    assert rows[5]["detail"] == 'response is not a chat completion: "<html>sign in</html>"'
    assert report["no_answer"]["audio"] == {"unanswered": 2, "empty": 1}
    # Without any answer nothing is written, so that the next run retries.
    write_records(str(folder / "test.json"), [records[1]])
    with pytest.raises(Exception, match=r"answers no question: .*tripped"):
        evaluate(config.model_copy(update={"output": str(made.root / "all-tripped")}))
    assert not list((made.root / "all-tripped/answers").glob("*"))


@pytest.mark.extended
def test_resubmitted_job_retries_only_unanswered_questions(made: SimpleNamespace, loud_and_soft: Path):
    folder, server = made.root / "again", Listener()
    texts = ["poison?", *(f"is it loud, {number}?" for number in range(7))]
    records = [Record("c", "loud.wav", "", "", "", text, "yes", "Levels-Presence") for text in texts]
    write_records(str(folder / "test.json"), records)
    config = EvaluateConfig(
        model=server.url, corpus=str(folder), audio_root=str(loud_and_soft / "audio"), output=str(folder / "out"),
        conditions=["audio"], endpoint={"retries": 2}, rows_per_part=4, workers=1, resamples=100, max_failed_share=0.1,
    )  # fmt: skip

    def asked_since(number: int) -> Counter[str]:
        return Counter(body["messages"][0]["content"][0]["text"] for body in server.requests[number:])

    for _ in range(2):
        before = len(server.requests)
        with pytest.raises(ValueError, match=r"1 of 8 .*\(unanswered 1\)"):
            evaluate(config)
    assert asked_since(before).keys() == {"poison?"}
    # A larger share completes the job; a completed job sends no request, not even for the model's name.
    allowed = config.model_copy(update={"max_failed_share": 0.2})
    evaluate(allowed)
    server.down, tries = True, server.tries.total()
    assert evaluate(allowed)["benchmarks"]["families"]["no_answer"] == {"audio": {"unanswered": 1}}
    assert server.tries.total() == tries
    # A new condition is answered separately; answers survive if the server is down by then.
    more = allowed.model_copy(update={"conditions": ["audio", "noise"]})
    with pytest.raises(ValueError, match="unanswered 4"):
        evaluate(more)
    server.down, before = False, len(server.requests)
    assert evaluate(more)["conditions"] == ["audio", "noise"]
    assert asked_since(before) - Counter({"poison?": 100}) == Counter(texts[1:])
    assert [row["prediction"] for row in rows_of(more)] == ["", *["yes"] * 7]
    server.shutdown()
    server.server_close()
    assert evaluate(more)["conditions"] == ["audio", "noise"]


@pytest.mark.extended
def test_text_only_silence_for_models_that_need_audio(made: SimpleNamespace, listener: Listener, loud_and_soft: Path):
    folder = made.root / "insisting"
    records = [
        Record("c", "loud.wav", "", "", "", f"insist: is it loud, {number}?", "yes", "Levels-Presence")
        for number in range(3)
    ]
    write_records(str(folder / "test.json"), records)
    config = EvaluateConfig(
        model=listener.url, corpus=str(folder), audio_root=str(loud_and_soft / "audio"), output=str(folder / "out"),
        conditions=["audio"], endpoint={"retries": 3}, workers=1, resamples=100,
    )  # fmt: skip
    evaluate(config)
    config = config.model_copy(update={"conditions": ["audio", "text_only"]})
    with pytest.raises(ValueError, match=r"3 of 3 questions .*\(refused 3\)"):
        evaluate(config)
    details = pq.read_table(folder / "out/answers/text_only-omit-000000.parquet")["detail"].to_pylist()
    assert all(detail.endswith("set endpoint.text_only: silence") for detail in details)
    asked = len(listener.requests)
    silent = config.model_copy(update={"endpoint": config.endpoint.model_copy(update={"text_only": "silence"})})
    assert evaluate(silent)["benchmarks"]["families"]["no_answer"] == {}
    assert len(listener.requests) == asked + 3


@pytest.mark.extended
def test_question_ids_do_not_depend_on_dropped_records_and_partners(made: SimpleNamespace):
    """Whatever preprocess drops, and whichever partners it draws."""
    folder = made.root / "tars"
    sounds = [(Path(made.corpus) / f"audio/train/{number:06d}.flac").read_bytes() for number in range(3)]
    asked = {"taskname": "audiocaps", "input": "caption the audio.", "subtype": "AudioCaps.json"}
    folder.mkdir()
    with tarfile.open(folder / "test-0.tar", "w") as tar:
        for name, data in (("a", b"no sound"), *zip("bcd", sounds, strict=True)):
            captions = [asked | {"answer": f"{name} barks {number}"} for number in range(2)]
            for suffix, content in ((".flac", data), (".json", json.dumps(captions).encode())):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    config = PreprocessConfig(
        source="webdataset", corpus=str(folder), output=str(folder / "shards"), size="mellow-tiny", features="encoder",
        encoder=str(made.root / "encoder"), partner="random", max_failed_share=0.5,
    )  # fmt: skip
    made_shards = preprocess(config)
    assert made_shards.counts["records_dropped"] == 2
    assert len(set(read_shard_records(str(folder / "shards"), "test")["clip2"].to_pylist())) > 1
    job = configured(made, "by-recording", shards=str(folder / "shards"), split="test", benchmark=["captioning"])
    items = select(job, QuestionSource(job))[0][1]
    assert [item.references for item in items] == [(f"{name} barks 0", f"{name} barks 1") for name in "bcd"]
    assert [item.id for item in items] == ["test/2", "test/4", "test/6"]
    assert evaluate(job)["benchmarks"]["captioning"]["scored"] == 3


def test_shards_of_other_encoder_raise(made: SimpleNamespace):
    write_tiny_model(str(made.root / "stranger"), seed=9)
    config = configured(made, "strange", shards=str(made.root / "features"), model=str(made.root / "stranger"))
    with pytest.raises(ValueError, match=r"another encoder than that of .*stranger"):
        evaluate(config)


def test_unreachable_endpoint_raises(made: SimpleNamespace, loud_and_soft: Path):
    config = EvaluateConfig(
        model="http://127.0.0.1:9/v1", corpus=str(loud_and_soft), output=str(made.root / "nobody"),
        endpoint={"retries": 0}, workers=1,
    )  # fmt: skip
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/v1 .*Connection error"):
        evaluate(config)


def test_url_with_password_raises():
    with pytest.raises(ValueError, match=r"password.* OPENAI_API_KEY"):
        EvaluateConfig(model="http://me:secret@127.0.0.1/v1", corpus="/c", output="/o")


def test_shards_with_endpoint_raise():
    with pytest.raises(ValueError, match=r"`shards` .*endpoint.* `corpus`"):
        EvaluateConfig(model="https://api.example.org/v1", shards="/s", output="/o")
