"""Labels of clips: `labels.json` for the encoder and for questions about recordings, or AudioSet's CSV layout."""

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass

from mellow_platform import storage

# Fields and columns, in lower case, that name the common origin of clips; the first one in a table is used.
# src_file is ESC-50's, fsid (fsID) UrbanSound8K's: the recording on freesound.org that a clip was cut from.
GROUP_FIELDS = ("group", "speaker", "source", "kit", "src_file", "fsid", "uploader")


@dataclass(frozen=True, slots=True)
class ClipLabels:
    """Labels of one clip.

    Attributes:
        file: path under the audio root.
        labels: all tags of the clip, including its categories.
        categories: the `labels` that name a kind of sound ("birds"), if label and category are separate.
        group: common name of clips of one origin (a speaker, a long recording, a drum kit); empty if unknown.
    """

    file: str
    labels: tuple[str, ...]
    categories: tuple[str, ...] = ()
    group: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Labels that name the sound itself, or the categories if there are no other labels."""
        return tuple(label for label in self.labels if label not in self.categories) or self.labels


def read_labels(uri: str) -> list[ClipLabels]:
    """Read labels from `labels.json`, or from an AudioSet segment list (`*.csv`).

    JSON: a list of `{file, labels: [...]}` or `{file, label, category}`, optionally with a group (`GROUP_FIELDS`).
    CSV: `YTID, start, end, "mid,mid"`; names of mids are read from `class_labels_indices.csv` in the same folder, and
    clip files are `<YTID>.wav`.

    Raises:
        ValueError: an entry is malformed; the message names it.
    """
    return _read_audioset(uri) if uri.endswith(".csv") else _read_json(uri)


def write_labels(uri: str, clips: list[ClipLabels]) -> None:
    storage.write_json(uri, [{"file": clip.file, "labels": list(clip.labels)} for clip in clips])


def vocabulary(clips: list[ClipLabels]) -> list[str]:
    """Return every label once, sorted."""
    return sorted({label for clip in clips for label in clip.labels})


def group_field(fields: Collection[str]) -> str:
    """Return the first of `GROUP_FIELDS` in `fields` (lower case); empty if there is none."""
    return next((name for name in GROUP_FIELDS if name in fields), "")


def _read_json(uri: str) -> list[ClipLabels]:
    entries = storage.read_json(uri)
    if not isinstance(entries, list):
        raise ValueError(f"{uri}: expected a JSON list, found {type(entries).__name__}")
    rows = [{str(key).lower(): value for key, value in e.items()} if isinstance(e, dict) else {} for e in entries]
    group = group_field({name for row in rows for name in row})
    clips = []
    for number, row in enumerate(rows):
        values = row.get("labels") or [row[key] for key in ("label", "category") if row.get(key) is not None]
        labels = [_label(value) for value in values] if isinstance(values, list) else []
        if not isinstance(row.get("file"), str) or not labels or not all(labels):
            raise ValueError(
                f"{uri}: entry {number} needs `file` and a list `labels` (or `label` and `category`): "
                f"{entries[number]!r:.200}"
            )
        categories = labels[1:] if not row.get("labels") else []
        group_name = row.get(group)
        clips.append(
            ClipLabels(
                row["file"],
                tuple(dict.fromkeys(labels)),
                tuple(categories),
                "" if group_name is None else str(group_name),
            )
        )
    return clips


def _label(value: object) -> str:
    """Return a label in lower case without its full stop; empty for null, a list or an object."""
    return " ".join(str(value).split()).rstrip(".").lower() if isinstance(value, str | int | float) else ""


def _read_audioset(uri: str) -> list[ClipLabels]:
    index = storage.join(uri.rsplit("/", 1)[0], "class_labels_indices.csv")
    rows = csv.DictReader(io.StringIO(storage.read_bytes(index).decode()))
    names = {row["mid"]: row["display_name"] for row in rows}
    clips = []
    for number, row in enumerate(csv.reader(io.StringIO(storage.read_bytes(uri).decode()), skipinitialspace=True), 1):
        if not row or row[0].startswith("#"):
            continue
        mids = row[3].split(",") if len(row) == 4 else []
        unknown = [mid for mid in mids if mid not in names]
        if not mids or unknown:
            raise ValueError(
                f'{uri}: line {number} is {row}; expected `YTID, start, end, "mid,..."` with mids of {index}'
            )
        clips.append(ClipLabels(f"{row[0]}.wav", tuple(names[mid] for mid in mids)))
    return clips
