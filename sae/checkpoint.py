"""Checkpoints: whole folders that appear at once, each file with its checksum, the last few kept."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from torch import Tensor

from sae.extras import MissingError
from sae.io import FormatError, load_tensors, read_json, save_tensors, sync_folder, write_json

__all__ = ["Checkpoint", "Damaged", "clear", "latest", "write"]

KEPT = 3
_PARTIAL = ".partial"


class Checkpoint(NamedTuple):
    """What was saved at a step."""

    step: int
    parts: list[tuple[dict[str, Tensor], dict[str, Any]]]  # tensors and numbers of each SAE that is trained
    common: dict[str, Any]


class Damaged(NamedTuple):
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


def write(
    folder: Path, step: int, parts: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]], common: Mapping[str, Any]
) -> Path:
    """Write a checkpoint, make it durable, and drop all but the last three.

    It is built beside its name and renamed when whole: a reader sees all of it or nothing. Raises OSError, as for a
    full disk; older checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:012d}"
    if target.exists():
        return target
    partial = folder / f"{target.name}{_PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        names = [f"{number}.safetensors" for number in range(len(parts))]
        for name, (tensors, numbers) in zip(names, parts, strict=True):
            save_tensors(partial / name, tensors, numbers)
        sums = {name: _checksum(partial / name) for name in names}
        write_json(partial / "checkpoint.json", {"step": step, "xxh3_128": sums, "common": dict(common)})
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in _all(folder)[KEPT:]:
        _drop(old)
    return target


def latest(folder: Path) -> tuple[Checkpoint | None, list[Damaged]]:
    """Return the newest checkpoint whose files are what was written, and those newer ones that are not."""
    damaged: list[Damaged] = []
    for path in _all(folder):
        try:
            return _read(path), damaged
        except (FormatError, MissingError, KeyError, OSError) as error:
            damaged.append(Damaged(path, str(error)))
    return None, damaged


def clear(folder: Path) -> None:
    """Delete all checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> Checkpoint:
    found = read_json(path / "checkpoint.json")
    parts = []
    for name, checksum in found["xxh3_128"].items():
        if _checksum(path / name) != checksum:
            raise FormatError(f"{path / name} is not what was written: its checksum differs")
        parts.append(load_tensors(path / name))
    return Checkpoint(int(found["step"]), parts, found["common"])


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _drop(path: Path) -> None:
    # renamed first: a half deleted folder must not look like a checkpoint
    trash = path.with_name(f"{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
