"""The one place that turns a URI (a local path or s3://bucket/prefix) into a filesystem.

S3 is in `mellow_platform.s3`: endpoint, credentials, retries.

fsspec, s3fs and pyarrow are imported when they are needed: `--help` of a job needs none of them.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    import pyarrow.compute as pc
    from fsspec import AbstractFileSystem
    from pyarrow import fs as arrow_fs

PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}")  # names of files that are being written on a disk


def absolute(uri: str) -> str:
    """Return `uri` with a local path made absolute; other schemes are returned as they are.

    Raises:
        ValueError: an empty URI, or a relative path inside a submitted Ray job. Its working directory is a temporary
            copy that the cluster deletes, and no other node sees it.
    """
    if not uri:
        raise ValueError("the URI is empty; set a path or an s3:// URI")
    if "://" in uri:
        return uri
    path = Path(uri).expanduser()
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ValueError(
            f"{uri!r} is relative, and a submitted job runs in a temporary copy of the working directory: "
            "give an absolute path that every node sees, or an s3:// URI"
        )
    return str(path.absolute())


def join(uri: str, *parts: str) -> str:
    """Return `uri` extended by path `parts`; an absolute or s3:// last part stands for itself."""
    for part in parts:
        uri = part if "://" in part or part.startswith("/") else f"{uri.rstrip('/')}/{part}"
    return uri


def check(uri: str, exists: bool) -> None:
    """Raise an error if a job cannot read `uri` (`exists`), or cannot write a folder there.

    The check takes a second at most. Throttling and 5xx answers are no error here: the job itself retries them.

    Raises:
        FileNotFoundError: there is no such file, folder or bucket.
        PermissionError: access is denied, or the credentials are wrong or missing.
        ConnectionError: the S3 endpoint does not answer.
        ValueError: the scheme is unknown, or the URI malformed.
        OSError: a file is in the way of the folder.
    """
    if "://" not in uri:
        _check_path(Path(uri), exists)
    elif uri.startswith("s3://"):
        from mellow_platform.s3 import check_object

        check_object(uri, exists)
    else:
        try:
            fs, path = filesystem(uri)
        except (ValueError, ImportError) as error:
            scheme = uri.partition("://")[0]
            raise ValueError(f"{uri}: scheme {scheme!r} is not supported ({error}); use a path or s3://") from error
        if exists and not fs.exists(path):
            raise FileNotFoundError(f"{uri}: no such file or folder; check the URI")
        if not exists and "http" in fs.protocol:
            raise PermissionError(f"{uri} cannot be written; use a path or s3://")


def _check_path(path: Path, exists: bool) -> None:
    if exists:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"{path}: no such file or folder; check the path, which every node of the cluster must see"
            ) from error
        except OSError as error:
            raise PermissionError(f"{path}: {error.strerror}; check its permissions") from error
        if not os.access(path, os.R_OK):
            raise PermissionError(f"{path} is not readable: permission denied; check its permissions")
        return
    # The folder is made by the job, with its parents: in the nearest one that exists.
    parent = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {parent} is not a folder; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {parent} is not writable; choose another folder")


def filesystem(uri: str) -> "tuple[AbstractFileSystem, str]":
    """Return the fsspec filesystem of `uri` and the path inside it."""
    if uri.startswith("s3://"):
        from mellow_platform.s3 import connect

        return connect(uri)
    from fsspec.core import url_to_fs

    return url_to_fs(uri)


def arrow_filesystem(uri: str) -> "tuple[arrow_fs.FileSystem, str]":
    """Return the pyarrow filesystem of `uri` (what Ray and Parquet take) and the path inside it."""
    from pyarrow import fs as arrow_fs

    fs, path = filesystem(uri)
    if fs.protocol == "file" or "file" in fs.protocol:
        return arrow_fs.LocalFileSystem(), path
    return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(fs)), path


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.exists(path)


def read_bytes(uri: str) -> bytes:
    """Return all bytes of a file.

    Raises:
        FileNotFoundError: it does not exist.
    """
    fs, path = filesystem(uri)
    try:
        return fs.cat_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{uri} does not exist: check the URI and, on S3, AWS_ENDPOINT_URL and the keys"
        ) from error


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on."""
    fs, path = filesystem(uri)
    return fs.cat_file(path, start=offset, end=offset + size)


def open_read(uri: str) -> Any:
    """Return a binary file object that reads `uri` from its beginning, in pieces."""
    fs, path = filesystem(uri)
    return fs.open(path, "rb")


def size(uri: str) -> int:
    """Return the bytes of a file.

    Raises:
        FileNotFoundError: it does not exist.
    """
    fs, path = filesystem(uri)
    return fs.info(path)["size"]


def write_bytes(uri: str, data: bytes) -> None:
    """Write `data` so that `uri` holds all of it or is absent: rename on a disk, one put on an object store."""
    fs, path = filesystem(uri)
    if "file" not in fs.protocol:
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a name whose bytes a power cut took would pass for a whole file
    partial.replace(target)


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def write_table(uri: str, table: "pa.Table") -> str:
    """Write `table` as one Parquet file, whole or not at all, and return the SHA-256 of its bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest()


def read_tables(uris: list[str], columns: list[str] | None = None, rows: "pc.Expression | None" = None) -> "pa.Table":
    """Read Parquet files of one schema as one table, in the order given: all of them, or some columns or rows.

    Raises:
        ValueError: a file is not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(uri: str) -> "pa.Table":
        fs, path = arrow_filesystem(uri)
        with parquet_errors(uri):
            return pq.read_table(path, filesystem=fs, columns=columns, filters=rows)

    with ThreadPoolExecutor(16) as pool:
        return pa.concat_tables(pool.map(read, uris))


@contextlib.contextmanager
def parquet_errors(uri: str) -> "Iterator[None]":
    """Name the file `uri` in the errors of code that reads it.

    Raises:
        ValueError: the file is not Parquet, or damaged.
    """
    import pyarrow as pa

    try:
        yield
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} cannot be read as Parquet: {error} Delete the file, or write it again.") from error


def upload(folder: str | Path, uri: str) -> None:
    """Copy the contents of a local `folder` to `uri`."""
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            write_bytes(join(uri, file.relative_to(folder).as_posix()), file.read_bytes())


def local_copy(uri: str) -> Path:
    """Return a local folder (or file) with the contents of `uri`: itself when it is local, else a download kept
    while the process lives.

    Raises:
        FileNotFoundError: nothing is there.
    """
    fs, path = filesystem(uri)
    if not fs.exists(path):
        raise FileNotFoundError(
            f"{uri}: no such file or folder; check the URI and, on S3, AWS_ENDPOINT_URL and the keys"
        )
    if "file" in fs.protocol:
        return Path(path)
    target = Path(tempfile.mkdtemp(prefix="mellow-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    if fs.isfile(path):
        fs.get_file(path, str(target / Path(path).name))
        return target / Path(path).name
    for remote in fs.find(path):
        local = target / Path(remote).relative_to(path)
        local.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(remote, str(local))
    return target


def list_folder(uri: str) -> list[str]:
    """Return the names of what is in the folder `uri`, sorted; nothing where there is no such folder."""
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))


def find(uri: str) -> list[tuple[str, int]]:
    """Return path below the folder `uri` and bytes of every file in it, sorted; hidden ones are left out.

    A file in place of the folder is refused, as is its absence.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    fs, path = filesystem(uri)
    found = fs.find(path, detail=True)
    if not found or (len(found) == 1 and path.rstrip("/") in found):
        raise FileNotFoundError(f"{uri}: no folder with files; check the URI and, on S3, AWS_ENDPOINT_URL and the keys")
    below = {name[len(path.rstrip("/")) + 1 :]: entry["size"] for name, entry in found.items()}
    return sorted((name, size) for name, size in below.items() if not any(p[:1] == "." for p in name.split("/")))


def remove_partial(uri: str) -> None:
    """Delete what writers that were killed left below the folder `uri`; no writer may be at work there."""
    fs, path = filesystem(uri)
    if "file" in fs.protocol:
        for file in Path(path).rglob(".*"):
            if file.is_file() and PARTIAL.fullmatch(file.name):
                file.unlink()


def delete_folder(uri: str) -> None:
    """Delete the folder `uri` and all that is in it; it need not be there."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
