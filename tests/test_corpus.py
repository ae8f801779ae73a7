"""Questions about folders of labelled recordings: layouts, groups, splits, and messages about skipped files."""

import io
import json
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mellow_platform import storage
from mellow_platform.data import builtin_corpora
from mellow_platform.data.labels import ClipLabels
from mellow_platform.data.recordings import LabelledRecordings, read_recordings
from mellow_platform.data.records import SPLITS, Record, read_records
from mellow_platform.data.splits import assign_splits
from tests.conftest import REPOSITORY

RATE = 8_000
ANIMALS = ("dog", "rooster", "crying_baby", "chirping_birds", "sea_waves")


def write_sounds(folder: Path, paths: Iterable[str]) -> None:
    """Write a WAV file of 0.1 s with different noise to each path."""
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(wav(number))


def wav(number: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(number).uniform(-0.5, 0.5, RATE // 10), RATE, format="WAV")
    return buffer.getvalue()


def write_esc50(folder: Path) -> None:
    """Write 5 categories with 8 clips each, in pairs of takes of the same freesound file."""
    rows = [
        f"{fold}-{1000 + 10 * target + fold}-{take}-{target}.wav,{fold},{target},{name},{target < 2},"
        f"{1000 + 10 * target + fold},{take}"
        for target, name in enumerate(ANIMALS)
        for fold in range(1, 5)
        for take in "AB"
    ]
    write_sounds(folder / "audio", [row.split(",")[0] for row in rows])
    write_text(folder / "meta/esc50.csv", "\n".join(["filename,fold,target,category,esc10,src_file,take", *rows, ""]))


def write_urbansound(folder: Path) -> None:
    """Write 4 classes with 3 recordings of 4 slices each; slices of a recording are in one fold."""
    names = ("air_conditioner", "car_horn", "children_playing", "dog_bark")
    rows = [
        f"{100 * number + take}-{number}-0-{part}.wav,{100 * number + take},{part}.0,{part + 4}.0,1,{take + 1},"
        f"{number},{name}"
        for number, name in enumerate(names)
        for take in range(3)
        for part in range(4)
    ]
    write_sounds(folder / "audio", [f"fold{row.split(',')[5]}/{row.split(',')[0]}" for row in rows])
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    write_text(folder / "metadata/UrbanSound8K.csv", "\r\n".join([header, *rows, ""]))


def write_fsd50k(folder: Path) -> None:
    """Write 20 clips with up to 3 labels of a hierarchy, and an evaluation set that is not read."""
    labels = ("Crash_cymbal,Cymbal,Music", "Acoustic_guitar,Guitar,Music", "Bark,Dog,Animal", "Meow,Cat,Animal")
    rows = [
        f'{64760 + n},"{labels[n % 4]}","/m/0{n},/m/1{n},/m/2{n}",{"val" if n % 5 == 0 else "train"}' for n in range(20)
    ]
    write_sounds(folder, [f"FSD50K.dev_audio/{64760 + number}.wav" for number in range(20)])
    (folder / "FSD50K.eval_audio").mkdir()
    (folder / "FSD50K.eval_audio/37199.wav").write_bytes(wav(100))
    truth = folder / "FSD50K.ground_truth"
    write_text(truth / "dev.csv", "\n".join(["fname,labels,mids,split", *rows, ""]))
    write_text(truth / "eval.csv", 'fname,labels,mids\n37199,"Bark,Dog,Animal","/m/1,/m/2,/m/3"\n')
    write_text(truth / "vocabulary.csv", "0,Crash_cymbal,/m/0\n1,Cymbal,/m/1\n")


def write_subfolders(folder: Path) -> None:
    write_sounds(
        folder, [f"{name}/{part}/Take {n}, ß.WAV" for name in ANIMALS for part in ("a", "b") for n in range(3)]
    )


def write_table(folder: Path) -> None:
    names = [f"clip {number}.wav" for number in range(20)]
    write_sounds(folder / "sounds", names)
    rows = [f"sounds\\{name};{ANIMALS[number % 5]};s{number // 2}" for number, name in enumerate(names)]
    write_text(folder / "list.csv", "\ufeff" + "\r\n".join(["File;Label;Speaker", *rows, ""]))


def write_labels_json(folder: Path) -> None:
    files = [f"{number}.wav" for number in range(20)]
    write_sounds(folder, files)
    entries = [
        {
            "file": file,
            "label": f"A {ANIMALS[number % 5]}.",
            "category": ("loud", "soft")[number % 2],
            "kit": number // 2,
        }
        for number, file in enumerate(files)
    ]
    write_text(folder / "labels.json", json.dumps(entries))


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())


LAYOUTS = {
    "meta/esc50.csv": (write_esc50, 40, "src_file", 20),
    "metadata/UrbanSound8K.csv": (write_urbansound, 48, "fsid", 12),
    "FSD50K.ground_truth/dev.csv": (write_fsd50k, 20, "", 20),
    "subfolders": (write_subfolders, 30, "", 30),
    "list.csv": (write_table, 20, "speaker", 10),
    "labels.json": (write_labels_json, 20, "kit", 10),
}


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Name of a layout, and a folder with this layout."""
    folder = tmp_path / "recordings, täglich"
    folder.mkdir()
    LAYOUTS[request.param][0](folder)
    return request.param, folder


def make(folder: Path | str, output: Path, rounds: int = 2, seed: int = 0) -> tuple[dict, dict[str, list[Record]]]:
    summary = builtin_corpora.recording_corpus(str(folder), str(output), seed=seed, rounds=rounds)
    return summary, {split: read_records(str(output / f"{split}.json")) for split in SPLITS}


def test_layout_is_recognised(layout: tuple[str, Path], tmp_path: Path):
    source, folder = layout
    _, clips, group_field, groups = LAYOUTS[source]
    summary, records = make(folder, tmp_path / "corpus")
    assert (summary["source"], summary["group_field"], summary["groups"]) == (source, group_field, groups)
    assert sum(summary["recordings"].values()) == clips
    assert all((folder / path).is_file() for record in chain(*records.values()) for path in record.filepaths)
    assert summary["not_tested"] == {}
    assert json.loads((tmp_path / "corpus/corpus.json").read_text()) == summary
    for entry in json.loads((tmp_path / "corpus/mmau.json").read_text()):
        assert Path(entry["audio_id"]).is_file()
        assert entry["answer"] in entry["choices"]


def test_groups_are_never_split(layout: tuple[str, Path]):
    _, folder = layout
    clips = read_recordings(str(folder)).clips
    for seed in range(5):
        splits = assign_splits(clips, seed)
        groups = {split: {clip.group or clip.file for clip in members} for split, members in splits.items()}
        assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
        assert sum(map(len, splits.values())) == len(clips)


def test_answers_and_choices_have_training_clips(layout: tuple[str, Path], tmp_path: Path):
    _, folder = layout
    _, records = make(folder, tmp_path / "corpus")
    clips = {clip.file: clip for clip in read_recordings(str(folder)).clips}
    in_train = {label for record in records["train"] for label in clips[record.filepath1].labels}
    assert records["test"]
    for record in chain(*records.values()):
        labels = clips[record.filepath1].labels
        if record.is_multiple_choice:
            texts = [choice[3:] for choice in record.choices]
            assert set(texts) <= in_train
            assert [text for text in texts if text in labels] == [record.answer[3:]]
        else:
            label = record.input.removeprefix("is this heard: ").removesuffix("?")
            assert label in in_train
            assert (label in labels) == (record.answer == "yes")


def test_same_seed_gives_same_corpus(tmp_path: Path):
    write_esc50(tmp_path)
    outputs = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"out{number}"
        make(tmp_path, output, seed=seed)
        outputs.append({file.name: file.read_bytes() for file in output.iterdir()})
    assert sorted(outputs[0]) == ["corpus.json", "labels.json", "mmau.json", "test.json", "train.json", "val.json"]
    assert outputs[0] == outputs[1] != outputs[2]


def test_names_of_labels_are_words(layout: tuple[str, Path]):
    source, folder = layout
    labels = {label for clip in read_recordings(str(folder)).clips for label in clip.labels}
    expected = {
        "metadata/UrbanSound8K.csv": {"air conditioner", "car horn", "children playing", "dog bark"},
        "FSD50K.ground_truth/dev.csv": {
            "crash cymbal", "cymbal", "music", "acoustic guitar", "guitar", "bark", "dog", "animal", "meow", "cat",
        },
        "labels.json": {*(f"a {name}" for name in ANIMALS), "loud", "soft"},
    }  # fmt: skip
    assert labels == expected.get(source, {name.replace("_", " ") for name in ANIMALS})


def clips_of(counts: Iterable[int], group: str = "") -> list[ClipLabels]:
    """Return `counts` clips of each label; with `group`, those of a label are one group."""
    return [
        ClipLabels(f"{label}/{number}.wav", (f"label {label}",), (), group and f"{group}{label}")
        for label, count in enumerate(counts)
        for number in range(count)
    ]


def by_split(splits: dict[str, list[ClipLabels]]) -> dict[str, Counter[str]]:
    return {split: Counter(label for clip in members for label in clip.labels) for split, members in splits.items()}


@pytest.mark.parametrize(
    ("groups", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (40, (24, 8, 8))]
)
def test_labels_are_split_three_to_one_to_one(groups: int, expected: tuple[int, int, int]):
    counts = by_split(assign_splits(clips_of([groups] * 6), seed=0))
    for label in range(6):
        assert tuple(counts[split][f"label {label}"] for split in SPLITS) == expected


def test_labels_with_three_recordings_share_val():
    splits = assign_splits(clips_of([3] * 20), seed=0)
    assert [len(splits[split]) for split in SPLITS] == [30, 10, 20]
    assert len(by_split(splits)["test"]) == 20


def test_rare_labels_leave_common_ones_stratified():
    counts = by_split(assign_splits(clips_of([2] * 50 + [10] * 4 + [1] * 30), seed=0))
    for label in range(50, 54):
        assert [counts[split][f"label {label}"] for split in SPLITS] == [6, 2, 2]
    assert all(counts["train"][f"label {label}"] == 1 for label in range(54, 84))


def test_label_in_one_group_is_not_tested(tmp_path: Path):
    write_esc50(tmp_path)
    rows = [f"lone{take}.wav,1,9,one_source,False,77,{take}" for take in "ABC"]
    write_sounds(tmp_path / "audio", [f"lone{take}.wav" for take in "ABC"])
    for number, take in enumerate("ABC"):
        (tmp_path / f"audio/lone{take}.wav").write_bytes(wav(500 + number))
    with (tmp_path / "meta/esc50.csv").open("a") as table:
        table.write("\n".join(rows))
    summary, records = make(tmp_path, tmp_path / "corpus")
    assert summary["not_tested"] == {"one source": 3}
    assert "5 of 6 labels" in summary["warnings"][0] and "one source (3)" in summary["warnings"][0]
    label = next(each for each in summary["labels"] if each["label"] == "one source")
    assert label["recordings"] == {"train": 3, "val": 0, "test": 0}
    assert (label["groups"], label["questions"]) == (1, {"train": 6, "val": 0, "test": 0})
    assert not [record for record in records["test"] if record.answer.endswith("one source")]


def test_summary_counts_match_records(tmp_path: Path):
    write_labels_json(tmp_path)
    summary, records = make(tmp_path, tmp_path / "corpus")
    clips = {clip.file: clip for clip in read_recordings(str(tmp_path)).clips}
    for each in summary["labels"]:
        family = {"label": "Recordings-Heard-MCQ", "category": "Recordings-Category-MCQ"}[each["kind"]]
        for split in SPLITS:
            files = {record.filepath1 for record in records[split]}
            assert each["recordings"][split] == sum(each["label"] in clips[file].labels for file in files)
            answers = [record.answer[3:] for record in records[split] if record.family == family]
            assert each["questions"][split] == answers.count(each["label"])


def test_chance_follows_the_number_of_choices(tmp_path: Path):
    write_labels_json(tmp_path)
    summary, records = make(tmp_path, tmp_path / "corpus")
    # Four choices among five labels, two among two categories, and as many questions of both.
    assert summary["chance"] == dict.fromkeys(SPLITS, 0.375)
    assert {len(record.choices) for record in records["test"] if record.is_multiple_choice} == {2, 4}


def test_questions_are_balanced_over_labels(tmp_path: Path):
    write_fsd50k(tmp_path)
    summary, _ = make(tmp_path, tmp_path / "corpus", rounds=3)
    for each in summary["labels"]:
        assert each["questions"]["test"] == each["recordings"]["test"]
        assert each["questions"]["val"] == each["recordings"]["val"]
    questions = [each["questions"]["train"] for each in summary["labels"]]
    assert sum(questions) == 3 * summary["recordings"]["train"]
    assert max(questions) - min(questions) <= 4


def test_speakers_with_all_labels_are_not_split():
    clips = [ClipLabels(f"{speaker}/{word}.wav", (word,), (), str(speaker)) for speaker in range(6) for word in ANIMALS]
    splits = assign_splits(clips, seed=0)
    assert {split: len({clip.group for clip in members}) for split, members in splits.items()} == {
        "train": 4, "val": 1, "test": 1,
    }  # fmt: skip


def test_labels_assigned_with_rarer_ones_reach_train_and_test():
    pairs = ("bell horn", "horn dog", "dog bell", "bell horn", "horn dog", "dog bell", "cat bell", "cat dog")
    for seed in range(20):
        clips = [ClipLabels(f"{number}.wav", tuple(pair.split())) for number, pair in enumerate(pairs)]
        counts = by_split(assign_splits(clips, seed))
        assert set(counts["train"]) == set(counts["test"]) == {"bell", "horn", "dog", "cat"}


def test_real_sounds_test_categories(real_sounds: Path, tmp_path: Path):
    summary, records = make(real_sounds, tmp_path / "corpus", rounds=40)
    assert summary["recordings"] == {"train": 28, "val": 8, "test": 9}
    files = [record.filepath1 for split in SPLITS for record in records[split]]
    assert set(files) == {path.name for path in real_sounds.glob("*.ogg")}
    assert sum(len({record.filepath1 for record in records[split]}) for split in SPLITS) == 45
    tested = {each["label"] for each in summary["labels"] if each["questions"]["test"]}
    assert tested == {"a tamworth pig", "birds", "household", "insects", "mammals", "music"}
    assert len(summary["not_tested"]) == 48
    assert "1 of 44 labels and 5 of 10 categories" in summary["warnings"][0]


def read(folder: Path, header: str, *rows: str, newline: str = "\n", encoding: str = "utf-8") -> LabelledRecordings:
    folder.mkdir(exist_ok=True)
    (folder / "list.csv").write_bytes(newline.join([header, *rows, ""]).encode(encoding))
    return read_recordings(str(folder))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_tables_in_all_formats_are_read(delimiter: str, encoding: str, newline: str, tmp_path: Path):
    write_sounds(tmp_path, ["ä b.wav"])
    header, row = delimiter.join(["Path", "Class"]), delimiter.join(['"ä b.wav"', '"Löwe"'])
    assert read(tmp_path, header, row, newline=newline, encoding=encoding).clips == [ClipLabels("ä b.wav", ("löwe",))]


@pytest.mark.parametrize(
    "name",
    [
        "a/b/Bell, 1.WAV",
        "a\\b\\Bell, 1.WAV",
        ".\\b/../b/Bell, 1.wav",
        "C:\\data\\a\\b\\Bell, 1.WAV",
        "/home/someone/a/b/Bell, 1.WAV",
        "Bell, 1.WAV",
        " Bell, 1 ",
        "bell, 1.wav",
    ],
)
def test_file_is_found_by_name(name: str, tmp_path: Path):
    write_sounds(tmp_path, ["a/b/Bell, 1.WAV", "c/other.wav"])
    assert read(tmp_path, "file,label", f'"{name}",bell').clips == [ClipLabels("a/b/Bell, 1.WAV", ("bell",))]


def test_file_is_found_in_both_unicode_forms(tmp_path: Path):
    write_sounds(tmp_path, [unicodedata.normalize("NFD", "é.wav")])
    (clip,) = read(tmp_path, "file,label", unicodedata.normalize("NFC", "é.wav,é")).clips
    assert (tmp_path / clip.file).is_file()


def test_space_before_file_name_is_kept(tmp_path: Path):
    write_sounds(tmp_path, [" a.wav", "b/a.wav"])
    assert read(tmp_path, "file,label", " a.wav,bell").clips[0].file == " a.wav"


def test_ambiguous_base_name_is_rejected(tmp_path: Path):
    write_sounds(tmp_path, ["x/a.wav", "y/a.wav", "1.wav"])
    with pytest.raises(ValueError, match=r"list\.csv, line 2: 'a\.wav'.*x/a\.wav.*y/a\.wav"):
        read(tmp_path, "file,label", "a.wav,bell")
    assert [clip.file for clip in read(tmp_path, "file,label", "y/a.wav,bell").clips] == ["y/a.wav"]


def test_missing_files_are_counted_and_named(tmp_path: Path):
    write_sounds(tmp_path, ["a.wav", "b.wav"])
    found = read(tmp_path, "file,label", "a.wav,bell", "b.wav,horn", "gone.wav,bell")
    assert found.skipped == {"files_not_found": 1}
    assert "1 of 3" in found.warnings[0] and "gone.wav" in found.warnings[0]
    with pytest.raises(ValueError, match=r"\b3\b.*\b4\b.*list\.csv.*x\.wav, y\.wav, z\.wav"):
        read(tmp_path, "file,label", "x.wav,bell", "y.wav,horn", "z.wav,bell", "a.wav,horn")


def test_empty_labels_are_counted_and_named(tmp_path: Path):
    write_sounds(tmp_path, ["a.wav", "b.wav", "c.wav", "d.wav"])
    found = read(tmp_path, "file,label", "a.wav,bell", "b.wav,", "c.wav, _ ", "d.wav", "", ",bell")
    assert [clip.file for clip in found.clips] == ["a.wav"]
    assert found.skipped == {"rows_without_label": 4, "recordings_without_label": 3}
    assert "4 of 5" in found.warnings[0] and "line 3, line 4, line 5, ..." in found.warnings[0]
    assert "b.wav, c.wav, d.wav" in found.warnings[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.wav,bell", "a.wav,bell, loud"], r"list\.csv, line 3: .*\b3\b.*\b2\b"),
        (['a.wav,"two', 'lines"', 'a.wav,"bell'], r"list\.csv, line 4: .*quotes"),
        (["a.wav,bell", "a.wav,L\udce4we"], r"list\.csv, line 3: .*UTF-8"),
    ],
)
def test_malformed_row_is_named(rows: list[str], message: str, tmp_path: Path):
    write_sounds(tmp_path, ["a.wav"])
    (tmp_path / "list.csv").write_bytes("\n".join(["file,label", *rows]).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_recordings(str(tmp_path))


@pytest.mark.parametrize("column", ["group", "speaker", "source", "kit", "src_file", "fsID", "uploader"])
def test_group_column(column: str, tmp_path: Path):
    write_sounds(tmp_path, ["a.wav", "b.wav"])
    found = read(tmp_path, f"file,label,{column}", "a.wav,bell,x1", "b.wav,horn,")
    assert found.group_field == column.lower()
    assert [clip.group for clip in found.clips] == ["x1", ""]


def test_rows_of_one_file_are_merged(tmp_path: Path):
    write_sounds(tmp_path, ["a.wav", "b.wav", "c.wav"])
    found = read(
        tmp_path, "file,label,category,group", "a.wav,bell,metal,g", "a.wav,dog,animals,h", "b.wav,dog,animals,h",
        "c.wav,cat,animals,i",
    )  # fmt: skip
    assert found.clips == [
        ClipLabels("a.wav", ("bell", "metal", "dog", "animals"), ("metal", "animals"), "g"),
        ClipLabels("b.wav", ("dog", "animals"), ("animals",), "g"),
        ClipLabels("c.wav", ("cat", "animals"), ("animals",), "i"),
    ]
    assert found.clips[0].names == ("bell", "dog")


def test_copies_are_one_recording(tmp_path: Path):
    write_sounds(tmp_path, ["dog/a.wav", "cat/b.wav", "cat/empty.wav", "dog/empty.wav"])
    (tmp_path / "dog/a (1).wav").write_bytes((tmp_path / "cat/b.wav").read_bytes())
    for name in ("cat", "dog"):
        (tmp_path / name / "empty.wav").write_bytes(b"")
    found = read_recordings(str(tmp_path))
    assert [(clip.file, clip.labels) for clip in found.clips] == [
        ("cat/b.wav", ("cat", "dog")),
        ("cat/empty.wav", ("cat",)),
        ("dog/a.wav", ("dog",)),
        ("dog/empty.wav", ("dog",)),
    ]
    assert found.skipped == {"copies": 1}
    assert "dog/a (1).wav" in found.warnings[0] and "cat/b.wav" in found.warnings[0]


def test_two_sources_of_labels_are_rejected(tmp_path: Path):
    write_table(tmp_path)
    write_text(tmp_path / "meta/other.csv", "fname,class\n")
    with pytest.raises(ValueError, match=r"list\.csv.*meta/other\.csv"):
        read_recordings(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], r"\b1\b.*\baudio\b"),
        (["a.wav", "b.wav"], r"\b2\b.*a\.wav, b\.wav"),
        (["fold1/a.wav", "fold2/b.wav"], "fold1, fold2"),
        (["train/a.wav", "test/b.wav", "val/c.wav"], "test, train, val"),
    ],
)
def test_folder_without_labels_is_rejected(files: list[str], message: str, tmp_path: Path):
    write_sounds(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        read_recordings(str(tmp_path))


def test_table_with_other_columns_is_named(tmp_path: Path):
    write_sounds(tmp_path, ["a.wav"])
    with pytest.raises(ValueError, match=r"list\.csv.*\bwav, sound\b"):
        read(tmp_path, "wav,sound", "a.wav,bell")


@pytest.mark.parametrize(
    ("labels", "message"),
    [(3, r"\b12\b.*\b3\b"), (2, r"\b8\b.*\b2\b"), (0, "folder")],
)
def test_too_few_recordings_are_rejected(labels: int, message: str, tmp_path: Path):
    write_sounds(tmp_path, [f"{ANIMALS[label]}/{number}.wav" for label in range(labels) for number in range(4)])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_corpus_without_test_questions_is_rejected(tmp_path: Path):
    write_sounds(tmp_path, [f"{number}.wav" for number in range(20)])
    rows = [f"{number}.wav,{ANIMALS[number % 5]},freesound" for number in range(20)]
    write_text(tmp_path / "list.csv", "\n".join(["file,label,source", *rows]))
    with pytest.raises(ValueError, match=r"\b20\b.*\b1\b.*'source'"):
        make(tmp_path, tmp_path / "corpus")


def test_label_with_choice_letter_is_rejected(tmp_path: Path):
    write_sounds(tmp_path, [f"{name}/{number}.wav" for name in (*ANIMALS[:3], "class b) bell") for number in range(5)])
    with pytest.raises(ValueError, match=r"'class b\) bell'"):
        make(tmp_path, tmp_path / "corpus")


def test_recordings_on_s3(bucket: str, tmp_path: Path):
    if not bucket:
        pytest.skip("no S3 server")
    write_urbansound(tmp_path / "local")
    storage.upload(tmp_path / "local", storage.join(bucket, "urban sounds"))
    builtin_corpora.recording_corpus(
        storage.join(bucket, "urban sounds"), storage.join(bucket, "corpus"), seed=0, rounds=1
    )
    make(tmp_path / "local", tmp_path / "corpus", rounds=1)
    for name in ("train.json", "test.json", "corpus.json", "labels.json"):
        assert storage.read_bytes(storage.join(bucket, "corpus", name)) == (tmp_path / "corpus" / name).read_bytes()


def test_job_prints_summary_and_warnings(layout: tuple[str, Path], tmp_path: Path):
    source, folder = layout
    (folder / "broken link.wav").write_bytes(wav(999))
    command = [sys.executable, "jobs/make_corpus.py", "--source", "recordings", "--recordings", str(folder)]
    command += ["--output", str(tmp_path / "corpus")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert (printed["corpus"], printed["source"]) == (str(tmp_path / "corpus"), source)
    assert printed["skipped"]["recordings_without_label"] == 1 + (source == "FSD50K.ground_truth/dev.csv")
    assert any(source in line and "broken link.wav" in line for line in result.stdout.splitlines()[:-1])
