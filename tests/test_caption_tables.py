"""Captions from files of the formats that synthesis reads."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mellow_platform import storage
from mellow_platform.data.caption_tables import Caption, read_captions
from mellow_platform.data.records import Record


def captions_of(tmp_path: Path, name: str, text: str) -> list[Caption]:
    (tmp_path / name).write_text(text)
    return read_captions([str(tmp_path / name)], "mine", "{youtube_id}_{start_time}.wav")


def test_formats_are_recognised_by_columns(tmp_path):
    header = "audiocap_id,youtube_id,start_time,caption\n"
    assert captions_of(tmp_path, "val.csv", f'{header}1,007,030,"A dog, barking"\n2,-xY,30,Rain\n') == [
        Caption("007_030.wav", "A dog, barking", "val", "audiocaps"),
        Caption("-xY_30.wav", "Rain", "val", "audiocaps"),
    ]
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    clotho = captions_of(tmp_path, "clotho_captions_evaluation.csv", f"{header}a b.wav,One,Two,Three,Four,Five\n")
    assert clotho == [Caption("a b.wav", text, "test", "clothov21") for text in ("One", "Two", "Three", "Four", "Five")]
    scene = Record("scenes", "1.flac", "2.flac", "a tone", "a horn", "?", "!", "Scenes-Difference")
    fields = {name: getattr(scene, name) for name in Record.__dataclass_fields__}
    storage.write_json(str(tmp_path / "train.json"), [fields, fields | {"filepath2": "", "caption2": ""}])
    assert read_captions([str(tmp_path / "train.json")], "mine", "") == [
        Caption("1.flac", "a tone", "train", "scenes"),
        Caption("2.flac", "a horn", "train", "scenes"),
    ]
    storage.write_json(str(tmp_path / "labels.json"), [{"file": "3.wav", "label": "Dog", "category": "animals"}])
    assert read_captions([str(tmp_path / "labels.json")], "mine", "") == [
        Caption("3.wav", "dog, animals", "train", "mine", ("dog", "animals"))
    ]
    storage.write_json(str(tmp_path / "labels.json"), [{"file": "3.wav", "labels": ["dog"], "split": "test"}])
    assert read_captions([str(tmp_path / "labels.json")], "mine", "")[0].split == "test"
    rows = [{"audiocap_id": 7, "youtube_id": "abc", "start_time": 30, "caption": "Rain", "": None, "split": ""}]
    storage.write_json(str(tmp_path / "test.json"), rows)
    by_number = read_captions([str(tmp_path / "test.json")], "mine", "{audiocap_id}-{start_time}.wav")
    assert by_number == [Caption("7-30.wav", "Rain", "test", "audiocaps")]
    table = {"clip": ["4.wav", "5.wav"], "caption": [["a", "b"], ["c"]], "split": ["test", None]}
    pq.write_table(pa.table(table), tmp_path / "mine.parquet")
    found = read_captions([str(tmp_path / "mine.parquet")], "mine", "")
    assert [(c.clip, c.text, c.split, c.taskname) for c in found] == [
        ("4.wav", "a", "test", "mine"), ("4.wav", "b", "test", "mine"), ("5.wav", "c", "train", "mine"),
    ]  # fmt: skip
    everything = [str(tmp_path / name) for name in ("val.csv", "mine.parquet", "val.csv")]
    assert len(read_captions(everything, "mine", "{youtube_id}.wav")) == 5
    assert len(read_captions(everything, "mine", "{youtube_id}.wav", limit=1)) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "clip,text\na,b\n", r"a\.csv.*clip, text.*youtube_id.*AudioCaps"),
        ("a.csv", "clip,caption\na,b\nc,\n", r"a\.csv.*row 1.*''.*caption"),
        ("a.csv", "clip,caption,split\na,b,dev\n", r"a\.csv.*row 0.*'dev'.*split.*train, val, test"),
        ("a.csv", "clip,caption,split\na,b,val\na,c,test\n", r"a\.csv.*clip a\b.*test.*val"),
        ("a.csv", "youtube_id,start_time,caption\na,,c\n", r"a\.csv.*row 0.*''.*start_time"),
        ("a.csv", "clip,caption\n", r"a\.csv.*youtube_id.*AudioCaps"),
        ("a.json", '[{"clip": "a", "caption": 5}]', r"a\.json.*row 0.*5.*caption"),
        ("a.txt", "", r"a\.txt.*\.parquet.*\.csv.*\.jsonl"),
    ],
)
def test_invalid_captions_name_file_row_and_value(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        captions_of(tmp_path, name, text)


def test_invalid_clip_name_template(tmp_path):
    (tmp_path / "a.csv").write_text("youtube_id,start_time,caption\na,1,c\n")
    with pytest.raises(ValueError, match=r"row 0.*clip_name.*\{ytid\}\.wav"):
        read_captions([str(tmp_path / "a.csv")], "mine", "{ytid}.wav")
