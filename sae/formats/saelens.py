"""Our own format: SAELens 6's folder of cfg.json and sae_weights.safetensors, inference form "jumprelu".

So that what we save, SAELens loads as it is. What it does not know (architecture, k) is in the metadata, whose unknown
keys it keeps. Layout read from sae_lens 6.54.12.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.archs.base import SAE
from sae.config import SAEConfig
from sae.io import FormatError, load_tensors, read_json, save_tensors, write_json

__all__ = ["load", "save"]

# Without a version of at least 6.0.0, SAELens takes its old path and drops model and hook names in silence.
SAELENS_VERSION = "6.54.12"
_OURS = ("sae_lens_version", "sae_lens_training_version", "training_architecture", "k", "interp_version")
_CORE = ("architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "reshape_activations")


def save(sae: SAE, path: str | os.PathLike) -> None:
    """Write cfg.json and sae_weights.safetensors into a folder, which is made; the training scale is folded."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = _cfg(sae)
    tensors = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    # cfg.json last, and its core in the weights too: a folder half overwritten is recognised as such
    core = {key: cfg[key] for key in _CORE} | {"k": sae.config.k, "training_architecture": sae.config.arch}
    save_tensors(folder / "sae_weights.safetensors", tensors, core)
    write_json(folder / "cfg.json", cfg)


def load(path: str | os.PathLike) -> SAE:
    """Return the SAE in a folder. Raises MissingError or FormatError."""
    folder = Path(path)
    cfg = read_json(folder / "cfg.json")
    config = _config(cfg, folder / "cfg.json")
    file = folder / "sae_weights.safetensors"
    tensors, core = load_tensors(file)
    for key, value in core.items():
        given = cfg["metadata"].get(key) if key in ("k", "training_architecture") else cfg.get(key)
        if given != value:
            raise FormatError(f"{file} was saved with {key} = {value!r}, cfg.json says {given!r}: not of one save")
    _check(tensors, config, file)
    from sae.archs import ARCHS

    sae = ARCHS[config.arch](config)
    with torch.no_grad():
        sae.enc.copy_(tensors["W_enc"].t())
        sae.dec.copy_(tensors["W_dec"])
        sae.enc_bias.copy_(tensors["b_enc"])
        sae.dec_bias.copy_(tensors["b_dec"])
        sae.cut.copy_(tensors["threshold"])
    return sae


def _cfg(sae: SAE) -> dict[str, Any]:
    try:
        own = version("interp")
    except PackageNotFoundError:  # run from a checkout that was never installed
        own = None
    metadata = {
        **sae.config.metadata,
        "sae_lens_version": SAELENS_VERSION,
        "training_architecture": sae.config.arch,
        "k": sae.config.k,
        "interp_version": own,
    }
    return {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }


def _config(cfg: Any, file: Path) -> SAEConfig:
    from sae.archs import ARCHS

    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata"), dict):
        raise FormatError(f"{file} is not the configuration of an SAE: no table 'metadata'")
    wanted = {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    for key, value in wanted.items():
        if cfg.get(key) != value:
            raise FormatError(f"{file}: {key} is {cfg.get(key)!r}; only {value!r} is read")
    metadata = cfg["metadata"]
    arch, k = metadata.get("training_architecture"), metadata.get("k")
    if not isinstance(arch, str) or arch not in ARCHS:
        raise FormatError(f"{file}: training_architecture is {arch!r}; known: {', '.join(ARCHS)}")
    d_in, d_sae = cfg.get("d_in"), cfg.get("d_sae")
    if type(d_in) is not int or type(d_sae) is not int or type(k) not in (int, float):
        raise FormatError(f"{file}: d_in {d_in!r}, d_sae {d_sae!r} and metadata.k {k!r} must be numbers")
    kept = {key: value for key, value in metadata.items() if key not in _OURS}
    try:
        return SAEConfig(arch=arch, d_in=d_in, d_sae=d_sae, k=k, metadata=kept)
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from error


def _check(tensors: dict[str, Tensor], config: SAEConfig, file: Path) -> None:
    d_in, d_sae = config.d_in, config.d_sae
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    if set(tensors) != set(shapes):
        raise FormatError(f"{file} holds {sorted(tensors)}; wanted: {sorted(shapes)}")
    for name, shape in shapes.items():
        value = tensors[name]
        if tuple(value.shape) != shape or value.dtype != torch.float32:
            raise FormatError(f"{file}: {name} is {value.dtype} {tuple(value.shape)}; wanted: float32 {shape}")
