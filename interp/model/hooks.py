"""Hook points: their names, and the contexts that read and that edit the values there."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.model.anatomy import BLOCKS, DECODER
from interp.model.clock import Clock, Watch
from interp.model.forward import block_input, first_tensor, replace_first

if TYPE_CHECKING:
    from interp.model.core import Model

__all__ = ["Clock", "HookPoint", "HookPointError", "StopForward", "canonical_name", "editing", "expand", "reading"]

BLOCK_KINDS = ("resid_pre", "attn_out", "cross_attn_out", "resid_mid", "mlp_out", "resid_post")
EMBED, FINAL_NORM = "hook_embed", "ln_final.hook_out"
_KINDS = "|".join(BLOCK_KINDS)
_SHORT = re.compile(rf"(?:(encoder|decoder)\.)?({_KINDS})\.(-?\d+)")
_ALIAS = re.compile(rf"(?:(encoder|decoder)[_.])?blocks\.(-?\d+)\.(?:hook_)?({_KINDS}|in|out)")
_TOP = {
    "embed": EMBED,
    "embed.hook_out": EMBED,
    EMBED: EMBED,
    "final_norm": FINAL_NORM,
    "ln_final": FINAL_NORM,
    FINAL_NORM: FINAL_NORM,
    **{f"{side}.final_norm": f"{side}_{FINAL_NORM}" for side in ("encoder", "decoder")},
    **{f"{side}_ln_final": f"{side}_{FINAL_NORM}" for side in ("encoder", "decoder")},
    **{f"{side}_{FINAL_NORM}": f"{side}_{FINAL_NORM}" for side in ("encoder", "decoder")},
}


class HookPointError(KeyError):
    """The model has no such hook point."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the quotes of a repr


class StopForward(Exception):
    """Ends a forward pass once everything wanted has been read; caught by `Model.run` and by `reading`."""


@dataclass(frozen=True)
class HookPoint:
    """A named place of width `d` in a model, and what the tensor there is; `layer` is None outside the blocks.

    The name is TransformerLens's alias ("blocks.2.hook_resid_post"; "encoder_blocks.2.hook_resid_post" in a model of
    two streams); a place known by its module path alone has kind "module".
    """

    name: str
    kind: str
    layer: int | None
    d: int
    meaning: str = field(default="", compare=False)

    @property
    def shape(self) -> str:
        """The shape of a batch's values there."""
        return f"[batch, pos, {self.d}]"


@dataclass(frozen=True)
class Place:
    """A hook point and the side of the module that its value is read from and written to."""

    point: HookPoint
    module: nn.Module
    side: str  # "input" | "output"
    after: "Place | None" = None  # resid_mid: the resid_post of its block, which an edit has to reach too
    stack: str = BLOCKS  # the stream that it lies in


def canonical_name(name: str, n_layers: int | Mapping[str, int] | None = None) -> str | None:
    """Return TransformerLens's alias for an accepted spelling, or None if `name` is none of them by its form.

    `resid_post.6`, `blocks.6.hook_out`, `blocks.6.resid_post` -> `blocks.6.hook_resid_post`; `encoder.resid_post.6` ->
    `encoder_blocks.6.hook_resid_post`. Negative layers count from the end where `n_layers` (of each stream, by prefix,
    where there are two) is given.
    """
    if name in _TOP:
        return _TOP[name]
    if match := _SHORT.fullmatch(name):
        side, kind, layer = match[1], match[2], int(match[3])
    elif match := _ALIAS.fullmatch(name):
        side, kind, layer = match[1], {"in": "resid_pre", "out": "resid_post"}.get(match[3], match[3]), int(match[2])
    else:
        return None
    prefix = f"{side}_blocks" if side else BLOCKS
    count = n_layers.get(prefix) if isinstance(n_layers, Mapping) else n_layers
    if layer < 0 and count is not None:
        layer += count
    return f"{prefix}.{layer}.hook_{kind}"


def short_name(name: str) -> str:
    """Return the short address of an alias: `resid_post.6` for `blocks.6.hook_resid_post`."""
    match = _ALIAS.fullmatch(name)
    if match:
        return f"{match[1]}.{match[3]}.{match[2]}" if match[1] else f"{match[3]}.{match[2]}"
    side, _, rest = name.partition("_")
    if rest == FINAL_NORM:
        return f"{side}.final_norm"
    return {EMBED: "embed", FINAL_NORM: "final_norm"}.get(name, name)


def unknown_hook(model: str, name: str, known: Iterable[str]) -> HookPointError:
    """Make the error that names the closest hook points."""
    spelled = {spelling: full for full in known for spelling in (full, short_name(full))}
    close = list(dict.fromkeys(spelled[s] for s in difflib.get_close_matches(name, spelled, n=6, cutoff=0.5)))[:3]
    hint = f"closest: {', '.join(close)}" if close else "model.hook_points() lists them"
    return HookPointError(f"{model} has no hook point {name!r}; {hint}")


def expand(model: "Model", names: str | Iterable[str]) -> list[str]:
    """Return the canonical names of hook points given by any spelling or glob ("resid_post.*"), in order, once each.

    Raises HookPointError for a name, or a glob, that fits none.
    """
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if not any(c in name for c in "*?["):
            found[model.hook_point(name).name] = None
            continue
        known = [p.name for p in model.hook_points()]
        fits = [n for n in known if fnmatch.fnmatchcase(n, name) or fnmatch.fnmatchcase(short_name(n), name)]
        if not fits:
            raise unknown_hook(model.name, name, known)
        found.update(dict.fromkeys(fits))
    return list(found)


def _as_stream(value: Any, watch: Watch, name: str) -> Tensor:
    """View a value as [b, q, d] (OPT runs its MLP on [b * q, d])."""
    if watch.shape is None:
        raise RuntimeError(f"{name} ran outside a forward of the model; call the model, not one of its blocks")
    rows, q = watch.shape
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (rows, q):
        return value
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == rows * q:
        return value.view(rows, q, -1)
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name} gives {got}, not [batch {rows}, columns {q}, width]")


@contextmanager
def reading(
    model: "Model",
    hooks: str | Iterable[str],
    callback: Callable[[str, Float[Tensor, "b t d"]], Any],
    *,
    stop: bool = True,
) -> Iterator[None]:
    """Call `callback(name, value)` with the value at each hook point in every forward inside the context.

    `name` is the canonical one. The value is the live tensor: copy what is kept, some families go on writing into it.
    With `stop` the forward ends after the last wanted point: `model.run(ids, mask)` then returns None and can be called
    again, while a direct call of the model leaves the context. Points edited by an enclosing `editing` show the edited
    value. Raises HookPointError.
    """
    places = [model.place(name) for name in expand(model, hooks)]
    if not places:
        raise ValueError("no hook points to read")
    wanted = {p.point.name for p in places}
    seen: set[str] = set()
    watches = _watches(model, places, seen)
    handles: list[Any] = []

    def halt() -> None:
        if stop and seen == wanted:
            raise StopForward

    def reader(place: Place) -> Callable:
        watch, name = watches[place.stack], place.point.name
        # offloaded weights go back where they lie at the end of a block: stop there, not inside it
        late = model.offloaded and place.module not in model.blocks_of(place.stack)

        def note(value: Any) -> None:
            if not watch.quiet:
                callback(name, _as_stream(value, watch, name))
                seen.add(name)
                if not late:
                    halt()

        if place.side == "input":
            return lambda module, args, kwargs: note(block_input(args, kwargs))
        return lambda module, args, output: note(first_tensor(output))

    try:
        for watch in watches.values():
            watch.attach(prompts=False)
        for place in places:
            handles.append(_register(place, reader(place)))
        if model.offloaded:
            ends = [block for stack in watches for block in model.blocks_of(stack)]
            handles.extend(block.register_forward_hook(lambda module, args, output: halt()) for block in ends)
        with uncompiled(), model.wanting(watches):
            yield
    except StopForward:
        if seen != wanted:  # another, enclosing reading asked for it
            raise
    finally:
        for handle in handles:
            handle.remove()
        for watch in watches.values():
            watch.detach()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run eagerly, inside the context, whatever torch.compile has compiled or is asked to compile.

    Code compiled before a hook was registered never calls it: dynamo does not guard on hooks. Nothing is lost, the
    compiled code is there again afterwards.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


def _watches(model: "Model", places: list[Place], seen: set[str]) -> dict[str, Watch]:
    """Return a watch, of shapes alone, for each stream; a new forward of a stream clears what was seen of it."""

    def clearer(stack: str) -> Callable:
        own = {p.point.name for p in places if p.stack == stack}
        return lambda: seen.difference_update(own)

    stacks = dict.fromkeys(p.stack for p in places)
    return {stack: Watch(model.hf, model.roots(stack), on_start=clearer(stack)) for stack in stacks}


def _register(place: Place, hook: Callable, prepend: bool = False) -> Any:
    if place.side == "input":
        return place.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)
    return place.module.register_forward_hook(hook, prepend=prepend)


Edit = Callable[[Float[Tensor, "b q d"], Clock], Float[Tensor, "b q d"]]


@contextmanager
def editing(model: "Model", edits: Mapping[str, Edit | Iterable[Edit]]) -> Iterator[None]:
    """Replace the value at each hook point by `fn(value, clock)` in every forward inside the context.

    `fn` gets [b, q, d] for the columns of this pass (all of a prompt, then one at a time with a cache) and returns a
    new tensor of that shape; it must not write into its argument. It sees pads too: select with `clock.mask`. Several
    functions for a point, and nested contexts, apply in order, outermost first. `resid_mid` reaches the rest of the
    stream, not the MLP alone. Inside the context `generate` notes its prompt for the clock. A key-value cache filled
    here stays edited: do not use it after. What torch.compile has compiled runs eagerly inside.
    Raises HookPointError, and ValueError where `fn` returns another shape.
    """
    steps = [(model.place(name), fn) for name, fns in edits.items() for fn in ([fns] if callable(fns) else fns)]
    watches = {
        stack: Watch(model.hf, model.roots(stack), model.special_ids, decoder=stack == DECODER, bridge=model.bridge)
        for stack in dict.fromkeys([place.stack for place, _ in steps])
    }
    handles: list[Any] = []
    try:
        for stack, watch in watches.items():
            watch.attach(prompts=stack in (BLOCKS, DECODER))
        for place, fn in steps:
            handles.extend(_install(place, fn, watches[place.stack]))
        with uncompiled(), model.wanting(watches):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for watch in watches.values():
            watch.detach()


def _edited(value: Any, fn: Edit, watch: Watch, name: str) -> Tensor | None:
    """Return the new value in the old one's shape, dtype and device, or None where it is unchanged."""
    if watch.paused:
        return None
    stream, clock = _as_stream(value, watch, name), watch.clock
    assert clock is not None  # read whenever the shape is
    device = stream.device
    new = fn(stream, clock if clock.device == device else clock.to(device))
    if new is stream:
        return None
    if not isinstance(new, Tensor) or new.shape != stream.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"the edit of {name} returned {got}; it must return {tuple(stream.shape)}")
    if new.dtype != value.dtype or new.device != device:
        new = new.to(device, value.dtype)
    return new if stream is value else new.reshape(value.shape)


def _install(place: Place, fn: Edit, watch: Watch) -> list[Any]:
    name = place.point.name

    def on_output(module: nn.Module, args: tuple, output: Any) -> Any:
        new = _edited(first_tensor(output), fn, watch, name)
        return None if new is None else replace_first(output, new)

    def on_input(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        new = _edited(block_input(args, kwargs), fn, watch, name)
        return None if new is None else _with_input(args, kwargs, new)

    if place.after is not None:
        return _install_mid(place, place.after, fn, watch)
    return [_register(place, on_input if place.side == "input" else on_output)]


def _with_input(args: tuple, kwargs: dict, new: Tensor) -> tuple[tuple, dict]:
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def _install_mid(place: Place, post: Place, fn: Edit, watch: Watch) -> list[Any]:
    """Edit resid_mid: what the MLP reads, and by the same difference what the block passes on."""
    shift: list[Tensor] = []

    def change(value: Any) -> Tensor | None:
        shift.clear()
        new = _edited(value, fn, watch, place.point.name)
        if new is not None:
            shift.append(new - value)
        return new

    def on_input(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        new = change(block_input(args, kwargs))
        return None if new is None else _with_input(args, kwargs, new)

    def on_output(module: nn.Module, args: tuple, output: Any) -> Any:
        new = change(first_tensor(output))
        return None if new is None else replace_first(output, new)

    def pass_on(module: nn.Module, args: tuple, output: Any) -> Any:
        if not shift:
            return None
        value = first_tensor(output)
        return replace_first(output, value + shift.pop().view(value.shape).to(value.device))

    # prepended: the block's own resid_post, and what is read or edited there, comes after the shift
    return [_register(place, on_input if place.side == "input" else on_output), _register(post, pass_on, prepend=True)]
