"""The questions that benchmarks are made of, from record files, shards, or MMAU's file."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mellow_platform import storage
from mellow_platform.data import records as record_files
from mellow_platform.data.clip_reader import audio_root
from mellow_platform.data.records import FIELDS, Record, from_row
from mellow_platform.data.shards import Manifest
from mellow_platform.data.shards import read_records as read_shard_records
from mellow_platform.evaluation.evaluate_config import EvaluateConfig

MOST_CHOICES = 8  # that there are letters for, a to h
MMAU_GROUPS = ("task", "difficulty", "sub-category")


@dataclass(frozen=True, slots=True)
class BenchmarkItem:
    """One question of a benchmark.

    Attributes:
        id: of the question, in its file.
        paths: of the recordings that it is about, as its file has them.
        clips: what is heard: ids of clips in the shards (of a single recording with its partner), or URIs.
        files: URIs of the recordings, to listen to; empty where none are known.
        question: as it stands in the file.
        choices: to choose from, as they stand in the file; empty for an open question.
        references: right answers; empty where they are not public.
        groups: name of a category to the item's own, to score by.
    """

    id: str
    paths: tuple[str, ...]
    clips: tuple[str, ...]
    files: tuple[str, ...]
    question: str
    choices: tuple[str, ...]
    references: tuple[str, ...]
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Name of the questions that it is one of; empty where questions have none."""
        return self.groups.get("family", "")


class QuestionSource:
    """Where a job's questions come from; what is not asked for is not read.

    Raises, when it is read:
        FileNotFoundError: a file is absent.
        ValueError: a file holds something else, or none is configured; the message names the field.
    """

    def __init__(self, config: EvaluateConfig):
        self.config = config

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest of the shards, whose clips are encoded already."""
        return Manifest.read_with(self.config.shards, "encoder") if self.config.shards else None

    @cached_property
    def records(self) -> list[BenchmarkItem]:
        """The split's questions in ReasonAQA's format, in their order."""
        config = self.config
        if self.manifest:
            assert config.shards
            made = self.manifest.configuration
            rows = read_shard_records(config.shards, config.split, [*FIELDS, "number", "clip1", "clip2"]).to_pylist()
            files_of = made["source"] == "records"  # elsewhere clips are parts of files
            roots = config.audio_root or made["audio_root"], made["corpus"]
            return [
                _item(f"{config.split}/{row['number']}", from_row(row), (row["clip1"], row["clip2"]), roots, files_of)
                for row in rows
            ]
        if not config.corpus:
            raise ValueError("give `shards`, or `corpus` with `audio_root`: the benchmark is questions of a split")
        found = record_files.read_records(storage.join(config.corpus, f"{config.split}.json"))
        roots = config.audio_root, config.corpus
        return [_item(f"{config.split}/{number}", record, (), roots, True) for number, record in enumerate(found)]

    @cached_property
    def mmau_entries(self) -> list[dict[str, Any]]:
        """MMAU's file as it stands."""
        if not self.config.mmau:
            raise ValueError("give `mmau`, the benchmark's file (mmau-test-mini.json or mmau-test.json)")
        entries = storage.read_json(self.config.mmau)
        if not isinstance(entries, list):
            raise ValueError(f"{self.config.mmau}: expected MMAU's list of questions, found {type(entries).__name__}")
        ids: set[str] = set()
        for number, entry in enumerate(entries):
            fields = entry if isinstance(entry, dict) else {}
            texts = [name for name in ("id", "audio_id", "question") if not isinstance(fields.get(name), str)]
            choices = fields.get("choices")
            if texts or not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(
                    f"{self.config.mmau}: entry {number} has no {', '.join(texts) or 'choices'}; "
                    "id, audio_id, question and choices are needed"
                )
            if not 2 <= len(choices) <= MOST_CHOICES or entry["id"] in ids:
                raise ValueError(
                    f"{self.config.mmau}: entry {number} with id {entry['id']!r} has {len(choices)} choices, or an id "
                    f"that was there before: 2 to {MOST_CHOICES} choices and an id of its own are needed"
                )
            if not isinstance(entry.get("answer") or "", str):
                raise ValueError(
                    f"{self.config.mmau}: entry {number} has the answer {entry['answer']!r}, which is no text"
                )
            ids.add(entry["id"])
        return entries

    @cached_property
    def mmau(self) -> list[BenchmarkItem]:
        """MMAU's questions; clips that the shards hold too are taken from there."""
        root = self.config.audio_root
        folder = root.get("mmau") if isinstance(root, dict) else root
        folder = folder or (self.config.mmau or "").rpartition("/")[0]
        stored = {item.files[0]: item.clips[0] for item in self.records if item.files} if self.manifest else {}
        items = []
        for entry in self.mmau_entries:
            uri = storage.join(folder, entry["audio_id"].removeprefix("./"))
            items.append(
                BenchmarkItem(
                    id=f"mmau/{entry['id']}",
                    paths=(entry["audio_id"],),
                    clips=(stored.get(uri, uri),),
                    files=(uri,),
                    question=entry["question"],
                    choices=tuple(entry["choices"]),
                    references=(entry["answer"],) if entry.get("answer") else (),
                    groups={name: str(entry[name]) for name in MMAU_GROUPS if entry.get(name)},
                )
            )
        return items


def _item(id: str, record: Record, stored: tuple[str, ...], roots: tuple[Any, Any], has_files: bool) -> BenchmarkItem:
    """Return a record as an item; `stored` are its clips in the shards, if it comes from there."""
    folder = audio_root(*roots, record.taskname) if has_files else ""
    files = tuple(storage.join(folder, path) for path in record.filepaths) if has_files else ()
    return BenchmarkItem(
        id=id,
        paths=record.filepaths,
        clips=stored or files,
        files=files,
        question=record.input,
        choices=record.choices,
        references=(record.answer,),
        groups={"family": record.family},
    )


def merged(items: list[BenchmarkItem]) -> list[BenchmarkItem]:
    """Return items with those that ask the same about the same clips as one, which has all their references."""
    first: dict[tuple[Any, ...], BenchmarkItem] = {}
    for item in items:
        # By the recordings: a stored partner of a single clip differs from question to question.
        key = (item.paths, item.question, item.family)
        known = first.get(key)
        references = tuple(dict.fromkeys((known.references if known else ()) + item.references))
        first[key] = dataclasses.replace(known or item, references=references)
    return list(first.values())
