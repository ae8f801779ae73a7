"""Folders of labelled recordings: `labels.json`, a table of file names and labels, or a subfolder per label.

docs/guides/recordings.md describes these layouts.
"""

import codecs
import csv
import hashlib
import io
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from mellow_platform import storage
from mellow_platform.data.clip_reader import AUDIO_SUFFIXES, READERS
from mellow_platform.data.labels import ClipLabels, group_field, read_labels

LABELS_JSON = "labels.json"
SUBFOLDERS = "subfolders"
# Columns in lower case; the first one in a table is used.
FILE_COLUMNS = ("path", "filepath", "file_path", "file", "filename", "file_name", "fname", "slice_file_name")
LABEL_COLUMNS = ("label", "labels", "class", "category")
# Tables of published data sets with the folders of their recordings; if one exists, other tables are not read.
PUBLISHED = {
    "meta/esc50.csv": "audio",
    "metadata/UrbanSound8K.csv": "audio/fold{fold}",
    "FSD50K.ground_truth/dev.csv": "FSD50K.dev_audio",
}
NOT_A_LABEL = re.compile(r"fold ?\d+|train|val|valid|validation|dev|eval|test")  # subfolders of published data sets
MAX_MISSING_SHARE = 0.5  # of the files in a table; above it, folder and table do not match


@dataclass
class LabelledRecordings:
    """Labelled recordings of a folder.

    Attributes:
        source: origin of the labels: `labels.json`, path of a table in the folder, or `subfolders`.
        clips: recordings with their labels, each once; files are paths relative to the folder.
        group_field: field or column of the groups; empty if there is none.
        skipped: number of unused rows or files, by reason.
        warnings: sentences about unused rows and files.
    """

    source: str
    clips: list[ClipLabels] = field(default_factory=list)
    group_field: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def skip(self, reason: str, names: Sequence[str], sentence: str) -> None:
        """Count unused rows or files and warn about them, if there are any."""
        if names:
            self.skipped[reason] = len(names)
            self.warnings.append(f"{len(names)} {sentence}: {examples(names)}")


def read_recordings(folder: str) -> LabelledRecordings:
    """Detect how the recordings in `folder` are labelled, and read their labels.

    Raises:
        ValueError: no layout or several layouts match, the labels are malformed, a name matches several files, or more
            than half of the named files are missing; the message names file, line and remedy.
        FileNotFoundError: the folder does not exist.
    """
    sizes = dict(storage.find(folder))
    audio = [path for path in sizes if path.lower().endswith(AUDIO_SUFFIXES)]
    if not audio:
        raise ValueError(f"{folder} has {len(sizes)} files, none of them audio ({', '.join(AUDIO_SUFFIXES)})")
    tables, reasons = _find_tables(folder, sizes)
    sources = [name for name in (LABELS_JSON, *tables) if name in sizes]
    if len(sources) > 1:
        raise ValueError(f"{folder} has labels in {' and in '.join(sources)}: move all but one out of the folder")
    recordings = LabelledRecordings(sources[0] if sources else SUBFOLDERS)
    if not sources:
        _read_subfolders(folder, audio, recordings, reasons)
    elif recordings.source == LABELS_JSON:
        _read_labels_json(folder, AudioIndex(audio), recordings)
    else:
        _read_table(folder, AudioIndex(audio), recordings)
    labelled = {clip.file for clip in recordings.clips}
    unlabelled = [path for path in audio if path not in labelled]
    sentence = f"of {len(audio)} recordings in the folder have no label from {recordings.source} and are skipped"
    recordings.skip("recordings_without_label", unlabelled, sentence)
    _merge(recordings, _copies(folder, recordings, sizes))
    return recordings


def label_name(text: str) -> str:
    """Return a label as questions contain it: `Dog_bark` becomes "dog bark"; empty if it has no words."""
    words = unicodedata.normalize("NFC", text).replace("_", " ").replace("-", " ").split()
    return " ".join(words).rstrip(".").lower()


class AudioIndex:
    """Paths of the recordings in a folder, by path and by base name, with or without suffix; case is ignored."""

    def __init__(self, paths: Iterable[str]):
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            for key in (path, posixpath.splitext(path)[0]):
                self._by_path[_key(key)].append(path)
                self._by_name[_key(posixpath.basename(key))].append(path)

    def find(self, name: str, folders: Sequence[str] = ("",)) -> str:
        """Return the path of the recording that a table calls `name`; empty if there is none.

        The name is looked up in `folders`; then without its first folders, because a table may contain paths of another
        machine; then by base name in the whole folder.

        Raises:
            ValueError: the name matches several recordings.
        """
        path = name.replace("\\", "/")
        parts = path.split("/")
        candidates = [posixpath.normpath(posixpath.join(folder, path)) for folder in folders]
        candidates += ["/".join(parts[start:]) for start in range(1, len(parts) - 1)]
        for candidate in candidates:
            if matches := self._by_path.get(_key(candidate)):
                return _single_match(name, [path for path in matches if path == candidate] or matches)
        return _single_match(name, self._by_name.get(_key(parts[-1]), []))


def _key(path: str) -> str:
    # macOS decomposes accents in file names, and Windows ignores case.
    return unicodedata.normalize("NFC", path).casefold()


def _single_match(name: str, matches: list[str]) -> str:
    if len(matches) > 1:
        raise ValueError(f"{name!r} may be {matches[0]} or {matches[1]}: write its path relative to the folder")
    return matches[0] if matches else ""


def _find_tables(folder: str, paths: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the CSV and TSV files with columns of files and of labels, and the reasons why other tables are not read.

    Only the folder and its direct subfolders are searched.
    """
    if published := [name for name in PUBLISHED if name in paths]:
        return published, []
    tables, reasons = [], []
    for name in paths:
        if name.lower().endswith((".csv", ".tsv")) and name.count("/") <= 1:
            data = storage.read_bytes(storage.join(folder, name))
            columns, _ = _header(data.decode(_encoding(data), errors="replace"))
            if _first(FILE_COLUMNS, columns) and _first(LABEL_COLUMNS, columns):
                tables.append(name)
            else:
                reasons.append(f"table {name} is not read: {_expected_columns(columns)}")
    return tables, reasons


def _expected_columns(columns: list[str]) -> str:
    return (
        f"its columns are {', '.join(columns[:10])}; expected one of {', '.join(FILE_COLUMNS)} "
        f"and one of {', '.join(LABEL_COLUMNS)}"
    )


def _first(names: Iterable[str], columns: Sequence[str]) -> str:
    return next((name for name in names if name in columns), "")


def _encoding(data: bytes) -> str:
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _header(text: str) -> tuple[list[str], str]:
    """Return the columns of a table, in lower case, and its delimiter: the most frequent one in the first line."""
    line = io.StringIO(text, newline="").readline(1 << 16)
    delimiter = max(",;\t|", key=line.count)
    return [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])], delimiter


def _rows(uri: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns of a table, in lower case, and its rows with the numbers of their first lines.

    Raises:
        ValueError: the table is not UTF-8 or UTF-16, or a row is malformed; the message names the line.
    """
    data = storage.read_bytes(uri)
    try:
        text = data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{uri}, line {line}: the text is not UTF-8; save the table as CSV in UTF-8") from error
    columns, delimiter = _header(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    line = 1
    try:
        for cells in reader:
            if line > 1 and any(cells):
                if any(cells[len(columns) :]):
                    raise ValueError(
                        f"{uri}, line {line}: {len(cells)} cells for {len(columns)} columns; "
                        f"put cells that contain {delimiter!r} in double quotes"
                    )
                cells += [""] * (len(columns) - len(cells))
                rows.append((line, dict(zip(columns, cells, strict=False))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{uri}, line {line}: {error}; check the double quotes from this line on") from error
    return columns, rows


def _read_table(folder: str, index: AudioIndex, recordings: LabelledRecordings) -> None:
    name = recordings.source
    uri = storage.join(folder, name)
    columns, rows = _rows(uri)
    file_column, label_column = _first(FILE_COLUMNS, columns), _first(LABEL_COLUMNS, columns)
    if not file_column or not label_column:
        raise ValueError(f"{uri}: {_expected_columns(columns)}")
    recordings.group_field = group = group_field(columns)
    empty, missing = [], []
    for line, row in rows:
        cell, file = row[label_column], row[file_column]
        texts = re.split(r"[,;|]", cell) if label_column == "labels" else [cell]
        labels = [label for label in map(label_name, texts) if label]
        category = label_name(row["category"]) if "category" in columns and label_column != "category" else ""
        if not labels or not file.strip():
            empty.append(f"line {line}")
            continue
        folders = (posixpath.dirname(name), PUBLISHED.get(name, "").format_map(defaultdict(str, row)), "")
        try:
            # Spaces around a name may be part of the file name.
            path = index.find(file, folders) or index.find(file.strip(), folders)
        except ValueError as error:
            raise ValueError(f"{uri}, line {line}: {error}") from error
        if not path:
            missing.append(file)
            continue
        categories = (category,) if category else ()
        tags = tuple(dict.fromkeys((*labels, *categories)))
        recordings.clips.append(ClipLabels(path, tags, categories, row[group].strip() if group else ""))
    sentence = f"of {len(rows)} rows of {name} have no file name or no label and are skipped"
    recordings.skip("rows_without_label", empty, sentence)
    _skip_missing(folder, missing, len(rows) - len(empty), recordings)


def _read_labels_json(folder: str, index: AudioIndex, recordings: LabelledRecordings) -> None:
    uri = storage.join(folder, LABELS_JSON)
    clips = read_labels(uri)
    recordings.group_field = group_field({str(key).lower() for entry in storage.read_json(uri) for key in entry})
    missing = []
    for number, clip in enumerate(clips):
        try:
            path = index.find(clip.file)
        except ValueError as error:
            raise ValueError(f"{uri}: entry {number}: {error}") from error
        if path:
            recordings.clips.append(replace(clip, file=path))
        else:
            missing.append(clip.file)
    _skip_missing(folder, missing, len(clips), recordings)


def _read_subfolders(folder: str, audio: list[str], recordings: LabelledRecordings, reasons: list[str]) -> None:
    """Label every recording with the name of the subfolder of `folder` that contains it, at any depth."""
    recordings.warnings += reasons
    recordings.clips += [ClipLabels(path, (label_name(path.split("/")[0]),)) for path in audio if "/" in path]
    labels = sorted({clip.names[0] for clip in recordings.clips})
    if not labels:
        raise ValueError(
            f"{folder} has {len(audio)} recordings without labels ({examples(audio)}): move them into a subfolder per "
            f"label, or add {LABELS_JSON} or a CSV table as in docs/guides/recordings.md"
            f"{''.join(f'; {reason}' for reason in reasons)}"
        )
    if not all(labels) or all(NOT_A_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            f"{folder}: the subfolders ({examples(labels)}) are named by fold or split, not by label: pass the folder "
            f"with the table of labels, or one whose subfolders are labels{''.join(f'; {r}' for r in reasons)}"
        )


def _skip_missing(folder: str, missing: list[str], count: int, recordings: LabelledRecordings) -> None:
    """Skip files that are `missing`, of `count` files with labels.

    Raises:
        ValueError: more than `MAX_MISSING_SHARE` are missing.
    """
    if len(missing) > MAX_MISSING_SHARE * count:
        raise ValueError(
            f"{folder}: {len(missing)} of the {count} files that {recordings.source} names are missing "
            f"({examples(missing)}): unpack all recordings, or remove the rows"
        )
    recordings.skip("files_not_found", missing, f"of {count} files that {recordings.source} names are missing")


def _copies(folder: str, recordings: LabelledRecordings, sizes: dict[str, int]) -> dict[str, str]:
    """Return the original of each copy, a file with the same bytes as an earlier file.

    Only files of equal size are read; empty files are not copies.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(clip.file for clip in recordings.clips):
        by_size[sizes[path]].append(path)
    same_size = [path for size, paths in by_size.items() if size and len(paths) > 1 for path in paths]

    def digest(path: str) -> bytes:
        return hashlib.sha256(storage.read_bytes(storage.join(folder, path))).digest()

    first: dict[bytes, str] = {}
    copies = {}
    with ThreadPoolExecutor(READERS) as pool:
        for path, content in zip(same_size, pool.map(digest, same_size), strict=True):
            if first.setdefault(content, path) != path:
                copies[path] = first[content]
    pairs = [f"{copy} of {original}" for copy, original in copies.items()]
    recordings.skip("copies", pairs, "files are copies; each recording is used once, with the labels of all its copies")
    return copies


def _merge(recordings: LabelledRecordings, copies: dict[str, str]) -> None:
    """Merge all entries of a recording into one clip with all labels, and groups that share a recording into one."""
    clips: dict[str, ClipLabels] = {}
    merged: dict[str, str] = {}  # group to the group that contains it

    def final(group: str) -> str:
        while group in merged:
            group = merged[group]
        return group

    for entry in recordings.clips:
        file = copies.get(entry.file, entry.file)
        clip = clips.get(file, entry)
        groups = list(dict.fromkeys(final(group) for group in (clip.group, entry.group) if group))
        if len(groups) > 1:
            merged[groups[1]] = groups[0]
        labels = tuple(dict.fromkeys(clip.labels + entry.labels))
        categories = tuple(dict.fromkeys(clip.categories + entry.categories))
        clips[file] = ClipLabels(file, labels, categories, groups[0] if groups else "")
    recordings.clips = [replace(clip, group=final(clip.group)) for clip in clips.values()]


def examples(names: Sequence[str], count: int = 3) -> str:
    """Return the first `count` names as text for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
