"""The table of hook points of one model: from its anatomy, or from a TransformerBridge's own HookPoints."""

from typing import Any

import torch
from torch import Tensor, nn

from interp.model.anatomy import Anatomy, Part, Probe, eval_mode, kept_rng, probe_ids, sums_to
from interp.model.hooks import BLOCK_KINDS, EMBED, FINAL_NORM, HookPoint, Place


def _place(name: str, kind: str, layer: int | None, d: int, part: Part, after: Place | None = None) -> Place:
    return Place(HookPoint(name, kind, layer, d), part.module, part.side, after)


def native_places(hf: nn.Module, parts: Anatomy) -> tuple[dict[str, Place], dict[str, str]]:
    """Return {canonical name: place} in the order of the forward, and further accepted names.

    attn_out, mlp_out and resid_mid are listed only where the anatomy established them.
    """
    d = parts.d_model
    embed: Any = hf.get_input_embeddings()  # type: ignore[operator]
    places = {EMBED: _place(EMBED, "embed", None, int(embed.weight.shape[1]), parts.embed)}
    aliases: dict[str, str] = {}
    for i, block in enumerate(parts.blocks):
        path = f"{parts.blocks_path}.{i}"
        post = _place(f"blocks.{i}.hook_resid_post", "resid_post", i, d, Part(block, "output", path))
        found = {
            "resid_pre": Part(block, "input", path),
            "attn_out": parts.attn[i],
            "resid_mid": parts.mid[i],
            "mlp_out": parts.mlp[i],
        }
        for kind, part in found.items():
            if part is None:
                continue
            name = f"blocks.{i}.hook_{kind}"
            places[name] = _place(name, kind, i, d, part, post if kind == "resid_mid" else None)
            aliases.update(dict.fromkeys(_bridge_names(i, kind, part, path), name))
        places[post.point.name] = post
    if parts.final_norm is not None:
        places[FINAL_NORM] = _place(FINAL_NORM, "final_norm", None, d, parts.final_norm)
    return places, aliases


def _bridge_names(layer: int, kind: str, part: Part, path: str) -> list[str]:
    """Return the bridge's canonical names for an established part of block `layer`.

    They name modules: `attn.hook_out` is the added tensor only where no post-norm stands behind and the residual is
    not added inside.
    """
    stem = {"attn_out": ("attn", "ln1_post", "attn.o"), "mlp_out": ("mlp", "ln2_post", "mlp.out")}.get(kind)
    if kind == "resid_mid":
        return [f"blocks.{layer}.ln2.hook_in"] if "norm" in type(part.module).__name__.lower() else []
    if stem is None:
        return []
    inner = part.path[len(path) + 1 :]
    if "norm" in inner:
        return [f"blocks.{layer}.{stem[1]}.hook_out"]
    if "." in inner:  # the inner linear of a module that adds the residual itself
        return [f"blocks.{layer}.{stem[2]}.hook_out"]
    return [f"blocks.{layer}.{stem[0]}.hook_out"] + ([f"blocks.{layer}.mlp.out.hook_out"] if inner == "fc2" else [])


def bridge_places(bridge: Any, n_layers: int) -> tuple[dict[str, Place], dict[str, str]]:
    """Return the same table for a TransformerBridge; every place is the output of one of its HookPoints.

    attn_out, mlp_out and resid_mid are listed only where one small forward shows that they sum to the stream.
    """
    hooks: dict[str, nn.Module] = dict(bridge.hook_dict)
    order = [EMBED, *(f"blocks.{i}.hook_{k}" for i in range(n_layers) for k in BLOCK_KINDS), FINAL_NORM]
    seen = Probe({name: hooks[name] for name in order if name in hooks})
    hf = bridge.original_model
    ids = probe_ids(hf)
    with torch.no_grad(), kept_rng(ids.device), eval_mode(hf):
        seen.run(lambda: hf(input_ids=ids, use_cache=False))
    kept = [n for n in order if isinstance(seen.outputs.get(n), Tensor) and _sound(n, seen.outputs)]
    places: dict[str, Place] = {}
    for name in kept:
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        kind = name.rpartition("hook_")[2] if layer is not None else {EMBED: "embed", FINAL_NORM: "final_norm"}[name]
        point = HookPoint(name, kind, layer, int(seen.outputs[name].shape[-1]))
        places[name] = Place(point, hooks[name], "output")
    for name, place in places.items():
        if place.point.kind == "resid_mid":
            post = places[f"blocks.{place.point.layer}.hook_resid_post"]
            places[name] = Place(place.point, place.module, "output", post)
    by_module = {id(place.module): name for name, place in places.items()}
    return places, {n: by_module[id(m)] for n, m in hooks.items() if id(m) in by_module}


def _sound(name: str, values: dict[str, Any]) -> bool:
    """Whether a bridge's attn_out, mlp_out or resid_mid is what its name says."""
    stem, _, kind = name.rpartition(".hook_")
    if kind not in ("attn_out", "mlp_out", "resid_mid"):
        return True
    pre, attn, mid, mlp, post = (
        values.get(f"{stem}.hook_{k}") for k in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    if pre is None or post is None or attn is None:
        return False
    if kind == "resid_mid":
        return mid is not None and sums_to(mid, pre, attn)
    return mlp is not None and sums_to(post, pre, attn, mlp)


def module_place(hf: nn.Module, name: str, module: nn.Module, layer: int | None) -> Place | str:
    """Return the place "output of this module", or why there is none (found out by one small forward)."""
    seen = Probe({name: module})
    ids = probe_ids(hf)
    with torch.no_grad(), kept_rng(ids.device), eval_mode(hf):
        seen.run(lambda: hf(input_ids=ids))
    value = seen.outputs.get(name)
    if not isinstance(value, Tensor):
        return "it does not run in a forward" if name not in seen.outputs else "its output is no tensor"
    rows, width = ids.shape
    if tuple(value.shape[:-1]) not in ((rows, width), (rows * width,)):
        return f"its output {tuple(value.shape)} for {rows} x {width} tokens is not [batch, position, width]"
    return Place(HookPoint(name, "module", layer, int(value.shape[-1])), module, "output")
