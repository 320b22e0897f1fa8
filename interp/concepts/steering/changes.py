"""The mathematics of steering operations: functions of the stream, and the tensors that they need, made once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.acts.direction import Direction, DirectionError, residual_norm
from interp.model.hooks import HookPoint
from interp.model.loading import Model

if TYPE_CHECKING:
    from interp.concepts.steering.operations import Operation

__all__ = ["KINDS", "Change", "Site", "orthonormal"]

DEPENDENT = 1e-5  # of a unit vector left after the others are taken out: below it is float32 rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What an operation does at one hook point: value -> fn(value, *rows, *shared), or value + rows[0] without fn.

    Each of `rows` is [rows, 1, ...]: one row in all, or one a prompt. `shared` is the same for all rows. `moves` tells
    the rows that change at all: the others keep every bit. Tensors are float64 on the CPU until they are used.
    """

    fn: Callable[..., Float[Tensor, "b q d"]] | None
    rows: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()
    moves: Bool[Tensor, " rows"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """Where an operation is about to act."""

    model: Model
    point: HookPoint
    fingerprint: str
    force: bool

    def check(self, direction: Direction, named: bool) -> None:
        """Raise DirectionError for a direction of another width, model or hook point.

        With `named` the operation names its hook points itself, so that another than the direction's is meant; with
        `force` another model is, too.
        """
        if direction.hook and not named and self.model.hook_point(direction.hook).name != self.point.name:
            raise DirectionError(f"{direction.hook} is not {self.point.name}")
        wrong_width = len(direction.vector) != self.point.d
        if wrong_width or not (self.force or direction.model == self.fingerprint):
            direction.for_model(self.model, hook=self.point.name if named else None)  # raises, and says why

    def unit(self, direction: Direction) -> float:
        """Return the unit of strength: the direction's own at its hook point, that of the hook point elsewhere."""
        if direction.model == self.fingerprint and direction.hook == self.point.name and direction.norm is not None:
            return direction.norm
        return residual_norm(self.model, self.point.name)


def orthonormal(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    """Return an orthonormal basis of what vectors span, in their order (Gram-Schmidt, float64), dependent ones dropped.

    The first is the first vector's own direction. Raises ValueError where nothing is left.
    """
    basis: list[Tensor] = []
    for vector in vectors.double():
        length = vector.norm()
        rest = vector / length if length > 0 else vector
        for _ in range(2):  # once leaves rounding along the others
            for q in basis:
                rest = rest - (rest @ q) * q
        if rest.norm() > DEPENDENT:
            basis.append(rest / rest.norm())
    if not basis:
        raise ValueError("there is no direction other than 0")
    return torch.stack(basis)


def along(h: Float[Tensor, "b q d"], u: Float[Tensor, "rows _ d"]) -> Float[Tensor, "b q 1"]:
    """Return the coordinate along a unit vector: one for all rows, or one a row."""
    return h @ u[0].t() if len(u) == 1 else (h * u).sum(-1, keepdim=True)


def _column(values: Sequence[float]) -> Float[Tensor, "rows 1 1"]:
    return torch.tensor(list(values), dtype=torch.float64)[:, None, None]


def _vectors(directions: Sequence[Direction]) -> Float[Tensor, "rows 1 d"]:
    return torch.stack([d.vector for d in directions]).double()[:, None]


def _moves(*amounts: Tensor) -> Bool[Tensor, " rows"]:
    """Return which rows have no amount of 0."""
    moving = torch.ones(1, dtype=torch.bool)
    for amount in amounts:
        moving = moving & (amount != 0).flatten(1).any(1)
    return moving


def added(op: "Operation", site: Site) -> Change:
    """h + strength * unit * v; with keep_norm rescaled to the length of h, each token by itself."""
    units = {id(d): site.unit(d) for d in op.directions}
    length = _column(op.strengths) * _column([units[id(d)] for d in op.directions])
    # -0.0, not 0.0, leaves every bit of what it is added to
    step = torch.where(length == 0, -0.0, length * _vectors(op.directions))

    def kept(h: Tensor, step: Tensor) -> Tensor:
        new = h + step
        return new * (h.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(1e-30))

    return Change(fn=kept if op.options.get("keep_norm") else None, rows=(step,), moves=_moves(length))


def ablated(op: "Operation", site: Site) -> Change:
    """h - strength * Q Qᵀ h for an orthonormal basis Q; one-sided: only what lies on that side of 0 is taken off."""
    basis, strength = orthonormal(torch.stack([d.vector for d in op.directions])), _column(op.strengths)
    side = op.options["side"]
    if len(basis) > 1:

        def project(h: Tensor, strength: Tensor, q: Tensor) -> Tensor:
            return h - (strength * (h @ q.t())) @ q

        return Change(fn=project, rows=(strength,), shared=(basis,), moves=_moves(strength))

    def take_off(h: Tensor, minus: Tensor, u: Tensor) -> Tensor:
        return torch.addcmul(h, _one_side(h @ u.t(), side), minus)

    return Change(fn=take_off, rows=(-strength * basis[None],), shared=(basis,), moves=_moves(strength))


def _one_side(x: Tensor, side: str) -> Tensor:
    return x if side == "both" else x.clamp_min(0) if side == "positive" else x.clamp_max(0)


def clamped(op: "Operation", site: Site) -> Change:
    """h + strength * (value - h·u) u; one-sided: only where h·u lies below (min) or above (max) it."""
    side = {"both": "both", "min": "positive", "max": "negative"}[op.options["side"]]

    def clamp(h: Tensor, u: Tensor, value: Tensor, strength: Tensor) -> Tensor:
        return torch.addcmul(h, strength * _one_side(value - along(h, u), side), u)

    strength = _column(op.strengths)
    rows = (_vectors(op.directions), _column(op.options["values"]), strength)
    return Change(fn=clamp, rows=rows, moves=_moves(strength))


def rotated(op: "Operation", site: Site) -> Change:
    """h turned in a plane, its length kept: by an angle, or until it stands at one."""
    angle, strength = torch.deg2rad(_column(op.options["angles"])), _column(op.strengths)
    aim = op.options["to"]
    basis = orthonormal(torch.stack([d.vector for d in op.directions]))
    turn = _in_plane if len(op.directions) == 2 else _towards

    def rotate(h: Tensor, angle: Tensor, strength: Tensor, basis: Tensor) -> Tensor:
        return turn(h, angle, strength, basis, aim)

    moves = _moves(strength) if aim else _moves(strength, angle)
    return Change(fn=rotate, rows=(angle, strength), shared=(basis,), moves=moves)


def _in_plane(h: Tensor, angle: Tensor, strength: Tensor, basis: Tensor, aim: bool) -> Tensor:
    at = h @ basis.t()
    x, y = at[..., :1], at[..., 1:]
    if aim:  # the shorter way round
        gap = angle - torch.atan2(y, x)
        angle = torch.atan2(gap.sin(), gap.cos())
    turn = strength * angle
    cos, sin = turn.cos(), turn.sin()
    return h + (torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1) - at) @ basis


def _towards(h: Tensor, angle: Tensor, strength: Tensor, basis: Tensor, aim: bool) -> Tensor:
    """Turn in the plane of h itself and the direction; a row along the direction spans none and stays."""
    x = h @ basis.t()
    across = h - x * basis
    y = across.norm(dim=-1, keepdim=True)
    turn = strength * (angle - torch.atan2(y, x) if aim else -angle)
    cos, sin = turn.cos(), turn.sin()
    new = (x * cos - y * sin) * basis + (x * sin / y.clamp_min(1e-30) + cos) * across
    return torch.where(y > 0, new, h)


def mapped(op: "Operation", site: Site) -> Change:
    """h + strength * (h A + bias) B."""
    A, B, bias = (op.options[name].double() for name in ("A", "B", "bias"))
    if A.shape[0] != site.point.d:
        raise ValueError(f"the map reads width {A.shape[0]}, {site.point.name} has {site.point.d}")

    def move(h: Tensor, strength: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return h + strength * ((h @ A + bias) @ B)

    strength = _column(op.strengths)
    return Change(fn=move, rows=(strength,), shared=(A, B, bias), moves=_moves(strength))


def written(op: "Operation", site: Site) -> Change:
    """h + strength * (decode(c) - decode(a)), a the latents of h and c the edited ones."""
    sae, cols = op.options["sae"], op.options["latents"]
    if site.point.d != sae.d_in:
        raise ValueError(f"the SAE reads width {sae.d_in}, {site.point.name} has {site.point.d}")
    delta = _Decoded(sae, cols, op.options["values"], op.options["mode"])
    strength = _column(op.strengths)
    return Change(
        fn=lambda h, strength: h + strength * delta(h), rows=(strength,), moves=_moves(strength) & bool(len(cols))
    )


class _Decoded:
    """The decoder's difference for some latents: only their columns and rows are read where no others compete."""

    def __init__(self, sae: Any, cols: Sequence[int], values: Sequence[float], mode: str) -> None:
        self.mode, self.cols = mode, torch.tensor(list(cols), dtype=torch.long, device=sae.enc.device)
        self.sae = sae if sae.compares else _part(sae, self.cols)
        self.whole = bool(sae.compares)
        self.rows = sae.W_dec.detach()[self.cols].clone()
        self.values = torch.tensor(list(values), dtype=self.rows.dtype, device=self.rows.device)
        self.normed = sae.config.input_norm == "layer_norm"

    def __call__(self, h: Float[Tensor, "b q d"]) -> Float[Tensor, "b q d"]:
        x = h.to(self.rows.device, self.rows.dtype)
        before = self.sae.encode(x)
        if self.whole:
            before = before[..., self.cols]
        if self.mode == "min":
            change = (self.values - before).clamp_min(0)
        elif self.mode == "scale":
            change = before * (self.values - 1)
        else:
            change = self.values - before
        delta = change @ self.rows
        if self.normed:  # what is decoded is put back in the token's own scale
            delta = delta * x.std(-1, keepdim=True)
        return delta.to(h.device, h.dtype)


def _part(sae: Any, cols: Tensor) -> Any:
    """Return an SAE of some latents of another; each is active by itself, whatever the others are."""
    import copy

    from sae.archs.base import PER_LATENT

    part = copy.copy(sae)
    part._parameters, part._buffers = dict(sae._parameters), dict(sae._buffers)
    for name in PER_LATENT:
        held = getattr(sae, name, None)
        if isinstance(held, torch.nn.Parameter):
            part._parameters[name] = torch.nn.Parameter(held.detach()[cols].clone(), requires_grad=False)
        elif held is not None:
            part._buffers[name] = held[cols].clone()
    return part


KINDS: dict[str, Callable[["Operation", Site], Change]] = {
    "add": added,
    "ablate": ablated,
    "clamp": clamped,
    "rotate": rotated,
    "low_rank": mapped,
    "latents": written,
}
