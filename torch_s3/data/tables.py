"""Uris and labels from the columns of tables."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any


def read_csv(content: bytes, uri: str, uri_column: str, label_column: str | None) -> tuple[list[str], list[Any] | None]:
    """The uris and, where there is a column for them, the labels that a CSV file with a header has.

    Raises:
        ValueError: It is no UTF-8, or lacks a column.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri}: not UTF-8 text ({error})") from None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    _check(uri, rows.fieldnames or (), uri_column, label_column)
    uris, labels = [], []
    for row in rows:
        uris.append(row[uri_column])
        labels.append(row[label_column] if label_column is not None else None)
    if all(label and re.fullmatch(r"-?\d+", label) for label in labels):
        labels = list(map(int, labels))  # type: ignore[arg-type]
    return uris, None if label_column is None else labels


def read_parquet(
    content: bytes, uri: str, uri_column: str, label_column: str | None
) -> tuple[list[str], list[Any] | None]:
    """The same of a Parquet file.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: It is no such file, or lacks a column.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ImportError("from_parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(pa.BufferReader(content))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: {error}") from None
    _check(uri, table.column_names, uri_column, label_column)
    labels = None if label_column is None else table[label_column].to_pylist()
    return table[uri_column].to_pylist(), labels


def _check(uri: str, columns: Sequence[str], *wanted: str | None) -> None:
    for name in wanted:
        if name is not None and name not in columns:
            raise ValueError(f"{uri}: no column {name!r}; there are {', '.join(map(repr, columns)) or 'none'}")
