"""Hook points: their names, and the contexts that read and that edit the values there."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from interp.model.anatomy import block_input, first_tensor, replace_first
from interp.model.clock import Clock, Watch

if TYPE_CHECKING:
    from interp.model.loading import Model

__all__ = ["Clock", "HookPoint", "HookPointError", "StopForward", "canonical_name", "editing", "expand", "reading"]

BLOCK_KINDS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
EMBED, FINAL_NORM = "hook_embed", "ln_final.hook_out"
_KINDS = "|".join(BLOCK_KINDS)
_SHORT = re.compile(rf"({_KINDS})\.(-?\d+)")
_ALIAS = re.compile(rf"blocks\.(-?\d+)\.(?:hook_)?({_KINDS}|in|out)")
_TOP = {
    "embed": EMBED,
    "embed.hook_out": EMBED,
    EMBED: EMBED,
    "final_norm": FINAL_NORM,
    "ln_final": FINAL_NORM,
    FINAL_NORM: FINAL_NORM,
}


class HookPointError(KeyError):
    """The model has no such hook point."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the quotes of a repr


class StopForward(Exception):
    """Ends a forward pass once everything wanted has been read; caught by `Model.run` and by `reading`."""


@dataclass(frozen=True)
class HookPoint:
    """A named place of width `d` in a model; `layer` is None outside the blocks.

    The name is TransformerLens's alias ("blocks.2.hook_resid_post"); a place known by its module path alone has kind
    "module".
    """

    name: str
    kind: str
    layer: int | None
    d: int


@dataclass(frozen=True)
class Place:
    """A hook point and the side of the module that its value is read from and written to."""

    point: HookPoint
    module: nn.Module
    side: str  # "input" | "output"
    after: "Place | None" = None  # resid_mid: the resid_post of its block, which an edit has to reach too


def canonical_name(name: str, n_layers: int | None = None) -> str | None:
    """Return TransformerLens's alias for an accepted spelling, or None if `name` is none of them by its form.

    `resid_post.6`, `blocks.6.hook_out`, `blocks.6.resid_post` -> `blocks.6.hook_resid_post`; negative layers count
    from the end where `n_layers` is given.
    """
    if name in _TOP:
        return _TOP[name]
    if match := _SHORT.fullmatch(name):
        kind, layer = match[1], int(match[2])
    elif match := _ALIAS.fullmatch(name):
        kind, layer = {"in": "resid_pre", "out": "resid_post"}.get(match[2], match[2]), int(match[1])
    else:
        return None
    if layer < 0 and n_layers is not None:
        layer += n_layers
    return f"blocks.{layer}.hook_{kind}"


def short_name(name: str) -> str:
    """Return the short address of an alias: `resid_post.6` for `blocks.6.hook_resid_post`."""
    match = _ALIAS.fullmatch(name)
    return f"{match[2]}.{match[1]}" if match else {EMBED: "embed", FINAL_NORM: "final_norm"}.get(name, name)


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


def _as_stream(value: Any, clock: Clock, name: str) -> Tensor:
    """View a value as [b, q, d] (OPT runs its MLP on [b * q, d])."""
    rows, q = clock.mask.shape
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (rows, q):
        return value
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == rows * q:
        return value.view(rows, q, -1)
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name} gives {got}, not [batch {rows}, columns {q}, width]")


def _now(watch: Watch, name: str) -> Clock:
    if watch.clock is None:
        raise RuntimeError(f"{name} ran outside a forward of the model; call the model, not one of its blocks")
    return watch.clock


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
    watch = Watch(model.hf, model.blocks_path, frozenset(), on_start=seen.clear)
    handles: list[Any] = []

    def note(name: str, value: Any) -> None:
        if watch.quiet:
            return
        callback(name, _as_stream(value, _now(watch, name), name))
        seen.add(name)
        if stop and seen == wanted:
            raise StopForward

    def reader(place: Place) -> Callable:
        if place.side == "input":
            return lambda module, args, kwargs: note(place.point.name, block_input(args, kwargs))
        return lambda module, args, output: note(place.point.name, first_tensor(output))

    try:
        watch.attach(prompts=False)
        for place in places:
            handles.append(_register(place, reader(place)))
        yield
    except StopForward:
        if seen != wanted:  # another, enclosing reading asked for it
            raise
    finally:
        for handle in handles:
            handle.remove()
        watch.detach()


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
    here stays edited: do not use it after.
    Raises HookPointError, and ValueError where `fn` returns another shape.
    """
    steps = [(model.place(name), fn) for name, fns in edits.items() for fn in ([fns] if callable(fns) else fns)]
    watch = Watch(model.hf, model.blocks_path, model.special_ids)
    handles: list[Any] = []
    try:
        watch.attach()
        for place, fn in steps:
            handles.extend(_install(place, fn, watch))
        yield
    finally:
        for handle in handles:
            handle.remove()
        watch.detach()


def _edited(value: Any, fn: Edit, watch: Watch, name: str) -> Tensor | None:
    """Return the new value in the old one's shape, dtype and device, or None where it is unchanged."""
    if watch.quiet:
        return None
    clock = _now(watch, name)
    stream = _as_stream(value, clock, name)
    new = fn(stream, clock.to(stream.device))
    if new is stream:
        return None
    if not isinstance(new, Tensor) or new.shape != stream.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"the edit of {name} returned {got}; it must return {tuple(stream.shape)}")
    return new.to(value.device, value.dtype).reshape(value.shape)


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
