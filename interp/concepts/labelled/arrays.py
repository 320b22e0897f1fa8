"""Activations that are there already, with labels and groups: arrays in memory, .npy, .npz and .safetensors files."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.acts.direction import as_rows
from interp.concepts.labelled.examples import make_examples, numbered
from interp.concepts.labelled.token_choice import LabelledRows
from sae.data import load_array
from sae.io import MAX_FILE_BYTES, FormatError, load_tensors, regular_file

__all__ = ["from_arrays"]

NAMES = {"y": ("y", "labels"), "groups": ("groups",), "pairs": ("pairs",)}  # of what lies beside the rows in a file


def from_arrays(
    X: Any,
    y: Any = None,
    groups: Any = None,
    *,
    pairs: Any = None,
    positive: Any = None,
    target: bool = False,
    name: str = "rows",
) -> LabelledRows:
    """Return existing activations [n, d] with labels as LabelledRows, cells by name.

    X is an array, a mapping from cells to arrays, or a file: .npy; .npz or .safetensors, in which every table is a cell
    and y (or labels), groups and pairs may lie beside them. y, groups and pairs may be .npy files. An array alone is
    the cell `name`. Labels as in labelled.make_examples. Rows come back as float32 (float64 stays).
    Raises ValueError for values that are not finite, lengths that differ, no labels; FormatError for a damaged file
    (pickles are never read); MissingError.
    """
    beside: dict[str, Any] = {}
    if isinstance(X, (str, Path)):
        cells, beside = _read(Path(X).expanduser(), name)
    else:
        cells = dict(X) if isinstance(X, Mapping) else {name: X}
    y, groups, pairs = (_row(v, beside.get(k), k) for k, v in (("y", y), ("groups", groups), ("pairs", pairs)))
    if y is None:
        raise ValueError("there are no labels: give y, or a file that holds y (or labels) beside the rows")
    if not cells:
        raise ValueError("there are no rows: give an array [n, d], or a file that holds one")
    rows = {str(cell): _floating(as_rows(value)) for cell, value in cells.items()}
    n = len(next(iter(rows.values())))
    lengths = {cell: len(value) for cell, value in rows.items()}
    lengths |= {k: len(v) for k, v in (("y", y), ("groups", groups), ("pairs", pairs)) if v is not None}
    if set(lengths.values()) != {n}:
        raise ValueError(f"rows, labels, groups and pairs must be equally many; they are {lengths}")
    named = [f"row {i}" for i in range(n)]  # distinct, as texts would be: labels are checked as those are
    labels = make_examples(named, y, positive=positive, target=target, place="row {}".format).labels
    own = numbered(pairs) if groups is None and pairs is not None else groups
    return LabelledRows(
        X=rows, y=labels, groups=list(range(n)) if own is None else list(own), pairs=pairs, documents=np.arange(n)
    )


def _floating(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _row(given: Any, held: Any, what: str) -> list | None:
    """Return labels, groups or pairs as a list: those given (a file of them too), else those beside the rows."""
    value = held if given is None else given
    if isinstance(value, (str, Path)):
        value = _npy(Path(value).expanduser())
    if value is None:
        return None
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1:
        raise ValueError(f"{what} is one row, one entry a row of X; shape {array.shape} was given")
    return array.tolist()


def _read(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables of a file, and what lies beside them under the NAMES."""
    if path.suffix == ".npy":
        return {name: load_array(path)}, {}
    if path.suffix == ".safetensors":
        held: dict[str, Any] = dict(load_tensors(path)[0])
    elif path.suffix == ".npz":
        held = _npz(path)
    else:
        raise ValueError(f"{path} is neither .npy, .npz nor .safetensors: other files are not read as activations")
    cells = {key: value for key, value in held.items() if value.ndim == 2}
    beside = {what: held[key] for what, keys in NAMES.items() for key in keys if key in held and held[key].ndim == 1}
    unread = sorted(set(held) - set(cells) - {key for keys in NAMES.values() for key in keys})
    if unread:
        raise FormatError(
            f"{path} holds {', '.join(unread)}, neither tables [n, d] nor y (or labels), groups, pairs: leave them out"
        )
    return cells, beside


def _npz(path: Path) -> dict[str, np.ndarray]:
    regular_file(path, MAX_FILE_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:  # a few bytes of zip can promise any number of zeros
            total = sum(entry.file_size for entry in archive.infolist())
        if total > MAX_FILE_BYTES:
            raise FormatError(f"{path} unpacks to {total:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FormatError:
        raise
    except (ValueError, TypeError, EOFError, OSError, SyntaxError, MemoryError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path} is not a sound .npz file: {error}") from error


def _npy(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        raise ValueError(f"{path} is no .npy file: labels and groups are read from nothing else")
    regular_file(path, MAX_FILE_BYTES)
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, TypeError, EOFError, OSError, SyntaxError, MemoryError) as error:
        raise FormatError(f"{path} is not a sound .npy file: {error}") from error
