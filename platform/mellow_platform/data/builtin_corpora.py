"""Corpora without a download: synthetic scenes, and questions about a folder of labelled recordings.

A corpus is a folder with `train.json`, `val.json`, `test.json` (ReasonAQA records with paths relative to the audio
root), `labels.json` (tags of the train clips, to train the encoder) and `mmau.json` (questions about test clips in the
format of the benchmark MMAU). Scenes have their audio in `audio/`; recordings stay in their folder, and `corpus.json`
counts their labels per split.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from mellow_platform import storage
from mellow_platform.data.audio import encode
from mellow_platform.data.labels import ClipLabels, write_labels
from mellow_platform.data.recordings import LabelledRecordings, examples, read_recordings
from mellow_platform.data.records import SPLITS, Record, lettered, write_records
from mellow_platform.data.scene_questions import caption_question, comparison_questions, single_clip_questions
from mellow_platform.data.scenes import Scene, draw_scene, render
from mellow_platform.data.splits import Term, assign_splits, group_key, terms

SCENE_RATES = (32_000, 44_100)  # Hz
SCENE_ROUNDS = 3
# Per round, a recording has a multiple-choice and a presence question about a label, and both about a category.
TRAINING_QUESTIONS, QUESTIONS_PER_ROUND, MAX_ROUNDS = 12_000, 4, 40
# Per kind of label: the multiple-choice family, the presence family, and the text of the multiple-choice question.
QUESTIONS = {
    "label": ("Recordings-Heard-MCQ", "Recordings-Presence", "what is heard?"),
    "category": ("Recordings-Category-MCQ", "Recordings-Category-Presence", "what kind of sound is it?"),
}


def scene_clip(seed: int, split: str, number: int) -> tuple[Scene, bytes]:
    """Return the scene and the FLAC file of one clip, a function of the arguments only."""
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
    """Return the questions of a split: one caption per clip, and `rounds` draws of all other families."""
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
    """Write records and labels of scenes whose audio exists; return the number of questions per split."""
    counts = {}
    for split in SPLITS:
        records = scene_records(scenes[split], split, seed, rounds if split == "train" else 1)
        write_records(storage.join(output, f"{split}.json"), records)
        counts[split] = len(records)
        if split == "test":
            _write_mmau(output, records, "./audio")
    labels = [ClipLabels(scene_path("train", n), tuple(s.labels)) for n, s in enumerate(scenes["train"])]
    write_labels(storage.join(output, "labels.json"), labels)
    return counts


def recording_corpus(folder: str, output: str, seed: int, rounds: int | None = None) -> dict[str, Any]:
    """Write questions about a folder of labelled recordings, and return the content of `corpus.json`.

    Right and wrong answers are labels with training clips. In val and test, a clip has questions about each such label;
    in train, about one label and one category per round. The default number of rounds gives about
    `TRAINING_QUESTIONS`.

    Raises:
        ValueError: the labels are malformed, there are fewer than 10 recordings or 4 labels, or no label has training
            and test clips.
    """
    recordings = read_recordings(folder)
    clips = recordings.clips
    names = {name for clip in clips for name in clip.names}
    if len(clips) < 10 or len(names) < 4:
        raise ValueError(
            f"{folder} has {len(clips)} recordings with {len(names)} labels from {recordings.source} "
            f"({examples(sorted(names))}); multiple-choice questions need at least 10 recordings and 4 "
            f"labels{''.join(f'; {warning}' for warning in recordings.warnings)}"
        )
    splits = assign_splits(clips, seed)
    rounds = rounds or min(MAX_ROUNDS, max(1, TRAINING_QUESTIONS // (QUESTIONS_PER_ROUND * len(splits["train"]))))
    in_train = {term for clip in splits["train"] for term in terms(clip)}
    train_terms = sorted(in_train)
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    answers: dict[str, Counter[Term]] = {split: Counter() for split in SPLITS}
    for split, members in splits.items():
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        for clip in members * (rounds if split == "train" else 1):
            candidates = [term for term in terms(clip) if term in in_train]
            for term in _rarest(candidates, answers[split], rng) if split == "train" else candidates:
                if questions := _recording_questions(clip, term, train_terms, rng):
                    records[split] += questions
                    answers[split][term] += 1
    summary = _summary(recordings, splits, records, answers) | {"seed": seed}
    if not records["test"]:
        column = recordings.group_field
        origin = f"groups by column {column!r}; rename it if it does not name groups" if column else "groups"
        raise ValueError(
            f"{folder}: no label has recordings for both train and test, which need two groups of recordings per "
            f"label; its {len(clips)} recordings are in {summary['groups']} {origin}"
        )
    for split in SPLITS:
        write_records(storage.join(output, f"{split}.json"), records[split])
    _write_mmau(output, records["test"], folder)
    write_labels(storage.join(output, "labels.json"), splits["train"])
    storage.write_json(storage.join(output, "corpus.json"), summary)
    return summary


def _summary(
    recordings: LabelledRecordings,
    splits: dict[str, list[ClipLabels]],
    records: dict[str, list[Record]],
    answers: dict[str, Counter[Term]],
) -> dict[str, Any]:
    """Return the fields of `corpus.json`, which docs/guides/recordings.md describes.

    Args:
        answers: per split, number of questions with each label as the right answer.
    """
    counts = {split: Counter(term for clip in members for term in terms(clip)) for split, members in splits.items()}
    groups: dict[Term, set[tuple[str, str]]] = defaultdict(set)
    for clip in recordings.clips:
        for term in terms(clip):
            groups[term].add(group_key(clip))
    labels = [
        {
            "label": term[1],
            "kind": term[0],
            "recordings": {split: counts[split][term] for split in SPLITS},
            "groups": len(groups[term]),
            "questions": {split: answers[split][term] for split in SPLITS},
        }
        for term in sorted(groups, key=lambda term: (term[0] != "label", term[1]))
    ]
    not_tested = {term[1]: sum(n[term] for n in counts.values()) for term in groups if not answers["test"][term]}
    warnings = list(recordings.warnings)
    if not_tested:
        shares = []
        for kind, name in (("label", "labels"), ("category", "categories")):
            kind_terms = [term for term in groups if term[0] == kind]
            if kind_terms:
                shares.append(f"{sum(answers['test'][term] > 0 for term in kind_terms)} of {len(kind_terms)} {name}")
        counted = [f"{text} ({count})" for text, count in not_tested.items()]
        warnings.append(
            f"test.json has questions about {' and '.join(shares)}: a label needs recordings of two groups, one for "
            f"train and one for test. Labels without test questions (number of recordings): {examples(counted, 10)}"
        )
    paths = {record.filepath1 for questions in records.values() for record in questions}
    if unused := len(recordings.clips) - len(paths):
        warnings.append(f"{unused} recordings have no question: none of their labels is in train")
    if not splits["val"]:
        warnings.append("val.json is empty: train and test have all recordings")
    return {
        "source": recordings.source,
        "group_field": recordings.group_field,
        "recordings": {split: len(members) for split, members in splits.items()},
        "groups": len({group_key(clip) for clip in recordings.clips}),
        "questions": {split: len(questions) for split, questions in records.items()},
        "chance": {split: _chance(questions) for split, questions in records.items()},
        "skipped": recordings.skipped,
        "not_tested": not_tested,
        "warnings": warnings,
        "labels": labels,
    }


def _chance(records: Sequence[Record]) -> float | None:
    """Return the chance level of multiple-choice questions: the mean of 1 / number of choices."""
    shares = [1 / len(record.choices) for record in records if record.is_multiple_choice]
    return round(float(np.mean(shares)), 4) if shares else None


def _write_mmau(output: str, records: Sequence[Record], audio_root: str) -> None:
    """Write `mmau.json`: one multiple-choice question per clip, in the format of the benchmark MMAU.

    More choices mean a higher difficulty.
    """
    by_clip: dict[str, list[Record]] = {}
    for record in records:
        if record.is_multiple_choice and not record.filepath2:
            by_clip.setdefault(record.filepath1, []).append(record)
    entries = []
    for number, (path, questions) in enumerate(by_clip.items()):
        record = questions[number % len(questions)]
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


def _rarest(candidates: Sequence[Term], answers: Counter[Term], rng: np.random.Generator) -> list[Term]:
    """Return the label and the category among `candidates`, if any, that were the right answer least often."""
    shuffled = [candidates[number] for number in rng.permutation(len(candidates))]
    return [
        min(kind_terms, key=lambda term: answers[term])
        for kind in QUESTIONS
        if (kind_terms := [term for term in shuffled if term[0] == kind])
    ]


def _recording_questions(
    clip: ClipLabels, term: Term, train_terms: Sequence[Term], rng: np.random.Generator
) -> list[Record]:
    """Return a multiple-choice question with the right answer `term`, and a yes-no question.

    Wrong answers are drawn from the `train_terms` of the same kind that are not labels of the clip; without any, there
    are no questions.
    """
    kind, right = term
    wrong = [text for other, text in train_terms if other == kind and text not in clip.labels]
    if not wrong:
        return []
    choice_family, presence_family, question = QUESTIONS[kind]
    order = [str(item) for item in rng.permutation([right, *rng.permutation(wrong)[:3]])]
    choices = lettered(order)
    present = rng.random() < 0.5
    label = right if present else rng.choice(wrong)

    def record(family: str, text: str, answer: str) -> Record:
        return Record("recordings", clip.file, "", ", ".join(clip.names), "", text, answer, family)

    multiple_choice = record(choice_family, " ".join([question, *choices]), choices[order.index(right)])
    if multiple_choice.choices != tuple(choices):
        raise ValueError(f"a label of {order} contains a choice letter such as 'b) '; rename it")
    return [multiple_choice, record(presence_family, f"is this heard: {label}?", "yes" if present else "no")]
