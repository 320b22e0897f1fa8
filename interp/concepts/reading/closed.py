"""Closed-form readers for many cells, training sets and label columns at once, from sums over folds by subtraction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["CLOSED", "Columns", "lda", "mean_difference_lines", "ridge"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Cells of equal width over the same rows in the order of their folds, and columns of targets.

    Every reader returns weights [cell, set, column, d] and biases [cell, set, column] for the rows in `F`.
    """

    F: Tensor  # [cell, n, d], each coordinate standardised over all rows
    deviation: Tensor  # [cell, d] what it was divided by
    Y: Tensor  # [column, n] of the same dtype: labels 0 and 1, or targets
    bounds: Sequence[int]  # where folds begin, and n
    left_out: Sequence[tuple[int, ...]]

    def sums(self, part: Callable[[slice], Tensor]) -> Tensor:
        """Return [set, ...]: the sum of part(rows of a fold) over the folds of each training set."""
        parts = torch.stack([part(slice(a, b)) for a, b in pairwise(self.bounds)])
        inside = parts.new_ones(len(self.left_out), len(parts))
        for i, out in enumerate(self.left_out):
            inside[i, list(out)] = 0
        return torch.tensordot(inside, parts, dims=1)

    def counts(self) -> Tensor:
        return self.sums(lambda rows: self.F.new_full((), rows.stop - rows.start))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return sums of rows [cell, set, 1, d] and of rows times columns [cell, set, column, d]."""
        total = self.sums(lambda rows: self.F[:, rows].sum(1, keepdim=True))
        times = self.sums(lambda rows: self.Y[:, rows] @ self.F[:, rows])
        return total.transpose(0, 1), times.transpose(0, 1)

    @cached_property
    def _grams(self) -> list[Tensor]:
        return [self.F[:, a:b].mT @ self.F[:, a:b] for a, b in pairwise(self.bounds)]

    @cached_property
    def _total(self) -> Tensor:
        return torch.stack(self._grams).sum(0) if len(self._grams) > 1 else self._grams[0]

    def scatter(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean [cell, d], deviation, and correlation matrix [cell, d, d] of training set i.

        One set at a time: all of them together would be the largest thing in memory by far.
        """
        kept = [k for k in range(len(self._grams)) if k not in self.left_out[i]]
        rows = [self.F[:, self.bounds[k] : self.bounds[k + 1]] for k in kept]
        n = sum(part.shape[1] for part in rows)
        mean = torch.stack([part.sum(1) for part in rows]).sum(0) / n
        S = self._total.clone()
        for k in self.left_out[i]:
            S -= self._grams[k]
        S = S / n - mean[:, :, None] * mean[:, None, :]
        variance = S.diagonal(dim1=-2, dim2=-1)
        deviation = torch.where(variance > 1e-6, variance, 1.0).sqrt()  # constant there: no division
        return mean, deviation, S / (deviation[:, :, None] * deviation[:, None, :])


def class_means(data: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the means of label 1 and 0 [cell, set, column, d] and their numbers of rows [set, column]."""
    total, ones = data.moments()
    n1 = data.sums(lambda rows: data.Y[:, rows].sum(1))
    n0 = data.counts()[:, None] - n1
    return ones / n1[..., None], (total - ones) / n0[..., None], n1, n0


def mean_difference_lines(data: Columns, C: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return mean differences in raw units, and the bias that puts 0 half way between the class means (C unused)."""
    high, low, _, _ = class_means(data)
    weight = (high - low) * data.deviation[:, None, None].square()  # of raw rows: once for w, once for x
    return weight, -(weight * (high + low)).sum(-1) / 2


def lda(data: Columns, C: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log-odds of linear discriminant analysis, its covariance shrunk as Ledoit and Wolf do (C unused).

    The within-class covariance of rows standardised over the training set is shrunk to a multiple of the identity by
    their formula (J. Multivariate Anal. 88:365, 2004); the prior is that of the training set. It is the total
    covariance S less a rank-one term, so one factorisation of S serves all columns (Sherman and Morrison).
    """
    high, low, n1, n0 = class_means(data)
    between = n1 * n0 / (n1 + n0).square()
    weights = []
    for i in range(len(data.left_out)):
        _, deviation, S = data.scatter(i)
        difference = (high[:, i] - low[:, i]) / deviation[:, None]
        shrinkage, size = _ledoit_wolf(data, i, S, deviation, (low[:, i], high[:, i]), difference, between[i])
        keep = (1 - shrinkage)[..., None]
        solved = _solve_shifted(S, keep, (shrinkage * size)[..., None], difference)
        loss = (keep[..., 0] * between[i] * (difference * solved).sum(-1)).clamp_max(1 - 1e-6)
        weights.append(solved / (1 - loss)[..., None] / deviation[:, None])
    weight = torch.stack(weights, dim=1)
    return weight, -(weight * (high + low)).sum(-1) / 2 + (n1 / n0).log()


def _ledoit_wolf(
    data: Columns,
    i: int,
    S: Tensor,
    deviation: Tensor,
    means: tuple[Tensor, Tensor],
    difference: Tensor,
    between: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return shrinkage and mean variance [cell, column] of the within-class covariance of training set i."""
    n, d = data.counts()[i], S.shape[-1]
    length = difference.square().sum(-1)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None] - between * length
    squared = (
        S.square().sum((-2, -1))[:, None]
        - 2 * between * ((difference @ S) * difference).sum(-1)
        + between.square() * length.square()
    )
    fourth = _fourth_powers(data, i, deviation, means)
    size = trace / d
    delta = (squared - 2 * size * trace + d * size.square()) / d
    beta = torch.minimum((fourth / n - squared) / (d * n), delta).clamp_min(0)
    return torch.where(delta > 0, beta / delta.clamp_min(1e-30), 0.0).clamp(1e-6, 1), size


def _fourth_powers(data: Columns, i: int, deviation: Tensor, means: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum over one training set's rows of |row - its class mean|^4, standardised: [cell, column]."""
    keep = torch.ones_like(data.F[0, :, 0])
    for k in data.left_out[i]:
        keep[data.bounds[k] : data.bounds[k + 1]] = 0
    metric = deviation[:, None].square().reciprocal()
    lengths = (data.F.square() @ metric.mT).mT
    squares = []
    for mean in means:
        cross = (mean * metric) @ data.F.mT
        squares.append(lengths - 2 * cross + (mean.square() * metric).sum(-1, keepdim=True))
    return (torch.lerp(squares[0], squares[1], data.Y).square() * keep).sum(-1)


def _solve_shifted(S: Tensor, keep: Tensor, identity: Tensor, right: Tensor) -> Tensor:
    """Return (keep S + identity I)^-1 right for each column, whose factors differ little: one Cholesky, then
    refinement to a relative residual of 1e-6. Raises RuntimeError where it does not get there.
    """
    S, keep, identity, wanted = (x.double() for x in (S, keep, identity, right))  # float32 residuals stop at 1e-3
    matrix = keep.mean(1, keepdim=True) * S
    matrix.diagonal(dim1=-2, dim2=-1).add_(identity.mean(1))
    factor = torch.linalg.cholesky(matrix)
    solved = torch.zeros_like(wanted)
    residual = wanted
    for _ in range(50):
        solved += torch.cholesky_solve(residual.mT, factor).mT
        residual = wanted - keep * (solved @ S) - identity * solved
        if bool((residual.norm(dim=-1) <= 1e-6 * wanted.norm(dim=-1) + 1e-30).all()):
            return solved.to(right.dtype)
    raise RuntimeError("shrunk LDA: the refinement of the solution did not converge")


def ridge(data: Columns, C: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return ridge regression on rows standardised over the training set, penalty 1 / C, intercept free.

    For labels the targets are -1 and 1, for other columns themselves.
    """
    n = data.counts()
    _, times = data.moments()
    level = data.sums(lambda rows: data.Y[:, rows].sum(1)) / n[:, None]
    labels = bool(((data.Y == 0) | (data.Y == 1)).all())
    weights, biases = [], []
    for i in range(len(data.left_out)):
        mean, deviation, S = data.scatter(i)
        right = (times[:, i] - n[i] * mean[:, None] * level[i][:, None]) / deviation[:, None]
        matrix = n[i] * S.double()
        matrix.diagonal(dim1=-2, dim2=-1).add_(1 / C)
        solved = torch.cholesky_solve(right.mT.double(), torch.linalg.cholesky(matrix)).mT.to(right.dtype)
        weights.append((2 if labels else 1) * solved / deviation[:, None])
        biases.append((2 * level[i] - 1 if labels else level[i]) - (weights[i] * mean[:, None]).sum(-1))
    return torch.stack(weights, dim=1), torch.stack(biases, dim=1)


CLOSED: dict[str, Callable[[Columns, float], tuple[Tensor, Tensor]]] = {
    "mean_difference": mean_difference_lines,
    "lda": lda,
    "ridge": ridge,
}
