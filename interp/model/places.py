"""The table of hook points of one model, by one small protocol: from its anatomy, or from a bridge's own HookPoints."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from interp.model.anatomy import BLOCKS, DECODER, ENCODER, Anatomy, Stack
from interp.model.clock import quiet
from interp.model.forward import Probe, embedding, eval_mode, kept_rng, probe_call, sums_to
from interp.model.hooks import BLOCK_KINDS, EMBED, FINAL_NORM, HookPoint, HookPointError, Place
from interp.model.parts import Part

if TYPE_CHECKING:
    from interp.model.core import Model

SIDES = {BLOCKS: "", ENCODER: "encoder_", DECODER: "decoder_"}


class Source(Protocol):
    """Where a Model's hook points come from: all that the two backends differ in."""

    name: str

    def places(self) -> tuple[dict[str, Place], dict[str, str]]:
        """Return {canonical name: place} in the order of the forward, and further accepted names."""
        ...

    def find(self, path: str) -> nn.Module | None:
        """Return the module at a raw path."""
        ...


class Native:
    """Hook points on the modules that the anatomy found."""

    name = "native"

    def __init__(self, hf: nn.Module, anatomy: Anatomy):
        self.hf, self.anatomy = hf, anatomy

    def places(self) -> tuple[dict[str, Place], dict[str, str]]:
        """Return the table; attn_out, mlp_out and resid_mid are listed only where the anatomy established them."""
        places: dict[str, Place] = {}
        aliases: dict[str, str] = {}
        if (part := self.anatomy.embed) is not None:
            width = int(embedding(self.hf).weight.shape[1])
            point = HookPoint(EMBED, "embed", None, width, f"token embeddings as the stream gets them ({part.path})")
            places[EMBED] = Place(point, part.module, part.side, stack=self.anatomy.main.prefix)
        for stack in self.anatomy.stacks:
            for i in range(len(stack.blocks)):
                for kind, part, place in _block_places(stack, i):
                    places[place.point.name] = place
                    aliases.update(dict.fromkeys(_bridge_names(stack, i, kind, part), place.point.name))
            if stack.final_norm is not None:
                name = SIDES[stack.prefix] + FINAL_NORM
                point = HookPoint(name, "final_norm", None, stack.d_model, meaning("final_norm", stack))
                places[name] = Place(point, stack.final_norm.module, stack.final_norm.side, stack=stack.prefix)
        return places, aliases

    def find(self, path: str) -> nn.Module | None:
        """Return the model's module at `path`."""
        return dict(self.hf.named_modules()).get(path)


def _block_places(stack: Stack, layer: int) -> list[tuple[str, Part, Place]]:
    block, path = stack.blocks[layer], f"{stack.path}.{layer}"

    def point(kind: str) -> HookPoint:
        return HookPoint(f"{stack.prefix}.{layer}.hook_{kind}", kind, layer, stack.d_model, meaning(kind, stack, layer))

    post = Place(point("resid_post"), block, "output", stack=stack.prefix)
    parts = {"resid_pre": Part(block, "input", path), **stack.added[layer].parts}
    found = []
    for kind in BLOCK_KINDS:
        if (part := parts.get(kind)) is not None:
            after = post if kind == "resid_mid" else None
            found.append((kind, part, Place(point(kind), part.module, part.side, after, stack.prefix)))
    return [*found, ("resid_post", Part(block, "output", path), post)]


def meaning(kind: str, stack: Stack, layer: int | None = None) -> str:
    """Say in one sentence what the tensor at a hook point is."""
    if kind == "final_norm":
        return "the stream after the final norm"
    assert layer is not None
    added = stack.added[layer]
    sums = " + ".join(["resid_pre", *(k for k in ("attn_out", "cross_attn_out", "mlp_out") if k in added.parts)])
    if kind == "resid_pre":
        return "the residual stream into the block" if layer else "the residual stream into the first block"
    if kind == "resid_post":
        if added.parts:
            return f"the residual stream out of the block: {sums}"
        return f"the stream out of the block; attn_out and mlp_out are not listed: {added.note}"
    if kind == "resid_mid":
        return f"the residual stream that the MLP side of the block takes: {sums.removesuffix(' + mlp_out')}"
    part = added.parts[kind]
    inner = part.path.removeprefix(f"{stack.path}.{layer}.")
    what = {"attn_out": "attention", "cross_attn_out": "attention to the encoder", "mlp_out": "the MLP"}[kind]
    text = f"what {what} adds to the stream: the output of {inner}"
    if kind == "mlp_out" and "resid_mid" not in added.parts:
        text += "; no module takes the stream between attention and MLP (the two run in parallel, or are fused)"
    return text


def _bridge_names(stack: Stack, layer: int, kind: str, part: Part) -> list[str]:
    """Return the bridge's canonical names for an established part of block `layer`.

    They name modules: `attn.hook_out` is the added tensor only where no post-norm stands behind and the residual is
    not added inside.
    """
    if stack.prefix != BLOCKS:
        return []
    stem = {"attn_out": ("attn", "ln1_post", "attn.o"), "mlp_out": ("mlp", "ln2_post", "mlp.out")}.get(kind)
    if kind == "resid_mid":
        return [f"blocks.{layer}.ln2.hook_in"] if "norm" in type(part.module).__name__.lower() else []
    if stem is None:
        return []
    inner = part.path.removeprefix(f"{stack.path}.{layer}.")
    if "norm" in inner:
        return [f"blocks.{layer}.{stem[1]}.hook_out"]
    if "." in inner:  # the inner linear of a module that adds the residual itself
        return [f"blocks.{layer}.{stem[2]}.hook_out"]
    return [f"blocks.{layer}.{stem[0]}.hook_out"] + ([f"blocks.{layer}.mlp.out.hook_out"] if inner == "fc2" else [])


class Bridged:
    """Hook points of a TransformerBridge: every place is the output of one of its own HookPoints."""

    name = "transformer_lens"

    def __init__(self, bridge: Any, anatomy: Anatomy):
        self.bridge, self.anatomy = bridge, anatomy

    def places(self) -> tuple[dict[str, Place], dict[str, str]]:
        """Return the table; attn_out, mlp_out and resid_mid are listed only where a forward shows that they sum."""
        hooks: dict[str, nn.Module] = dict(self.bridge.hook_dict)
        stacks = {stack.prefix: stack for stack in self.anatomy.stacks}
        owner = {EMBED: self.anatomy.main.prefix}
        for prefix, stack in stacks.items():
            owner.update({f"{prefix}.{i}.hook_{k}": prefix for i in range(len(stack.blocks)) for k in BLOCK_KINDS})
            if stack.final_norm is not None:  # BERT's ln_final lies in its head
                owner[SIDES[prefix] + FINAL_NORM] = prefix
        seen = Probe({name: hooks[name] for name in owner if name in hooks})
        hf = self.bridge.original_model
        given = probe_call(hf)
        with torch.no_grad(), kept_rng(given["input_ids"].device), eval_mode(hf):
            seen.run(lambda: hf(**given))
        kept = [n for n in owner if isinstance(seen.outputs.get(n), Tensor) and _sound(n, seen)]
        places: dict[str, Place] = {}
        for name in kept:
            stack = stacks[owner[name]]
            layer = int(name.split(".")[1]) if name.startswith(f"{stack.prefix}.") else None
            kind = name.rpartition("hook_")[2] if layer is not None else "embed" if name == EMBED else "final_norm"
            point = HookPoint(name, kind, layer, int(seen.outputs[name].shape[-1]), _bridge_meaning(kind, stack, layer))
            places[name] = Place(point, hooks[name], "output", stack=stack.prefix)
        for name, place in places.items():
            if place.point.kind == "resid_mid":
                post = places[name.replace("hook_resid_mid", "hook_resid_post")]
                places[name] = Place(place.point, place.module, "output", post, place.stack)
        by_module = {id(place.module): name for name, place in places.items()}
        return places, {n: by_module[id(m)] for n, m in hooks.items() if id(m) in by_module}

    def find(self, path: str) -> nn.Module | None:
        """Return the module at `path` of the model inside the bridge, or of the bridge itself, or a HookPoint."""
        inside = dict(self.bridge.original_model.named_modules()).get(path)
        if inside is not None:
            return inside
        return self.bridge.hook_dict.get(path) or dict(self.bridge.named_modules()).get(path)


def _bridge_meaning(kind: str, stack: Stack, layer: int | None) -> str:
    """Say what a bridge's tensor is, in terms that hold whichever module it is read at."""
    if kind == "embed":
        return "token embeddings as the stream gets them"
    if kind in ("resid_pre", "resid_post", "final_norm"):
        return meaning(kind, stack, layer)
    added = {"attn_out": "attention", "cross_attn_out": "attention to the encoder", "mlp_out": "the MLP"}
    return f"what {added[kind]} adds to the stream" if kind in added else "the residual stream after attention"


def _sound(name: str, seen: Probe) -> bool:
    """Whether a bridge's attn_out, mlp_out or resid_mid is what its name says; a place runs once a forward."""
    stem, _, kind = name.rpartition(".hook_")
    if seen.calls[name] != 1:
        return False
    if kind not in ("attn_out", "cross_attn_out", "mlp_out", "resid_mid"):
        return True
    found = {k: v for k in BLOCK_KINDS if isinstance(v := seen.outputs.get(f"{stem}.hook_{k}"), Tensor)}
    terms = [found[k] for k in ("resid_pre", "attn_out", "cross_attn_out") if k in found]
    if not {"resid_pre", "attn_out", "mlp_out" if kind != "resid_mid" else kind, "resid_post"} <= set(found):
        return False
    if kind == "resid_mid":
        return "cross_attn_out" not in found and sums_to(found[kind], *terms)
    return sums_to(found["resid_post"], *terms, found["mlp_out"])


def module_place(model: "Model", name: str, module: nn.Module, places: dict[str, Place]) -> Place:
    """Return the place "output of the module at this path"; raises HookPointError where there is none to hook."""
    for place in places.values():
        if place.module is module and place.side == "output":
            return place
    stack, layer = _stack_of(model, name, module)
    for i, block in enumerate(model.blocks_of(stack)):
        if block is module:
            return places[f"{stack}.{i}.hook_resid_post"]
    seen, given = Probe({name: module}), probe_call(model.hf)
    with torch.no_grad(), kept_rng(given["input_ids"].device), eval_mode(model.hf), quiet(model.hf):
        seen.run(lambda: model.hf(**given))
    value, why = seen.outputs.get(name), ""
    rows, width = given["decoder_input_ids" if stack == DECODER else "input_ids"].shape
    if not seen.calls[name]:
        why = "it does not run in a forward"
    elif seen.calls[name] > 1:
        why = f"it runs {seen.calls[name]} times in a forward"
    elif not isinstance(value, Tensor):
        why = "its output is no tensor"
    elif tuple(value.shape[:-1]) not in ((rows, width), (rows * width,)):
        why = f"its output {tuple(value.shape)} for {rows} x {width} tokens is not [batch, position, width]"
    if why or not isinstance(value, Tensor):
        raise HookPointError(f"{model.name}: module {name!r} cannot be a hook point: {why}")
    point = HookPoint(name, "module", layer, int(value.shape[-1]), f"the output of the module {name}")
    return Place(point, module, "output", stack=stack)


def _stack_of(model: "Model", name: str, module: nn.Module) -> tuple[str, int | None]:
    """Return the stream that a module belongs to, and the block that it lies in."""
    stacks = model.stacks()
    for prefix, path in stacks.items():
        inside = name.removeprefix(f"{path}.").partition(".")[0]
        if name.startswith(f"{path}.") and inside.isdigit():
            return prefix, int(inside)
    for prefix, path in stacks.items():
        owner = path.rpartition(".")[0]
        if owner and any(m is module for m in model.hf.get_submodule(owner).modules()):
            return prefix, None
    return list(stacks)[-1], None
