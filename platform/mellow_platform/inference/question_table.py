"""Questions and their clips: the same questions about every clip of a folder, or the rows of a table."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mellow_platform import storage
from mellow_platform.data.clip_reader import AUDIO_SUFFIXES
from mellow_platform.data.tables import read_table
from mellow_platform.inference.predict_config import PredictConfig

TEXT_COLUMNS = ("clip", "clip2", "question")
# Output columns, which an input table cannot have.
ANSWER_COLUMNS = ("answer", "finish_reason", "tokens", "heard", "scores", "logprobs", "error", "detail")

Pair = tuple[str, str | None]


@dataclass(frozen=True)
class QuestionTable:
    """Questions in the order of their answers; those about the same clips are adjacent.

    Attributes:
        table: one row per question: `clip`, `question`, and, if the input has them, `clip2` (null: about one clip),
            `choices` (null or empty: an answer is generated) and other columns.
        base: folder that clips are relative to; None is the working directory.
        sizes: bytes of each clip in a folder; empty for a table.
    """

    table: pa.Table
    base: str | None
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def has(self, column: str) -> bool:
        return column in self.table.column_names

    @property
    def extra_columns(self) -> list[str]:
        """Names of the columns that are copied to the output."""
        return [name for name in self.table.column_names if name not in (*TEXT_COLUMNS, "choices")]

    @property
    def digest(self) -> str:
        """SHA-256 over questions, clips and extra columns; a different digest means different rows."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as stream:
            stream.write_table(self.table.combine_chunks())
        return hashlib.sha256(f"{self.base} {self.sizes}".encode() + sink.getvalue().to_pybytes()).hexdigest()

    def clips(self, rows: range) -> set[str]:
        """Return the clips of the questions in a range of rows."""
        return {clip for pair in _pairs(self.table.slice(rows.start, len(rows))) for clip in pair if clip}

    def groups(self, rows: range) -> list[dict[str, Any]]:
        """Return groups of adjacent questions about the same clips in a range of rows.

        A group has its first `row`, the `uris` of its one or two clips, and `questions` and `choices` per row.
        """
        part = self.table.slice(rows.start, len(rows))
        choices = part["choices"].to_pylist() if self.has("choices") else [None] * len(part)
        questions = zip(_pairs(part), part["question"].to_pylist(), choices, strict=True)
        groups: list[dict[str, Any]] = []
        current = None
        for number, (pair, question, row_choices) in enumerate(questions, rows.start):
            if pair != current:
                current = pair
                uris = [self.uri(clip) for clip in pair if clip]
                groups.append({"row": number, "uris": uris, "questions": [], "choices": []})
            groups[-1]["questions"].append(question)
            groups[-1]["choices"].append(row_choices or [])
        return groups

    def uri(self, clip: str) -> str:
        return storage.absolute(storage.join(self.base, clip) if self.base else clip)


def read_question_table(config: PredictConfig) -> QuestionTable:
    """Return the questions of `config`, without reading audio.

    Raises:
        FileNotFoundError: the folder or the table is missing.
        ValueError: the folder contains no audio, or the table is invalid; the message names the row.
    """
    if config.table:
        return _read_table(config, config.table)
    assert config.clips
    files = [(name, size) for name, size in storage.find(config.clips) if name.lower().endswith(AUDIO_SUFFIXES)]
    if not files:
        raise ValueError(f"{config.clips} contains no {', '.join(AUDIO_SUFFIXES)} file; check `clips`")
    clips = [name for name, _ in files for _ in config.clip_questions]
    table = pa.table({"clip": pa.array(clips, pa.string()), "question": config.clip_questions * len(files)})
    return QuestionTable(table, config.clips, tuple(size for _, size in files))


def _read_table(config: PredictConfig, uri: str) -> QuestionTable:
    table = read_table(uri, text_columns=(*TEXT_COLUMNS, "choices"))
    names = table.column_names
    if missing := [name for name in ("clip", "question") if name not in names]:
        raise ValueError(f"{uri} has no column {' and no column '.join(missing)}; it has {', '.join(names)}")
    if invalid := [name for name in names if name in ANSWER_COLUMNS or names.count(name) > 1]:
        raise ValueError(f"{uri}: column {invalid[0]!r} is repeated or reserved for the output; rename it")
    if not len(table):
        raise ValueError(f"{uri} has no rows")
    columns = {name: _texts(uri, name, table[name].to_pylist()) for name in TEXT_COLUMNS if name in names}
    if "choices" in names:
        columns["choices"] = _choices(uri, table["choices"].to_pylist())
    for name, values in columns.items():
        table = table.set_column(names.index(name), name, values)
    questions = QuestionTable(table.take(_order(table)), config.clips)
    _check_clips(questions, uri, config.window)
    return questions


def _texts(uri: str, column: str, values: list[Any]) -> pa.Array:
    """Return a column of texts; null and empty values of clip2 become null."""
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{uri}: row {row} has {value!r} in column {column}; expected text")
        if column != "clip2" and not (value or "").strip():
            raise ValueError(f"{uri}: row {row} has an empty {column}")
    return pa.array([value or None for value in values], pa.string())


def _choices(uri: str, values: list[Any]) -> pa.Array:
    """Return a column of lists of texts, which a CSV file contains as JSON."""
    lists = []
    for row, value in enumerate(values):
        try:
            texts = (json.loads(value) if value else None) if isinstance(value, str) else value
        except json.JSONDecodeError:
            texts = value
        if texts is not None and not (isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)):
            raise ValueError(
                f'{uri}: row {row} has {value!r} in column choices; expected a list of texts such as ["yes", "no"]'
            )
        lists.append(texts)
    return pa.array(lists, pa.list_(pa.string()))


def _order(table: pa.Table) -> list[int]:
    """Return the input's row order, with rows about the same clips moved together."""
    pairs = list(_pairs(table))
    first: dict[str | Pair, int] = {}
    for row, pair in enumerate(pairs):
        first.setdefault(pair[0], row)
        first.setdefault(pair, row)
    return sorted(range(len(pairs)), key=lambda row: (first[pairs[row][0]], first[pairs[row]], row))


def _check_clips(questions: QuestionTable, uri: str, window: str) -> None:
    """Check that every clip has a valid URI, and that the window rule applies.

    Raises:
        ValueError: a clip has an unknown scheme, a relative path in a submitted job, or a second clip with `pair`.
    """
    schemes: set[str] = set()
    for clip, second in _pairs(questions.table):
        if second and window == "pair":
            raise ValueError(f"{uri}: clips {clip} and {second}: window: pair is for one clip; use first or each")
        for name in (clip, second):
            scheme = name.partition("://")[0] if name and "://" in name else ""
            if name and scheme not in schemes:
                try:
                    storage.filesystem(questions.uri(name))
                except (ValueError, ImportError) as error:
                    raise ValueError(f"{uri}: clip {name}: {error}") from error
                schemes.add(scheme)


def _pairs(table: pa.Table) -> Iterator[Pair]:
    """Yield the clip of each row with its second clip, or None."""
    clips = table["clip"].to_pylist()
    seconds = table["clip2"].to_pylist() if "clip2" in table.column_names else [None] * len(clips)
    return zip(clips, seconds, strict=True)
