"""Streaming moments and bootstrap intervals: the statistics that both packages share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["Moments", "MomentsValue", "bootstrap_interval"]


@dataclass(frozen=True, kw_only=True)
class MomentsValue:
    """Count, mean vector and total variance of a set of rows."""

    count: int
    mean: Float[Tensor, " d"]  # float64
    variance: float  # mean over rows of |row - mean|^2, summed over dimensions


class Moments:
    """Count, mean and total variance of rows, gathered batch by batch in float64.

    The pairwise update of Chan, Golub and LeVeque (1983): exact under any cut into batches and any order of merging,
    up to float64 rounding, also where the mean is far larger than the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # sum of |row - mean|^2

    def add(self, batch: Shaped[Tensor, "tok d"]) -> "Moments":
        """Take in the rows of a batch; returns self. No device synchronisation. Raises ValueError on another width."""
        if len(batch):
            rows = batch.detach().double()
            mean = rows.mean(0)
            self._join(len(rows), mean, (rows - mean).square().sum())
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Take in what another object has seen; returns self."""
        if other._mean is not None and other._squares is not None:
            self._join(other.count, other._mean, other._squares)
        return self

    def value(self) -> MomentsValue:
        """Return the moments of everything seen. Raises ValueError where that is nothing."""
        if self._mean is None or self._squares is None:
            raise ValueError("no rows were given: their mean and variance do not exist")
        return MomentsValue(count=self.count, mean=self._mean.clone(), variance=float(self._squares) / self.count)

    def _join(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean.clone(), squares.clone()
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f"rows have {mean.shape[0]} dimensions, those before had {self._mean.shape[0]}")
        gap = mean.to(self._mean) - self._mean
        total = self.count + count
        self._squares = self._squares + squares.to(self._mean) + gap.square().sum() * (self.count * count / total)
        self._mean = self._mean + gap * (count / total)
        self.count = total


def bootstrap_interval(
    values: np.ndarray | Sequence[float | int] | Tensor,
    *,
    statistic: Callable[[np.ndarray], float] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of a statistic of independent values, in their unit.

    statistic maps an array of the same shape as values (rows resampled) to a number; without one it is the mean. Raises
    ValueError for fewer than two values, values that are not finite, or a level outside (0, 1). Values that belong
    together (sentences of one template) must be grouped by the caller first: this treats each row as independent.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    if len(array) < 2 or not np.isfinite(array).all():
        raise ValueError(f"an interval needs at least 2 finite values, {len(array)} given or some not finite")
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(f"level {level} must lie between 0 and 1, and n_resamples {n_resamples} be at least 1")
    generator = np.random.default_rng(seed)
    picks = (generator.integers(0, len(array), len(array)) for _ in range(n_resamples))
    drawn = np.array([array[pick].mean() if statistic is None else statistic(array[pick]) for pick in picks])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
