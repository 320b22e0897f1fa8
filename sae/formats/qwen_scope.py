"""Qwen Scope: layer{n}.sae.pt with transposed matrices; the number of active latents is in the repository's name."""

import os
import re
from pathlib import Path
from typing import Any

from sae.archs.base import SAE
from sae.formats.files import load_state, names_of
from sae.formats.weights import assemble, take
from sae.io import FormatError

__all__ = ["FILES", "detect", "load"]

FILES: tuple[tuple[str, ...], ...] = ()  # of no fixed name: on a hub, the file is part of the id

_NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def detect(path: Path) -> bool:
    """Return whether a file is named layer{n}.sae.pt and has these tensors."""
    named = re.fullmatch(r"layer\d+\.sae\.pt", path.name)
    return named is not None and path.is_file() and set(names_of(path)) == set(_NAMES)


def load(path: str | os.PathLike, *, k: int | None = None) -> SAE:
    """Return the SAE in a file; k where no folder of the path is named ...-W{N}K-L0_{k}.

    Raises MissingError or FormatError.
    """
    file = Path(path)
    weights = take(load_state(file), _NAMES, file)
    named = re.search(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)", file.absolute().as_posix())
    if k is None and named is None:
        raise FormatError(
            f"{file} does not hold k, and no folder above it is named like SAE-Res-...-W32K-L0_50: give it, "
            "load_sae(path, k=50)"
        )
    if any(weights[name].ndim != 2 for name in ("W_enc", "W_dec")):
        raise FormatError(f"{file}: W_enc and W_dec must be matrices")
    weights |= {name: weights[name].t() for name in ("W_enc", "W_dec")}
    metadata: dict[str, Any] = {}
    layer = re.match(r"layer(\d+)", file.name)
    if layer:
        metadata |= {"hook_name": f"blocks.{layer[1]}.hook_resid_post", "hf_hook_name": f"model.layers.{layer[1]}"}
    if named:
        metadata["model_name"] = f"Qwen/{named[1]}"
    return assemble(
        file, weights, arch="topk", k=k if k is not None else int(named[2] if named else 0),
        apply_b_dec_to_input=False, metadata=metadata,
    )  # fmt: skip
