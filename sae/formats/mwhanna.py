"""Transcoders of one layer for circuit tracing: layer_{n}.safetensors, W_enc transposed, W_dec as here."""

import os
import re
from pathlib import Path

from sae.archs.base import SAE
from sae.formats.files import load_state, names_of
from sae.formats.weights import assemble, take
from sae.io import FormatError

__all__ = ["FILES", "detect", "load"]

FILES: tuple[tuple[str, ...], ...] = ()  # of no fixed name: on a hub, the file is part of the id

_NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_MORE = ("W_skip", "threshold")


def detect(path: Path) -> bool:
    """Return whether a file is named layer_{n}.safetensors and its two matrices have one shape."""
    if not re.fullmatch(r"layer_\d+\.safetensors", path.name) or not path.is_file():
        return False
    names = names_of(path)
    return set(_NAMES) <= set(names) <= {*_NAMES, *_MORE} and names["W_enc"] == names["W_dec"]


def load(path: str | os.PathLike) -> SAE:
    """Return the transcoder in a file: jumprelu where there are thresholds, else relu.

    Raises MissingError or FormatError.
    """
    file = Path(path)
    state = load_state(file)
    weights = take(state, _NAMES | {name: name for name in _MORE if name in state}, file)
    if weights["W_enc"].ndim != 2:
        raise FormatError(f"{file}: W_enc has shape {tuple(weights['W_enc'].shape)}")
    weights["W_enc"] = weights["W_enc"].t()
    layer = re.search(r"(\d+)", file.name)
    block = f"blocks.{layer[1]}" if layer else "blocks"
    return assemble(
        file, weights, transcoder=True, arch="jumprelu" if "threshold" in weights else "relu",
        metadata={"hook_name": f"{block}.mlp.hook_in", "hook_name_out": f"{block}.hook_mlp_out"},
    )  # fmt: skip
