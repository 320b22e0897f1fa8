"""sparsify's folder: cfg.json and sae.safetensors. Layout read from eai-sparsify 1.3.3."""

import os
from pathlib import Path
from typing import Any

from sae.archs.base import SAE
from sae.archs.topk import TopK
from sae.formats.weights import assemble, centring, parts, take
from sae.io import FormatError, load_tensors, read_json, save_tensors, write_json

__all__ = ["FILES", "detect", "load", "save"]

FILES = (("cfg.json", "sae.safetensors"),)  # as fetched from a hub; a "?" marks what may be absent

_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def detect(path: Path) -> bool:
    """Return whether a folder holds what sparsify writes."""
    if not (path / "cfg.json").is_file():
        return False
    cfg = read_json(path / "cfg.json")
    return isinstance(cfg, dict) and "k" in cfg and "architecture" not in cfg and "expansion_factor" in cfg


def load(path: str | os.PathLike) -> SAE:
    """Return the SAE or transcoder in a folder of sparsify.

    An autoencoder with a skip connection comes back as a transcoder of the same function, b_dec folded into the
    encoder's bias. Raises MissingError or FormatError (groupmax, whose latents compete in groups, is not readable).
    """
    folder, file = Path(path), Path(path) / "cfg.json"
    cfg = read_json(file)
    if not isinstance(cfg, dict):
        raise FormatError(f"{file} is not the configuration of a sparse coder")
    if cfg.get("activation", "topk") != "topk":
        raise FormatError(f"{file}: activation is {cfg['activation']!r}; only 'topk' is readable")
    weights_file = folder / "sae.safetensors"
    tensors, _ = load_tensors(weights_file)
    skip = "W_skip" in tensors
    weights = take(tensors, _NAMES | ({"W_skip": "W_skip"} if skip else {}), weights_file)
    if weights["W_enc"].ndim != 2:
        raise FormatError(f"{weights_file}: encoder.weight has shape {tuple(weights['W_enc'].shape)}")
    weights["W_enc"] = weights["W_enc"].t()
    transcode = cfg.get("transcode") is True
    if skip and not transcode:
        if weights["W_enc"].shape[:1] != weights["b_dec"].shape:
            raise FormatError(f"{weights_file}: b_dec has shape {tuple(weights['b_dec'].shape)}")
        weights = centring(weights, have=True, want=False)
    # signed, in early versions: the k largest magnitudes, not rectified
    return assemble(
        weights_file, weights, transcoder=transcode or skip,
        arch="abstopk" if cfg.get("signed") is True else "topk", k=cfg.get("k"), metadata=_metadata(folder),
    )  # fmt: skip


def save(sae: SAE, path: str | os.PathLike) -> None:
    """Write an SAE as sparsify does; raises ValueError for what it cannot express: anything but TopK."""
    config = sae.config
    if not isinstance(sae, TopK) or config.arch == "abstopk":
        raise ValueError(f"sparsify knows TopK latents alone, not {config.arch}; formats for it: native, saelens")
    if config.d_target != config.d_in or config.n_sites > 1 or config.input_norm != "none":
        raise ValueError(
            "sparsify reads and writes one width, without input normalisation; this SAE has d_in "
            f"{config.d_in}, d_out {config.d_target}, {config.n_sites} site(s), input_norm {config.input_norm!r}"
        )
    held = centring(parts(sae), have=config.centred, want=not config.transcoder)
    tensors = {name: held[public] for public, name in _NAMES.items()} | {"encoder.weight": held["W_enc"].t()}
    if "W_skip" in held:
        tensors["W_skip"] = held["W_skip"]
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": True,
        "num_latents": config.d_sae,
        "k": int(config.k or 0),
        "multi_topk": False,
        "skip_connection": "W_skip" in held,
        "transcode": config.transcoder,
        "d_in": config.d_in,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "sae.safetensors", {name: value.float() for name, value in tensors.items()}, {})
    write_json(folder / "cfg.json", cfg)


def _metadata(folder: Path) -> dict[str, Any]:
    """Return what the run around a folder says: its hook point is the folder's name, its model in config.json."""
    found: dict[str, Any] = {"hookpoint": folder.name} if folder.name else {}
    run = folder.parent / "config.json"
    if run.is_file():
        table = read_json(run)
        if isinstance(table, dict) and isinstance(table.get("model"), str):
            found["model_name"] = table["model"]
    return found
