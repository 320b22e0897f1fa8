"""Steer a model: the context in which operations act on every forward, and what it takes to generate under it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.acts.direction import DirectionError
from interp.concepts.steering.changes import Change, Site
from interp.concepts.steering.conditions import Condition, Gate
from interp.concepts.steering.operations import Operation, Plan, add, as_operations
from interp.concepts.steering.positions import POSITIONS, repeated, selector
from interp.model.anatomy import eval_mode
from interp.model.clock import Clock, unedited
from interp.model.hooks import HookPoint, editing
from interp.model.loading import Model, as_model
from interp.model.tokens import TokenBatch, pad_id, pad_rows

__all__ = ["POSITIONS", "Operation", "add", "cached_equals_uncached", "generate_ids", "prompt_batch", "steer"]

Edit = Callable[[Float[Tensor, "b q d"], Clock], Float[Tensor, "b q d"]]

# Models under steering by the ids of their Hugging Face object and bridge: loading one anew looks at it by forwards of
# its own, which a context around would steer.
_ACTIVE: dict[int, Model] = {}


@contextmanager
def steer(model: Any, *operations: Plan, force: bool = False) -> Iterator[Model]:
    """Apply operations, or plans of them, in every forward of a model inside; they follow each other in their order.

    The model is an interp Model, a Hugging Face model or a TransformerBridge, and is used as ever: forward, generate
    (any cache, beams, left pads, chunks), pipelines. Contexts nest. A strength of 0 changes no bit, nor does leaving
    the context, by an exception too. Sums are made in float32 at least and cast back. What torch.compile has compiled
    runs eagerly inside. A key-value cache filled inside stays steered: do not use it after.
    Raises DirectionError for directions of another model (unless forced), width or hook point, ValueError for a
    condition that is read after it is needed; inside, ValueError for a batch that does not fit the rows of an
    operation, or for positions that need a prompt where there is no generate.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns
    model = _ACTIVE.get(id(model)) or as_model(model)
    plan = as_operations(*operations)
    with unedited(model.hf):  # units of strength are measured on the model itself
        edits = _edits(model, plan, force)
    if not edits:
        yield model
        return
    keys = [id(part) for part in (model.hf, model.bridge) if part is not None]
    outer = {key: _ACTIVE[key] for key in keys if key in _ACTIVE}
    _ACTIVE.update({key: model for key in keys})
    try:
        with editing(model, edits):
            yield model
    finally:
        for key in keys:
            del _ACTIVE[key]
        _ACTIVE.update(outer)


def _edits(model: Model, plan: Sequence[Operation], force: bool) -> dict[str, Edit]:
    """Return one function a hook point; a condition reads the stream as the operations before its own have left it."""
    steps: dict[str, list[Edit]] = {}
    gates: dict[int, Gate] = {}
    fingerprint = model.fingerprint if plan else ""
    for operation in plan:
        for point in operation.points(model):
            change = operation.change(Site(model=model, point=point, fingerprint=fingerprint, force=force))
            if not bool(change.moves.any()):  # left out altogether: not even a zero's sign can change
                continue
            gate = None
            if (condition := operation.when) is not None:
                read_at = _reading_point(model, condition, point, fingerprint, force)
                if id(condition) not in gates:
                    gates[id(condition)] = Gate(condition)
                    steps.setdefault(read_at, []).append(gates[id(condition)].note)
                gate = gates[id(condition)]
            steps.setdefault(point.name, []).append(_step(operation, change, gate))
    return {name: _chain(each) for name, each in steps.items()}


def _chain(steps: list[Edit]) -> Edit:
    if len(steps) == 1:
        return steps[0]

    def all_of_them(value: Tensor, clock: Clock) -> Tensor:
        for step in steps:
            value = step(value, clock)
        return value

    return all_of_them


def _reading_point(model: Model, condition: Condition, point: HookPoint, fingerprint: str, force: bool) -> str:
    """Return where a condition is read. Raises DirectionError where it does not belong, ValueError where too late."""
    read_at = model.hook_point(condition.hook) if condition.hook else None
    if read_at is None:
        raise DirectionError("the condition's probe knows no hook point: when(..., hook='resid_post.6')")
    site = Site(model=model, point=read_at, fingerprint=fingerprint, force=force)
    site.check(condition.origin, named=condition.named)
    order = {p.name: i for i, p in enumerate(model.hook_points())}
    if read_at.name not in order or point.name not in order:
        raise ValueError(f"whether {read_at.name} comes before {point.name} is not known: name listed hook points")
    if order[read_at.name] > order[point.name]:
        raise ValueError(
            f"the condition reads {read_at.name}, which comes after {point.name}: read it at an earlier hook point"
        )
    apart = model.place(read_at.name).stack != model.place(point.name).stack
    if apart and condition.read == "token":
        raise ValueError(f"{read_at.name} and {point.name} have other tokens: read='last', 'mean' or 'max' a row")
    return read_at.name


def _step(operation: Operation, change: Change, gate: Gate | None) -> Edit:
    """Return the edit of one operation at one hook point."""
    where = selector(operation.positions)
    tensors = _Prepared(change)
    plain = change.fn is None

    def edit(value: Tensor, clock: Clock) -> Tensor:
        chosen = where(clock)
        if chosen is False:
            return value
        if gate is not None:
            fires = gate.open(clock)
            chosen = fires if chosen is True else fires & chosen
        rows, shared, moves = tensors.of(value, clock)
        if plain:  # -0.0 is the number that changes nothing when added
            step = rows[0] if chosen is True else torch.where(chosen[..., None], rows[0], -0.0)
            moved = value + step
            return moved if moved.dtype == value.dtype else moved.to(value.dtype)
        assert change.fn is not None
        wide = value if value.dtype == shared_dtype(value) else value.to(shared_dtype(value))
        moved = change.fn(wide, *rows, *shared).to(value.dtype)
        if moves is not None:
            chosen = moves if chosen is True else chosen & moves
        return moved if chosen is True else torch.where(chosen[..., None], moved, value)

    return edit


def shared_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype that a stream is steered in: float32 at least."""
    return torch.promote_types(value.dtype, torch.float32)


class _Prepared:
    """The tensors of a change for each device, dtype and batch, made at the first pass and not again at every token."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.moves = None if bool(change.moves.all()) else change.moves[:, None]
        self._ready: dict[tuple, tuple[list[Tensor], list[Tensor], Tensor | None]] = {}

    def of(self, value: Tensor, clock: Clock) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        key = (value.device, value.dtype, len(value))
        found = self._ready.get(key)
        if found is None:
            wide = shared_dtype(value)
            rows = [repeated(x, clock, "the operation").to(value.device, wide) for x in self.change.rows]
            shared = [x.to(value.device, wide) for x in self.change.shared]
            moves = None if self.moves is None else repeated(self.moves, clock, "the operation").to(value.device)
            found = self._ready[key] = rows, shared, moves
        return found


def prompt_batch(model: Model, prompts: Sequence[str] | Sequence[Sequence[int]]) -> TokenBatch:
    """Return prompts, texts or token ids, as one left-padded batch. Raises ValueError for an empty one."""
    if not len(prompts):
        raise ValueError("there is no prompt")
    if isinstance(prompts[0], str):
        batch = model.tokenize([str(p) for p in prompts], side="left")
    else:
        rows = [[int(i) for i in p] for p in prompts]
        batch = pad_rows(rows, fill=_fill(model), special_ids=model.special_ids, side="left")
    if batch.ids.numel() == 0 or not bool(batch.mask.any(1).all()):
        raise ValueError("a prompt has no token")
    return batch


def generate_ids(
    model: Model, prompts: Sequence[str] | Sequence[Sequence[int]], max_new_tokens: int = 20, **options: Any
) -> Int[Tensor, "rows new"]:
    """Return the new token ids for each prompt (or returned sequence), greedy unless options say otherwise.

    Options go to Hugging Face's generate. Rows that end early are filled up with the pad id.
    """
    batch = prompt_batch(model, prompts)
    width = batch.ids.shape[1]
    if width + max_new_tokens > model.n_ctx:
        raise ValueError(f"{width} prompt and {max_new_tokens} new tokens exceed the {model.n_ctx} of {model.name}")
    given = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": _fill(model)}
    ids, mask = batch.ids.to(model.device), batch.mask.long().to(model.device)
    with eval_mode(model.hf), torch.no_grad():
        out = model.hf.generate(input_ids=ids, attention_mask=mask, **(given | options))
    return getattr(out, "sequences", out)[:, width:].cpu()


def cached_equals_uncached(
    model: Any,
    operations: Plan,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 20,
) -> bool:
    """Tell whether greedy steered generation gives the same tokens with a key-value cache as without one."""
    model = as_model(model)
    with steer(model, operations):
        cached, uncached = (generate_ids(model, prompts, max_new_tokens, use_cache=use) for use in (True, False))
    return torch.equal(cached, uncached)


def _fill(model: Model) -> int:
    return pad_id(model.tokenizer if model.tokenizer is not None else model.hf.config)
