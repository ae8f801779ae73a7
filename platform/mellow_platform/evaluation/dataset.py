"""Questions of benchmarks, from record files, shards, or MMAU's file."""

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

MAX_CHOICES = 8  # letters a to h
MMAU_GROUPS = ("task", "difficulty", "sub-category")


@dataclass(frozen=True, slots=True)
class BenchmarkItem:
    """One question of a benchmark.

    Attributes:
        id: id of the question in its file.
        paths: paths of its recordings, as in its file.
        clips: keys of the model's audio input: ids in the shards (a single recording and its partner), or URIs.
        files: URIs of its recordings, for playback; empty if unknown.
        question: text of the question, as in its file.
        choices: choices, as in its file; empty for an open question.
        references: reference answers; empty if they are not public.
        groups: category of the item by axis, such as `family` or `task`.
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
        """Question family; empty if the item has none."""
        return self.groups.get("family", "")


class QuestionSource:
    """Questions of an evaluation job, read on first access.

    Raises, on first access:
        FileNotFoundError: a file does not exist.
        ValueError: a file is malformed, or none is configured; the message names the field.
    """

    def __init__(self, config: EvaluateConfig):
        self.config = config

    @cached_property
    def manifest(self) -> Manifest | None:
        """Manifest of the shards with encoded clips; None without shards."""
        return Manifest.read_with(self.config.shards, "encoder") if self.config.shards else None

    @cached_property
    def records(self) -> list[BenchmarkItem]:
        """Questions of the split in ReasonAQA's format, in file order."""
        config = self.config
        if self.manifest:
            assert config.shards
            settings = self.manifest.configuration
            rows = read_shard_records(config.shards, config.split, [*FIELDS, "number", "clip1", "clip2"]).to_pylist()
            has_files = settings["source"] == "records"  # other sources store clips inside archives
            roots = config.audio_root or settings["audio_root"], settings["corpus"]
            return [
                _item(f"{config.split}/{row['number']}", from_row(row), (row["clip1"], row["clip2"]), roots, has_files)
                for row in rows
            ]
        if not config.corpus:
            raise ValueError("no questions: set `shards`, or `corpus` with `audio_root`")
        records = record_files.read_records(storage.join(config.corpus, f"{config.split}.json"))
        roots = config.audio_root, config.corpus
        return [_item(f"{config.split}/{number}", record, (), roots, True) for number, record in enumerate(records)]

    @cached_property
    def mmau_entries(self) -> list[dict[str, Any]]:
        """Entries of MMAU's file."""
        if not self.config.mmau:
            raise ValueError("set `mmau`, the benchmark's file (mmau-test-mini.json or mmau-test.json)")
        entries = storage.read_json(self.config.mmau)
        if not isinstance(entries, list):
            raise ValueError(f"{self.config.mmau} is a {type(entries).__name__}; expected MMAU's list of questions")
        ids: set[str] = set()
        for number, entry in enumerate(entries):
            fields = entry if isinstance(entry, dict) else {}
            missing = [name for name in ("id", "audio_id", "question") if not isinstance(fields.get(name), str)]
            choices = fields.get("choices")
            if missing or not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(
                    f"{self.config.mmau}: entry {number} has no {', '.join(missing) or 'choices'}; "
                    "expected the texts id, audio_id and question, and a list choices"
                )
            if not 2 <= len(choices) <= MAX_CHOICES or entry["id"] in ids:
                raise ValueError(
                    f"{self.config.mmau}: entry {number} with id {entry['id']!r} has {len(choices)} choices, or "
                    f"repeats an id; expected 2 to {MAX_CHOICES} choices and unique ids"
                )
            if not isinstance(entry.get("answer") or "", str):
                raise ValueError(
                    f"{self.config.mmau}: entry {number} has the answer {entry['answer']!r}; expected text"
                )
            ids.add(entry["id"])
        return entries

    @cached_property
    def mmau(self) -> list[BenchmarkItem]:
        """Questions of MMAU; their clips are taken from the shards if these contain them."""
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
    """Return a record as an item; `stored` are its clip ids in the shards, empty for a record file."""
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


def merge_references(items: list[BenchmarkItem]) -> list[BenchmarkItem]:
    """Merge items with the same question about the same recordings into one item with all their references."""
    merged: dict[tuple[Any, ...], BenchmarkItem] = {}
    for item in items:
        # Keyed by recordings, because the stored partner of a single clip differs between questions.
        key = (item.paths, item.question, item.family)
        first = merged.get(key)
        references = tuple(dict.fromkeys((first.references if first else ()) + item.references))
        merged[key] = dataclasses.replace(first or item, references=references)
    return list(merged.values())
