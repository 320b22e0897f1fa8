"""Our own format: SAELens's two files, and in their metadata, under "interp", the whole configuration.

SAELens loads what it has a class for (a crosscoder as an SAE of flattened sites) and keeps the metadata. For the rest
(a transcoder with topk or gated latents) the name of the architecture is one that SAELens refuses.
"""

import json
import os
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sae.archs.base import SAE
from sae.config import SAEConfig
from sae.formats import saelens
from sae.formats.weights import assemble, take
from sae.io import MAX_JSON_BYTES, FormatError, load_tensors, read_json

__all__ = ["FILES", "detect", "load", "save"]

FILES = (("cfg.json", "sae_weights.safetensors"),)

_NAMES = [field.name for field in fields(SAEConfig) if field.name != "metadata"]
_NUMBER = (int, float, type(None))
_TYPES = {"arch": (str,), "d_in": (int,), "d_sae": (int,), "k": _NUMBER, "d_out": (int, type(None)), "skip": (bool,)}
_TYPES |= {"n_sites": (int,), "levels": (list,), "apply_b_dec_to_input": (bool, type(None)), "input_norm": (str,)}


def detect(path: Path) -> bool:
    """Return whether a folder was saved by this project."""
    cfg = read_json(path / "cfg.json") if (path / "cfg.json").is_file() else None
    metadata = cfg.get("metadata") if isinstance(cfg, dict) else None
    return isinstance(metadata, dict) and "interp" in metadata


def save(sae: SAE, path: str | os.PathLike) -> None:
    """Write cfg.json and sae_weights.safetensors into a folder, which is made; a training scale is folded."""
    reserved = {"interp", "sae_lens_version", "training_architecture"} & set(sae.config.metadata)
    if reserved:
        raise ValueError(f"metadata {', '.join(sorted(reserved))} is written by save_sae itself; use another name")
    try:
        text = json.dumps(sae.config.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata cannot be written as JSON: {error}") from error
    if len(text) > MAX_JSON_BYTES // 2:
        raise ValueError(f"metadata has {len(text):,} characters; at most {MAX_JSON_BYTES // 2:,} are saved")
    try:
        own = version("interp")
    except PackageNotFoundError:  # run from a checkout that was never installed
        own = None
    config = {name: getattr(sae.config, name) for name in _NAMES} | {"levels": list(sae.config.levels)}
    saelens.write(sae, path, {"interp": {"version": own, "config": config}})


def load(path: str | os.PathLike) -> SAE:
    """Return the SAE in a folder. Raises MissingError or FormatError."""
    folder, file = Path(path), Path(path) / "cfg.json"
    cfg = read_json(file)
    try:
        table, metadata = cfg["metadata"]["interp"]["config"], dict(cfg["metadata"])
    except (TypeError, KeyError) as error:
        raise FormatError(f"{file} lacks metadata.interp.config") from error
    config = _config(table, file)
    weights_file = folder / "sae_weights.safetensors"
    tensors, core = load_tensors(weights_file)
    for key, value in core.items():
        given = metadata.get(key) if key == "interp" else cfg.get(key)
        if given != value:
            raise FormatError(f"{weights_file} was saved with {key} = {value!r}, cfg.json says {given!r}: not one save")
    for name in ("interp", "sae_lens_version", "training_architecture"):
        metadata.pop(name, None)
    if not core:  # saved again by SAELens, which adds this one
        metadata.pop("sae_lens_training_version", None)
    if cfg.get("reshape_activations", "none") != "none":
        metadata["reshape_activations"] = cfg["reshape_activations"]
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if "b_gate" in tensors:
        names |= {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
    names |= {name: name for name in ("threshold", "W_skip") if name in tensors}
    transcoder = config.pop("d_out") is not None
    skip = config.pop("skip")
    if skip != ("W_skip" in tensors):
        raise FormatError(f"{weights_file}: W_skip is {'absent' if skip else 'there'}, cfg.json says skip = {skip}")
    sizes = {name: config.pop(name) for name in ("d_in", "d_sae")}
    sae = assemble(weights_file, take(tensors, names, weights_file), transcoder=transcoder, metadata=metadata, **config)
    kind, _ = saelens.architecture(sae)
    told = {"d_in": sae.d_in, "d_sae": sae.d_sae, "d_out": sae.config.d_out, "architecture": kind}
    for name, value in told.items():
        given = sizes.get(name, table["d_out"] if name == "d_out" else cfg.get(name))
        if given != value or (name in sizes and cfg.get(name) != value):
            raise FormatError(f"{file}: {name} is {given!r}; the weights are of {value!r}")
    return sae


def _config(table: Any, file: Path) -> dict[str, Any]:
    """Return the fields of SAEConfig from JSON, their types checked."""
    from sae.archs import ARCHS

    if not isinstance(table, dict) or set(table) != set(_TYPES):
        raise FormatError(f"{file}: metadata.interp.config must have exactly: {', '.join(_TYPES)}")
    for name, types in _TYPES.items():
        if type(table[name]) not in types:
            raise FormatError(f"{file}: {name} is {table[name]!r}, of a type that it never has")
    if table["arch"] not in ARCHS:
        raise FormatError(f"{file}: arch is {table['arch']!r}; known: {', '.join(ARCHS)}")
    if not all(type(n) is int for n in table["levels"]):
        raise FormatError(f"{file}: levels are {table['levels']!r}; wanted: whole numbers")
    return dict(table) | {"levels": tuple(table["levels"])}
