"""Records, decoding, the built-in corpora, and labels."""

import dataclasses
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mellow_platform.data import builtin_corpora
from mellow_platform.data.audio import AudioError, decode, encode
from mellow_platform.data.audio_limits import AudioLimits
from mellow_platform.data.labels import ClipLabels, read_labels
from mellow_platform.data.partners import draw_partner, second_clip
from mellow_platform.data.records import Record, from_row, read_records, to_table, write_records
from mellow_platform.data.scenes import KINDS, PITCHES, Event, Scene, draw_scene, render

RATE = 32_000
LIMITS = AudioLimits(max_seconds=2.0, max_bytes=1_000_000, max_channels=2, max_samples=70_000)


def tone(seconds: float = 1.0, rate: int = RATE, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def record(**changes: str) -> Record:
    values = dict.fromkeys((field.name for field in dataclasses.fields(Record)), "")
    return Record(**values | {"filepath1": "a.wav", "input": "what is heard?", "answer": "a dog"} | changes)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_containers_decode_to_the_same_tone(container: str):
    waveform = decode(encode(tone(), RATE, container), RATE)
    spectrum = np.abs(np.fft.rfft(waveform[:RATE]))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert len(waveform) == pytest.approx(RATE, abs=3000)


def test_decode_averages_channels_and_resamples():
    stereo = np.stack([tone(rate=44_100), np.zeros(44_100, np.float32)], axis=1)
    waveform = decode(encode(stereo, 44_100), RATE)
    assert waveform.ndim == 1
    assert len(waveform) == RATE
    assert np.abs(waveform[1000:-1000]).max() == pytest.approx(0.25, abs=0.01)


def _cut(container: str) -> bytes:
    data = encode(np.random.default_rng(0).normal(0, 0.1, 60_000).astype(np.float32), RATE, container)
    return data[: len(data) * 7 // 10]


def _cut_at_its_last_page() -> bytes:
    data = encode(np.zeros(60_000, np.float32), RATE, "OGG")
    return data[: data.rfind(b"OggS") + len(b"OggS")]


def _float_wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is no audio", "not_audio"),
        (encode(np.zeros(0, np.float32), RATE, "WAV"), "no_samples"),
        (_float_wav(np.array([0.0, np.nan], np.float32)), "not_finite"),
        (_float_wav(np.array([0.0, 1e20], np.float32)), "not_finite"),
        (_float_wav(np.full((2, 2), 3e38, np.float32)), "not_finite"),
        (encode(np.zeros(1, np.float32), 192_000, "WAV"), "no_samples"),
        (encode(tone(3.0), RATE, "WAV"), "too_long"),
        (encode(tone(0.1), 500, "WAV"), "bad_header"),
        (encode(np.zeros((100, 3)), RATE, "WAV"), "bad_header"),
        (encode(np.zeros((40_000, 2)), RATE, "WAV"), "too_large"),
        (bytes(1_000_001), "too_large"),
        (_cut_at_its_last_page(), "truncated"),
        *((_cut(container), "truncated") for container in ("WAV", "FLAC", "OGG", "MP3")),
    ],
)
def test_invalid_audio_has_a_reason(data: bytes, reason: str):
    with pytest.raises(AudioError) as error:
        decode(data, RATE, LIMITS)
    assert error.value.reason == reason


def test_partial_last_chunk_is_ignored():
    data = encode(tone(0.1), RATE, "WAV")
    samples = data[data.index(b"data") :]
    form = data[12:36]
    chunks = form + b"LIST" + struct.pack("<I", len(samples)) + samples + form[:8]
    nested = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
    np.testing.assert_array_equal(decode(nested, RATE), decode(data, RATE))


def test_scene_bytes_follow_the_seed():
    assert builtin_corpora.scene_clip(3, "train", 5) == builtin_corpora.scene_clip(3, "train", 5)
    assert builtin_corpora.scene_clip(3, "train", 5)[1] != builtin_corpora.scene_clip(4, "train", 5)[1]
    assert builtin_corpora.scene_clip(3, "train", 5)[1] != builtin_corpora.scene_clip(3, "test", 5)[1]


def test_events_match_their_times_and_loudness():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = draw_scene(rng)
        waveform = render(scene, RATE, rng)
        active = np.zeros(len(waveform), bool)
        for event in scene.events:
            start, stop = round(event.start * RATE), round((event.start + event.seconds) * RATE)
            active[start:stop] = True
            assert np.abs(waveform[start:stop]).max() == pytest.approx(event.amplitude, rel=0.35)
        assert not active.all()
        assert np.abs(waveform[~active]).max() < 0.005


@pytest.mark.parametrize("pitch", list(PITCHES))
def test_pitch_sets_the_frequency(pitch: str):
    low, high = PITCHES[pitch]
    event = Event("tone", pitch, "loud", "long", 0.5, 2.0, (low * high) ** 0.5, 0.5)
    waveform = render(Scene((event,), 3.0), RATE, np.random.default_rng(0))
    peak = np.abs(np.fft.rfft(waveform)).argmax() / 3.0
    assert low <= peak <= high


def test_scene_questions_cover_eleven_families():
    scenes = [builtin_corpora.scene_clip(0, "train", number)[0] for number in range(60)]
    records = builtin_corpora.scene_records(scenes, "train", seed=0, rounds=1)
    assert len({record.family for record in records}) == 11
    for question in records:
        if question.is_multiple_choice:
            assert question.answer in question.choices
            assert len({choice[3:] for choice in question.choices}) == len(question.choices)
        assert question.input == question.input.lower()
    letters = [question.answer[0] for question in records if question.family == "Scenes-Heard-MCQ"]
    assert max(letters.count(letter) for letter in "abcd") < 0.5 * len(letters)


def test_heard_questions_have_one_correct_choice():
    for number in range(60):
        scene, _ = builtin_corpora.scene_clip(1, "val", number)
        kinds = {event.kind for event in scene.events}
        for question in builtin_corpora.scene_records([scene], "val", seed=number, rounds=1):
            if question.family == "Scenes-Heard-MCQ":
                right = [choice for choice in question.choices if choice[3:] in (kinds or {"silence"})]
                assert right == [question.answer]


def test_entailment_answers_match_scene():
    for number in range(80):
        scene, _ = builtin_corpora.scene_clip(2, "val", number)
        kinds = {event.kind for event in scene.events}
        for question in builtin_corpora.scene_records([scene], "val", seed=number, rounds=1):
            if question.family == "Scenes-Entailment":
                kind = next(kind for kind in KINDS if f" {kind} " in question.input)
                assert (question.answer == "c) definitely false") == (kind not in kinds)


def test_records_round_trip_json_and_arrow(tmp_path: Path):
    records = [record(), record(filepath2="b.wav", caption2="a cat", answer="é “quoted”")]
    uri = str(tmp_path / "train.json")
    write_records(uri, records)
    assert read_records(uri) == records
    assert [from_row(row) for row in to_table(records).to_pylist()] == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"JSON.*\bdict\b"),
        ("[{}]", "record 0.*taskname"),
        ("[1, 2]", "record 0.*taskname"),
        ("nonsense", "JSON"),
    ],
)
def test_malformed_record_file_is_named(text: str, message: str, tmp_path: Path):
    file = tmp_path / "train.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_records(str(file))
    assert str(file) in str(error.value)


def test_choices_are_read_from_the_question():
    question = record(input="which? a) birds, chirping b) a dog (barking) c) rain", answer="b) a dog (barking)")
    assert question.choices == ("a) birds, chirping", "b) a dog (barking)", "c) rain")
    assert record(answer="yes").choices == ("yes", "no")
    assert record().choices == ()


def test_audioset_csv_and_json_labels_are_read(tmp_path: Path):
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/04rlf,"Music, loud"\n'
    )
    segments = tmp_path / "segments.csv"
    segments.write_text('# Segments csv\n# num_ytids=1\nabc_1, 0.000, 10.000, "/m/09x0r,/m/04rlf"\n')
    assert read_labels(str(segments)) == [ClipLabels("abc_1.wav", ("Speech", "Music, loud"))]
    segments.write_text('abc_1, 0.000, 10.000, "/m/unknown"\n')
    with pytest.raises(ValueError, match="line 1"):
        read_labels(str(segments))
    labels = tmp_path / "labels.json"
    labels.write_text('[{"file": "frog.ogg", "label": "A frog.", "category": "amphibians"}]')
    assert read_labels(str(labels)) == [ClipLabels("frog.ogg", ("a frog", "amphibians"), ("amphibians",))]
    labels.write_text('[{"file": "a.wav", "labels": ["Dog", "rain"], "speaker": 7}, {"file": "b.wav", "label": "cat"}]')
    assert read_labels(str(labels)) == [ClipLabels("a.wav", ("dog", "rain"), (), "7"), ClipLabels("b.wav", ("cat",))]


@pytest.mark.parametrize(
    "fields", ["", ', "labels": "dog"', ', "labels": []', ', "label": ""', ', "labels": ["dog", null]']
)
def test_label_entry_without_labels_is_named(fields: str, tmp_path: Path):
    labels = tmp_path / "labels.json"
    labels.write_text(f'[{{"file": "cat.ogg", "label": "cat"}}, {{"file": "frog.ogg"{fields}}}]')
    with pytest.raises(ValueError, match=r"entry 1.*`file`.*`labels`"):
        read_labels(str(labels))


def test_partner_joins_only_single_clips():
    assert second_clip(["a"], "same", "silence", random_clip="b") == "a"
    assert second_clip(["a"], "silence", "silence", random_clip="b") == "silence"
    assert second_clip(["a"], "random", "silence", random_clip="b") == "b"
    assert second_clip(["a"], "random", "silence") == "a"
    for rule in ("same", "silence", "random"):
        assert second_clip(["a", "c"], rule, "silence", random_clip="b") == "c"


def test_random_partner_is_another_clip_and_repeatable():
    clips = [f"{number:02d}" for number in range(20)]
    partners = [draw_partner("07", position, clips) for position in range(2000)]
    assert partners == [draw_partner("07", position, clips) for position in range(2000)]
    counts = {clip: partners.count(clip) for clip in clips}
    assert counts.pop("07") == 0
    assert min(counts.values()) > 60
    assert draw_partner("00", 0, ["00"]) == "00"
    assert draw_partner("99", 0, ["00"]) == "00"
