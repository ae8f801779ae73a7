"""Question-answer records in ReasonAQA's format: one dataclass and one Arrow schema for JSON files and shards."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from mellow_platform import storage

SPLITS = ("train", "val", "test")

_CHOICE = re.compile(r"(?:^|\s)([a-h])\) (.*?)(?=\s[a-h]\) |$)")


@dataclass(frozen=True, slots=True)
class Record:
    """A question about one clip, or about two clips if `filepath2` is set.

    Paths are relative to the corpus's audio root. `subtype` is the source (`CLE.json`) or, in built-in corpora, the
    question family.
    """

    taskname: str
    filepath1: str
    filepath2: str
    caption1: str
    caption2: str
    input: str
    answer: str
    subtype: str

    @property
    def family(self) -> str:
        """Name of the question's group in scores."""
        return self.subtype.removesuffix(".json")

    @property
    def filepaths(self) -> tuple[str, ...]:
        return (self.filepath1, self.filepath2) if self.filepath2 else (self.filepath1,)

    @property
    def choices(self) -> tuple[str, ...]:
        """Choices as the question contains them (`b) chirping birds`); empty for an open question."""
        if lettered := tuple(f"{letter}) {text}" for letter, text in _CHOICE.findall(self.input)):
            return lettered
        return ("yes", "no") if self.answer in ("yes", "no") else ()

    @property
    def is_multiple_choice(self) -> bool:
        return bool(_CHOICE.search(self.input))


FIELDS = tuple(field.name for field in dataclasses.fields(Record))
SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in FIELDS])


def lettered(choices: Iterable[str]) -> list[str]:
    """Return choices as questions contain them: `a) ...`, `b) ...`."""
    return [f"{letter}) {choice}" for letter, choice in zip("abcdefgh", choices, strict=False)]


def read_records(uri: str) -> list[Record]:
    """Read a ReasonAQA JSON list.

    Raises:
        ValueError: the file is not a list of records; the message names entry and field.
    """
    entries = storage.read_json(uri)
    if not isinstance(entries, list):
        raise ValueError(f"{uri}: expected a JSON list of records, found {type(entries).__name__}")
    records = []
    for number, entry in enumerate(entries):
        values = {name: entry[name] for name in FIELDS if name in entry} if isinstance(entry, dict) else {}
        invalid = [name for name in FIELDS if not isinstance(values.get(name), str)]
        if invalid:
            raise ValueError(
                f"{uri}: record {number} has no text in {', '.join(invalid)}; all of {', '.join(FIELDS)} are needed"
            )
        if not values["filepath1"]:
            raise ValueError(f"{uri}: record {number} has an empty filepath1")
        records.append(Record(**values))
    return records


def write_records(uri: str, records: list[Record]) -> None:
    storage.write_json(uri, [dataclasses.asdict(record) for record in records])


def to_table(records: list[Record]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(record) for record in records], schema=SCHEMA)


def from_row(row: dict) -> Record:
    """Return the record in a table row; other columns are ignored."""
    return Record(**{name: row[name] for name in FIELDS})
