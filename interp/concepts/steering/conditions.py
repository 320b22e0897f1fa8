"""Conditions: an operation fires for the rows in which a probe says so, without a branch that waits for the answer."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.acts.direction import Direction, as_rows
from interp.concepts.steering.positions import repeated
from interp.model.clock import Clock

__all__ = ["READS", "Condition", "Gate", "when"]

READS = ("last", "mean", "max", "token")


@runtime_checkable
class Reader(Protocol):
    """A linear reader of the stream, as Probe is."""

    weight: Tensor
    bias: float

    def direction(self) -> Direction: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """Fires where h · weight + bias lies above the threshold (below it, where `below` is set).

    `read`: "last", "mean" and "max" decide once for a row, on its prompt's last token or on all its ordinary tokens;
    "token" decides for each token by itself.
    """

    weight: Float[Tensor, " d"]  # float64
    bias: float
    threshold: float
    hook: str
    read: str
    below: bool
    origin: Direction  # whose model and hook point it belongs to
    named: bool  # whether the hook point was given beside it


def when(
    reader: Direction | Reader,
    threshold: float | int | None = None,
    *,
    fpr: float | int | None = None,
    negatives: Float[Tensor, "n d"] | Float[np.ndarray, "n d"] | None = None,
    hook: str | None = None,
    read: str = "last",
    below: bool = False,
) -> Condition:
    """Return the condition under which an operation fires: `add(direction, 0.5, when=when(probe, fpr=0.01, ...))`.

    The score is a probe's decision, or the coordinate along a direction in residual-stream units. Its threshold is
    given, or the lowest at which at most a share `fpr` of `negatives` (rows of the same hook point, read in the same
    way) fires; a probe's is 0 otherwise. The decision is made for each row by itself; `read` says on what. On a prompt
    it is made once and kept for the generation; beams follow their prompt. In a plain forward the row is the prompt.
    What is read is the stream as the operations listed before have left it.
    Raises ValueError for a direction without a threshold, a share that the negatives are too few to show, or an
    unknown reading.
    """
    if read not in READS:
        raise ValueError(f"read is {read!r}; it is one of {', '.join(READS)}")
    if isinstance(reader, Direction):
        weight, bias, origin = reader.vector.double(), 0.0, reader
    else:
        weight, bias, origin = reader.weight.detach().cpu().double(), float(reader.bias), reader.direction()
    if (fpr is None) != (negatives is None) or (fpr is not None and threshold is not None):
        raise ValueError("give a threshold, or fpr together with negatives")
    if fpr is not None and negatives is not None:
        threshold = _threshold(as_rows(negatives).double() @ weight + bias, float(fpr), below)
    elif threshold is None and isinstance(reader, Direction):
        raise ValueError("a direction says nothing of where to fire: give a threshold, or fpr and negatives")
    level = 0.0 if threshold is None else float(threshold)
    if not np.isfinite(level):
        raise ValueError(f"the threshold is {level}; it must be finite")
    return Condition(
        weight=weight,
        bias=bias,
        threshold=level,
        hook=hook or origin.hook,
        read=read,
        below=below,
        origin=origin,
        named=hook is not None,
    )


def _threshold(scores: Float[Tensor, " n"], fpr: float, below: bool) -> float:
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr is {fpr}; it is a share of the negatives, 0 <= fpr < 1")
    n = len(scores)
    if 0 < fpr * n < 1:
        raise ValueError(f"{n} negatives cannot show a share of {fpr}: give at least {int(np.ceil(1 / fpr))}")
    rising = (-scores if below else scores).sort().values
    level = float(rising[n - int(np.floor(fpr * n + 1e-9)) - 1])  # firing is strict: at most that many lie above
    return -level if below else level


class Gate:
    """What a condition has decided for the rows of a batch, kept while they are continued."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self.fires: Bool[Tensor, "b _"] | None = None  # [b, 1], or [b, q] where each token decides
        self._generation: int | None = None
        self._best: Tensor | None = None  # highest score, sum and count of a row's ordinary tokens so far
        self._sum: Tensor | None = None
        self._count: Tensor | None = None
        self._ready: dict[tuple, Tensor] = {}

    def note(self, value: Float[Tensor, "b q d"], clock: Clock) -> Tensor:
        """Decide, from the stream at the condition's hook point; the value stays as it is."""
        read = self.condition.read
        if read == "token":
            self.fires = self._over(self._score(value))
        elif clock.prompt_width is None:
            self._read_row(self._score(value), clock)
        else:
            self._follow(value, clock, clock.prompt_width)
        return value

    def open(self, clock: Clock) -> Bool[Tensor, "b _"]:
        """Return which rows, or tokens, of a pass are acted on."""
        if self.fires is None:
            raise RuntimeError(f"the condition at {self.condition.hook} has not been read before it is needed")
        fires = self.fires if self.fires.device == clock.device else self.fires.to(clock.device)
        return repeated(fires, clock, "the condition")

    def _score(self, value: Tensor) -> Float[Tensor, "b q"]:
        wide = torch.promote_types(value.dtype, torch.float32)
        key = (value.device, wide)
        if key not in self._ready:
            self._ready[key] = self.condition.weight.to(*key)
        return value.to(wide) @ self._ready[key] + self.condition.bias

    def _over(self, score: Tensor) -> Tensor:
        level = self.condition.threshold
        return score < level if self.condition.below else score > level

    def _read_row(self, score: Tensor, clock: Clock) -> None:
        """Decide on the rows of a plain forward."""
        if self.condition.read == "last":
            last = clock.positions.argmax(1, keepdim=True)  # -1 on pads
            self.fires = self._over(score.gather(1, last))
            return
        self._forget()
        self._take(score, clock.mask & ~clock.special)
        self.fires = self._over(self._reduced())

    def _follow(self, value: Tensor, clock: Clock, width: int) -> None:
        """Take in what a pass of generate shows of the prompt, and decide once it has been seen whole."""
        if clock.generation != self._generation:
            self._generation, self.fires = clock.generation, None
            self._forget()
        stop = min(clock.end, width)
        if self.fires is not None or stop <= clock.past:
            return
        part = slice(stop - clock.past)
        score = self._score(value[:, part])
        if self.condition.read != "last":
            self._take(score, (clock.mask & ~clock.special)[:, part])
        if stop == width:
            self.fires = self._over(score[:, -1:] if self.condition.read == "last" else self._reduced())

    def _forget(self) -> None:
        self._best = self._sum = self._count = None

    def _take(self, score: Tensor, ordinary: Tensor) -> None:
        best = score.masked_fill(~ordinary, float("-inf")).amax(1, keepdim=True)
        total, count = (score * ordinary).sum(1, keepdim=True), ordinary.sum(1, keepdim=True)
        self._best = best if self._best is None else torch.maximum(self._best, best)
        self._sum = total if self._sum is None else self._sum + total
        self._count = count if self._count is None else self._count + count

    def _reduced(self) -> Float[Tensor, "b 1"]:
        """Return the score of each row; nan, which fires nowhere, for one without an ordinary token."""
        assert self._best is not None and self._sum is not None and self._count is not None
        mean = self._sum / self._count
        return mean if self.condition.read == "mean" else torch.where(self._count > 0, self._best, mean)
