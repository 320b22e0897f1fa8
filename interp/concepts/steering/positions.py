"""Which tokens of a forward pass an operation acts on: the same ones with a cache, without, in chunks and in beams."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.model.clock import Clock

__all__ = ["FROM_PROMPT_END", "POSITIONS", "Positions", "Window", "check_positions", "selector", "window"]


@dataclass(frozen=True)
class Window:
    """Real tokens whose absolute position p has start <= p < stop, counted from the first real token of each row."""

    start: int
    stop: int | None = None  # None: to the end


Positions: TypeAlias = str | Window | Tensor
Chosen: TypeAlias = Tensor | bool  # [b, q] or [q]; True: every column of the pass, False: none


def window(start: int, stop: int | None = None) -> Window:
    """Return the positions start <= p < stop (to the end without one); pads are not counted, BOS is position 0.

    Raises ValueError for an empty or negative one.
    """
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"the window {start} to {stop} is empty; give 0 <= start < stop")
    return Window(start, stop)


def _width(clock: Clock, name: str) -> int:
    if clock.prompt_width is None:
        raise ValueError(
            f"positions {name!r} needs the prompt's width, which only generate gives; in a plain forward use "
            "'default', 'all', window(...) or a mask"
        )
    return clock.prompt_width


def _from(clock: Clock, column: int) -> Chosen:
    """Return which columns of the pass are at `column` or after it; asked on the host, which costs a GPU nothing."""
    if clock.past >= column:
        return True
    return False if clock.end <= column else clock.columns >= column


def _prompt(clock: Clock) -> Chosen:
    width = _width(clock, "prompt")
    if clock.past >= width:
        return False
    return True if clock.end <= width else clock.columns < width


def _last_prompt_token(clock: Clock) -> Chosen:
    last = _width(clock, "last_prompt_token") - 1
    if not clock.past <= last < clock.end:
        return False
    return True if clock.shape[1] == 1 else clock.columns == last


POSITIONS: dict[str, Callable[[Clock], Chosen]] = {
    "default": lambda clock: True if clock.prompt_width is None else _from(clock, clock.prompt_width - 1),
    "all": lambda clock: True,
    "prompt": _prompt,
    "last_prompt_token": _last_prompt_token,
    "from_last_prompt_token": lambda clock: _from(clock, _width(clock, "from_last_prompt_token") - 1),
    "generated": lambda clock: _from(clock, _width(clock, "generated")),
}
FROM_PROMPT_END = ("default", "last_prompt_token", "from_last_prompt_token", "generated")


def check_positions(positions: Positions) -> Positions:
    """Return positions as they are. Raises ValueError for what is none."""
    if isinstance(positions, Window) or (isinstance(positions, str) and positions in POSITIONS):
        return positions
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2) or positions.numel() == 0:
            raise ValueError(
                f"a mask of positions is a boolean tensor [columns] or [rows, columns]; {positions.dtype} "
                f"{tuple(positions.shape)} was given"
            )
        return positions
    raise ValueError(f"positions is {positions!r}; it is one of {', '.join(POSITIONS)}, window(...) or a boolean mask")


def selector(positions: Positions) -> Callable[[Clock], Chosen]:
    """Return the function that tells which tokens of a pass are chosen.

    Pads never are; special tokens (BOS, EOS, ...) only where a mask names them. A mask covers the columns of the padded
    row from the first; what lies beyond it is not chosen.
    """
    if isinstance(positions, Tensor):
        mask, ready = positions, {}

        def by_mask(clock: Clock) -> Chosen:
            where = _slice(mask, clock, ready)
            return where if where is False or clock.all_real else where & clock.mask

        return by_mask
    if isinstance(positions, Window):
        return lambda clock: _shared(positions, clock, lambda: _ordinary(_in_window(positions, clock), clock))
    rule = POSITIONS[positions]
    return lambda clock: _shared(positions, clock, lambda: _ordinary(rule(clock), clock))


def repeated(rows: Tensor, clock: Clock, what: str) -> Tensor:
    """Return a tensor of one row a prompt with one row a row of the batch: beams and sequences follow their prompt.

    A single row stands for all. Raises ValueError where the counts do not fit.
    """
    n, batch = len(rows), clock.shape[0]
    if n in (1, batch):
        return rows
    if clock.prompt_width is None or batch % n:
        raise ValueError(f"{what} carries {n} rows, the batch has {batch}: give one row a prompt, or one in all")
    return rows.repeat_interleave(batch // n, dim=0)


def _shared(key: object, clock: Clock, find: Callable[[], Chosen]) -> Chosen:
    """Return what all operations with the same positions share in a pass."""
    found = clock.memo.get(key)
    if found is None:
        found = clock.memo[key] = find()
    return found


def _ordinary(where: Chosen, clock: Clock) -> Chosen:
    if where is False or (ordinary := clock.ordinary) is None:
        return where
    return ordinary if where is True else ordinary & where


def _in_window(given: Window, clock: Clock) -> Chosen:
    after = clock.positions >= given.start
    return after if given.stop is None else after & (clock.positions < given.stop)


def _slice(mask: Bool[Tensor, "..."], clock: Clock, ready: dict) -> Chosen:
    width = mask.shape[-1]
    if clock.past >= width:
        return False
    key = (clock.device, clock.shape[0])
    if key not in ready:
        rows = mask[None] if mask.ndim == 1 else mask
        ready[key] = repeated(rows, clock, "the mask of positions").to(clock.device)
    part = ready[key][:, clock.past : clock.end]
    beyond = clock.end - max(width, clock.past)
    return part if beyond <= 0 else torch.nn.functional.pad(part, (0, beyond))
