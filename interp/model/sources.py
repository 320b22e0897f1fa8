"""Sources of text, read as they are needed: files of text, jsonl or parquet, hub data sets, any iterable."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from sae.extras import MissingError, require

END_OF_TEXT = "<|endoftext|>"


def read_source(source: str | Iterable[Any], *, field: str = "text") -> Iterator[Any]:
    """Yield the documents of a source, one after the other, never the whole of it in memory.

    "text:FILE": documents between lines of `<|endoftext|>`, or, where there are none, between blank lines.
    "jsonl:FILE" and "parquet:FILE" (or a folder of them, by name): one record a document, its text under `field`.
    "hf:NAME" and "hf:NAME:SPLIT" (a hub data set or a local folder of one; split "train" unless given), streamed.
    Any iterable of texts, or of documents of token ids, is taken as it is.
    Raises, at the call, MissingError where file or data set are not there and ValueError for one without text or of an
    unknown kind; ValueError while reading for a record without such a text, with its number.
    """
    if not isinstance(source, str):
        return iter(source)
    kind, _, name = source.partition(":")
    if kind not in _READERS or not name:
        kinds = ", ".join(f"{k}:FILE" for k in _READERS if k != "hf")
        raise ValueError(f"source {source!r} is of no known kind; use {kinds} or hf:NAME[:SPLIT]")
    documents = _READERS[kind](name, field)
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{name} holds no text")
    return chain([first], documents)


def _files(name: str, suffix: str) -> list[Path]:
    """Return the file `name`, or the files of one kind in the folder `name`; raises MissingError for neither."""
    path = Path(name).expanduser()
    found = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
    if not found or not all(f.is_file() for f in found):
        raise MissingError(f"there is no {suffix} file in {name}" if path.is_dir() else f"there is no file {name}")
    return found


def _text(name: str, field: str) -> Iterator[str]:
    for path in _files(name, ".txt"):
        try:
            yield from _text_documents(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start} of a block") from error


def _text_documents(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="strict") as file:
        marked = any(line.strip() == END_OF_TEXT for line in file)
        file.seek(0)
        lines: list[str] = []
        for line in file:
            ends = line.strip() == END_OF_TEXT if marked else not line.strip()
            if not ends:
                lines.append(line)
            elif "".join(lines).strip():
                yield "".join(lines).strip("\n")
                lines = []
        if "".join(lines).strip():
            yield "".join(lines).strip("\n")


def _jsonl(name: str, field: str) -> Iterator[str]:
    for path in _files(name, ".jsonl"):
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield from _kept(_json_record(path, number, line), field, f"{path} line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from error


def _json_record(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} line {number} is no JSON: {getattr(error, 'msg', 'nested too deeply')}") from error


def _kept(record: Any, field: str, place: str) -> Iterator[str]:
    """Yield the record's text unless it is blank; raises ValueError where there is none under `field`."""
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        held = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place} has no text under {field!r}; it holds {held}")
    if text.strip():
        yield text


def _parquet(name: str, field: str) -> Iterator[str]:
    pyarrow: Any = require("pyarrow", "data")
    parquet: Any = require("pyarrow.parquet", "data")
    for path in _files(name, ".parquet"):
        try:
            with parquet.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                if field not in columns:
                    raise ValueError(f"{path} has no column {field!r}; it has {columns}")
                rows = (t for batch in file.iter_batches(1024, columns=[field]) for t in batch.column(0).to_pylist())
                for number, text in enumerate(rows, 1):
                    yield from _kept({field: text}, field, f"{path} row {number}")
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a sound parquet file: {str(error).splitlines()[0]}") from error


def _hub(name: str, field: str) -> Iterator[str]:
    datasets: Any = require("datasets", "data")
    name, _, split = name.partition(":")
    try:
        records = datasets.load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MissingError(f"data set {name!r}, split {split or 'train'!r}, cannot be opened: {reason}") from error
    for number, record in enumerate(records, 1):
        yield from _kept(record, field, f"{name} record {number}")


_READERS: dict[str, Callable[[str, str], Iterator[str]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hf": _hub,
}
