"""Every way to get a Model: the bundled one, a folder, a hub id, a Hugging Face model, a TransformerBridge."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.model import pretrained
from interp.model.core import NO_LIMIT, Model
from interp.model.fingerprint import fingerprint
from interp.model.forward import kept_rng

__all__ = ["NO_LIMIT", "Model", "as_model", "load_model", "untrained"]


def load_model(
    source: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "auto",
    backend: str = "native",
    tokenizer: Any = None,
    blocks: str | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> Model:
    """Return a Model from "tiny" (bundled), a local folder, a hub id, a Hugging Face model or a TransformerBridge.

    Causal language models, encoders, and encoder-decoders, with a head or without, as the checkpoint says.
    `dtype`: the checkpoint's own unless given ("tiny": float32). `device` "auto": the GPU if there is one. `device_map`
    goes to from_pretrained, which then places the parts of the model; activations are read where each block lies. An
    object in memory, dispatched or quantised too, stays as and where it is. `backend` "transformer_lens" runs a
    TransformerBridge of the model (of a deep copy of one in memory). `blocks`: the path of the block list where it is
    not found by itself.
    Raises MissingError where model or tokenizer, or the TransformerLens that was asked for, is not there, AnatomyError
    where the blocks are not found or do not carry the model's hidden states, ValueError for an unknown backend, a
    device beside a device_map, or a dtype or device that an object in memory does not have.
    """
    if backend not in ("native", "transformer_lens"):
        raise ValueError(f"backend is {backend!r}; it must be 'native' or 'transformer_lens'")
    if isinstance(source, Model):
        return source
    if backend == "transformer_lens":
        pretrained.need_bridges()
    if isinstance(source, (str, os.PathLike)):
        hf, name = pretrained.load(os.fspath(source), dtype, device, trust_remote_code, device_map)
        tokenizer = pretrained.load_tokenizer(name if tokenizer is None else tokenizer, trust_remote_code)
        label = "tiny" if os.fspath(source) == "tiny" else Path(name).name if Path(name).is_dir() else name
        if backend == "transformer_lens":
            return _bridged(hf, tokenizer, label)
        return Model(hf, tokenizer, name=label, blocks=blocks)
    if device_map is not None:
        raise ValueError("device_map places what is loaded; a model in memory stays where it is: dispatch it before")
    if hasattr(source, "original_model") and hasattr(source, "hook_dict"):
        pretrained.need_bridges()
        pretrained.check_placement(source.original_model, dtype, device)
        tokenizer = source.tokenizer if tokenizer is None else tokenizer
        return Model(source.original_model, tokenizer, name=type(source.original_model).__name__, bridge=source)
    if not isinstance(source, nn.Module):
        raise TypeError(f"source is a {type(source).__name__}; give 'tiny', a folder, a hub id or a model")
    pretrained.check_placement(source, dtype, device)
    label = Path(getattr(source, "name_or_path", "") or type(source).__name__).name
    if backend == "native":
        return Model(source, tokenizer, name=label, blocks=blocks)
    return _bridged(copy.deepcopy(source), tokenizer, label)


def _bridged(hf: nn.Module, tokenizer: Any, label: str) -> Model:
    """Return the Model on a TransformerBridge of `hf`, which is ours to change."""
    digest = fingerprint(hf)  # before the bridge renames the weights: both backends name a model alike
    bridge = pretrained.make_bridge(hf, tokenizer, label)
    model = Model(bridge.original_model, tokenizer, name=label, bridge=bridge)
    model._fingerprint = digest
    return model


def as_model(model: Any) -> Model:
    """Return a Model for what may be one already, a Hugging Face model or a TransformerBridge."""
    return model if isinstance(model, Model) else load_model(model)


def untrained(model: Any, seed: int = 0) -> Model:
    """Return the architecture of a model with fresh weights and the same tokenizer: the null of what training taught.

    On the CPU in float32; the seed decides the weights, and the random state is left as it was.
    """
    model = as_model(model)
    with kept_rng(torch.device("cpu")):
        torch.manual_seed(seed)
        hf = type(model.hf)._from_config(copy.deepcopy(model.hf.config), dtype=torch.float32).eval()
    return load_model(hf, tokenizer=model.tokenizer, blocks=model.blocks_path)
