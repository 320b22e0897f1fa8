"""Files that hold an SAE: one module a format, one line each in FORMATS."""

import difflib
import os
from typing import Protocol

from sae.archs.base import SAE
from sae.formats import saelens

__all__ = ["FORMATS", "load_sae", "save_sae"]


class Format(Protocol):
    """What a module in FORMATS offers."""

    def save(self, sae: SAE, path: str | os.PathLike) -> None: ...

    def load(self, path: str | os.PathLike) -> SAE: ...


FORMATS: dict[str, Format] = {"saelens": saelens}  # ty: a module with these two functions


def save_sae(sae: SAE, path: str | os.PathLike, *, format: str = "saelens") -> None:
    """Write an SAE into a folder, each file atomically; the folder is made, what else is in it stays.

    The default is our own format, which SAELens 6 reads too. Raises ValueError for a format that FORMATS does not hold.
    """
    if format not in FORMATS:
        close = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0.0)
        raise ValueError(f"there is no format {format!r}; closest: {close[0]}; all: {', '.join(FORMATS)}")
    FORMATS[format].save(sae, path)


def load_sae(path: str | os.PathLike) -> SAE:
    """Return the SAE in a folder, on the CPU, with the weights that were saved, bit for bit.

    Raises MissingError where the folder or a file of it is absent, FormatError where a file is not what it should be.
    """
    return saelens.load(path)
