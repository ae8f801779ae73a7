"""Read the bytes of clips from single files, members of tars, and rows of Parquet files.

Ray Data's readers are not used. `read_audio` decodes each file completely before any check, and one damaged file ends
the job. `read_webdataset` reads a tar as one stream, so that a retried task starts at its first byte, and rows have no
address. The row order of both depends on how Ray Data groups files into blocks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mellow_platform import storage
from mellow_platform.data.audio import AudioError, check_size
from mellow_platform.data.audio_limits import AudioLimits

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".oga", ".opus")
READERS = 8  # threads that read from storage, and files that are read ahead


@dataclass(frozen=True)
class ClipAddress:
    """Location of a clip's bytes: a whole file, `size` bytes from `offset` of a tar, or a row of a Parquet file.

    `path` is the clip's name in the corpus, `taskname` the task name of its questions.
    """

    path: str
    split: str
    uri: str
    taskname: str = ""
    offset: int = -1
    size: int = -1
    row: int = -1


def audio_root(roots: str | dict[str, str] | None, corpus: str | None, taskname: str) -> str:
    """Return the folder that paths of task `taskname` are relative to; by default `<corpus>/audio`.

    Raises:
        ValueError: `roots` has folders per task, but none for this one.
    """
    if isinstance(roots, dict):
        if taskname not in roots:
            raise ValueError(f"audio_root has no folder for taskname {taskname!r}; it has {', '.join(sorted(roots))}")
        return roots[taskname]
    return roots or storage.join(corpus or "", "audio")


def read(clip: ClipAddress, limits: AudioLimits) -> bytes:
    """Return the bytes of a clip in a file or in a tar.

    Raises:
        AudioError: `missing`, `empty` or `too_large`.
    """
    if clip.offset >= 0:
        return storage.read_range(clip.uri, clip.offset, clip.size)
    try:
        check_size(storage.size(clip.uri), limits)
        return storage.read_bytes(clip.uri)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise AudioError("missing", f"{clip.uri} does not exist") from error


def read_clips(clips: Iterable[ClipAddress], limits: AudioLimits) -> Iterator[tuple[ClipAddress, bytes | AudioError]]:
    """Yield clips with their bytes or their error, in the given order; a few are read ahead."""
    clips = list(clips)
    in_parquet = {clip.uri for clip in clips if clip.row >= 0}
    columns = {uri: ParquetAudio(uri) for uri in in_parquet}

    def fetch(clip: ClipAddress) -> bytes | AudioError:
        return columns[clip.uri][clip.row] if clip.row >= 0 else _try_read(clip, limits)

    # One thread, because rows share the row group in memory.
    return _read_ahead(fetch, clips, 1 if in_parquet else READERS)


def _try_read(clip: ClipAddress, limits: AudioLimits) -> bytes | AudioError:
    try:
        return read(clip, limits)
    except AudioError as error:
        return error


def _read_ahead(
    fetch: Callable[[ClipAddress], bytes | AudioError], clips: Iterable[ClipAddress], threads: int
) -> Iterator[tuple[ClipAddress, bytes | AudioError]]:
    """Yield each clip with the result of `fetch`, in order; at most `threads` clips are read ahead."""
    with ThreadPoolExecutor(threads) as pool:
        queue: deque = deque()
        for clip in clips:
            queue.append((clip, pool.submit(fetch, clip)))
            if len(queue) >= threads:
                first, future = queue.popleft()
                yield first, future.result()
        while queue:
            first, future = queue.popleft()
            yield first, future.result()


class ParquetAudio:
    """Audio column of a Parquet file by row number; keeps the last row group in memory."""

    def __init__(self, uri: str):
        fs, path = storage.arrow_filesystem(uri)
        self.uri = uri
        with storage.parquet_errors(uri):
            self.file = pq.ParquetFile(path, filesystem=fs)
        self.column = next((name for name in ("audio", "bytes") if name in self.file.schema_arrow.names), "")
        if not self.column:
            raise ValueError(f"{uri} has no column audio or bytes; it has {', '.join(self.file.schema_arrow.names)}")
        self.starts = [0]
        for group in range(self.file.num_row_groups):
            self.starts.append(self.starts[-1] + self.file.metadata.row_group(group).num_rows)
        self.group, self.values = -1, pa.chunked_array([], pa.binary())

    def __getitem__(self, row: int) -> bytes:
        group = next(number for number, start in enumerate(self.starts[1:]) if row < start)
        if group != self.group:
            self.group, self.values = group, self.file.read_row_group(group, [self.column])[self.column]
        return audio_bytes(self.values[row - self.starts[group]].as_py())


def audio_bytes(value: Any) -> bytes:
    """Return the bytes in a cell: binary, or the struct {bytes, path} of the datasets library."""
    return (value.get("bytes") if isinstance(value, dict) else value) or b""
