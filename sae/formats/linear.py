"""ReLU SAEs kept as two torch linear layers, b_dec not taken from the input: Goodfire's, and those of DeepSeek-R1."""

import os
import re
from pathlib import Path

from torch import Tensor

from sae.archs.base import SAE
from sae.formats.files import load_state, names_of
from sae.formats.weights import assemble, take
from sae.io import FormatError

__all__ = ["FILES", "detect", "load"]

FILES: tuple[tuple[str, ...], ...] = ()  # of no fixed name: on a hub, the file is part of the id

_PREFIXES = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


def detect(path: Path) -> bool:
    """Return whether a file holds the weight and bias of two linear layers, and nothing else."""
    if path.suffix not in (".pt", ".pth", ".safetensors") or not path.is_file():
        return False
    names = set(names_of(path))
    return any(names == set(_names(*pair).values()) for pair in _PREFIXES)


def load(path: str | os.PathLike) -> SAE:
    """Return the SAE in a file, its layer from a name like l19 or layer_19. Raises MissingError or FormatError."""
    file = Path(path)
    state = load_state(file)
    names = _names(*_PREFIXES[0] if "encoder_linear.weight" in state else _PREFIXES[1])
    weights = take(state, names, file)
    for name in ("W_enc", "W_dec"):
        if not isinstance(weights[name], Tensor) or weights[name].ndim != 2:
            raise FormatError(f"{file}: {names[name]} is not a matrix")
        weights[name] = weights[name].t()
    layer = re.search(r"(?:^|[-_.])(?:l|layer[-_]?)(\d+)(?=[-_.]|$)", file.name.lower())
    metadata = {"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}
    return assemble(file, weights, arch="relu", apply_b_dec_to_input=False, metadata=metadata)


def _names(encoder: str, decoder: str) -> dict[str, str]:
    return {
        "W_enc": f"{encoder}.weight",
        "b_enc": f"{encoder}.bias",
        "W_dec": f"{decoder}.weight",
        "b_dec": f"{decoder}.bias",
    }
