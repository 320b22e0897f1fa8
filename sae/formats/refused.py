"""Files that are recognised and cannot be an SAE here, each with the reason."""

import os
import re
from pathlib import Path

from sae.archs.base import SAE
from sae.io import FormatError

__all__ = ["detect", "load"]

_CROSS_LAYER = re.compile(r"W_(enc|dec)_\d+\.safetensors")


def detect(path: Path) -> bool:
    """Return whether a path is one of the kinds that `load` explains."""
    return _reason(path) is not None


def load(path: str | os.PathLike) -> SAE:
    """Raise FormatError with the reason why a path cannot be read."""
    raise FormatError(f"{path} {_reason(Path(path)) or 'is of no kind that is known and refused'}")


def _reason(path: Path) -> str | None:
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    if any(_CROSS_LAYER.fullmatch(name) for name in names):
        return (
            "is a cross-layer transcoder: its latents read one layer and write to all later ones, which one encoder "
            "and one decoder cannot express; adding its decoders up would give right latents and wrong reconstructions"
        )
    if {"conf.yaml", "latest_ckpt.safetensors"} <= names:
        return "is a temporal SAE, whose latents depend on earlier tokens through attention: not readable"
    return None
