"""Invertible maps between the data and the space in which an SAE is trained, and the statistics that fix them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Affine", "Statistics", "geometric_median", "statistics"]


class Affine(nn.Module):
    """z = (x - shift) M, with M a number, a diagonal or a matrix.

    Numbers and diagonals are powers of two, so that going there and back changes no bit.
    """

    def __init__(
        self, shift: Float[Tensor, " d"], scale: Float[Tensor, "..."], inverse: Float[Tensor, "d d"] | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.register_buffer("inverse", inverse)
        self.shift: Tensor
        self.scale: Tensor
        self.inverse: Tensor | None

    @property
    def unit(self) -> Tensor:
        """Length in training space of a unit of the data, where it is one number; else 1."""
        return self.scale if self.scale.ndim == 0 else torch.ones_like(self.scale.view(-1)[0])

    def into(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return rows of the data in training space."""
        return self.turn(x - self.shift)

    def back(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return rows of the training space in the data's."""
        return self.unturn(z) + self.shift

    def turn(self, x: Tensor) -> Tensor:
        """Return x M."""
        return x * self.scale if self.inverse is None else (x.to(self.scale) @ self.scale).to(x)

    def unturn(self, z: Tensor) -> Tensor:
        """Return z M^-1."""
        return z / self.scale if self.inverse is None else (z.to(self.scale) @ self.inverse).to(z)

    def turned(self, weights: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Return weights M^T: what reads x - shift as `weights` reads z."""
        return weights * self.scale if self.inverse is None else (weights.to(self.scale) @ self.scale.t()).to(weights)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a sample of rows says of the data, in float64."""

    count: int
    mean: Float[Tensor, " d"]
    squares: Float[Tensor, " d"]  # mean over rows of (x - mean)^2
    covariance: Float[Tensor, "d d"] | None

    def affine(self, kind: str, n_sites: int, *, shift: bool) -> Affine:
        """Return the map that `kind` names; with shift the mean goes to 0 (whitening always shifts).

        Raises ValueError where all rows are equal.
        """
        if not float(self.squares.sum()) > 0:
            raise ValueError("all activations are equal: there is nothing to learn from them")
        if kind == "whiten":
            return self._whitening()
        zero = self.mean.float() if shift else torch.zeros_like(self.mean, dtype=torch.float32)
        if kind == "none":
            return Affine(zero, torch.ones((), device=zero.device))
        widths = self.squares.view(n_sites, -1)
        spreads = widths.sum(1).clamp_min(1e-30 * float(self.squares.sum())).sqrt()
        exact = [2.0 ** round(math.log2(math.sqrt(widths.shape[1]) / s)) for s in spreads.tolist()]
        scale = torch.tensor(exact, dtype=torch.float32, device=zero.device)
        return Affine(zero, scale[0] if n_sites == 1 else scale.repeat_interleave(widths.shape[1]))

    def variance(self, affine: Affine) -> float:
        """Return the total variance a row in training space."""
        if affine.inverse is None:
            return float((self.squares * affine.scale.double().square()).sum())
        assert self.covariance is not None
        return float((affine.scale.t() @ self.covariance @ affine.scale).trace())

    def _whitening(self) -> Affine:
        # ZCA: of all whitenings the one that turns the data least. Directions without variance are not blown up.
        assert self.covariance is not None
        values, vectors = torch.linalg.eigh(self.covariance)
        roots = values.clamp_min(1e-4 * float(values.mean())).sqrt()
        return Affine(self.mean.float(), (vectors / roots) @ vectors.t(), (vectors * roots) @ vectors.t())


def statistics(
    rows: Sequence[Float[Tensor, "_ d"]],
    *,
    covariance: bool = False,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Statistics:
    """Return count, mean and variances of rows; `total` adds a tensor up over processes."""
    first = rows[0]
    count = total(torch.tensor(float(sum(len(r) for r in rows)), dtype=torch.float64, device=first.device))
    sums = torch.stack([r.double().sum(0) for r in rows]).sum(0)
    mean = total(sums) / count
    squares = torch.zeros_like(mean)
    outer = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device) if covariance else None
    for part in rows:
        centred = part.double() - mean
        squares += centred.square().sum(0)
        if outer is not None:
            outer += centred.t() @ centred
    whole = total(outer) / count if outer is not None else None
    return Statistics(count=int(count), mean=mean, squares=total(squares) / count, covariance=whole)


def geometric_median(rows: Float[Tensor, "tok d"], *, steps: int = 100) -> Float[Tensor, " d"]:
    """Return the point with the least sum of distances to the rows (Weiszfeld's iteration)."""
    point = rows.double().mean(0)
    for _ in range(steps):
        weights = 1 / (rows.double() - point).norm(dim=1).clamp_min(1e-12)
        moved = (weights[:, None] * rows.double()).sum(0) / weights.sum()
        if float((moved - point).norm()) <= 1e-6 * float(moved.norm() + 1e-12):
            return moved.to(rows)
        point = moved
    return point.to(rows)
