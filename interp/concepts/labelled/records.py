"""Tables of records from files: csv, tsv, jsonl, json and parquet, with a row number for every complaint."""

import csv
import difflib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.extras import require
from sae.io import FormatError, parse_json, read_json, regular_file

__all__ = ["Table", "read_table"]

MAX_BYTES = 4 * 2**30  # a labelled file is read whole


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The records of a file; `lines` holds the line on which each ends, where the file has lines."""

    path: Path
    columns: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    lines: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def place(self, i: int) -> str:
        """Return how an error names record `i`: rows count from 1, a header not counted."""
        return f"{self.path} row {i + 1}" + (f" (line {self.lines[i]})" if self.lines else "")

    def column(self, name: str) -> list[Any]:
        """Return the values of a column. Raises ValueError, with the nearest name, where there is none such."""
        if name not in self.columns:
            close = difflib.get_close_matches(name, self.columns, n=1, cutoff=0.4)
            hint = f"; closest: {close[0]!r}" if close else ""
            raise ValueError(f"{self.path} has no column {name!r}{hint}; it has: {', '.join(self.columns)}")
        for i, record in enumerate(self.records):
            if record.get(name) is None:
                raise ValueError(f"{self.place(i)} has no {name!r}")
        return [record[name] for record in self.records]

    def optional(self, name: str | None, default: str) -> list[Any] | None:
        """Return the column asked for; without a name the `default` one, or None where the file has none such."""
        if name is None and default not in self.columns:
            return None
        return self.column(default if name is None else name)


def read_table(path: str | Path) -> Table:
    """Return the records of a .csv, .tsv, .jsonl, .json (a list of objects) or .parquet file, none left out.

    Raises MissingError where the file (or pyarrow, for parquet) is absent, FormatError, which is a ValueError, with
    the row for what cannot be read, ValueError for another suffix or a file without records.
    """
    path = Path(path).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is of no known kind; labelled files end in {', '.join(_READERS)}")
    table = reader(regular_file(path, MAX_BYTES))
    if not len(table):
        raise ValueError(f"{path} holds no rows")
    return table


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FormatError(
            f"{path} line {line} is not UTF-8 (byte {error.start}: {error.reason}); save the file as UTF-8"
        ) from error


def _csv(path: Path) -> Table:
    reader = csv.reader(
        io.StringIO(_decoded(path), newline=""),
        delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
        strict=True,
    )
    header = next(_rows(path, reader), [])
    columns = [name.strip() for name in header]
    twice = [name for name in columns if columns.count(name) > 1]
    if twice or not any(columns):
        raise FormatError(f"{path} needs a first line of column names, each once; it is {header}")
    records, lines = [], []
    for cells in _rows(path, reader):
        if not cells:  # a blank line
            continue
        if len(cells) != len(columns):
            raise FormatError(
                f"{path} row {len(records) + 1} (line {reader.line_num}) has {len(cells)} cells for {len(columns)} "
                "columns; put texts that hold the separator in double quotes"
            )
        records.append({name: cell if cell.strip() else None for name, cell in zip(columns, cells, strict=True)})
        lines.append(reader.line_num)
    return Table(path=path, columns=tuple(columns), records=tuple(records), lines=tuple(lines))


def _rows(path: Path, reader: Any) -> Iterator[list[str]]:
    """Yield the reader's rows; its own errors get the file and line."""
    try:
        yield from reader
    except csv.Error as error:
        raise FormatError(f"{path} line {reader.line_num} is no sound row: {error}") from error


def _jsonl(path: Path) -> Table:
    records, lines = [], []
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path} row {len(records) + 1} (line {number})"
        try:
            record = parse_json(line.encode(), path)
        except FormatError as error:
            raise FormatError(f"{place}: {str(error).removeprefix(f'{path}: ')}") from error
        if not isinstance(record, dict):
            raise FormatError(f"{place} is a {type(record).__name__}; it must be an object")
        records.append(record)
        lines.append(number)
    return Table(path=path, columns=_keys(records), records=tuple(records), lines=tuple(lines))


def _json(path: Path) -> Table:
    records = read_json(path, max_bytes=MAX_BYTES)
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise FormatError(f"{path} must hold a list of objects, one a row")
    return Table(path=path, columns=_keys(records), records=tuple(records))


def _keys(records: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for record in records for key in record))


def _parquet(path: Path) -> Table:
    pyarrow: Any = require("pyarrow", "data")
    parquet: Any = require("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
            records = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(f"{path} is not a sound parquet file: {reason}") from error
    return Table(path=path, columns=tuple(table.column_names), records=tuple(records))


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
