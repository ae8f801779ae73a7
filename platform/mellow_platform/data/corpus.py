"""The corpora that need no download: synthetic scenes, and questions about a folder of labelled recordings.

A corpus is a folder with `train.json`, `val.json`, `test.json` (ReasonAQA records whose paths are relative to the
audio root), `labels.json` (tags of each clip, for training the encoder) and `mmau.json` (questions about test clips, as
the benchmark MMAU has them). Scenes bring their audio along in `audio/`.
"""

from collections.abc import Sequence

import numpy as np

from mellow_platform import storage
from mellow_platform.data.audio import encode
from mellow_platform.data.labels import ClipLabels, read_labels, write_labels
from mellow_platform.data.questions import caption_question, comparison_questions, single_clip_questions
from mellow_platform.data.records import SPLITS, Record, lettered, write_records
from mellow_platform.data.scenes import Scene, draw_scene, render

SCENE_RATES = (32_000, 44_100)  # Hz


def scene_clip(seed: int, split: str, number: int) -> tuple[Scene, bytes]:
    """Return one clip's truth and its FLAC file; a function of the arguments alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    scene = draw_scene(rng)
    rate = int(rng.choice(SCENE_RATES))
    waveform = render(scene, rate, rng)
    if rng.random() < 0.25:
        balance = rng.uniform(0.9, 1.0, 2)
        waveform = waveform[:, None] * (balance / balance.mean())
    return scene, encode(np.clip(waveform, -1.0, 1.0), rate)


def scene_path(split: str, number: int) -> str:
    return f"{split}/{number:06d}.flac"


def scene_records(scenes: Sequence[Scene], split: str, seed: int, rounds: int) -> list[Record]:
    """Return the questions of a split: `rounds` draws of every single-clip family, and of pairs of clips."""
    rng = np.random.default_rng([seed, SPLITS.index(split), len(scenes), rounds])
    records = [caption_question(scene, scene_path(split, number)) for number, scene in enumerate(scenes)]
    single = [number for number, scene in enumerate(scenes) if len(scene.events) == 1]
    for _ in range(rounds):
        for number, scene in enumerate(scenes):
            records += single_clip_questions(scene, scene_path(split, number), rng)
        for number in single:
            other = single[rng.integers(len(single))]
            pair = [(scenes[place], scene_path(split, place)) for place in (number, other)]
            records += comparison_questions(pair[0], pair[1], rng)
    return records


def write_scene_corpus(output: str, scenes: dict[str, list[Scene]], *, seed: int, rounds: int) -> dict[str, int]:
    """Write records and labels of scenes whose audio is in place; return the number of questions a split."""
    counts = {}
    labels = []
    for split in SPLITS:
        records = scene_records(scenes[split], split, seed, rounds if split == "train" else 1)
        write_records(storage.join(output, f"{split}.json"), records)
        counts[split] = len(records)
        if split == "test":
            _write_mmau(output, records, "./audio")
        labels += [ClipLabels(scene_path(split, n), tuple(s.labels)) for n, s in enumerate(scenes[split])]
    write_labels(storage.join(output, "labels.json"), labels)
    return counts


def recording_corpus(folder: str, output: str, seed: int, rounds: int) -> dict[str, int]:
    """Write questions on what is heard in a folder of recordings with `labels.json`; return their number a split.

    Recordings, not questions, are dealt to the splits (3 of 5 train, 1 val, 1 test), so no clip is in two.

    Raises:
        ValueError: fewer than 10 recordings, or fewer than 4 labels to choose from.
    """
    clips = read_labels(storage.join(folder, "labels.json"))
    names = sorted({clip.labels[0] for clip in clips})
    categories = sorted({clip.labels[-1] for clip in clips})
    if len(clips) < 10 or len(names) < 4:
        raise ValueError(
            f"{folder}/labels.json has {len(clips)} recordings with {len(names)} labels: "
            "at least 10 recordings and 4 labels are needed to ask multiple-choice questions"
        )
    rng = np.random.default_rng(seed)
    dealt: dict[str, list[ClipLabels]] = {split: [] for split in SPLITS}
    for place, number in enumerate(rng.permutation(len(clips))):
        dealt[("train", "train", "train", "val", "test")[place % 5]].append(clips[number])
    counts = {}
    for split, members in dealt.items():
        records = []
        for _ in range(rounds if split == "train" else 1):
            for clip in members:
                records += _recording_questions(clip, names, categories, rng)
        write_records(storage.join(output, f"{split}.json"), records)
        counts[split] = len(records)
        if split == "test":
            _write_mmau(output, records, folder)
    write_labels(storage.join(output, "labels.json"), [c for c in clips if c in dealt["train"]])
    return counts


def _write_mmau(output: str, records: Sequence[Record], audio_root: str) -> None:
    """Write `mmau.json`: a multiple-choice question of each clip in turn, in the format of the benchmark MMAU.

    A question with more choices counts as harder.
    """
    by_clip: dict[str, list[Record]] = {}
    for record in records:
        if record.is_multiple_choice and not record.filepath2:
            by_clip.setdefault(record.filepath1, []).append(record)
    entries = []
    for number, (path, asked) in enumerate(by_clip.items()):
        record = asked[number % len(asked)]
        choices = record.choices
        entries.append(
            {
                "id": f"{number:06d}",
                "audio_id": storage.join(audio_root, path),
                "question": record.input.removesuffix(" ".join(choices)).strip(),
                "choices": [choice[len("a) ") :] for choice in choices],
                "answer": record.answer[len("a) ") :],
                "task": "sound",
                "split": "test",
                "sub-category": record.family,
                "difficulty": {2: "easy", 3: "medium"}.get(len(choices), "hard"),
            }
        )
    storage.write_json(storage.join(output, "mmau.json"), entries)


def _recording_questions(
    clip: ClipLabels, names: list[str], categories: list[str], rng: np.random.Generator
) -> list[Record]:
    name, category = clip.labels[0], clip.labels[-1]
    records = []

    def add(family: str, question: str, answer: str) -> None:
        records.append(Record("recordings", clip.file, "", name, "", question, answer, f"Recordings-{family}"))

    for family, question, right, pool in (
        ("Heard-MCQ", "what is heard?", name, names),
        ("Category-MCQ", "what kind of sound is it?", category, categories),
    ):
        wrong = [item for item in pool if item != right]
        if not wrong:
            continue
        order = [str(item) for item in rng.permutation([right, *rng.permutation(wrong)[:3]])]
        choices = lettered(order)
        add(family, " ".join([question, *choices]), choices[order.index(right)])
    for family, right, pool in (("Presence", name, names), ("Category-Presence", category, categories)):
        wrong = [item for item in pool if item != right]
        present = not wrong or rng.random() < 0.5
        asked = right if present else str(rng.choice(wrong))
        add(family, f"is this heard: {asked}?", "yes" if present else "no")
    return records
