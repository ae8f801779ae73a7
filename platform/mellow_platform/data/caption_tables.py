"""Captions of clips, in their published layouts."""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mellow_platform.data.labels import read_labels
from mellow_platform.data.records import SPLITS
from mellow_platform.data.splits import split_of
from mellow_platform.data.tables import read_table

# Required columns of each layout.
AUDIOCAPS = ("youtube_id", "start_time", "caption")
CLOTHO = ("file_name", "caption_1")
REASONAQA = ("filepath1", "caption1")
LABELS = ("file",)
CAPTIONS = ("clip", "caption")
# Columns of CSV files that are read as text, because names and captions may look like numbers.
TEXT_COLUMNS = (
    *AUDIOCAPS,
    *CLOTHO,
    *CAPTIONS,
    "audiocap_id",
    *(f"caption_{n}" for n in range(2, 6)),
    "split",
)


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption of a clip, or its tags if `labels` is set.

    `clip` is a path relative to an audio root; `taskname` is the task name of questions about the caption.
    """

    clip: str
    text: str
    split: str
    taskname: str
    labels: tuple[str, ...] = ()


def read_captions(uris: list[str], taskname: str, clip_name: str, limit: int | None = None) -> list[Caption]:
    """Read captions from files of any layout below, in file order; each pair of clip and text is returned once.

    AudioCaps: `audiocap_id,youtube_id,start_time,caption`. Clotho: `file_name,caption_1,...,caption_5`. ReasonAQA:
    records with `filepath1`, `caption1` and, for two clips, `filepath2`, `caption2`. Tags: `{file, labels}` or
    `{file, label, category}`. Any other table: `clip`, `caption` (a text or a list of texts) and optionally `split`.
    A row without a split has the split of its file's name (`split_of`).

    Args:
        taskname: task name of captions from layouts without one.
        clip_name: path of an AudioCaps clip, with column names in braces.
        limit: largest number of captions per file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has an unknown layout or no captions, a row lacks clip or caption, or a clip is in two
            splits; the message names file, row and value.
    """
    splits: dict[str, str] = {}
    unique: dict[tuple[str, str], Caption] = {}
    for uri in uris:
        captions: dict[tuple[str, str], Caption] = {}
        for caption in _read(uri, taskname, clip_name):
            split = splits.setdefault(caption.clip, caption.split)
            if split != caption.split:
                raise ValueError(f"{uri}: clip {caption.clip} is in both {caption.split} and {split}; keep it in one")
            captions.setdefault((caption.clip, caption.text), caption)
            if len(captions) == limit:
                break
        if not captions:
            raise ValueError(f"{uri} contains no captions")
        for key, caption in captions.items():
            unique.setdefault(key, caption)
    return list(unique.values())


def _read(uri: str, taskname: str, clip_name: str) -> Iterator[Caption]:
    rows = read_table(uri, TEXT_COLUMNS).to_pylist()
    columns = rows[0].keys() if rows else set()
    if columns >= set(AUDIOCAPS):
        return _audiocaps(uri, rows, clip_name)
    if columns >= set(CLOTHO):
        return _clotho(uri, rows)
    if columns >= set(REASONAQA):
        return _reasonaqa(uri, rows)
    if columns >= set(CAPTIONS):
        return _table(uri, rows, taskname)
    if columns >= set(LABELS) and uri.lower().endswith(".json"):
        return _labels(uri, rows, taskname)
    raise ValueError(
        f"{uri} has columns {', '.join(columns) or '(none)'}; expected {', '.join(AUDIOCAPS)} (AudioCaps), "
        f"{', '.join(CLOTHO)}, ... (Clotho), {', '.join(REASONAQA)} (ReasonAQA), file, labels, or {', '.join(CAPTIONS)}"
    )


def _audiocaps(uri: str, rows: list[dict[str, Any]], clip_name: str) -> Iterator[Caption]:
    columns = [field for _, field, _, _ in string.Formatter().parse(clip_name) if field]
    for number, row in enumerate(rows):
        try:
            clip = clip_name.format_map({name: _name(uri, number, row, name) for name in columns if name in row})
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{uri}: row {number}: clip_name {clip_name!r} is invalid: {error}") from error
        yield Caption(clip, _text(uri, number, row, "caption"), _split(uri, number, row), "audiocaps")


def _clotho(uri: str, rows: list[dict[str, Any]]) -> Iterator[Caption]:
    columns = [name for name in rows[0] if name.startswith("caption_")]
    for number, row in enumerate(rows):
        for name in columns:
            text = _text(uri, number, row, name)
            yield Caption(_text(uri, number, row, "file_name"), text, _split(uri, number, row), "clothov21")


def _reasonaqa(uri: str, rows: list[dict[str, Any]]) -> Iterator[Caption]:
    for number, row in enumerate(rows):
        for clip, text in (("filepath1", "caption1"), ("filepath2", "caption2")):
            if clip == "filepath1" or row.get(clip):
                split, taskname = _split(uri, number, row), _text(uri, number, row, "taskname")
                yield Caption(_text(uri, number, row, clip), _text(uri, number, row, text), split, taskname)


def _table(uri: str, rows: list[dict[str, Any]], taskname: str) -> Iterator[Caption]:
    for number, row in enumerate(rows):
        texts = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        for text in texts:
            caption = _text(uri, number, {"caption": text}, "caption")
            yield Caption(_text(uri, number, row, "clip"), caption, _split(uri, number, row), taskname)


def _labels(uri: str, rows: list[dict[str, Any]], taskname: str) -> Iterator[Caption]:
    """Yield the labels of each clip, separated by commas, as its caption."""
    for number, (row, clip) in enumerate(zip(rows, read_labels(uri), strict=True)):
        yield Caption(clip.file, ", ".join(clip.labels), _split(uri, number, row), taskname, clip.labels)


def _name(uri: str, number: int, row: dict[str, Any], name: str) -> str:
    """Return a column's value for a file name; a whole number becomes text."""
    value = row[name]
    return str(value) if isinstance(value, int) else _text(uri, number, row, name)


def _text(uri: str, number: int, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{uri}: row {number} has {value!r} in column {name}; expected text")
    return " ".join(value.split())


def _split(uri: str, number: int, row: dict[str, Any]) -> str:
    if not (value := row.get("split")):
        return split_of(uri.rsplit("/", 1)[-1])
    if value not in SPLITS:
        raise ValueError(f"{uri}: row {number} has {value!r} in column split; expected {', '.join(SPLITS)}")
    return value
