"""Files and folders by URI: a local path or s3://bucket/prefix. No other module chooses a filesystem.

`mellow_platform.s3` contains endpoint, credentials and retries of S3. fsspec, s3fs and pyarrow are imported by the
functions that use them, because `--help` of a job needs none of them.
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

PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}")  # names of unfinished files on a disk


def absolute(uri: str) -> str:
    """Return a local path as an absolute one; URIs with a scheme are unchanged.

    Raises:
        ValueError: the URI is empty, or a relative path in a submitted Ray job, whose working directory is a temporary
            copy that the cluster deletes and that other nodes cannot see.
    """
    if not uri:
        raise ValueError("the URI is empty; set a path or an s3:// URI")
    if "://" in uri:
        return uri
    path = Path(uri).expanduser()
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ValueError(
            f"{uri!r} is relative, and a submitted job runs in a temporary copy of the working directory; "
            "set an absolute path that every node can see, or an s3:// URI"
        )
    return str(path.absolute())


def join(uri: str, *parts: str) -> str:
    """Return `uri` extended by path `parts`; an absolute path or URI among them replaces everything before it."""
    for part in parts:
        uri = part if "://" in part or part.startswith("/") else f"{uri.rstrip('/')}/{part}"
    return uri


def check(uri: str, exists: bool) -> None:
    """Check that a job can read `uri` (if `exists`), or else that it can write a folder there.

    Throttling and 5xx responses of S3 are not errors here, because the job retries them.

    Raises:
        FileNotFoundError: the file, folder or bucket does not exist.
        PermissionError: access is denied, or the credentials are wrong or missing.
        ConnectionError: the S3 endpoint does not respond.
        ValueError: the scheme is unknown, or the URI malformed.
        OSError: a parent of the folder is a file.
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
                f"{path}: no such file or folder; check the path, which every node of the cluster must be able to see"
            ) from error
        except OSError as error:
            raise PermissionError(f"{path}: {error.strerror}; check its permissions") from error
        if not os.access(path, os.R_OK):
            raise PermissionError(f"{path} is not readable: permission denied; check its permissions")
        return
    # The job creates the folder and its missing parents, so the nearest existing parent must be writable.
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
    """Return the pyarrow filesystem of `uri`, for Ray and Parquet, and the path inside it."""
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
        FileNotFoundError: the file does not exist.
    """
    fs, path = filesystem(uri)
    try:
        return fs.cat_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{uri} does not exist: check the URI and, on S3, AWS_ENDPOINT_URL and the keys"
        ) from error


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file, starting at byte `offset`."""
    fs, path = filesystem(uri)
    return fs.cat_file(path, start=offset, end=offset + size)


def open_read(uri: str) -> Any:
    """Return a binary file object that reads `uri` in blocks."""
    fs, path = filesystem(uri)
    return fs.open(path, "rb")


def size(uri: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    fs, path = filesystem(uri)
    return fs.info(path)["size"]


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: by renaming on a disk, as one object on an object store."""
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
        os.fsync(file.fileno())  # otherwise a power cut can leave the final name without its bytes
    partial.replace(target)


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def write_table(uri: str, table: "pa.Table") -> str:
    """Write `table` as one Parquet file, atomically, and return the SHA-256 of its bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest()


def read_tables(uris: list[str], columns: list[str] | None = None, rows: "pc.Expression | None" = None) -> "pa.Table":
    """Read Parquet files of one schema as one table, in the order of `uris`, with all or some columns and rows.

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
    """Add the file's URI to Parquet errors inside the `with` block.

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
    """Return a local folder or file with the contents of `uri`; a download is deleted when the process ends.

    Raises:
        FileNotFoundError: the file or folder does not exist.
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
    """Return the names in the folder `uri`, sorted; an empty list if the folder does not exist."""
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))


def find(uri: str) -> list[tuple[str, int]]:
    """Return (path below the folder `uri`, size in bytes) of every file in it, sorted, without hidden files.

    Raises:
        FileNotFoundError: the folder does not exist, is empty, or is a file.
    """
    fs, path = filesystem(uri)
    found = fs.find(path, detail=True)
    if not found or (len(found) == 1 and path.rstrip("/") in found):
        raise FileNotFoundError(f"{uri}: no folder with files; check the URI and, on S3, AWS_ENDPOINT_URL and the keys")
    below = {name[len(path.rstrip("/")) + 1 :]: entry["size"] for name, entry in found.items()}
    return sorted((name, size) for name, size in below.items() if not any(p[:1] == "." for p in name.split("/")))


def remove_partial(uri: str) -> None:
    """Delete unfinished files of killed writers below the folder `uri`; no writer may be active there."""
    fs, path = filesystem(uri)
    if "file" in fs.protocol:
        for file in Path(path).rglob(".*"):
            if file.is_file() and PARTIAL.fullmatch(file.name):
                file.unlink()


def delete_folder(uri: str) -> None:
    """Delete the folder or file `uri`, if it exists, with its contents."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
