"""OpenAI's sparse autoencoders (arXiv:2406.04093): a .pt file whose TopK models standardise each token first."""

import os
from pathlib import Path

import torch
from torch import Tensor

from sae.archs.base import SAE
from sae.formats.files import load_state, names_of
from sae.formats.weights import assemble, take
from sae.io import FormatError

__all__ = ["FILES", "detect", "load"]

FILES: tuple[tuple[str, ...], ...] = ()  # of no fixed name: on a hub, the file is part of the id

_NAMES = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "latent_bias", "b_dec": "pre_bias"}
_SPARE = (
    "stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "activation", "activation_state_dict"
)  # fmt: skip


def detect(path: Path) -> bool:
    """Return whether a file has a pre_bias and a latent_bias."""
    return path.suffix == ".pt" and path.is_file() and {"pre_bias", "latent_bias"} <= set(names_of(path))


def load(path: str | os.PathLike) -> SAE:
    """Return the SAE in a file. Raises MissingError or FormatError."""
    file = Path(path)
    state = load_state(file)
    weights = take(state, _NAMES, file, spare=_SPARE)
    for name in ("W_enc", "W_dec"):
        if not isinstance(weights[name], Tensor) or weights[name].ndim != 2:
            raise FormatError(f"{file}: {_NAMES[name]} is not a matrix")
        weights[name] = weights[name].t()
    kind = state.get("activation", "ReLU")
    if kind == "ReLU":
        return assemble(file, weights, arch="relu")
    options = state.get("activation_state_dict")
    options = options if isinstance(options, dict) else {}
    k, after = options.get("k"), options.get("postact_fn", "ReLU")
    if isinstance(k, Tensor) and k.numel() == 1 and k.dtype in (torch.int32, torch.int64):
        k = int(k)
    if kind != "TopK" or after != "ReLU" or type(k) is not int:
        raise FormatError(
            f"{file}: activation is {kind!r} with k {k!r}, then {after!r}; readable: ReLU, TopK then ReLU"
        )
    return assemble(file, weights, arch="topk", k=k, input_norm="layer_norm")
