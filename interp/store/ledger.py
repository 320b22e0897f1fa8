"""The papers of a store: settings and manifest that vouch for themselves, and the journals of those who write."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from interp.store.shards import FileRecord
from sae.io import FormatError, atomic_write, parse_json, regular_file, sync_folder

SETTINGS, MANIFEST, PLAN = "store.json", "MANIFEST.json", "tokens/plan.json"
MAX_BYTES = 256 * 2**20  # of a manifest


class StoreError(ValueError):
    """A store is damaged, unfinished where it must not be, in use, or not the one that the settings describe."""


@dataclass(frozen=True)
class ShardRecord(FileRecord):
    """A shard of activations: which sequences and how many rows it holds, from which documents."""

    shard: int
    sequences: tuple[int, int]  # first, one past the last
    rows: int
    documents: tuple[int, int]  # lowest, highest; (-1, -1) without rows

    @classmethod
    def read(cls, table: dict[str, Any]) -> "ShardRecord":
        """Return the record that a journal or manifest holds; raises FormatError where it is none."""
        try:
            given = {**table, "sequences": tuple(table["sequences"]), "documents": tuple(table["documents"])}
            return cls(**given)
        except (TypeError, KeyError) as error:
            raise FormatError(f"a shard's record is malformed: {error}") from error


def sealed(content: Any) -> bytes:
    """Return an object as JSON text that carries the SHA-256 of itself; equal objects give equal bytes."""
    body = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    return f'{{"sha256": "{hashlib.sha256(body.encode()).hexdigest()}",\n"content": {body}}}\n'.encode()


def write_sealed(path: Path, content: Any) -> None:
    """Write such a text, atomically."""
    atomic_write(path, sealed(content))


def read_sealed(path: Path) -> Any:
    """Return the object in such a text; raises MissingError, and StoreError where a single bit of it is changed."""
    path = regular_file(path, max_bytes=MAX_BYTES)
    data = path.read_bytes()
    try:
        content = parse_json(data, path)["content"]
        sound = sealed(content) == data
    except (FormatError, KeyError, TypeError, ValueError):
        sound, content = False, None
    if not sound:
        raise StoreError(f"{path} is damaged: it is not what was written (checksum)")
    return content


class Journal:
    """One writer's list of the shards it has finished: a line each, with a checksum, appended and made durable."""

    def __init__(self, root: Path, rank: int, world: int):
        self.path = root / f"journal-{rank}-of-{world}.jsonl"

    def begin(self) -> None:
        """Make the file, or take a line that was cut off away from its end."""
        lines = list(_lines(self.path)) if self.path.exists() else []
        atomic_write(self.path, "".join(_line(record) for record in lines).encode())

    def append(self, record: ShardRecord) -> None:
        """Add a finished shard; returns when it is durable."""
        with self.path.open("ab") as file:
            file.write(_line(record).encode())
            file.flush()
            os.fsync(file.fileno())

    def drop(self) -> None:
        """Delete the file, once a manifest holds what it says."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)


def journalled(root: Path) -> dict[int, ShardRecord]:
    """Return the finished shards of all writers, by number, in order; raises StoreError for a damaged journal."""
    found = {record.shard: record for path in sorted(root.glob("journal-*.jsonl")) for record in _lines(path)}
    return dict(sorted(found.items()))


def _line(record: ShardRecord) -> str:
    text = json.dumps(record.as_dict(), sort_keys=True)
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n"


def _lines(path: Path) -> Iterator[ShardRecord]:
    """Yield the records of a journal but a last line that was cut off; raises StoreError for other damage."""
    lines = regular_file(path, max_bytes=MAX_BYTES).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        whole = line.endswith(b"\n") and checksum == xxhash.xxh3_64_hexdigest(text).encode()
        if whole:
            yield ShardRecord.read(parse_json(text, path))
        elif number < len(lines):
            raise StoreError(f"{path} is damaged in line {number}: it is not what was written (checksum)")
