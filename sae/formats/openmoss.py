"""OpenMOSS (Llama Scope, arXiv:2410.20526): hyperparams.json with checkpoints/final.safetensors, or config.json with
sae_weights.safetensors.

In what they call dataset-wise normalisation an SAE reads activations times sqrt(d) / their mean norm; the factors are
folded here. The first layout has been compared with SAELens's reader of it; the second is read from the trainer's code
and from SAELens's reader of Llama-Scope-R1, not from a published checkpoint of version 2.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.archs.base import SAE
from sae.formats.files import load_state
from sae.formats.weights import assemble, fold_norms, take
from sae.io import FormatError, read_json

__all__ = ["FILES", "detect", "load"]

FILES = (("hyperparams.json", "checkpoints/final.safetensors"), ("config.json", "sae_weights.safetensors"))

_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
_PLAIN = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_NORM = "dataset_average_activation_norm"


def detect(path: Path) -> bool:
    """Return whether a folder holds hyperparams.json, or a config.json of an SAE of theirs."""
    if (path / "hyperparams.json").is_file():
        return True
    if not (path / "config.json").is_file() or not (path / "sae_weights.safetensors").is_file():
        return False
    cfg = read_json(path / "config.json")
    return isinstance(cfg, dict) and {"d_model", "hook_point_in"} <= set(cfg)


def load(path: str | os.PathLike) -> SAE:
    """Return the SAE or transcoder in a folder.

    Raises MissingError, or FormatError; also for what cannot be expressed: gated linear encoders, cross-layer
    transcoders, low-rank attention, and normalisation by the norm of each token or batch.
    """
    folder = Path(path)
    old = (folder / "hyperparams.json").is_file()
    config_file = folder / ("hyperparams.json" if old else "config.json")
    cfg = read_json(config_file)
    if not isinstance(cfg, dict):
        raise FormatError(f"{config_file} is not the configuration of an SAE")
    _refuse(cfg, config_file)
    file = folder / ("checkpoints/final.safetensors" if old else "sae_weights.safetensors")
    state = load_state(file)
    norms = {name.split(".", 1)[1]: state.pop(name).item() for name in list(state) if name.startswith(f"{_NORM}.")}
    own = cfg.get(_NORM)
    norms |= {place: own[place] for place in ("in", "out") if isinstance(own, dict) and place in own}
    names = _PLAIN if "W_E" in state else _LINEAR
    threshold = next((name for name in _THRESHOLDS if name in state), None)
    weights = take(state, names | ({"threshold": threshold} if threshold else {}), file)
    if any(weights[name].ndim != 2 for name in ("W_enc", "W_dec")):
        raise FormatError(f"{file}: {names['W_enc']} and {names['W_dec']} must be matrices")
    if names is _LINEAR:
        weights |= {name: weights[name].t() for name in ("W_enc", "W_dec")}
    if threshold:
        weights["threshold"] = weights["threshold"].float().exp()
    weights = {name: value.float() for name, value in weights.items()}
    arch, k = _arch(cfg, weights, config_file)
    hook_in, hook_out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    transcoder = hook_out not in (None, hook_in) or weights["W_dec"].shape[1] != weights["W_enc"].shape[0]
    weights = _scaled_old(weights, norms, config_file) if old else _scaled(weights, cfg, norms, config_file)
    centred = cfg.get("apply_decoder_bias_to_pre_encoder") is True and cfg.get("use_decoder_bias") is not False
    if centred and transcoder:
        raise FormatError(f"{config_file}: a transcoder that takes its decoder's bias from the input is not readable")
    return assemble(
        file, weights, transcoder=transcoder, arch=arch, k=k,
        apply_b_dec_to_input=None if centred or transcoder else False, metadata=_metadata(cfg, transcoder),
    )  # fmt: skip


def _refuse(cfg: dict[str, Any], file: Path) -> None:
    if cfg.get("use_glu_encoder") is True:
        raise FormatError(f"{file}: an encoder with a gated linear unit is not readable")
    if cfg.get("sae_type", "sae") not in ("sae", "transcoder"):
        raise FormatError(f"{file}: sae_type is {cfg['sae_type']!r}; readable: sae, transcoder")
    if cfg.get("norm_activation", "dataset-wise") not in ("dataset-wise", "inference"):
        raise FormatError(
            f"{file}: norm_activation is {cfg['norm_activation']!r}, by the norm of each token or batch; readable: "
            "dataset-wise, inference"
        )


def _arch(cfg: dict[str, Any], weights: dict[str, Tensor], file: Path) -> tuple[str, int | None]:
    """Return architecture and k; where a selection weighs latents by their decoder rows, this is folded in place."""
    kind = str(cfg.get("act_fn", "jumprelu")).lower()
    weighed = cfg.get("sparsity_include_decoder_norm") is True
    if kind == "topk":
        if weighed:
            weights.update(fold_norms(weights))
        return "topk", cfg.get("top_k")
    if kind == "relu":
        return "relu", None
    if kind != "jumprelu":
        raise FormatError(
            f"{file}: act_fn is {cfg.get('act_fn')!r}; readable: relu, topk, jumprelu (the inference form)"
        )
    if "threshold" not in weights:
        value = cfg.get("jump_relu_threshold")
        if type(value) not in (int, float):
            raise FormatError(f"{file}: jump_relu_threshold is {value!r}, and the weights hold none")
        weights["threshold"] = torch.full(weights["b_enc"].shape, float(value or 0))
    if weighed and weights["threshold"].shape == weights["W_dec"].shape[:1]:
        weights["threshold"] = weights["threshold"] / weights["W_dec"].norm(dim=1).clamp_min(1e-8)
    return "jumprelu", None


def _factor(norms: dict[str, Any], place: str, width: int, file: Path) -> float:
    value = norms.get(place)
    if type(value) not in (int, float) or not (0 < float(value or 0) < math.inf):
        raise FormatError(f"{file}: {_NORM} of {place!r} is {value!r}; it is needed to undo the normalisation")
    return math.sqrt(width) / float(value or 1)


def _scaled_old(weights: dict[str, Tensor], norms: dict[str, Any], file: Path) -> dict[str, Tensor]:
    # jump_relu_threshold of hyperparams.json is in the data's units, the biases in those of the normalised input
    scale = _factor(norms, "in", weights["W_enc"].shape[0], file)
    moved = {"W_enc": weights["W_enc"] * scale, "W_dec": weights["W_dec"] / scale, "b_dec": weights["b_dec"] / scale}
    if "threshold" in weights:
        moved["threshold"] = weights["threshold"] * scale
    return weights | moved


def _scaled(weights: dict[str, Tensor], cfg: dict[str, Any], norms: dict[str, Any], file: Path) -> dict[str, Tensor]:
    if cfg.get("norm_activation", "dataset-wise") == "inference":
        return weights
    places = [str(cfg.get("hook_point_in")), str(cfg.get("hook_point_out") or cfg.get("hook_point_in"))]
    # a file holds them under the hook point, or under "in" and "out"
    inner = _factor(norms, places[0] if places[0] in norms else "in", weights["W_enc"].shape[0], file)
    outer = _factor(norms, places[1] if places[1] in norms else "out", weights["W_enc"].shape[0], file)
    return weights | {
        "W_enc": weights["W_enc"] * inner,
        "W_dec": weights["W_dec"] / outer,
        "b_dec": weights["b_dec"] / outer,
    }


def _metadata(cfg: dict[str, Any], transcoder: bool) -> dict[str, Any]:
    names = {"hook_point_in": "hook_name", "model_name": "model_name"}
    if transcoder:
        names["hook_point_out"] = "hook_name_out"
    return {new: cfg[old] for old, new in names.items() if isinstance(cfg.get(old), str)}
