"""Joint second moments of rows and a concept, gathered in float64; concepts as columns of numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["JointMoments", "concept_columns", "shrunk"]


class JointMoments:
    """Means, covariance of rows and cross-covariance with a concept, batch by batch.

    The pairwise update of Chan, Golub and LeVeque (1983): exact under any cut into batches and any order of merging,
    up to float64 rounding, also where the mean is far larger than the spread.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean = torch.zeros(0, dtype=torch.float64)  # of rows and concept side by side
        self._squares = torch.zeros(0, 0, dtype=torch.float64)
        self._d = 0

    def add(self, X: Shaped[Tensor, "n d"], z: Float[Tensor, "n k"]) -> "JointMoments":
        """Take in rows and their concept; returns self. Raises ValueError for another width than before."""
        both = torch.cat([X.double(), z.double()], dim=1)
        mean = both.mean(0)
        self._join(len(both), mean, (both - mean).T @ (both - mean), X.shape[1])
        return self

    def merge(self, other: "JointMoments") -> "JointMoments":
        """Take in what another object has seen; returns self."""
        if other.n:
            self._join(other.n, other._mean, other._squares, other._d)
        return self

    def _join(self, n: int, mean: Tensor, squares: Tensor, d: int) -> None:
        if not self.n:
            self.n, self._mean, self._squares, self._d = n, mean.clone(), squares.clone(), d
            return
        if (len(mean), d) != (len(self._mean), self._d):
            before, now = (self._d, len(self._mean) - self._d), (d, len(mean) - d)
            raise ValueError(f"rows and concept had widths {before} before, now {now}")
        total, gap = self.n + n, mean - self._mean
        self._squares = self._squares + squares + torch.outer(gap, gap) * (self.n * n / total)
        self._mean = self._mean + gap * (n / total)
        self.n = total

    @property
    def mean_z(self) -> Float[Tensor, " k"]:
        """The mean of the concept's columns."""
        return self._mean[self._d :].clone()

    @property
    def deviation(self) -> Float[Tensor, " k"]:
        """The standard deviation of the concept's columns. Raises ValueError where one does not vary."""
        if self.n < 2:
            raise ValueError(f"{self.n} rows were given; a covariance needs at least 2")
        deviation = (self._squares.diagonal()[self._d :] / self.n).sqrt()
        if not bool((deviation > 1e-12 * self.mean_z.abs()).all()):
            raise ValueError("a column of the concept does not vary (a class without rows, or all rows of one class)")
        return deviation

    def value(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean [d], covariance [d, d] of rows, cross-covariance [d, k] and covariance [k, k] of the concept.

        Covariances are over n; the concept's columns are in units of their own standard deviation, so that a tolerance
        means the same whatever unit the concept is given in.
        """
        deviation = self.deviation
        squares = self._squares / self.n
        zz = squares[self._d :, self._d :] / torch.outer(deviation, deviation)
        return (
            self._mean[: self._d].clone(),
            squares[: self._d, : self._d],
            squares[: self._d, self._d :] / deviation,
            zz,
        )


def shrunk(covariance: Float[Tensor, "d d"], n: int) -> Float[Tensor, "d d"]:
    """Return a sample covariance (over n) shrunk towards a sphere of equal trace.

    With a = 1 - (tr S)^2 / n / (|S|^2 - (tr S)^2 / d), cut to [0, 1]: a S + (1 - a) tr(S) / d I (Bodnar, Gupta and
    Parolya, arXiv:1308.2608, for a spherical target).
    """
    d, trace = len(covariance), torch.trace(covariance)
    spread = covariance.square().sum() - trace.square() / d
    eye = torch.eye(d, dtype=covariance.dtype)
    if not bool(spread > 1e-14 * trace.square()):  # a sphere already
        return trace / d * eye
    a = (1 - trace.square() / n / spread).clamp(0, 1)
    return a * covariance + (1 - a) * trace / d * eye


def concept_columns(
    z: Any, classes: Sequence | None, n: int, *, find: bool = False
) -> tuple[Float[Tensor, "n k"], tuple | None]:
    """Return a concept as columns of numbers, and its classes where it is made of labels.

    Real numbers [n] or [n, k] stay as they are. Labels become one column of 0 and 1 where there are two classes, one
    column a class where there are more. `find`: labels that are not 0 and 1 name their own classes.
    Raises ValueError for other shapes, values that are not finite, unknown labels, or labels without classes.
    """
    array = z.detach().cpu().numpy() if isinstance(z, Tensor) else np.asarray(z)
    if len(array) != n or array.ndim not in (1, 2):
        raise ValueError(f"a concept of shape {array.shape} was given for {n} rows; it is [n] or [n, k]")
    if array.ndim == 2 or (array.dtype.kind == "f" and classes is None):
        columns = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64).reshape(n, -1))
        if not bool(torch.isfinite(columns).all()):
            raise ValueError("a value of the concept is nan or infinite")
        return columns, None
    values = sorted(set(array.tolist()), key=lambda v: (str(type(v)), v))
    if classes is None and set(values) <= {0, 1}:
        return torch.from_numpy(array.astype(np.float64))[:, None], None
    if classes is None and not find:
        raise ValueError(f"labels such as {values[:3]} need the list of all classes: LeaceFitter(classes=[...])")
    known = tuple(values if classes is None else classes)
    number = {label: i for i, label in enumerate(known)}
    if len(number) < 2 or not set(values) <= set(number):
        strange = [v for v in values if v not in number][:3]
        raise ValueError(f"a concept has at least two classes; there are {list(known)}, and labels {strange} are none")
    index = torch.tensor([number[v] for v in array.tolist()])
    one_hot = torch.nn.functional.one_hot(index, len(known)).double()
    return (one_hot[:, 1:] if len(known) == 2 else one_hot), known
