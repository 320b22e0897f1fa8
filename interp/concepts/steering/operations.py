"""Steering operations: plain functions that return what is done to the stream, where, how strongly and when."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.direction import Direction, DirectionError
from interp.concepts.steering.changes import KINDS, Change, Site, orthonormal
from interp.concepts.steering.conditions import Condition
from interp.concepts.steering.positions import FROM_PROMPT_END, Positions, check_positions
from interp.model.hooks import HookPoint, expand
from interp.model.loading import Model
from sae.archs.base import SAE

__all__ = [
    "EVERYWHERE",
    "Operation",
    "Plan",
    "ablate",
    "add",
    "as_operations",
    "clamp",
    "latents",
    "loreft",
    "low_rank",
    "rotate",
]

EVERYWHERE = ("resid_pre.*", "attn_out.*", "mlp_out.*")  # all that blocks read and write (arXiv:2406.11717)
MODES = ("set", "scale", "ablate", "min")
Hooks: TypeAlias = str | Sequence[str] | None
Amount: TypeAlias = float | int | Sequence[float | int] | Tensor  # one for all rows, or one a row


@dataclass(frozen=True, kw_only=True, eq=False)
class Operation:
    """What is done to the stream, where, how strongly, on which tokens and under which condition.

    Rows are prompts: what has one value a row fits a batch of so many prompts, and beams and returned sequences follow
    theirs. `options` are those of the kind: keep_norm of add; side of ablate; values, side of clamp; angles (degrees),
    to of rotate; A, B, bias of low_rank; sae, latents, values, mode of latents.
    """

    kind: str  # a name in interp.concepts.steering.changes.KINDS
    directions: tuple[Direction, ...] = ()
    strengths: tuple[float, ...] = (1.0,)  # 1, or one a row
    positions: Positions = "default"
    hooks: tuple[str, ...] = ()  # names or globs; (): the directions' own hook point
    when: Condition | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positions(self.positions)
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        if not self.strengths or not all(math.isfinite(s) for s in self.strengths):
            raise ValueError(f"a steering operation needs finite strengths, {self.strengths} were given")
        if len({d.hook for d in self.directions}) > 1 and not self.hooks:
            raise ValueError(
                "the directions of one operation lie at one hook point; name it, or use several operations"
            )
        if len({len(d.vector) for d in self.directions}) > 1:
            raise ValueError("the directions of one operation have one width")
        early = not (isinstance(self.positions, str) and self.positions in FROM_PROMPT_END)
        if self.when is not None and self.when.read != "token" and early:
            raise ValueError(
                "a condition decided on the prompt is known from the prompt's last token on: positions are one of "
                f"{', '.join(FROM_PROMPT_END)}; or let the condition read each token (read='token')"
            )

    def points(self, model: Model) -> list[HookPoint]:
        """Return the hook points that it acts at. Raises HookPointError, DirectionError."""
        if self.hooks:
            return [model.hook_point(name) for name in expand(model, self.hooks)]
        direction = self.directions[0]
        return [model.hook_point(direction.hook or direction.for_model(model).hook)]

    def change(self, site: Site) -> Change:
        """Return its mathematics at one hook point. Raises DirectionError as Direction.for_model does, ValueError."""
        for direction in {id(d): d for d in self.directions}.values():
            site.check(direction, named=bool(self.hooks))
        return KINDS[self.kind](self, site)


Plan: TypeAlias = Operation | Iterable[Any]  # operations, and plans of them


def as_operations(*given: Plan) -> tuple[Operation, ...]:
    """Return operations, and those of plans (any iterables of them), as one flat tuple. Raises TypeError for others."""
    found: list[Operation] = []
    for one in given:
        if isinstance(one, Operation):
            found.append(one)
        elif isinstance(one, Iterable) and not isinstance(one, (str, bytes, Mapping)):
            found.extend(as_operations(*one))
        else:
            raise TypeError(
                f"a {type(one).__name__} is no steering operation; add(...), ablate(...) and others make one"
            )
    return tuple(found)


def add(
    direction: Direction | Sequence[Direction],
    strength: Amount,
    positions: Positions = "default",
    *,
    hooks: Hooks = None,
    when: Condition | None = None,
    keep_norm: bool = False,
) -> Operation:
    """Return the operation h + strength * unit * vector, at the direction's hook point or at `hooks`.

    `strength` is in units of the median residual norm there, 1 of them for all rows of a batch or one a row; so may
    directions be, which then share one hook point. With `keep_norm` each token keeps its length. `positions`: see
    steering.positions; "default" is from the prompt's last token on in generate, every token in a plain forward. Pads
    are never touched, special tokens (BOS, EOS) only where a mask names them.
    Raises ValueError for what means nothing, DirectionError for a direction without a unit.
    """
    directions, strengths = _directions(direction), _amounts(strength, "strength")
    _check_rows(directions=directions, strengths=strengths)
    for d in directions:
        if d.norm is None and hooks is None:
            raise DirectionError("this direction has no unit of strength: give it one by for_model(model, force=True)")
    return Operation(
        kind="add",
        directions=directions,
        strengths=strengths,
        positions=positions,
        hooks=_hooks(hooks),
        when=when,
        options={"keep_norm": keep_norm},
    )


def ablate(
    direction: Direction | Sequence[Direction],
    strength: Amount = 1.0,
    positions: Positions = "default",
    *,
    hooks: Hooks = None,
    side: str = "both",
    when: Condition | None = None,
) -> Operation:
    """Return the operation h - strength * (projection of h on the directions): 1 takes all of it away, 0 nothing.

    Several directions are taken out together: made orthonormal, dependent ones dropped. `hooks=EVERYWHERE` is what
    blocks read and write (Arditi et al., arXiv:2406.11717). `side` "positive" or "negative" takes off what lies on
    that side alone, h - relu(h·u) u; of one direction.
    Raises ValueError for a strength outside [0, 1] or an unknown side.
    """
    directions, strengths = _directions(direction), _shares(strength)
    _check_choice("side", side, ("both", "positive", "negative"))
    if side != "both" and len(directions) > 1:
        raise ValueError(f"one-sided ablation takes one direction, {len(directions)} were given; use an operation each")
    return Operation(
        kind="ablate",
        directions=directions,
        strengths=strengths,
        positions=positions,
        hooks=_hooks(hooks),
        when=when,
        options={"side": side},
    )


def clamp(
    direction: Direction | Sequence[Direction],
    value: Amount | str,
    strength: Amount = 1.0,
    positions: Positions = "default",
    *,
    hooks: Hooks = None,
    side: str = "both",
    when: Condition | None = None,
) -> Operation:
    """Return the operation h + strength * (value - h·u) u: the coordinate along u is set, all others stay.

    `value` is in residual-stream units, one for all rows or one a row; "positive" and "negative" are the direction's
    own class means. `side` "min" raises what lies below the value and "max" lowers what lies above it, nothing else.
    Raises ValueError for a strength outside [0, 1], DirectionError for a direction without class means.
    """
    directions, strengths = _directions(direction), _shares(strength)
    _check_choice("side", side, ("both", "min", "max"))
    values = _class_means(directions, value) if isinstance(value, str) else _amounts(value, "value")
    _check_rows(directions=directions, values=values, strengths=strengths)
    return Operation(
        kind="clamp",
        directions=directions,
        strengths=strengths,
        positions=positions,
        hooks=_hooks(hooks),
        when=when,
        options={"values": values, "side": side},
    )


def rotate(
    direction: Direction,
    angle: Amount,
    second: Direction | None = None,
    *,
    to: bool = False,
    strength: Amount = 1.0,
    positions: Positions = "default",
    hooks: Hooks = None,
    when: Condition | None = None,
) -> Operation:
    """Return the operation that turns h in a plane by `angle` degrees; its length, and all outside the plane, stay.

    With `second` the plane is that of the two directions, turned from the first towards the second; alone, that of h
    and the direction, turned towards it. `to`: h is turned until the angle of its part in the plane to the first
    direction is `angle`. `strength` multiplies the turn. Angles and strengths: one for all rows, or one a row.
    Raises ValueError for two directions that span no plane.
    """
    directions = (direction,) if second is None else (direction, second)
    angles, strengths = _amounts(angle, "angle"), _amounts(strength, "strength")
    _check_rows(angles=angles, strengths=strengths)
    if len(directions) == 2 and len(orthonormal(torch.stack([d.vector for d in directions]))) < 2:
        raise ValueError("the two directions are one line and span no plane to turn in")
    return Operation(
        kind="rotate",
        directions=directions,
        strengths=strengths,
        positions=positions,
        hooks=_hooks(hooks),
        when=when,
        options={"angles": angles, "to": to},
    )


def low_rank(
    A: Float[Tensor, "d rank"],
    B: Float[Tensor, "_ _"],
    hooks: Hooks,
    bias: Float[Tensor, " _"] | None = None,
    strength: Amount = 1.0,
    positions: Positions = "default",
    *,
    when: Condition | None = None,
) -> Operation:
    """Return the operation h + strength * (h A + bias) B, bias [rank] and B [rank, d].

    Raises ValueError for shapes that do not fit.
    """
    bias = torch.zeros(A.shape[-1]) if bias is None else bias
    if A.ndim != 2 or B.shape != A.shape[::-1] or bias.shape != A.shape[1:]:
        shapes = [tuple(t.shape) for t in (A, B, bias)]
        raise ValueError(
            f"A is [d, rank], B [rank, d] and bias [rank]; {shapes[0]}, {shapes[1]}, {shapes[2]} were given"
        )
    options = {name: t.detach().cpu().clone() for name, t in (("A", A), ("B", B), ("bias", bias))}
    return Operation(
        kind="low_rank",
        strengths=_amounts(strength, "strength"),
        positions=positions,
        hooks=_needed(hooks),
        when=when,
        options=options,
    )


def loreft(
    R: Float[Tensor, "rank d"], W: Float[Tensor, "rank d"], b: Float[Tensor, " rank"], hooks: Hooks, **more: Any
) -> Operation:
    """Return LoReFT's operation h + Rᵀ (W h + b - R h) (arXiv:2404.03592, eq. 2); `more` as in low_rank."""
    return low_rank((W - R).t(), R, hooks, b, **more)


def latents(
    sae: SAE,
    values: Mapping[int, float | int] | Iterable[int],
    hooks: Hooks = None,
    mode: str = "set",
    strength: Amount = 1.0,
    positions: Positions = "default",
    *,
    when: Condition | None = None,
) -> Operation:
    """Return the operation h + strength * (decode(c) - decode(a)): a the SAE's latents of h, c those with some edited.

    What the SAE misses stays exactly, and without a latent nothing happens at all. `mode`: "set" to the value, "scale"
    by it, "ablate" (to 0; latents alone are given), "min": raised to it where it is lower. The hook point is the SAE's
    own (metadata hook_name) unless given. The SAE is copied in part: what it learns later is not seen.
    Raises ValueError for a transcoder or crosscoder, latents that it does not have, or values that are not finite.
    """
    _check_choice("mode", mode, MODES)
    if sae.config.transcoder or sae.config.n_sites > 1:
        raise ValueError(
            "this SAE writes elsewhere than it reads (a transcoder or crosscoder): it cannot edit a stream"
        )
    if mode != "ablate" and not isinstance(values, Mapping):
        raise ValueError(f"mode {mode!r} needs {{latent: value}}")
    pairs = dict(values) if isinstance(values, Mapping) and mode != "ablate" else dict.fromkeys(values, 0.0)
    wrong = [i for i in pairs if not 0 <= int(i) < sae.d_sae]
    if wrong or not all(math.isfinite(v) for v in pairs.values()):
        raise ValueError(f"latents are 0 to {sae.d_sae - 1} with finite values; {pairs} was given")
    return Operation(
        kind="latents",
        strengths=_amounts(strength, "strength"),
        positions=positions,
        hooks=_needed(hooks or sae.config.metadata.get("hook_name")),
        when=when,
        options={
            "sae": sae,
            "latents": tuple(int(i) for i in pairs),
            "values": tuple(float(v) for v in pairs.values()),
            "mode": mode,
        },
    )


def _directions(given: Direction | Sequence[Direction]) -> tuple[Direction, ...]:
    directions = (given,) if isinstance(given, Direction) else tuple(given)
    if not directions or not all(isinstance(d, Direction) for d in directions):
        raise ValueError("a steering operation needs one direction or more, each a Direction")
    return directions


def _amounts(given: Amount, what: str) -> tuple[float, ...]:
    if isinstance(given, Tensor):
        given = given.tolist()
    amounts = tuple(float(a) for a in given) if isinstance(given, Sequence) else (float(given),)  # type: ignore[arg-type]
    if not amounts or not all(math.isfinite(a) for a in amounts):
        raise ValueError(f"{what} is one finite number, or one a row; {given} was given")
    return amounts


def _shares(given: Amount) -> tuple[float, ...]:
    shares = _amounts(given, "strength")
    if not all(0 <= s <= 1 for s in shares):
        raise ValueError(f"strength is a share between 0 and 1 here; {given} was given")
    return shares


def _class_means(directions: Sequence[Direction], which: str) -> tuple[float, ...]:
    _check_choice("value", which, ("positive", "negative"))
    means = [getattr(d, which) for d in directions]
    if any(m is None for m in means):
        raise DirectionError(f"this direction knows no {which} class mean: give a number, or fit it on labelled rows")
    return tuple(means)


def _check_rows(**given: Sequence[Any]) -> None:
    if len({len(v) for v in given.values()} - {1}) > 1:
        counts = " and ".join(f"{len(v)} {name}" for name, v in given.items() if len(v) > 1)
        raise ValueError(f"{counts}: give one, or one a row, of each")


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(allowed)}")


def _hooks(hooks: Hooks) -> tuple[str, ...]:
    return () if hooks is None else (hooks,) if isinstance(hooks, str) else tuple(hooks)


def _needed(hooks: Hooks) -> tuple[str, ...]:
    if not hooks:
        raise ValueError("name the hook point: hooks='resid_post.6'")
    return _hooks(hooks)
