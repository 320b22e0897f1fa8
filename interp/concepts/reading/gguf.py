"""gguf control vectors (llama.cpp, repeng, EasySteer), read within limits and written.

The gguf package maps a file and walks its header without limits, so that a hostile count or length makes it run on or
take memory; the header would have to be walked here first, and after that nothing is left for the package to do.

Layers: `direction.N` is what llama.cpp adds to the output of the block of index N, counted from 0; its buffer starts at
layer 1 and has no place for the block of index 0. repeng and EasySteer number alike, and do write `direction.0`.
So direction.N is blocks.N.hook_resid_post.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.io import FormatError, atomic_write, regular_file

__all__ = ["MAGIC", "read_gguf", "write_gguf"]

MAGIC = b"GGUF"
ARCHITECTURE = "controlvector"
MAX_BYTES = 2**30
MAX_ENTRIES = 65_536  # key-value pairs; EasySteer writes one a layer and statistic
MAX_TENSORS = 4_096
MAX_TEXT = 2**16
MAX_ITEMS = 2**20  # of an array in the header
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _UINT32 = 8, 9, 4
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


class _Cursor:
    """Reads numbers and texts from bytes, never past their end."""

    def __init__(self, path: Path, data: Any):
        self.path, self.data, self.at = path, data, 0

    def take(self, n: int, what: str) -> bytes:
        if n > len(self.data) - self.at:
            raise FormatError(f"{self.path} is cut short, or lies about its length: {what} at byte {self.at:,}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind), what))[0]

    def count(self, kind: str, limit: int, what: str) -> int:
        n = self.number(kind, what)
        if n > limit:
            raise FormatError(f"{self.path} claims {n:,} {what}; at most {limit:,} are read")
        return n

    def text(self, what: str) -> str:
        data = self.take(self.count("Q", MAX_TEXT, f"bytes in {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: {what} is not UTF-8") from error


def read_gguf(path: Path) -> tuple[dict[int, Float[Tensor, " d"]], dict[str, Any]]:
    """Return the vectors of a control-vector file by block index (float32), and its key-value pairs.

    Vectors have the length that the file gives them. Raises MissingError where the file is absent, FormatError for
    anything else that is wrong with it; no data is read before the header is checked.
    """
    path = regular_file(path, MAX_BYTES)
    if path.stat().st_size < 24:
        raise FormatError(f"{path} is too short for a gguf file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(path, data))


def _parse(cursor: _Cursor) -> tuple[dict[int, Tensor], dict[str, Any]]:
    path = cursor.path
    if cursor.take(4, "the magic number") != MAGIC:
        raise FormatError(f"{path} is not a gguf file")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise FormatError(f"{path} is gguf version {version:,}; 2 and 3 are read (little-endian)")
    n_tensors = cursor.number("Q", "the number of tensors")  # judged below: a model's file should say what it is
    entries = _entries(cursor)
    if entries.get("general.architecture") != ARCHITECTURE:
        raise FormatError(
            f"{path} is a gguf file of {entries.get('general.architecture')!r}, not a {ARCHITECTURE}: it holds no "
            "directions"
        )
    if not 0 < n_tensors <= MAX_TENSORS:
        raise FormatError(f"{path} claims {n_tensors:,} tensors; from 1 to {MAX_TENSORS:,} are read")
    infos = [_info(cursor) for _ in range(n_tensors)]
    align = entries.get("general.alignment", 32)
    if not isinstance(align, int) or not 8 <= align <= 2**16 or align & (align - 1):
        raise FormatError(f"{path}: general.alignment is {align!r}; it must be a power of two")
    start = -(-cursor.at // align) * align
    vectors: dict[int, Tensor] = {}
    for layer, d, dtype, offset in infos:
        if layer in vectors:
            raise FormatError(f"{path} holds direction.{layer} twice")
        cursor.at = start + offset
        held = bytearray(cursor.take(d * dtype.itemsize, f"direction.{layer}"))
        vectors[layer] = torch.frombuffer(held, dtype=dtype).float()
    return dict(sorted(vectors.items())), entries


def _entries(cursor: _Cursor) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for _ in range(cursor.count("Q", MAX_ENTRIES, "key-value pairs")):
        key = cursor.text("a key")
        if key in entries:
            raise FormatError(f"{cursor.path} holds the key {key!r} twice")
        entries[key] = _value(cursor, cursor.number("I", "a type"), key)
    return entries


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _TEXT:
        return cursor.text(key)
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], key)
    if kind != _ARRAY:
        raise FormatError(f"{cursor.path}: {key!r} is of the unknown type {kind}")
    inner, n = cursor.number("I", key), cursor.count("Q", MAX_ITEMS, f"items in {key!r}")
    if inner == _TEXT:
        return [cursor.text(key) for _ in range(n)]
    if inner not in _SCALARS:
        raise FormatError(f"{cursor.path}: {key!r} is an array of the unknown type {inner}")
    kind_of = _SCALARS[inner]
    return list(struct.unpack(f"<{n}{kind_of}", cursor.take(n * struct.calcsize(kind_of), key)))


def _info(cursor: _Cursor) -> tuple[int, int, torch.dtype, int]:
    """Return block index, width, dtype and offset of a tensor."""
    path, name = cursor.path, cursor.text("the name of a tensor")
    shape = [cursor.number("Q", name) for _ in range(cursor.count("I", 4, f"dimensions of {name!r}"))]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"{path} holds {name!r}; the tensors of a control vector are direction.1, direction.2, ...")
    sizes = [n for n in shape if n != 1]
    if len(sizes) != 1 or not 0 < sizes[0] <= MAX_BYTES // 2:
        raise FormatError(f"{path}: {name} has shape {shape}; one vector a layer is expected")
    if kind not in _DTYPES:
        raise FormatError(f"{path}: {name} is of ggml type {kind}; float types are read, quantised ones are not")
    if offset > MAX_BYTES:
        raise FormatError(f"{path}: {name} lies at byte {offset:,}, past the end")
    return int(match[1]), sizes[0], _DTYPES[kind], offset


def write_gguf(
    path: str | Path, vectors: Mapping[int, Float[Tensor, " d"]], model_hint: str, extra: Mapping[str, str]
) -> None:
    """Write vectors by block index as a gguf version 3 control vector (float32), atomically."""

    def text(value: str) -> bytes:
        data = value.encode("utf-8")
        return struct.pack("<Q", len(data)) + data

    pairs = [text("general.architecture") + struct.pack("<I", _TEXT) + text(ARCHITECTURE)]
    pairs.append(text(f"{ARCHITECTURE}.model_hint") + struct.pack("<I", _TEXT) + text(model_hint))
    pairs.append(text(f"{ARCHITECTURE}.layer_count") + struct.pack("<II", _UINT32, len(vectors)))
    pairs += [text(key) + struct.pack("<I", _TEXT) + text(value) for key, value in extra.items()]
    infos, blobs, offset = [], [], 0
    for layer, vector in sorted(vectors.items()):
        blob = vector.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
        infos.append(text(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(vector), 0, offset))
        blobs.append(blob + b"\0" * (-len(blob) % 32))
        offset += len(blobs[-1])
    head = MAGIC + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    atomic_write(path, [head + b"\0" * (-len(head) % 32), *blobs])
