"""Tensors in the files of others, read without running anything in them: safetensors, torch's .pt, numpy's .npz.

Limits are checked first, then the structure is read, then memory is taken. A .pt file is a zip of a pickle and raw
bytes: the pickle's opcodes and the names it imports are compared with a short list before torch's own restricted
loader (weights_only) sees it, and nothing falls back to the unrestricted one. This runs in the process of the caller; a
flaw in torch's loader behind that list would not be contained.
"""

import pickletools
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.io import FormatError, load_tensors, read_header, regular_file

__all__ = ["SUFFIXES", "load_state", "names_of", "single_file"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
MAX_BYTES = 64 * 2**30
MAX_MEMBERS = 4096
MAX_PICKLE = 8 * 2**20
MAX_TEXT = 2**20

_STORAGES = "Float Half BFloat16 Double Long Int Short Char Byte Bool"
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "torch Size",
    "torch device",
    *(f"torch {kind}Storage" for kind in _STORAGES.split()),
    *(f"torch {name}" for name in ("float32", "float16", "bfloat16", "float64")),
}
_OPCODES = (
    "PROTO EMPTY_DICT EMPTY_LIST EMPTY_TUPLE MARK BINUNICODE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID "
    "BININT BININT1 BININT2 BINFLOAT LONG1 NEWFALSE NEWTRUE NONE TUPLE TUPLE1 TUPLE2 TUPLE3 REDUCE BUILD SETITEM "
    "SETITEMS APPEND APPENDS STOP"
)
_ALLOWED = frozenset(_OPCODES.split())


def load_state(path: Path) -> dict[str, Any]:
    """Return what a file of weights holds, by name: tensors on the CPU, numbers and texts.

    Raises MissingError where it is absent, FormatError for anything else that is wrong with it.
    """
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.suffix == ".safetensors":
        return dict(load_tensors(path)[0])
    return _load_pt(path, "cpu")


def names_of(path: Path) -> Mapping[str, Any]:
    """Return the shape of each tensor of a file by its name, and the other values as they are; no data is read."""
    status = regular_file(path, MAX_BYTES).stat()
    return _names(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)  # every format looks at the same file while one is recognised
def _names(path: Path, _time: int, _size: int) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return {name: tuple(entry["shape"]) for name, entry in read_header(path)[0].items()}
    if path.suffix == ".npz":
        with _archive(path) as archive:
            return {info.filename.removesuffix(".npy"): _npy_header(archive, info, path) for info in archive.infolist()}
    held = _load_pt(path, "meta")
    return {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in held.items()}


def single_file(folder: Path) -> Path | None:
    """Return the one file of weights in a folder; None where there is none, or where there are several."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    return found[0] if len(found) == 1 else None


def _archive(path: Path) -> zipfile.ZipFile:
    regular_file(path, MAX_BYTES)
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a dozen kinds, from BadZipFile to struct.error
        legacy = " (torch before 1.6 wrote no zip: load and save it again with a newer one)" if _is_pt(path) else ""
        raise FormatError(f"{path} is not a sound {path.suffix} file{legacy}: {error}") from error
    infos = archive.infolist()
    problem = None
    if len(infos) > MAX_MEMBERS:
        problem = f"it has {len(infos):,} members; at most {MAX_MEMBERS:,} are read"
    elif len({info.filename for info in infos}) != len(infos):
        problem = "two members have one name"
    elif any(info.flag_bits & 1 for info in infos):
        problem = "it is encrypted"
    elif sum(info.file_size for info in infos) > MAX_BYTES:
        problem = f"its members claim more than {MAX_BYTES:,} bytes"
    if problem:
        archive.close()
        raise FormatError(f"{path}: {problem}")
    return archive


def _is_pt(path: Path) -> bool:
    return path.suffix in (".pt", ".pth", ".bin")


def _load_pt(path: Path, device: str) -> dict[str, Any]:
    _inspect(path)
    try:
        held = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged pickle or archive makes of torch's loader
        raise FormatError(f"{path} is not a sound file of weights: {str(error)[:200]}") from error
    for key in ("state_dict", "model_state_dict", "model", "sae"):  # a checkpoint around the weights
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    if not isinstance(held, dict):
        raise FormatError(f"{path} holds a {type(held).__name__}; wanted: a table of tensors by name")
    return {name: _checked(path, name, value) for name, value in held.items()}


def _checked(path: Path, name: Any, value: Any) -> Any:
    if not isinstance(name, str):
        raise FormatError(f"{path} holds something under {name!r}; wanted: a name")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise FormatError(f"{path}: tensor {name!r} claims more numbers than the file holds")
        return value.detach()
    if isinstance(value, dict):
        return {key: _checked(path, key, inner) for key, inner in value.items()}
    if value is not None and not isinstance(value, (bool, int, float, str, list, tuple, torch.dtype, torch.device)):
        raise FormatError(f"{path}: {name!r} is a {type(value).__name__}; wanted: tensors, numbers and texts")
    return value


def _inspect(path: Path) -> None:
    """Raise FormatError unless a .pt file is a plain archive whose pickle only makes tensors and tables."""
    with _archive(path) as archive:
        infos = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise FormatError(f"{path}: its members are compressed, which torch never does")
        if any(info.filename.endswith(("/constants.pkl", ".py")) for info in infos):
            raise FormatError(f"{path} is a TorchScript program, not a table of tensors")
        pickles = [info for info in infos if info.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise FormatError(f"{path} holds no single data.pkl of at most {MAX_PICKLE:,} bytes")
        try:
            data = archive.read(pickles[0])
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name not in _ALLOWED or (opcode.name == "GLOBAL" and argument not in _GLOBALS):
                    what = argument if opcode.name == "GLOBAL" else f"opcode {opcode.name}"
                    raise FormatError(f"{path}: its pickle asks for {what!r}, which no table of tensors needs")
                if isinstance(argument, str) and len(argument) > MAX_TEXT:
                    raise FormatError(f"{path}: its pickle holds a text of {len(argument):,} characters")
        except FormatError:
            raise
        except Exception as error:  # BadZipFile, struct.error, ValueError, EOFError...
            raise FormatError(f"{path}: its pickle is damaged: {error}") from error


def _load_npz(path: Path) -> dict[str, Any]:
    with _archive(path) as archive:
        for info in archive.infolist():
            _npy_header(archive, info, path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            # a copy in the machine's byte order, writable: what torch wants
            return {name: torch.from_numpy(np.array(arrays[name], dtype=np.float32)) for name in arrays.files}
    except Exception as error:  # BadZipFile (CRC), zlib.error, ValueError...
        raise FormatError(f"{path} is not a sound npz file: {error}") from error


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> tuple[int, ...]:
    """Return the shape that a member claims, after comparing it with the member's size."""
    if not info.filename.endswith(".npy"):
        raise FormatError(f"{path}: member {info.filename!r} is not an array")
    try:
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read[version](file)
            start = file.tell()
    except Exception as error:
        raise FormatError(f"{path}: member {info.filename!r} is damaged: {error}") from error
    size = dtype.itemsize
    for n in shape:
        size *= n
    if dtype.kind != "f" or len(shape) > 8 or min(shape, default=1) < 0 or start + size != info.file_size:
        raise FormatError(f"{path}: member {info.filename!r} claims {shape} of {dtype}, which it does not hold")
    return tuple(shape)
