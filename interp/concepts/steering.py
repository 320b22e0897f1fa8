"""Steer a model: operations on a hook point, and the context in which they act."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.acts.direction import Direction, DirectionError
from interp.model.anatomy import eval_mode
from interp.model.hooks import Clock, editing
from interp.model.loading import Model, as_model
from interp.model.tokens import TokenBatch, pad_id, pad_rows

__all__ = ["POSITIONS", "Operation", "add", "cached_equals_uncached", "generate_ids", "prompt_batch", "steer"]

POSITIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda columns, width: torch.ones_like(columns, dtype=torch.bool),
    "prompt": lambda columns, width: columns < width,
    "generated": lambda columns, width: columns >= width,
    "from_last_prompt_token": lambda columns, width: columns >= width - 1,
}

# Models under steering by the id of their Hugging Face object: loading one anew looks at it by forwards of its own,
# which a context around would steer.
_ACTIVE: dict[int, Model] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Operation:
    """What is added where: one direction and strength for every row of a batch, or one of each a row."""

    directions: tuple[Direction, ...]  # 1, or one a row
    strengths: tuple[float, ...]  # 1, or one a row, in units of the direction's norm
    positions: str

    def delta(self, model: Model, force: bool = False) -> Float[Tensor, "rows d"]:
        """Return what is added to each row, in residual-stream units. Raises DirectionError as `for_model` does."""
        point, fingerprint = model.hook_point(self.directions[0].hook), model.fingerprint
        own = {id(d): d for d in self.directions}
        for key, d in own.items():
            if (d.model, d.hook, len(d.vector)) != (fingerprint, point.name, point.d):
                own[key] = d.for_model(model, force=force)  # raises, unless forced
        n = max(len(self.directions), len(self.strengths))
        used = [own[id(d)] for d in self.directions] * (n if len(self.directions) == 1 else 1)
        amounts = list(self.strengths) * (n if len(self.strengths) == 1 else 1)
        length = torch.tensor([s * (d.norm or 0.0) for s, d in zip(amounts, used, strict=True)], dtype=torch.float64)
        return (length[:, None] * torch.stack([d.vector for d in used]).double()).float()


def add(
    direction: Direction | Sequence[Direction], strength: float | Sequence[float | int] | Tensor, positions: str = "all"
) -> Operation:
    """Return the operation h + strength * norm * vector at the direction's hook point.

    `strength` is in units of the median residual norm there, 1 of them for all rows of a batch or one a row; so may
    directions be, which then share one hook point. Rows are prompts: beams and returned sequences follow their prompt.
    `positions`: "all"; of a generation also "prompt", "generated" (the new tokens), "from_last_prompt_token" (the
    prompt's last token, from which the first new one is predicted, and the new tokens). Pads and special tokens (BOS,
    EOS) are never touched. Raises ValueError for anything else, DirectionError for a direction without a unit.
    """
    directions = (direction,) if isinstance(direction, Direction) else tuple(direction)
    given = strength.tolist() if isinstance(strength, Tensor) else strength
    strengths = tuple(float(s) for s in given) if isinstance(given, Sequence) else (float(given),)
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; it is one of {', '.join(POSITIONS)}")
    if not directions or not strengths or not all(math.isfinite(s) for s in strengths):
        raise ValueError(f"a steering operation needs directions and finite strengths, strength {strength} was given")
    if len({len(directions), len(strengths)} - {1}) > 1:
        raise ValueError(
            f"{len(directions)} directions and {len(strengths)} strengths: give one, or one a row, of each"
        )
    if len({(d.hook, len(d.vector)) for d in directions}) > 1:
        raise ValueError("the directions of one operation lie at one hook point; use several operations")
    for d in directions:
        if d.norm is None:
            raise DirectionError("this direction has no unit of strength: give it one by for_model(model, force=True)")
    return Operation(directions=directions, strengths=strengths, positions=positions)


@contextmanager
def steer(model: Any, *operations: Operation, force: bool = False) -> Iterator[Model]:
    """Apply operations in every forward of a model inside the context; they follow each other in the order given.

    The model is an interp Model, a Hugging Face model or a TransformerBridge, and is used as ever: forward, generate
    (any cache, beams, left pads), pipelines. Contexts nest. A strength of 0 changes no bit, nor does leaving the
    context, by an exception too. Additions are made in float32 at least and cast back.
    A key-value cache filled inside stays steered: do not use it after.
    Raises DirectionError for directions of another model (unless forced), width or hook point; inside, ValueError for
    a batch that does not fit the rows of an operation, or for positions that need a prompt where there is no generate.
    """
    model = _ACTIVE.get(id(model)) or as_model(model)
    edits: dict[str, list[Callable]] = {}
    for operation in operations:
        delta = operation.delta(model, force)
        if bool(delta.any()):  # 0 is left out altogether: -0.0 + 0.0 would flip a bit
            edits.setdefault(model.hook_point(operation.directions[0].hook).name, []).append(_edit(operation, delta))
    if not edits:
        yield model
        return
    outer = _ACTIVE.get(id(model.hf))
    _ACTIVE[id(model.hf)] = model
    try:
        with editing(model, edits):
            yield model
    finally:
        if outer is None:
            del _ACTIVE[id(model.hf)]


def _edit(operation: Operation, delta: Float[Tensor, "rows d"]) -> Callable[[Tensor, Clock], Tensor]:
    moving = delta.any(1)
    ready: dict[tuple, tuple[Tensor, Tensor]] = {}  # by device, dtype and batch: not copied again at every token

    def edit(value: Tensor, clock: Clock) -> Tensor:
        chosen = _chosen(operation.positions, clock)
        if chosen is None:
            return value
        wide = torch.promote_types(value.dtype, torch.float32)
        key = (value.device, wide, len(value))
        if key not in ready:
            times = _times(len(delta), len(value), clock)
            rows = [repeat(x.to(value.device), "rows ... -> (rows times) ...", times=times) for x in (delta, moving)]
            ready[key] = rows[0].to(wide)[:, None], rows[1][:, None]
        step, moves = ready[key]
        moved = (value.to(wide) + step).to(value.dtype)
        return torch.where((chosen & moves)[..., None], moved, value)

    return edit


def _chosen(positions: str, clock: Clock) -> Bool[Tensor, "b q"] | None:
    """Return which tokens of a pass are steered, None where by their columns none can be."""
    width = clock.prompt_width
    if positions == "all":
        return clock.mask & ~clock.special
    if width is None:
        raise ValueError(
            f"positions {positions!r} needs the prompt's width, which only generate gives; use 'all' in a plain forward"
        )
    end = clock.past + len(clock.columns)  # on the host: asking the tensor would stall a GPU at every token
    if (positions == "prompt" and clock.past >= width) or (positions == "generated" and end <= width):
        return None
    return clock.mask & ~clock.special & POSITIONS[positions](clock.columns, width)


def _times(rows: int, batch: int, clock: Clock) -> int:
    """Return how often each row of an operation stands in the batch (1 also where one row broadcasts)."""
    if rows in (1, batch):
        return 1
    if clock.prompt_width is None or batch % rows:
        raise ValueError(
            f"the operation carries {rows} rows, the batch has {batch}: give one row a prompt, or one in all"
        )
    return batch // rows


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
    operations: Operation | Sequence[Operation],
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 20,
) -> bool:
    """Tell whether greedy steered generation gives the same tokens with a key-value cache as without one."""
    model = as_model(model)
    each = [operations] if isinstance(operations, Operation) else list(operations)
    with steer(model, *each):
        cached, uncached = (generate_ids(model, prompts, max_new_tokens, use_cache=use) for use in (True, False))
    return torch.equal(cached, uncached)


def _fill(model: Model) -> int:
    return pad_id(model.tokenizer if model.tokenizer is not None else model.hf.config)
