"""SAELens's folder: cfg.json and sae_weights.safetensors. Layout read from sae_lens 6.54.12.

Read: the inference architectures, the training checkpoints of version 6 (what is still to be folded is folded), and
the configurations from before 6.0. Written: the inference form, and only what SAELens has a class for.
"""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.archs.base import SAE
from sae.archs.gated import Gated
from sae.archs.relu import ReLU
from sae.archs.topk import TopK
from sae.formats.weights import assemble, fold_norms, fold_scale, fold_whitening, parts, take
from sae.io import FormatError, load_tensors, read_json, save_tensors, write_json

__all__ = ["FILES", "VERSION", "architecture", "detect", "load", "save", "write"]

FILES = (("cfg.json", "sae_weights.safetensors", "activation_scaler.json?", "activation_whitening.safetensors?"),)

# Without a version of at least 6.0.0, SAELens takes its old path and drops model and hook names in silence.
VERSION = "6.54.12"

_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_KEYS = {
    "standard": _PLAIN,
    "topk": _PLAIN,
    "abstopk": _PLAIN,
    "jumprelu": (*_PLAIN, "threshold"),
    "gated": ("W_enc", "b_gate", "W_dec", "b_dec", "r_mag", "b_mag"),
    "transcoder": _PLAIN,
    "skip_transcoder": (*_PLAIN, "W_skip"),
    "jumprelu_transcoder": (*_PLAIN, "threshold"),
    "jumprelu_skip_transcoder": (*_PLAIN, "threshold", "W_skip"),
    "batchtopk": (*_PLAIN, "topk_threshold"),
    "matryoshka_batchtopk": (*_PLAIN, "topk_threshold"),
}
_ARCHS = {"standard": "relu", "transcoder": "relu", "skip_transcoder": "relu", "gated": "gated", "topk": "topk"}
_ARCHS |= {"abstopk": "abstopk"}  # every other: a threshold, see _threshold_arch
_TRAINED = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}  # our names in SAELens's words
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_OLD_METADATA = (
    "model_name", "hook_name", "hook_head_index", "hook_layer", "context_size", "prepend_bos", "seqpos_slice",
    "dataset_path", "neuronpedia_id", "model_from_pretrained_kwargs", "sae_lens_training_version", "model_class_name",
    "exclude_special_tokens", "hook_name_out", "hook_head_index_out", "hf_hook_name", "hf_hook_name_out",
)  # fmt: skip


def detect(path: Path) -> bool:
    """Return whether a folder holds what SAELens writes."""
    cfg = read_json(path / "cfg.json") if (path / "cfg.json").is_file() else None
    known = ("architecture", "metadata", "d_sae", "hook_point", "activation_fn_str")
    return isinstance(cfg, dict) and "num_latents" not in cfg and any(key in cfg for key in known)


def load(path: str | os.PathLike, *, scale: float | int | None = None) -> SAE:
    """Return the SAE in a folder of SAELens.

    `scale` is what activations were multiplied with while it was trained, needed for a checkpoint with normalised
    activations that has no activation_scaler.json beside it. The name of the hook point and the rest of SAELens's
    metadata are kept; activations of hook_z are read flat, [tok, n_heads * d_head]. Raises MissingError or FormatError.
    """
    folder, file = Path(path), Path(path) / "cfg.json"
    cfg = _modern(read_json(file), file)
    kind = cfg["architecture"]
    if kind in ("matching_pursuit", "temporal"):
        raise FormatError(f"{file}: a {kind} SAE encodes by a procedure of its own and cannot be read as an SAE here")
    if kind not in _KEYS:
        raise FormatError(f"{file}: architecture is {kind!r}; known: {', '.join(_KEYS)}")
    weights_file = folder / "sae_weights.safetensors"
    tensors, core = load_tensors(weights_file)
    if core.get("interp") != cfg["metadata"].get("interp"):
        raise FormatError(f"{weights_file} was saved by this project beside another cfg.json: not one save")
    weights = _weights(tensors, kind, weights_file)
    rescaled = _flag(cfg, "rescale_acts_by_decoder_norm", False, file) and "topk" in kind
    transcoder = "transcoder" in kind
    centred = not transcoder and _flag(cfg, "apply_b_dec_to_input", True, file)
    if rescaled:
        weights = fold_norms(weights)
    norm = cfg.get("normalize_activations") or "none"
    if norm not in ("none", "layer_norm"):
        weights = _unnormalised(weights, norm, folder, scale, keep_norms=rescaled, centred=centred)
    arch, k, levels = _training(cfg, kind, weights["W_dec"].shape[0])
    return assemble(
        weights_file, weights, transcoder=transcoder, arch=arch, k=k, levels=levels,
        apply_b_dec_to_input=None if centred is not transcoder else centred,
        input_norm="layer_norm" if norm == "layer_norm" else "none", metadata=_kept(cfg),
    )  # fmt: skip


def save(sae: SAE, path: str | os.PathLike) -> None:
    """Write what SAELens loads as it is; raises ValueError where SAELens has no class for this SAE."""
    from sae.formats import native

    name, known = architecture(sae)
    if not known:
        what = f"a crosscoder of {sae.config.n_sites} sites" if sae.config.n_sites > 1 else f"a {name}"
        raise ValueError(
            f"SAELens has no class for {what}; save_sae(sae, path) writes the same two files in our own extension, "
            "which load_sae reads"
        )
    native.save(sae, path)


def architecture(sae: SAE) -> tuple[str, bool]:
    """Return the architecture's name in cfg.json, and whether SAELens knows it as what it is."""
    if isinstance(sae, Gated):
        base = "gated"
    elif isinstance(sae, TopK):
        base = "abstopk" if sae.config.arch == "abstopk" else "topk"
    elif type(sae).gate is not SAE.gate:
        raise ValueError(f"the inference form of {sae.config.arch} has no name in a file; known: {', '.join(_KEYS)}")
    else:
        base = "standard" if isinstance(sae, ReLU) and not bool(sae.threshold.any()) else "jumprelu"
    if not sae.config.transcoder:
        return base, sae.config.n_sites == 1
    form = "skip_transcoder" if sae.config.skip else "transcoder"
    return form if base == "standard" else f"{base}_{form}", base in ("standard", "jumprelu")


def write(sae: SAE, path: str | os.PathLike, own: dict[str, Any]) -> None:
    """Write the two files; `own` goes into the metadata of both."""
    kind, _ = architecture(sae)
    held = parts(sae)
    base = kind.removesuffix("_transcoder").removesuffix("_skip")
    keys = (*_KEYS[base if base in _KEYS else "standard"], *(["W_skip"] if "W_skip" in held else []))
    held["b_gate"] = held["b_enc"]
    config = sae.config
    metadata = {key: value for key, value in config.metadata.items() if key != "reshape_activations"}
    cfg = {
        "architecture": kind,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.centred,
        "normalize_activations": config.input_norm,
        "reshape_activations": config.metadata.get("reshape_activations", "none"),
        "metadata": {
            **metadata,
            "sae_lens_version": VERSION,
            "training_architecture": _TRAINED.get(config.arch, config.arch),
            **own,
        },
    }
    if config.d_out is not None:
        cfg["d_out"] = config.d_out
    if base in ("topk", "abstopk"):
        cfg |= {"k": int(config.k or 0), "rescale_acts_by_decoder_norm": False}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # cfg.json last, and its core in the weights too: a folder half overwritten is recognised as such
    core = {key: value for key, value in cfg.items() if key != "metadata"}
    save_tensors(folder / "sae_weights.safetensors", {key: held[key].float() for key in keys}, core | own)
    write_json(folder / "cfg.json", cfg)


def _modern(cfg: Any, file: Path) -> dict[str, Any]:
    """Return a configuration with everything where version 6 has it."""
    if not isinstance(cfg, dict):
        raise FormatError(f"{file} is not the configuration of an SAE")
    metadata = cfg.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise FormatError(f"{file}: metadata is a {type(metadata).__name__}; wanted: a table")
    version = cfg.get("sae_lens_version") or (metadata or {}).get("sae_lens_version")
    if isinstance(version, str) and version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6:
        return {"architecture": "standard", **cfg, "metadata": metadata or {}}
    cfg = {_OLD_NAMES.get(key, key): value for key, value in cfg.items()}
    if cfg.get("activation_fn") == "topk":
        options = cfg.get("activation_fn_kwargs")
        cfg |= {"architecture": "topk", "k": options.get("k") if isinstance(options, dict) else None}
    elif cfg.get("activation_fn", "relu") != "relu":
        raise FormatError(f"{file}: activation_fn is {cfg['activation_fn']!r}; known: relu, topk")
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    if "hook_z" in str(cfg.get("hook_name")):
        cfg.setdefault("reshape_activations", "hook_z")
    cfg.setdefault("architecture", "standard")
    found = {key: cfg[key] for key in _OLD_METADATA if cfg.get(key) is not None}
    return cfg | {"metadata": (metadata or {}) | found}


def _weights(tensors: dict[str, Tensor], kind: str, file: Path) -> dict[str, Tensor]:
    gain = tensors.pop("scaling_factor", None)  # of a fine-tuning that is long gone: applied before decoding
    if kind == "jumprelu" and "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    found = take(tensors, {key: key for key in _KEYS[kind]}, file)
    if "b_gate" in found:
        found["b_enc"] = found.pop("b_gate")
    if "topk_threshold" in found:
        value = found.pop("topk_threshold")
        if value.numel() != 1:
            raise FormatError(f"{file}: topk_threshold has shape {tuple(value.shape)}; wanted: one number")
        found["threshold"] = value.float().reshape(()).expand(found["b_enc"].shape)
    if found["W_dec"].ndim != 2 or found["W_enc"].ndim != 2 or found["W_dec"].shape[0] != found["W_enc"].shape[1]:
        raise FormatError(f"{file}: W_enc {tuple(found['W_enc'].shape)} does not fit {tuple(found['W_dec'].shape)}")
    if gain is not None and not bool((gain == 1).all()):
        if gain.shape != found["b_enc"].shape:
            raise FormatError(f"{file}: scaling_factor has shape {tuple(gain.shape)}")
        found["W_dec"] = found["W_dec"].float() * gain.float()[:, None]
    return found


def _unnormalised(
    weights: dict[str, Tensor], norm: str, folder: Path, scale: float | int | None, *, keep_norms: bool, centred: bool
) -> dict[str, Tensor]:
    """Return weights that read plain activations."""
    if norm == "covariance_whitening":
        file = folder / "activation_whitening.safetensors"
        found = take(load_tensors(file)[0], {name: name for name in ("mean", "matrix", "inverse_matrix")}, file)
        wide = weights["W_enc"].shape[0]
        shapes = [tuple(value.shape) for value in found.values()]
        if shapes != [(wide,), (wide, wide), (wide, wide)] or weights["W_dec"].shape[1] != wide:
            raise FormatError(f"{file}: shapes {shapes} do not fit activations of width {wide}")
        return fold_whitening(weights, found["mean"], found["matrix"], found["inverse_matrix"], centred=centred)
    if norm != "expected_average_only_in":
        raise FormatError(
            f"{folder / 'cfg.json'}: normalize_activations is {norm!r}, which depends on each token's norm and is not "
            "readable; readable: none, layer_norm, expected_average_only_in, covariance_whitening"
        )
    scaler = folder / "activation_scaler.json"
    if scale is None and scaler.is_file():
        table = read_json(scaler)
        scale = table.get("scaling_factor") if isinstance(table, dict) else None
    if type(scale) not in (int, float) or not 0 < float(scale or 0) < float("inf"):
        raise FormatError(
            f"{folder / 'cfg.json'}: activations were scaled while it was trained (expected_average_only_in) and the "
            "factor is not in the folder; give it: load_sae(path, scale=...), sqrt(d_in) / mean norm of the activations"
        )
    return fold_scale(weights, float(scale or 1), keep_norms=keep_norms)


def _training(cfg: dict[str, Any], kind: str, d_sae: int) -> tuple[str, Any, tuple[int, ...]]:
    """Return architecture, k and levels."""
    if kind in _ARCHS:
        return _ARCHS[kind], cfg.get("k") if "topk" in kind else None, ()
    metadata = cfg["metadata"]
    details = metadata.get("training_architecture_details")
    details = cfg | details if isinstance(details, dict) else cfg
    trained = metadata.get("training_architecture") if "jumprelu" in kind else kind
    k = details.get("k", metadata.get("k"))
    k = k if type(k) in (int, float) and 0 < k <= d_sae else None
    if trained == "batchtopk":
        return "batchtopk", k, ()
    if trained in ("matryoshka_batchtopk", "matryoshka"):
        levels = details.get("matryoshka_widths")
        if isinstance(levels, list) and all(type(n) is int for n in levels):
            levels = (*(n for n in levels if n < d_sae), d_sae)
            if all(0 < a < b for a, b in pairwise(levels)):
                return "matryoshka", k, levels
        return "batchtopk", k, ()  # of unknown levels: only training needs them
    return "jumprelu", k, ()


def _kept(cfg: dict[str, Any]) -> dict[str, Any]:
    ours = ("sae_lens_version", "training_architecture", "k", "interp_version", "interp")
    metadata = {key: value for key, value in cfg["metadata"].items() if key not in ours}
    reshape = cfg.get("reshape_activations", "none")
    return metadata if reshape == "none" else metadata | {"reshape_activations": reshape}


def _flag(cfg: dict[str, Any], key: str, default: bool, file: Path) -> bool:
    value = cfg.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{file}: {key} is {value!r}; wanted: true or false")
    return value
