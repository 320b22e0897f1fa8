"""Files that hold an SAE: one module a format, one line each in FORMATS."""

import difflib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sae.archs.base import SAE
from sae.extras import MissingError
from sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    linear,
    mwhanna,
    native,
    openai,
    openmoss,
    plain,
    qwen_scope,
    refused,
    saelens,
    sparsify,
)
from sae.formats.files import single_file
from sae.formats.hub import fetch, is_hub_id, push_to_hub
from sae.io import FormatError

__all__ = ["FORMATS", "load_sae", "push_to_hub", "recognise", "save_sae"]

# Asked in this order whether a path is theirs. Each has FILES, detect(path) and load(path, ...), some save(sae, path).
FORMATS: dict[str, ModuleType] = {
    "native": native,
    "saelens": saelens,
    "sparsify": sparsify,
    "openmoss": openmoss,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "openai": openai,
    "qwen_scope": qwen_scope,
    "mwhanna": mwhanna,
    "linear": linear,
    "plain": plain,
}


def save_sae(sae: SAE, path: str | os.PathLike, *, format: str = "native") -> None:
    """Write an SAE into a folder, each file atomically; the folder is made, what else is in it stays.

    The default is our own format, which SAELens 6 reads too wherever it has the architecture; the others are
    "saelens" (the same files, refused where SAELens has no class for them), "sparsify" and "dictionary_learning". What
    is written is the inference form: batchtopk and matryoshka become thresholds. Raises ValueError for a format that
    is not there or cannot be written, and for an SAE that the format cannot express.
    """
    writable = [name for name, module in FORMATS.items() if hasattr(module, "save")]
    if format not in FORMATS:
        raise ValueError(_no_format(format))
    if format not in writable:
        raise ValueError(f"{format} is read but not written; writable: {', '.join(writable)}")
    FORMATS[format].save(sae, path)


def load_sae(
    path: str | os.PathLike,
    *,
    format: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    sae_id: str | None = None,
    **hints: Any,
) -> SAE:
    """Return the SAE in a folder or file, or on the Hugging Face hub, on the CPU in float32.

    Args:
        path: a folder or a file of weights; or a hub id, "org/repo" or "org/repo/sub/folder" (also "hf:org/repo"),
            where no such path exists.
        format: a name in FORMATS; None: recognised from file names and the names of the tensors.
        revision: hub only; a commit (40 hex digits) is what makes a load repeatable.
        subfolder: the folder or file inside `path`; sae_id is another word for it.
        hints: what a format needs and its files do not say, for example k; see the load function of its module, and
            sae.formats.plain for files of nobody's format.

    Raises MissingError where the path or a file of it is absent, FormatError where a file is not what it should be,
    ValueError for an unknown format or hint.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(_no_format(format))
    if subfolder is not None and sae_id is not None:
        raise ValueError(f"subfolder {subfolder!r} and sae_id {sae_id!r} mean the same; give one")
    place = _place(path, subfolder or sae_id, format, revision)
    with _one_error(place):
        name = format or recognise(place)
    module = FORMATS[name]
    known = [p.name for p in inspect.signature(module.load).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for hint in hints:
        if hint not in known:
            raise ValueError(f"{name} takes no hint {hint!r}; it takes: {', '.join(known) or 'none'}")
    with _one_error(place):
        return module.load(place, **hints)


def recognise(path: Path) -> str:
    """Return the name of the format of a folder or file; raises FormatError where none fits, or one that is refused."""
    if refused.detect(path):
        refused.load(path)
    for name, module in FORMATS.items():
        if module.detect(path):
            return name
    held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    inside = f"; it holds: {', '.join(held[:12])}" if held else ""
    folders = [entry for entry in held if (path / entry).is_dir()]
    hint = f"; an SAE in a folder of it: load_sae(path, subfolder={folders[0]!r})" if folders else ""
    raise FormatError(f"{path} is of no known format ({', '.join(FORMATS)}){inside}{hint}")


@contextmanager
def _one_error(place: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file makes of the code that reads it into FormatError."""
    try:
        yield
    except (FormatError, MissingError):
        raise
    except Exception as error:
        raise FormatError(f"{place} is not what it seems: {type(error).__name__}: {str(error)[:200]}") from error


def _place(path: str | os.PathLike, inner: str | None, format: str | None, revision: str | None) -> Path:
    """Return the folder or file to read, fetched from the hub where it is not on this machine."""
    try:
        place = Path(path)
        there = place.exists()
    except (ValueError, OSError) as error:  # a NUL byte, a name of 5,000 letters
        raise FormatError(f"{str(path)[:100]!r} is not a path: {error}") from error
    # a text whose first part is a folder here is a mistyped path, not an id
    if isinstance(path, str) and not there and is_hub_id(path) and not Path(place.parts[0]).exists():
        modules = FORMATS.values() if format is None else [FORMATS[format]]
        wanted = dict.fromkeys(names for module in modules for names in module.FILES)
        return _file_of(fetch(path, wanted, revision=revision, inner=inner))
    if inner is not None and there:
        target = place / inner
        if not target.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"subfolder {inner!r} leads out of {place}")
        place, there = target, target.exists()
    if not there:
        raise MissingError(f"there is no file or folder {place}")
    fixed = ("cfg.json", "config.json", "sae_weights.safetensors", "sae.safetensors", "ae.pt")
    return place.parent if place.is_file() and place.name in fixed else _file_of(place)


def _file_of(folder: Path) -> Path:
    """Return the one file of weights in a folder that has no configuration; else the path as it is."""
    if not folder.is_dir() or any(folder.glob("*.json")) or refused.detect(folder):
        return folder
    return single_file(folder) or folder


def _no_format(name: str) -> str:
    close = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.0)
    return f"there is no format {name!r}; closest: {close[0]}; all: {', '.join(FORMATS)}"
