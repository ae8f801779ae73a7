"""Preprocessing: sources, resume, distinct clips, quarantine, filters, limits and statistics."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from mellow_platform import storage
from mellow_platform.data.audio import decode, encode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.records import Record, read_records, write_records
from mellow_platform.data.shards import read_records as read_shard_records
from mellow_platform.data.splits import split_of
from mellow_platform.model import HTSATEncoder, encoder_config
from mellow_platform.model.folder import save_pretrained
from mellow_platform.preprocessing.corpus_plan import plan_corpus
from mellow_platform.preprocessing.feature_store import FeatureStore
from mellow_platform.preprocessing.inventory import scan_unit
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.preprocessing.preprocess_job import preprocess
from tests.small_corpus import write_corpus

RATE = 32_000


def sound(seed: int, seconds: float = 1.0, container: str = "FLAC") -> bytes:
    samples = np.random.default_rng(seed).normal(0.0, 0.1, round(seconds * RATE))
    return encode(samples.astype(np.float32), RATE, container)


def question(path: str, **fields: str) -> Record:
    values = dict.fromkeys((field.name for field in dataclasses.fields(Record)), "")
    return Record(**values | {"filepath1": path, "input": "what is heard?", "answer": "noise"} | fields)


def write_questions(corpus: Path, clips: dict[str, dict[str, bytes]], **fields: str) -> None:
    """Write clips by split and path, with a question about each."""
    for split in ("train", "val", "test"):
        for path, data in clips.get(split, {}).items():
            storage.write_bytes(str(corpus / "audio" / path), data)
        write_records(str(corpus / f"{split}.json"), [question(path, **fields) for path in clips.get(split, {})])


def config(corpus: Path, output: Path, **fields) -> PreprocessConfig:
    values = {"size": "mellow-tiny", "clips_per_shard": 2, "vocab_size": 300, "split": ["train", "val", "test"]}
    return PreprocessConfig(**values | {"corpus": str(corpus), "output": str(output)} | fields)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Seven clips with a question each; two of them have the same bytes."""
    clips = {"train": {f"{n}.flac": sound(n) for n in range(4)}, "val": {"v.flac": sound(7)}, "test": {}}
    clips["train"]["copy.flac"] = sound(0)
    clips["test"]["t.flac"] = sound(8)
    write_questions(tmp_path / "corpus", clips)
    return tmp_path / "corpus"


@pytest.mark.extended
def test_equal_clips_are_stored_once(cluster: None, corpus, tmp_path):
    manifest = preprocess(config(corpus, tmp_path / "set"))
    assert manifest.counts["clips"] == 7
    assert manifest.counts["distinct_clips"] == 6
    table = manifest.read_table(str(tmp_path / "set"), "clips")
    assert len(table) == 6
    rows = {row["filepath1"]: row["clip1"] for row in read_shard_records(str(tmp_path / "set"), "train").to_pylist()}
    assert rows["copy.flac"] == rows["0.flac"]
    assert len(set(rows.values())) == 4
    assert set(rows.values()) <= set(FeatureStore.load(str(tmp_path / "set")).rows)


def test_resume_writes_only_missing_shards(cluster: None, corpus, tmp_path, capsys):
    whole = preprocess(config(corpus, tmp_path / "whole"))
    output = tmp_path / "set"
    preprocess(config(corpus, output))
    # State after a kill: a shard without its receipt, a missing shard, and a partial file.
    (output / "manifest.json").unlink()
    (output / "receipts/clips/000001.json").unlink()
    (output / "clips/000002.parquet").unlink()
    partial = output / "clips/.000002.parquet.0123456789abcdef0123456789abcdef"
    partial.write_bytes(b"half a shard")
    untouched = output / "clips/000000.parquet"
    before = {
        name: (output / name).stat().st_mtime_ns for name in ("clips/000000.parquet", "records/train/000000.parquet")
    }
    again = preprocess(config(corpus, output))
    assert untouched.exists()
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    assert again.content_hash == whole.content_hash
    for name in again.files:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not partial.exists()
    before_again = files_of(output)
    capsys.readouterr()
    preprocess(config(corpus, output))
    assert "finished" in capsys.readouterr().out
    assert files_of(output) == before_again


def test_other_options_or_input_need_another_folder(cluster: None, corpus, tmp_path):
    first = preprocess(config(corpus, tmp_path / "set-{hash}"))
    assert preprocess(config(corpus, tmp_path / "set-{hash}")).content_hash == first.content_hash
    other = preprocess(config(corpus, tmp_path / "set-{hash}", short_clip="repeat"))
    folders = {Path(manifest.configuration["output"]).name for manifest in (first, other)}
    assert folders == {folder.name for folder in tmp_path.glob("set-*")}
    assert len(folders) == 2
    # An unfinished set is protected, too.
    (tmp_path / "unfinished").mkdir()
    preprocess(config(corpus, tmp_path / "unfinished"))
    (tmp_path / "unfinished/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"partner.*unfinished-"):
        preprocess(config(corpus, tmp_path / "unfinished", partner="silence"))
    preprocess(config(corpus, tmp_path / "changed"))
    write_records(str(corpus / "val.json"), read_records(str(corpus / "val.json")) * 2)
    with pytest.raises(ValueError, match="input"):
        preprocess(config(corpus, tmp_path / "changed"))


def test_equal_clips_in_two_splits_are_rejected(cluster: None, tmp_path):
    write_questions(tmp_path / "corpus", {"train": {"a.flac": sound(0)}, "test": {"b.flac": sound(0)}})
    with pytest.raises(ValueError, match=r"a\.flac.*\btrain\b.*b\.flac.*\btest\b"):
        preprocess(config(tmp_path / "corpus", tmp_path / "set"))


def test_failures_are_counted_by_reason_split_and_task(cluster: None, tmp_path):
    nan = io.BytesIO()
    soundfile.write(nan, np.array([0.0, np.nan] * 20_000), RATE, format="WAV", subtype="FLOAT")
    whole = sound(3, container="WAV")
    clips = {
        "good.flac": sound(1),
        "also.flac": sound(2),
        "codec.flac": b"ID3 no sound",
        "cut.wav": whole[: len(whole) // 2],
        "empty.wav": b"",
        "long.flac": sound(4, seconds=3.0),
        "nan.wav": nan.getvalue(),
        "none.wav": encode(np.zeros(0, np.float32), RATE, "WAV"),
        "short.flac": sound(5, seconds=0.1),
    }
    write_questions(
        tmp_path / "corpus",
        {"train": clips, "val": {"missing.flac": sound(6), "val.flac": sound(7)}},
        taskname="audiocaps",
    )
    (tmp_path / "corpus/audio/val").mkdir()
    (tmp_path / "corpus/audio/missing.flac").unlink()
    fields = {"limits": {"max_seconds": 2.0}, "min_seconds": 0.2}
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "set", max_failed_share=0.9, **fields))
    reasons = ("empty", "missing", "no_samples", "not_audio", "not_finite", "too_long", "too_short", "truncated")
    assert manifest.counts["quarantined_by_reason"] == dict.fromkeys(reasons, 1)
    assert manifest.counts["clips"] == 3
    assert manifest.counts["splits"]["val"]["audiocaps"] == {
        "clips": 2, "missing": 1, "quarantined": 1, "missing_share": 0.5,
    }  # fmt: skip
    assert manifest.counts["records"] == {"train": 2, "val": 1, "test": 0}
    assert manifest.counts["records_dropped"] == 8
    with pytest.raises(ValueError, match=r"empty 1, missing 1.*max_failed_share"):
        preprocess(config(tmp_path / "corpus", tmp_path / "strict", max_failed_share=0.1, **fields))
    assert not (tmp_path / "strict/clips").exists()  # fails before the first clip is decoded


def test_clip_changed_after_inventory_fails_the_job(cluster: None, corpus, tmp_path):
    settings = config(corpus, tmp_path / "set")
    preprocess(settings)
    for name in ("manifest.json", "receipts/clips/000000.json"):
        (tmp_path / "set" / name).unlink()
    (corpus / "audio/0.flac").write_bytes(sound(99))
    with pytest.raises(Exception, match=r"0\.flac.*changed"):
        preprocess(settings)


def test_waveforms_are_stored_whole_and_resampled(cluster: None, tmp_path):
    stereo = np.stack([np.sin(np.arange(44_100 * 12) / 30), np.zeros(44_100 * 12)], axis=1).astype(np.float32)
    data = encode(0.5 * stereo, 44_100, "WAV")
    write_questions(tmp_path / "corpus", {"train": {"a.wav": data}})
    preprocess(config(tmp_path / "corpus", tmp_path / "set", features="waveform"))
    store = FeatureStore.load(str(tmp_path / "set"))
    waveform = store.waveform(0)
    assert waveform.dtype == np.float32
    assert len(waveform) == 12 * RATE
    np.testing.assert_allclose(waveform, decode(data, RATE), atol=2**-15)
    with pytest.raises(ValueError, match="waveform"):
        preprocess(config(tmp_path / "corpus", tmp_path / "mel"))
        FeatureStore.load(str(tmp_path / "mel")).waveform(0)


@pytest.mark.extended
def test_features_are_independent_of_encoder_workers(cluster: None, corpus, tmp_path):
    save_pretrained(HTSATEncoder(encoder_config("mellow-tiny")), str(tmp_path / "encoder"))
    fields = {"features": "encoder", "encoder": str(tmp_path / "encoder")}
    one = preprocess(config(corpus, tmp_path / "one", encoder_workers=1, **fields))
    two = preprocess(config(corpus, tmp_path / "two", encoder_workers=2, **fields))
    assert one.content_hash == two.content_hash
    assert FeatureStore.load(str(tmp_path / "one")).arrays["frames"].shape[0] == 6


def test_filters_limit_and_audio_root_per_task(cluster: None, tmp_path):
    for task, seed in (("audiocaps", 0), ("clothov21", 10)):
        for number in range(3):
            storage.write_bytes(str(tmp_path / task / f"{task}-{number}.flac"), sound(seed + number))
    records = [
        question(f"{task}-{number}.flac", taskname=task, subtype=subtype)
        for task in ("audiocaps", "clothov21")
        for number in range(3)
        for subtype in ("CLE.json", "ACD-1.json")
    ]
    storage.write_bytes(str(tmp_path / "audiocaps/held-out.flac"), sound(6))
    held_out = [question("held-out.flac", taskname="audiocaps", subtype="CLE.json")]
    for split, questions in {"train": records, "val": held_out, "test": []}.items():
        write_records(str(tmp_path / f"corpus/{split}.json"), questions)
    fields = {"audio_root": {task: str(tmp_path / task) for task in ("audiocaps", "clothov21")}}
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "all", **fields))
    assert manifest.counts["records"]["train"] == 12
    filtered = config(
        tmp_path / "corpus", tmp_path / "some", tasknames=["clothov21"], subtypes=["CLE"], limit=2, **fields
    )
    manifest = preprocess(filtered)
    assert manifest.counts["clips"] == manifest.counts["records"]["train"] == 2
    rows = read_shard_records(str(tmp_path / "some"), "train").to_pylist()
    assert [row["filepath1"] for row in rows] == ["clothov21-0.flac", "clothov21-1.flac"]
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "val", split=["val"], **fields))
    assert manifest.counts["clips"] == 1
    assert read_shard_records(str(tmp_path / "val"), "val")["filepath1"].to_pylist() == ["held-out.flac"]
    fields = {"audio_root": {"audiocaps": str(tmp_path / "audiocaps")}}
    with pytest.raises(ValueError, match=r"audio_root.*'clothov21'"):
        preprocess(config(tmp_path / "corpus", tmp_path / "none", **fields))


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_source(cluster: None, tmp_path):
    def record(**fields: str) -> dict[str, str]:
        return {"taskname": "audiocaps", "subtype": "ACD-1.json", "input": "what?", "answer": "noise"} | fields

    write_tar(
        tmp_path / "corpus/train-000.tar",
        {
            "a.flac": sound(0),
            "a.json": json.dumps([record(answer="one"), record(answer="two", filepath2="b.flac")]).encode(),
            "b.flac": sound(1),
            "b.json": json.dumps(record()).encode(),
            "c.flac": b"",
            "c.json": json.dumps(record(answer="none")).encode(),
        },
    )
    write_tar(tmp_path / "corpus/valid-000.tar", {"a.flac": sound(2), "a.json": json.dumps(record()).encode()})
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "set", source="webdataset", max_failed_share=0.5))
    assert manifest.counts["records"] == {"train": 3, "val": 1, "test": 0}
    assert manifest.counts["records_dropped"] == 1
    assert manifest.counts["quarantined_by_reason"] == {"empty": 1}
    rows = read_shard_records(str(tmp_path / "set"), "train").to_pylist()
    store = FeatureStore.load(str(tmp_path / "set"))
    pair = next(row for row in rows if row["answer"] == "two")
    assert store.filepaths[store.rows[pair["clip1"]]] == "train-000.tar/a.flac"
    assert store.filepaths[store.rows[pair["clip2"]]] == "train-000.tar/b.flac"


def test_parquet_source(cluster: None, tmp_path):
    rows = [
        {"audio": {"bytes": sound(number // 2), "path": None}, "input": f"question {number}?", "answer": "noise"}
        for number in range(10)
    ]
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus/train-0.parquet", row_group_size=3)
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "set", source="parquet"))
    assert manifest.counts["records"]["train"] == 10
    assert manifest.counts["distinct_clips"] == 5
    store = FeatureStore.load(str(tmp_path / "set"))
    recordings = preprocess(config(_as_recordings(tmp_path, 5), tmp_path / "plain", source="recordings"))
    plain = FeatureStore.load(str(tmp_path / "plain"))
    assert recordings.counts["records"] == {}
    for clip_id, row in store.rows.items():
        np.testing.assert_array_equal(store.arrays["log_mel"][row], plain.arrays["log_mel"][plain.rows[clip_id]])


def test_repeated_clips_keep_all_questions(cluster: None, tmp_path):
    def rows(*numbers: int) -> pa.Table:
        return pa.Table.from_pylist(
            [
                {
                    "audio": {"bytes": sound(number % 3), "path": f"{number % 3}.flac"},
                    "input": f"{number}?",
                    "answer": "a",
                }
                for number in numbers
            ]
        )

    (tmp_path / "corpus").mkdir()
    pq.write_table(rows(0, 1, 2, 3), tmp_path / "corpus/train-0.parquet")
    pq.write_table(rows(4, 5, 6), tmp_path / "corpus/train-1.parquet")
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "set", source="parquet"))
    assert manifest.counts["clips"] == manifest.counts["distinct_clips"] == 3
    assert manifest.counts["records_dropped"] == 0
    records = read_shard_records(str(tmp_path / "set"), "train").to_pylist()
    assert sorted((row["input"], row["filepath1"]) for row in records) == [(f"{n}?", f"{n % 3}.flac") for n in range(7)]
    pq.write_table(rows(2), tmp_path / "corpus/test-0.parquet")
    with pytest.raises(ValueError, match=r"2\.flac.*\btest\b.*\btrain\b"):
        preprocess(config(tmp_path / "corpus", tmp_path / "two", source="parquet"))


def test_equal_file_names_in_split_folders_are_distinct(cluster: None, tmp_path):
    fields = {"input": "what?", "answer": "noise"}
    for number, split in enumerate(("train", "valid")):
        table = pa.Table.from_pylist([fields | {"audio": sound(number)}])
        (tmp_path / "parquet" / split).mkdir(parents=True)
        pq.write_table(table, tmp_path / "parquet" / split / "0.parquet")
        pair = json.dumps(fields | {"filepath2": "b.flac"}).encode()
        members = {"a.flac": sound(2 * number), "a.json": pair, "b.flac": sound(2 * number + 1)}
        write_tar(tmp_path / "tars" / split / "0.tar", members)
    for source, name in (("parquet", "{}/0.parquet/0"), ("webdataset", "{}/0.tar/a.flac")):
        folder = tmp_path / ("tars" if source == "webdataset" else "parquet")
        preprocess(config(folder, tmp_path / source, source=source))
        for split, stored in (("train", "train"), ("valid", "val")):
            (row,) = read_shard_records(str(tmp_path / source), stored).to_pylist()
            assert row["filepath1"] == name.format(split)
            assert row["filepath2"] in ("", f"{split}/0.tar/b.flac")


def test_limit_without_questions_is_per_split(cluster: None, tmp_path):
    for split, clips in (("train", 4), ("test", 3)):
        write_tar(
            tmp_path / "corpus" / f"{split}.tar", {f"{split}{n}.flac": sound(10 * clips + n) for n in range(clips)}
        )
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "set", source="webdataset", limit=2))
    assert manifest.counts["clips"] == 4
    assert {split: tasks["clips"]["clips"] for split, tasks in manifest.counts["splits"].items()} == {
        "train": 2, "test": 2,
    }  # fmt: skip


def _as_recordings(folder: Path, clips: int) -> Path:
    for number in range(clips):
        storage.write_bytes(str(folder / "recordings" / f"{number}.flac"), sound(number))
    (folder / "recordings/readme.txt").write_text("no sound")
    return folder / "recordings"


def test_inventory_rejects_too_large_files(tmp_path):
    _as_recordings(tmp_path, 2)
    settings = config(tmp_path / "recordings", tmp_path / "set", source="recordings")
    (unit,) = plan_corpus(settings).units
    table = scan_unit(unit, AudioLimits(max_bytes=100))
    assert table["reason"].to_pylist() == ["too_large"] * 2
    assert scan_unit(unit, AudioLimits())["reason"].to_pylist() == [""] * 2


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/0.tar", "train"),
        ("a/valid-0.parquet", "val"),
        ("x_test.tar", "test"),
        ("contest.tar", "train"),
        ("Test-0.tar", "test"),
        ("testimony.tar", "train"),
        ("valley-0.parquet", "train"),
        ("dev2.tar", "val"),
        ("clotho_development-0.tar", "train"),
        ("clotho_evaluation.tar", "test"),
        ("validation-00000.parquet", "val"),
    ],
)
def test_split_of_shard_name(name: str, split: str):
    assert split_of(name) == split


def test_statistics_describe_the_corpus(cluster: None, tmp_path):
    write_corpus(str(tmp_path / "corpus"), {"train": 6, "val": 1, "test": 1})
    manifest = preprocess(config(tmp_path / "corpus", tmp_path / "set", partner="silence"))  # not a clip of the corpus
    statistics = storage.read_json(str(tmp_path / "set/statistics.json"))
    assert statistics["clips"] == 8
    assert sum(statistics["seconds"]["histogram"]["counts"]) == 8
    assert statistics["hours"] == pytest.approx(manifest.counts["audio_seconds"] / 3600, abs=1e-4)
    records = {split: read_records(str(tmp_path / f"corpus/{split}.json")) for split in ("train", "val", "test")}
    questions = sum(sum(counts.values()) for counts in statistics["questions_by_type"].values())
    assert questions == sum(map(len, records.values()))
    assert statistics["answer_tokens"]["train"]["count"] == len(records["train"])
    assert (tmp_path / "set/statistics.png").read_bytes().startswith(b"\x89PNG")
