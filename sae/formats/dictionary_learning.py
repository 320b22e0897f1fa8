"""dictionary_learning's folder: ae.pt, a table of tensors, and config.json. Layout read from its version 0.1.0."""

import io
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.archs.base import SAE
from sae.archs.gated import Gated
from sae.archs.relu import ReLU
from sae.archs.topk import TopK
from sae.formats.files import load_state, names_of
from sae.formats.weights import assemble, centring, parts, take
from sae.io import FormatError, atomic_write, read_json, write_json

__all__ = ["FILES", "detect", "load", "save"]

FILES = (("ae.pt", "config.json?"),)

_ENC = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_OWN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias"}
# class -> names, whether the matrices are transposed, whether the decoder's bias is taken from the input, architecture
_CLASSES: dict[str, tuple[dict[str, str], bool, bool, str]] = {
    "AutoEncoder": (_ENC | {"b_dec": "bias"}, True, True, "relu"),
    "AutoEncoderNew": (_ENC | {"b_dec": "decoder.bias"}, True, False, "relu"),
    "GatedAutoEncoder": (
        _GATED | {"b_enc": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}, True, True, "gated"
    ),
    "AutoEncoderTopK": (_ENC | {"b_dec": "b_dec"}, True, True, "topk"),
    "BatchTopKSAE": (_ENC | {"b_dec": "b_dec"}, True, True, "batchtopk"),
    "MatryoshkaBatchTopKSAE": (_OWN, False, True, "matryoshka"),
    "JumpReluAutoEncoder": (_OWN | {"threshold": "threshold"}, False, False, "jumprelu"),
}  # fmt: skip
_SPARE = ("k", "threshold", "group_sizes")


def detect(path: Path) -> bool:
    """Return whether a folder, or a .pt file, holds what dictionary_learning writes."""
    file = path / "ae.pt" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".pt":
        return False
    if _config_file(file) is not None:
        return True
    names = set(names_of(file))
    return any(
        set(known.values()) <= names <= {*known.values(), *_SPARE} and kind != "AutoEncoderNew"
        for kind, (known, _, _, _) in _CLASSES.items()
        if kind not in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE") or "threshold" in names
    )


def load(path: str | os.PathLike, *, dict_class: str | None = None) -> SAE:
    """Return the dictionary in a folder, or in a .pt file with config.json beside or above it.

    `dict_class` is needed where there is no config.json and the names of the tensors fit two classes
    (AutoEncoderTopK, BatchTopKSAE). Raises MissingError or FormatError; also for a BatchTopKSAE whose training ended
    before it had a threshold.
    """
    file = Path(path) / "ae.pt" if Path(path).is_dir() else Path(path)
    state = load_state(file)
    config = _config_file(file)
    trainer = _trainer(config) if config is not None else {}
    kind = dict_class or trainer.get("dict_class") or _guess(state, file)
    if kind not in _CLASSES:
        raise FormatError(f"{file}: dict_class is {kind!r}; known: {', '.join(_CLASSES)}")
    names, transposed, centred, arch = _CLASSES[kind]
    weights = take(state, names, file, spare=_SPARE)
    if transposed:
        for name in ("W_enc", "W_dec"):
            weights[name] = _matrix(weights[name], name, file).t()
    k: int | float | None = None
    if arch in ("topk", "batchtopk", "matryoshka"):
        k = _number(state.get("k"))
    if arch in ("batchtopk", "matryoshka"):
        cut = _number(state.get("threshold"))
        if cut is None or cut < 0:
            raise FormatError(
                f"{file}: threshold is {cut}: training ended before it was measured, and without it a {kind} depends "
                "on the other tokens of a batch"
            )
        weights["threshold"] = torch.full((_matrix(weights["W_enc"], "W_enc", file).shape[1],), float(cut))
    levels = _levels(state, file) if arch == "matryoshka" else ()
    return assemble(
        file, weights, arch=arch, k=k, levels=levels, apply_b_dec_to_input=None if centred else False,
        metadata=_metadata(trainer),
    )  # fmt: skip


def save(sae: SAE, path: str | os.PathLike) -> None:
    """Write ae.pt and config.json as dictionary_learning does, the class chosen by what the SAE computes.

    A batchtopk SAE whose latents have thresholds of their own (after whitening, say) or no whole k becomes a
    JumpReluAutoEncoder, whose b_dec is folded into b_enc, since it is not taken from the input there. Raises ValueError
    for transcoders, crosscoders, input normalisation and abstopk.
    """
    config = sae.config
    if config.transcoder or config.n_sites > 1 or config.input_norm != "none" or config.arch == "abstopk":
        raise ValueError(
            "dictionary_learning has autoencoders of one site with relu, gated, topk, batchtopk, matryoshka or "
            f"jumprelu latents; this one: {config.arch}, d_out {config.d_out}, {config.n_sites} site(s), input_norm "
            f"{config.input_norm!r}; format='native' takes it"
        )
    kind = _class_of(sae)
    names, transposed, centred, _ = _CLASSES[kind]
    held = centring(parts(sae), have=config.centred, want=centred)
    state: dict[str, Tensor] = {}
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        topk = kind == "AutoEncoderTopK"
        state["k"] = torch.tensor(int(config.k or 0), dtype=torch.int)
        state["threshold"] = torch.tensor(-1.0) if topk else held["threshold"][0].float().cpu().clone()
    if kind == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([b - a for a, b in zip((0, *config.levels), config.levels, strict=False)])
    for public, name in names.items():
        value = held[public].float().cpu()
        state[name] = (value.t() if transposed and value.ndim == 2 else value).contiguous().clone()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(folder / "ae.pt", buffer.getvalue())
    write_json(folder / "config.json", {"trainer": _trainer_table(sae, kind), "buffer": _buffer_table(sae)})


def _class_of(sae: SAE) -> str:
    config = sae.config
    if isinstance(sae, Gated):
        return "GatedAutoEncoder"
    if isinstance(sae, TopK):
        return "AutoEncoderTopK"
    if type(sae).gate is not SAE.gate:
        raise ValueError(f"dictionary_learning has no class for {config.arch}")
    cut = sae.threshold.detach()
    if isinstance(sae, ReLU) and not bool(cut.any()):
        return "AutoEncoder" if config.centred else "AutoEncoderNew"
    batch = {"batchtopk": "BatchTopKSAE", "matryoshka": "MatryoshkaBatchTopKSAE"}.get(config.arch)
    whole = config.k is not None and config.k == int(config.k)
    return batch if batch and whole and bool((cut == cut[0]).all()) else "JumpReluAutoEncoder"


def _trainer_table(sae: SAE, kind: str) -> dict[str, Any]:
    config = sae.config
    layer = re.search(r"(?:blocks|layers|h|layer|resid_post)[._](\d+)", str(config.metadata.get("hook_name", "")))
    return {
        "dict_class": kind,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "k": int(config.k) if config.k is not None and config.k == int(config.k) else config.k,
        "layer": int(layer[1]) if layer else None,
        "lm_name": config.metadata.get("model_name"),
        "submodule_name": config.metadata.get("hook_name"),
    }


def _buffer_table(sae: SAE) -> dict[str, Any]:
    return {"d_submodule": sae.d_in, "io": "out", "ctx_len": sae.config.metadata.get("context_size")}


def _config_file(file: Path) -> Path | None:
    """Return config.json beside a file, or above the folder of checkpoints that it lies in."""
    near = [file.parent / "config.json"]
    if file.parent.name == "checkpoints":
        near.append(file.parent.parent / "config.json")
    for candidate in near:
        if candidate.is_file():
            table = read_json(candidate)
            if isinstance(table, dict) and isinstance(table.get("trainer"), dict):
                return candidate
    return None


def _trainer(config: Path) -> dict[str, Any]:
    return read_json(config)["trainer"]


def _guess(state: dict[str, Any], file: Path) -> str:
    names = set(state)
    known = {kind: set(held.values()) for kind, (held, *_) in _CLASSES.items()}
    fits = [kind for kind, held in known.items() if held <= names <= {*held, *_SPARE}]
    if "MatryoshkaBatchTopKSAE" in fits and "group_sizes" not in names:
        fits.remove("MatryoshkaBatchTopKSAE")
    if "JumpReluAutoEncoder" in fits and "group_sizes" in names:
        fits.remove("JumpReluAutoEncoder")
    if len(fits) != 1:
        between = " or ".join(fits) or ", ".join(_CLASSES)
        raise FormatError(f"{file} has no config.json beside it: say what it is, dict_class={between}")
    return fits[0]


def _metadata(trainer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    name, layer, place = trainer.get("lm_name"), trainer.get("layer"), trainer.get("submodule_name")
    if isinstance(name, str):
        found["model_name"] = name
    if isinstance(place, str) and not place.startswith("resid_post"):
        found["hook_name"] = place
    elif type(layer) is int:
        found["hook_name"] = f"blocks.{layer}.hook_resid_post"  # what its own buffers read by default
    return found


def _matrix(value: Any, name: str, file: Path) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise FormatError(f"{file}: {name} is not a matrix")
    return value


def _number(value: Any) -> int | float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _levels(state: dict[str, Any], file: Path) -> tuple[int, ...]:
    sizes = state.get("group_sizes")
    if not isinstance(sizes, Tensor) or sizes.ndim != 1 or sizes.is_floating_point() or sizes.is_complex():
        raise FormatError(f"{file}: group_sizes is absent or no list of whole numbers")
    return tuple(int(n) for n in sizes.cumsum(0))
