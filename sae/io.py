"""Durable files: atomic writes, safetensors with JSON metadata, limits before parsing, one error for bad input."""

import json
import math
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.extras import MissingError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FormatError",
    "atomic_write",
    "load_tensors",
    "parse_json",
    "read_header",
    "read_json",
    "regular_file",
    "save_tensors",
    "sweep_temporaries",
    "sync_folder",
    "write_json",
]

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 4096
MAX_DIMS = 8
MAX_FILE_BYTES = 64 * 2**30
MAX_JSON_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,256}")


class FormatError(ValueError):
    """A file is there but is not what it should be: damaged, hostile, or of another kind."""


def atomic_write(path: str | os.PathLike, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write bytes (or parts, one after the other) so that a reader, or a power cut, sees the old file or the new one.

    A temporary file beside the target, fsync, rename, fsync of the folder. A target that is a symbolic link stays a
    link. Raises OSError (disk full, no permission); then the old file is untouched and no temporary file is left.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        # mode 0o666: the kernel takes the umask off, as for any file that a user makes (safetensors leaves 0600)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            for part in [data] if isinstance(data, bytes) else data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: str | os.PathLike) -> None:
    """Make the names in a folder durable (nothing to do where the system has no such call)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep_temporaries(folder: str | os.PathLike) -> int:
    """Delete temporary files that dead processes of this machine left in a folder; returns how many.

    Those of other machines go when they are over a day old.
    """
    host, gone = socket.gethostname(), 0
    for path in Path(folder).glob(".tmp-*"):
        owner, _, tail = path.name.removeprefix(".tmp-").rpartition("-")
        name, _, pid = owner.rpartition("-")
        if not (tail and pid.isdigit()):
            continue
        if _alive(int(pid)) if name == host else time.time() - path.stat().st_mtime < 86_400:
            continue
        path.unlink(missing_ok=True)
        gone += 1
    return gone


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write an object as indented JSON, atomically; nan and infinity raise ValueError, since JSON has neither."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, (text + "\n").encode("utf-8", errors="strict"))


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the object in a JSON file.

    Raises MissingError where the file is absent and FormatError where it is too large, malformed, holds a key twice
    or a nan: all of these pass through the standard parser in silence or with an error of its own.
    """
    path = regular_file(path, max_bytes)
    return parse_json(path.read_bytes(), path)


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, "torch.Tensor"], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able dict as one safetensors file, atomically.

    The dict goes under the metadata key "json". Tensors are copied to the CPU and made contiguous; two names may share
    memory, and are then written twice.
    """
    from safetensors.torch import save

    wrong = [name for name in tensors if not _NAME.fullmatch(name) or ".." in name]
    if wrong:
        raise ValueError(f"tensor name {wrong[0]!r} is not allowed: letters, digits and _ . - / only, without '..'")
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    text = json.dumps(dict(meta), ensure_ascii=False, allow_nan=False)
    atomic_write(path, save(own, metadata={"json": text}))


def load_tensors(
    path: str | os.PathLike, *, max_bytes: int = MAX_FILE_BYTES
) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Return the tensors of a safetensors file (on the CPU, all values finite) and its "json" metadata.

    Raises MissingError where the file is absent, FormatError for anything else that is wrong with it. Size and header
    are checked before a byte of data is read.
    """
    path = regular_file(path, max_bytes)
    _, meta, _ = read_header(path)
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path} is not a sound safetensors file: {error}") from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise FormatError(f"{path}: tensor {name!r} holds nan or infinity")
    return tensors, meta


def regular_file(path: str | os.PathLike, max_bytes: int) -> Path:
    """Return the path of a file to read; raises MissingError, or FormatError for no plain file or one too large."""
    path = Path(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"there is no file {path}") from error
    except ValueError as error:  # a NUL byte in the name
        raise FormatError(f"{str(path)!r} is not a file name") from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path} is not a regular file")
    if status.st_size > max_bytes:
        raise FormatError(f"{path} has {status.st_size:,} bytes; at most {max_bytes:,} are read")
    return path


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return tensor entries, "json" metadata and the offset of the data of a safetensors file.

    After checking what the safetensors library lets pass; raises FormatError. No data is read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise FormatError(f"{path} is not a safetensors file: its header claims {length:,} of {size:,} bytes")
        header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the safetensors header is not an object")
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{path} holds {len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    for name, entry in header.items():
        _check_entry(path, name, entry)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("json", "{}"), str):
        raise FormatError(f"{path}: the metadata is not a table of texts")
    meta = parse_json(metadata.get("json", "{}").encode("utf-8", errors="replace"), path)
    if not isinstance(meta, dict):
        raise FormatError(f"{path}: the metadata under 'json' is not an object")
    return header, meta, 8 + length


def _check_entry(path: Path, name: str, entry: object) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise FormatError(f"{path}: tensor name {name!r} is not allowed")
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"{path}: tensor {name!r} has no usable shape")
    # max(n, 1): a shape such as (2^40, 0) holds no byte, yet what is computed from its width would not fit anywhere
    if len(shape) > MAX_DIMS or math.prod(max(n, 1) for n in shape) > MAX_FILE_BYTES:
        raise FormatError(f"{path}: tensor {name!r} has no usable shape")


def parse_json(data: bytes, path: Path) -> Any:
    """Return the object that bytes of JSON from `path` hold; raises FormatError (see read_json)."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise FormatError(f"{path}: a JSON object holds the same key twice")
        return table

    def no_constant(name: str) -> None:
        raise FormatError(f"{path}: JSON has no {name}")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad syntax, a number of 5,000 digits, depth
        raise FormatError(f"{path}: malformed JSON ({str(error)[:120]})") from error
