"""Tags of clips for training the encoder: the corpora's own `labels.json`, or AudioSet's CSV layout."""

import csv
import io
from dataclasses import dataclass

from mellow_platform import storage


@dataclass(frozen=True, slots=True)
class ClipLabels:
    """A clip's path under the audio root, and its tags."""

    file: str
    labels: tuple[str, ...]


def read_labels(uri: str) -> list[ClipLabels]:
    """Read tags from `labels.json`, or from an AudioSet segment list (`*.csv`).

    JSON: a list of `{file, labels: [...]}` or `{file, label, category}`.
    CSV: `YTID, start, end, "mid,mid"`; the names of the mids come from `class_labels_indices.csv` beside it, and
    clip files are `<YTID>.wav`.

    Raises:
        ValueError: the file has another form; the message names the entry.
    """
    return _read_audioset(uri) if uri.endswith(".csv") else _read_json(uri)


def write_labels(uri: str, clips: list[ClipLabels]) -> None:
    storage.write_json(uri, [{"file": clip.file, "labels": list(clip.labels)} for clip in clips])


def vocabulary(clips: list[ClipLabels]) -> list[str]:
    """Return every tag once, sorted."""
    return sorted({label for clip in clips for label in clip.labels})


def _read_json(uri: str) -> list[ClipLabels]:
    entries = storage.read_json(uri)
    if not isinstance(entries, list):
        raise ValueError(f"{uri}: expected a JSON list, found {type(entries).__name__}")
    clips = []
    for number, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {}
        names = fields.get("labels") or [fields[key] for key in ("label", "category") if key in fields]
        names = [str(name).rstrip(".").lower() for name in names]
        if not isinstance(fields.get("file"), str) or not names:
            raise ValueError(f"{uri}: entry {number} needs `file` and `labels` (or `label` and `category`): {entry!r}")
        clips.append(ClipLabels(fields["file"], tuple(names)))
    return clips


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
                f'{uri}: line {number} should be `YTID, start, end, "mid,..."` with mids of {index}: {row}'
            )
        clips.append(ClipLabels(f"{row[0]}.wav", tuple(names[mid] for mid in mids)))
    return clips
