"""One shard of a store: a safetensors file written from buffers, checksummed, and mapped back without a copy."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from sae.io import FormatError, atomic_write, read_header, regular_file

ALIGN = 64  # bytes: where the data begin, so that every mapped tensor is aligned
BLOCK = 8 * 2**20  # bytes read at once by a check
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRecord:
    """Name below the store, size, and checksums (xxh3, 128 bits) of the header and of the data of one file."""

    file: str
    bytes: int
    header: str
    data: str

    def as_dict(self) -> dict[str, Any]:
        """Return the record for a manifest."""
        return asdict(self)


def write_shard(root: Path, file: str, columns: Mapping[str, Tensor], meta: Mapping[str, Any]) -> FileRecord:
    """Write tensors (on the CPU) as one safetensors file below `root`, atomically, and return its record.

    The buffers go to the file as they are, the widest types first. The checksum of the data stands in the file's own
    metadata too, so that a shard can be judged by itself. Raises OSError where the disk is full or read-only.
    """
    order = sorted(columns, key=lambda name: -columns[name].element_size())
    parts = [_bytes(columns[name]) for name in order]
    digest = xxhash.xxh3_128()
    entries: dict[str, Any] = {}
    at = 0
    for name, part in zip(order, parts, strict=True):
        digest.update(part)
        shape = list(columns[name].shape)
        entries[name] = {"dtype": _CODES[columns[name].dtype], "shape": shape, "data_offsets": [at, at + len(part)]}
        at += len(part)
    told = json.dumps({**meta, "xxh3_128": digest.hexdigest()}, sort_keys=True)
    text = json.dumps({"__metadata__": {"format": "pt", "json": told}, **entries}).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    header = len(text).to_bytes(8, "little") + text
    atomic_write(root / file, [header, *parts])
    return FileRecord(file, len(header) + at, xxhash.xxh3_128_hexdigest(header), digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def map_shard(path: Path, size: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a shard, mapped from the file without a copy, and its metadata.

    Writing into them changes memory only, never the file. Raises FormatError where the header does not fit the file or
    the file is not `size` bytes long, MissingError where it is absent.
    """
    path = regular_file(path, max_bytes=2**50)
    held = path.stat().st_size
    if size is not None and held != size:
        raise FormatError(f"{path} has {held:,} bytes instead of {size:,}: it is damaged; `interp verify` tells more")
    entries, meta, start = read_header(path)
    data = torch.from_file(str(path), shared=False, size=held, dtype=torch.uint8)[start:]
    return {name: _view(path, name, entry, data) for name, entry in entries.items()}, meta


def _view(path: Path, name: str, entry: dict[str, Any], data: Tensor) -> Tensor:
    dtype, offsets = DTYPES.get(entry.get("dtype", "")), entry.get("data_offsets")
    if dtype is None or not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)):
        raise FormatError(f"{path}: tensor {name!r} is of no known type")
    begin, end = offsets
    want = math.prod(entry["shape"]) * dtype.itemsize
    if not 0 <= begin <= end <= len(data) or end - begin != want or begin % dtype.itemsize:
        raise FormatError(f"{path}: tensor {name!r} does not lie where its header says")
    return data[begin:end].view(dtype).view(entry["shape"])


def check_shard(root: Path, record: FileRecord) -> str | None:
    """Return what is wrong with a file, read whole and hashed, or None where it is as it was written."""
    path = root / record.file
    try:
        status = regular_file(path, max_bytes=2**50).stat()
        if status.st_size != record.bytes:
            return f"{record.file}: {status.st_size:,} bytes instead of {record.bytes:,}"
        with path.open("rb", buffering=0) as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if length > record.bytes - 8:
                return f"{record.file}: the header's length is damaged"
            if xxhash.xxh3_128_hexdigest(first + file.read(length)) != record.header:
                return f"{record.file}: the header is not what was written (checksum)"
            if _digest(file) != record.data:
                return f"{record.file}: the data are not what was written (checksum)"
    except FileNotFoundError:
        return f"{record.file}: missing"
    except (OSError, FormatError) as error:
        return f"{record.file}: cannot be read ({error})"
    return None


def _digest(file: Any) -> str:
    digest, block = xxhash.xxh3_128(), bytearray(BLOCK)
    while count := file.readinto(block):
        digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def self_record(root: Path, file: str) -> tuple[FileRecord, dict[str, Any]]:
    """Return the record of a shard that nothing else vouches for, and its metadata.

    Raises FormatError where its data do not agree with the checksum in its own header.
    """
    path = regular_file(root / file, max_bytes=2**50)
    _, meta, start = read_header(path)
    with path.open("rb", buffering=0) as handle:
        header = xxhash.xxh3_128_hexdigest(handle.read(start))
        data = _digest(handle)
    if data != meta.get("xxh3_128"):
        raise FormatError(f"{path}: the data are not what was written (checksum)")
    return FileRecord(file, path.stat().st_size, header, data), meta


def record_plain(root: Path, file: str) -> FileRecord:
    """Return the record of a file that is no shard (a tokenizer's): all of it counts as data."""
    content = (root / file).read_bytes()
    return FileRecord(file, len(content), "", xxhash.xxh3_128_hexdigest(content))


def check_plain(root: Path, record: FileRecord) -> str | None:
    """Return what is wrong with such a file, or None."""
    try:
        found = record_plain(root, record.file)
    except FileNotFoundError:
        return f"{record.file}: missing"
    except OSError as error:
        return f"{record.file}: cannot be read ({error})"
    return None if found == record else f"{record.file}: not what was written (checksum)"
