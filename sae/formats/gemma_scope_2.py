"""Gemma Scope 2: params.safetensors with lower-case names and config.json; transcoders may have an affine bypass."""

import os
import re
from pathlib import Path
from typing import Any

from sae.archs.base import SAE
from sae.extras import MissingError
from sae.formats.files import load_state, names_of
from sae.formats.weights import assemble, take
from sae.io import FormatError, read_json

__all__ = ["FILES", "detect", "load"]

FILES = (("params.safetensors", "config.json?"),)

_NAMES = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
_SKIP = "affine_skip_connection"


def detect(path: Path) -> bool:
    """Return whether a folder holds params.safetensors, or a safetensors file has these names."""
    file = path / "params.safetensors" if path.is_dir() else path
    return file.suffix == ".safetensors" and file.is_file() and {"w_enc", "w_dec"} <= set(names_of(file))


def load(path: str | os.PathLike, *, transcoder: bool | None = None) -> SAE:
    """Return the SAE or transcoder of a params.safetensors.

    It is a transcoder where the path or config.json says so, or as `transcoder` says. Raises MissingError, or
    FormatError; also for a cross-layer transcoder, whose latents write to many layers.
    """
    file = Path(path) / "params.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise MissingError(f"there is no file {file}")
    state = load_state(file)
    if "w_dec" in state and state["w_dec"].ndim == 3:
        raise FormatError(f"{file} is of a cross-layer transcoder, whose latents write to many layers: not readable")
    skip = _SKIP in state
    weights = take(state, _NAMES | ({"W_skip": _SKIP} if skip else {}), file)
    if skip:
        if weights["W_skip"].ndim != 2:
            raise FormatError(f"{file}: {_SKIP} has shape {tuple(weights['W_skip'].shape)}")
        weights["W_skip"] = weights["W_skip"].t()
    config = file.parent / "config.json"
    table = read_json(config) if config.is_file() else {}
    if not isinstance(table, dict) or table.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(f"{config}: architecture must be 'jump_relu'")
    where = file.absolute().as_posix()
    if transcoder is None:
        transcoder = skip or "transcoder" in where or table.get("hf_hook_point_out") not in (None, _in(table))
    return assemble(
        file, weights, transcoder=transcoder, arch="jumprelu",
        apply_b_dec_to_input=None if transcoder else False, metadata=_metadata(table, where, transcoder),
    )  # fmt: skip


def _in(table: dict[str, Any]) -> Any:
    return table.get("hf_hook_point_in")


def _metadata(table: dict[str, Any], where: str, transcoder: bool) -> dict[str, Any]:
    names = {"model_name": "model_name", "hf_hook_point_in": "hf_hook_name", "hf_hook_point_out": "hf_hook_name_out"}
    found = {new: table[old] for old, new in names.items() if isinstance(table.get(old), str)}
    layer = re.search(r"layer_(\d+)", where)
    if layer is None:
        return found
    block = f"blocks.{layer[1]}"
    if transcoder:
        return found | {"hook_name": f"{block}.hook_mlp_in", "hook_name_out": f"{block}.hook_mlp_out"}
    sites = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    named = [f"{block}.{hook}" for word, hook in sites.items() if f"/{word}" in where]
    return found | ({"hook_name": named[0]} if named else {})
