"""Input tables, in the file format of their suffix."""

import io
import json
from collections.abc import Collection

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mellow_platform import storage


def read_table(uri: str, text_columns: Collection[str] = (), columns: Collection[str] | None = None) -> pa.Table:
    """Read a `.parquet`, `.csv`, `.json` (a list of objects) or `.jsonl` file.

    Args:
        text_columns: columns of a CSV file that are read as text; the name of a clip may be 001.
        columns: columns to read, if they exist; by default all. Each must have a single type.

    Raises:
        ValueError: the file has another suffix, or is malformed.
    """
    try:
        return _parse(uri, storage.read_bytes(uri), text_columns, columns)
    except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{uri} is malformed: {error}") from error


def _parse(uri: str, data: bytes, text_columns: Collection[str], columns: Collection[str] | None) -> pa.Table:
    suffix = uri.rpartition(".")[2].lower()
    if suffix in ("parquet", "csv"):
        table = _parquet(data) if suffix == "parquet" else _csv(data, text_columns)
        return table if columns is None else table.select([name for name in table.column_names if name in columns])
    if suffix == "json":
        rows = json.loads(data)
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
    else:
        raise ValueError(f"table {uri} is not a .parquet, .csv, .json or .jsonl file")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{uri}: expected a list of objects, one per row")
    names = dict.fromkeys(name for row in rows for name in row if columns is None or name in columns)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _parquet(data: bytes) -> pa.Table:
    # Metadata of pandas names columns that derived tables do not have.
    return pq.read_table(io.BytesIO(data)).replace_schema_metadata(None)


def _csv(data: bytes, text_columns: Collection[str]) -> pa.Table:
    return pa.csv.read_csv(
        io.BytesIO(data),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string())),
    )
