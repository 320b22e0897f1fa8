"""Put steering into the weights: ablation out of every writer of the stream, addition into a bias."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.acts.direction import Direction, DirectionError
from interp.concepts.erasing.erasure import orthonormal
from interp.concepts.steering.bakeable import refuse_model, refuse_operation
from interp.concepts.steering.baked import Baked, BakingError, outputs, some_ids, stream_values, tolerance
from interp.concepts.steering.context import steer
from interp.concepts.steering.operations import Operation, Plan, as_operations
from interp.concepts.steering.writers import Site, find_sites, find_writers, norm_basis, project_away, removing
from interp.model.core import Model
from interp.model.forward import embedding, first_tensor, kept_rng, replace_first, text_config
from interp.model.loading import as_model

__all__ = ["Baked", "BakingError", "ablate_weights", "add_bias", "bake"]

BIAS_FLAGS = ("mlp_bias", "attention_bias", "attention_out_bias", "use_bias", "bias")  # of configurations
ADDED_AT = ("resid_post", "mlp_out", "attn_out")


def ablate_weights(model: Any, directions: Direction | Sequence[Direction], *, force: bool = False) -> Baked:
    """Return a copy of a model whose residual stream has no component along the directions, at any site and position.

    Every parameter that writes into the stream loses it: embeddings, position embeddings, attention and MLP outputs,
    their biases, experts. The same as ablating it by hooks in the block's input and in what attention and MLP add
    (Arditi et al., arXiv:2406.11717), BOS included, for models that add these as they are.

    Where a norm stands between a writer and the stream (Gemma-2 and 3, OLMo-2), the writer loses gain * direction, so
    that the stream is free of it all the same; the norm then divides by a smaller length than it would under hooks
    after it. `plain_difference` tells how far apart the two are. Tied embeddings are untied: the unembedding stays.
    Checked before it is returned. Raises BakingError where the stream keeps a component or the outputs are not those
    of hooks at the same places, DirectionError for directions of another model (unless forced) or another width.
    """
    model, given = as_model(model), _directions(directions)
    refuse_model(model)
    for d in given:
        _suits(model, d, force)
    basis = orthonormal(torch.stack([d.vector for d in given]))
    copied, notes = _copy(model, untie=True)
    edited = _ablate_in_place(copied, basis, notes)
    component, difference, plain = _check_ablation(model, copied, basis)
    told = [{"operation": "ablate", **_past(d)} for d in given]
    return _result(model, copied, edited, notes, told, difference, component, plain)


def add_bias(
    model: Any, direction: Direction, strength: float | int, *, hook: str | None = None, force: bool = False
) -> Baked:
    """Return a copy of a model to which strength * norm * vector is added at the direction's hook point, everywhere.

    At resid_post, mlp_out or attn_out, into the bias of what writes there; a configuration that can have one (Llama's
    mlp_bias and attention_bias) is switched to have it, the others of that switch being zero. Every position gets it,
    BOS too. `hook` (with `force`) names another hook point than the direction's.
    Raises BakingError with the reason where there is no such bias or the outputs are not those of a hook.
    """
    model = as_model(model)
    refuse_model(model)
    owned = _suits(model, direction, force, hook)
    if owned.norm is None:
        raise DirectionError("this direction has no unit of strength: give it one by for_model(model, force=True)")
    step = owned.vector.double() * owned.norm * strength
    copied, notes = _copy(model)
    copied, name = _add_in_place(copied, owned.hook, step, notes)
    difference = _check_addition(model, copied, owned.hook, step)
    told = {"operation": "add", "strength": strength, "norm": owned.norm, **_past(owned)}
    return _result(model, copied, (name,), notes, [told], difference)


def bake(
    model: Any,
    *operations: Plan,
    out: str | Path | None = None,
    force: bool = False,
    approximate: bool = False,
) -> Baked:
    """Return the model that a steering plan amounts to, without hooks; with `out`, saved as a Hugging Face folder.

    What weights can do: ablate(direction, positions="all", hooks=EVERYWHERE), two-sided and whole, any number of them;
    and add(direction, strength, positions="all") at resid_post, mlp_out or attn_out where there is a bias. Weights act
    at every position, so BOS and other special tokens, which steering leaves alone, are steered too.
    The result is compared with `steer` on text without special tokens. Where a norm stands between what is written and
    the stream (Gemma-2), ablation frees the stream of the direction but differs from hooks after the norm: that needs
    `approximate=True`, and the difference is in the record.
    Raises BakingError with the reason for all else, DirectionError as steer does, FileExistsError for a full folder.
    """
    model = as_model(model)
    plan = as_operations(*operations)
    if not plan:
        raise ValueError("the plan is empty: there is nothing to bake")
    refuse_model(model)
    for operation in plan:
        refuse_operation(model, operation)
    cuts: list[Direction] = [d for op in plan if op.kind == "ablate" for d in op.directions]
    copied, notes = _copy(model, untie=bool(cuts))
    edited: list[str] = []
    for operation in (op for op in plan if op.kind == "add"):
        for hook, step in _steps(model, operation, force).items():
            copied, name = _add_in_place(copied, hook, step, notes)
            edited.append(name)
    component = plain = None
    if cuts:  # last, so that they take their direction out of the new biases too, as hooks at every site would
        basis = orthonormal(torch.stack([_suits(model, d, force, named=True).vector for d in cuts]))
        edited += _ablate_in_place(copied, basis, notes)
        component = _check_component(copied, basis)
    ids = some_ids(model)
    with steer(model, *plan, force=force):
        steered = outputs(model.hf, ids)
    difference = _gap(steered, outputs(copied.hf, ids))
    if difference > tolerance(model):
        if not (approximate and cuts and len(edited) == len(dict.fromkeys(edited)) and _only_cuts(plan)):
            raise BakingError(
                f"the baked {model.name} differs from the steered one by {difference:.2g} of its largest output"
                f"{': ' + notes[-1] if notes else ''}; approximate=True bakes an ablation all the same"
            )
        component, difference, plain = _check_ablation(model, copied, basis)
    told = [_told(op) for op in plan]
    baked = _result(model, copied, tuple(dict.fromkeys(edited)), notes, told, difference, component, plain)
    if out is not None:
        baked.save(out)
    return baked


def _only_cuts(plan: Sequence[Operation]) -> bool:
    return all(op.kind == "ablate" for op in plan)


def _steps(model: Model, operation: Operation, force: bool) -> dict[str, Tensor]:
    """Return what an addition adds, by hook point, in residual-stream units."""
    direction, strength = operation.directions[0], operation.strengths[0]
    found = {}
    for point in operation.points(model):
        owned = _suits(model, direction, force, point.name, named=bool(operation.hooks))
        if owned.norm is None:
            raise DirectionError("this direction has no unit of strength: give it one by for_model(model, force=True)")
        found[point.name] = owned.vector.double() * owned.norm * strength
    return found


def _told(operation: Operation) -> dict[str, Any]:
    known = {"strength": operation.strengths[0], "directions": [_past(d) for d in operation.directions]}
    return {"operation": operation.kind, "hooks": list(operation.hooks), **known}


def _past(direction: Direction) -> dict[str, Any]:
    return {"hook": direction.hook, "method": direction.method, "data": direction.data, "model": direction.model}


def _result(
    model: Model,
    copied: Model,
    edited: tuple[str, ...],
    notes: list[str],
    told: list[dict[str, Any]],
    difference: float,
    component: float | None = None,
    plain: float | None = None,
) -> Baked:
    return Baked(
        hf=copied.hf,
        tokenizer=model.tokenizer,
        edited=edited,
        component=component,
        difference=difference,
        plain_difference=plain,
        notes=tuple(notes),
        operations=tuple(told),
        source=model.fingerprint,
    )


def _ablate_in_place(model: Model, basis: Float[Tensor, "k d"], notes: list[str]) -> tuple[str, ...]:
    """Take the span of a basis out of every writer of a model; return their names. Raises BakingError for none."""
    sites = find_sites(model)
    writers = find_writers(model, sites)
    if not writers:
        raise BakingError(f"no parameter of {model.name} was seen to write into its stream")
    ways = _ways(model.hf, [w.site for w in writers], basis)
    held = dict(model.hf.named_parameters())
    for writer in writers:
        project_away(held[writer.name], writer.axis, ways[writer.site])
    normed = sorted({w.site.norm.rpartition(".")[2] for w in writers if w.site.norm})
    if normed:
        notes.append(
            f"{', '.join(normed)} stands between writers and the stream: they lost gain * direction, which frees the "
            "stream of the direction, but is not the same as ablating it after the norm (see plain_difference)"
        )
    return tuple(dict.fromkeys(w.name for w in writers))


def _ways(hf: nn.Module, sites: list[Site], basis: Tensor) -> dict[Site, Tensor]:
    """Return what is to be removed at each site: the basis, or before a norm its counterpart there."""
    return {s: norm_basis(hf.get_submodule(s.norm), basis) if s.norm else basis for s in dict.fromkeys(sites)}


def _check_component(baked: Model, basis: Tensor) -> float:
    """Return the largest share of the stream along a basis, over tokens and hook points; raises BakingError."""
    component, worst = 0.0, ""
    for hook, value in stream_values(baked, some_ids(baked)).items():
        along = (value.double() @ basis.T.to(value.device)).norm(dim=-1)
        share = float((along / value.double().norm(dim=-1).clamp_min(1e-30)).max())
        component, worst = max((component, worst), (share, hook))
    if component > tolerance(baked):
        raise BakingError(
            f"{baked.name} cannot be ablated by its weights: at {worst} a share of {component:.2g} of the stream still "
            "points along the direction (a norm of the whole stream, or a writer of an unknown form)"
        )
    return component


def _check_ablation(model: Model, baked: Model, basis: Tensor) -> tuple[float, float, float]:
    """Return component, difference to hooks at the same sites and to hooks on what is added; raises BakingError."""
    component, ids = _check_component(baked, basis), some_ids(model)
    sites = [site for found in find_sites(model).values() for site in found]
    gaps = []
    for chosen in (sites, [s for s in sites if not s.norm]):
        ways = _ways(model.hf, chosen, basis)
        with removing(model.hf, [(s, ways[s]) for s in chosen]):
            hooked = outputs(model.hf, ids)
        gaps.append(_gap(hooked, outputs(baked.hf, ids)))
    if gaps[0] > tolerance(model):
        raise BakingError(
            f"the baked {model.name} differs from the hooked one by {gaps[0]:.2g} of its largest output: "
            "a parameter was changed that does more than write into the stream"
        )
    return component, gaps[0], gaps[1]


def _gap(hooked: Tensor, baked: Tensor) -> float:
    return float((hooked - baked).abs().max() / hooked.abs().max())


def _add_in_place(model: Model, hook: str, step: Tensor, notes: list[str]) -> tuple[Model, str]:
    """Add to the bias that writes at a hook point; return the model (a new one where a bias had to be made)."""
    point = model.hook_point(hook)
    if point.kind not in ADDED_AT or point.layer is None:
        raise BakingError(f"{hook}: a bias adds at {', '.join(ADDED_AT)} only; steer there with hooks")
    name = _bias_at(model, point.name)
    for flag in BIAS_FLAGS if name is None else ():
        wider = _with_biases(model, flag)
        name = None if wider is None else _bias_at(wider, point.name)
        if wider is not None and name is not None:
            notes.append(f"the configuration was switched to {flag}=True; the biases that it brings are 0 but for this")
            model = wider
            break
    if name is None:
        kind = type(model.hf).__name__
        raise BakingError(
            f"{kind} has no bias that adds at {point.name}, and its configuration cannot have one (a bias before a "
            "norm is no addition after it); steer there with hooks"
        )
    bias = dict(model.hf.named_parameters())[name]
    bias.data.copy_((bias.data.double() + step.to(bias.device)).to(bias.dtype))
    return model, name


def _bias_at(model: Model, hook: str) -> str | None:
    """Return the name of the vector that is added at a hook point of a block, None where there is none.

    The last writer of a block adds to resid_post too, whatever hook it is seen at; the attention's does not, where the
    MLP reads what it wrote (between them lies resid_mid).
    """
    (block_path,) = model.stacks().values()
    stack, layer, kind = hook.split(".")[0], hook.split(".")[1], hook.rpartition("hook_")[2]
    stem = f"{stack}.{layer}.hook_"
    known = {p.name for p in model.hook_points()}
    wanted = {hook}
    if kind in ("resid_post", "mlp_out") and f"{stem}mlp_out" in known:
        wanted = {f"{stem}mlp_out", f"{stem}resid_post"}
    held = dict(model.hf.named_parameters())
    for writer in find_writers(model, find_sites(model), only=f"{block_path}.{layer}"):
        if held[writer.name].ndim == 1 and not writer.site.norm and writer.site.hook in wanted:
            return writer.name
    return None


def _with_biases(model: Model, flag: str) -> Model | None:
    """Return the model with a switch of its configuration turned on and the biases that it brings at 0."""
    hf = model.hf
    if getattr(text_config(hf), flag, None) is not False:
        return None
    config = copy.deepcopy(hf.config)
    inner = config if text_config(hf) is hf.config else config.get_text_config()
    setattr(inner, flag, True)
    weight = next(hf.parameters())
    with kept_rng(weight.device):
        wider = type(hf)._from_config(config, dtype=weight.dtype).to(weight.device)
    missing, unexpected = wider.load_state_dict(hf.state_dict(), strict=False)
    if unexpected or not missing or not all(name.endswith("bias") for name in missing):
        return None
    held = dict(wider.named_parameters())
    for name in missing:
        held[name].data.zero_()
    wider.generation_config = copy.deepcopy(getattr(hf, "generation_config", None))
    return Model(wider.train(hf.training), model.tokenizer, name=model.name)


def _check_addition(model: Model, baked: Model, hook: str, step: Tensor) -> float:
    place, ids = model.place(hook), some_ids(model)

    def add(module: nn.Module, args: tuple, out: Any) -> Any:
        value = first_tensor(out)
        return replace_first(out, (value.double() + step.to(value.device)).to(value.dtype))

    handle = place.module.register_forward_hook(add)
    try:
        gap = _gap(outputs(model.hf, ids), outputs(baked.hf, ids))
    finally:
        handle.remove()
    if gap > tolerance(model):
        raise BakingError(f"a bias at {hook} of {model.name} gives outputs {gap:.2g} off those of a hook there")
    return gap


def _copy(model: Model, untie: bool = False) -> tuple[Model, list[str]]:
    """Return a copy to change, its tied embeddings untied where asked, and what was done."""
    hf = copy.deepcopy(model.hf)
    notes: list[str] = []
    head, embed = hf.get_output_embeddings(), embedding(hf)
    if untie and head is not None and head.weight is embed.weight:
        embed.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=embed.weight.requires_grad)
        hf.config.tie_word_embeddings = False
        text_config(hf).tie_word_embeddings = False
        notes.append("the tied embeddings were untied (tie_word_embeddings is false, the folder holds both matrices)")
    return Model(hf, model.tokenizer, name=model.name, blocks=model.blocks_path), notes


def _directions(given: Direction | Sequence[Direction]) -> list[Direction]:
    directions = [given] if isinstance(given, Direction) else list(given)
    if not directions:
        raise ValueError("no direction was given; at least one is needed")
    return directions


def _suits(
    model: Model, direction: Direction, force: bool, hook: str | None = None, *, named: bool = False
) -> Direction:
    """Return a direction for use at a hook point; `named`: the plan moves it there itself, within its own model."""
    own = named and direction.model == model.fingerprint
    owned = direction.for_model(model, hook=hook, force=force or own)
    if len(owned.vector) != model.d_model:
        raise DirectionError(f"the direction has width {len(owned.vector)}, the stream {model.d_model}")
    return owned
