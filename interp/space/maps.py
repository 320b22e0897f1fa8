"""Two-dimensional maps, and how much of the space they keep.

A map never comes alone: what it loses is in `map_quality`, beside what a map that kept nothing would score.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.space.neighbors import SpaceError, as_matrix


class MapError(SpaceError):
    """Too few points, or unfit parameters, for a map or its quality."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Map:
    """Points of a map, the axes they were projected on, and the share of variance of each."""

    points: Float[Tensor, "n k"]
    axes: Float[Tensor, "k d"]
    mean: Float[Tensor, "d"]
    explained: Float[Tensor, "k"]
    method: str = "pca"

    def place(self, vectors: Float[Tensor, "m d"] | np.ndarray) -> Float[Tensor, "m k"]:
        """Return where further vectors fall on the map."""
        return (as_matrix(vectors).to(self.mean) - self.mean) @ self.axes.T


@dataclass(frozen=True, kw_only=True)
class MapQuality:
    """How well a map keeps the neighbourhoods of a space, beside the same for maps with their points shuffled."""

    trustworthiness: float  # 1: no false neighbours on the map (Venna & Kaski 2001)
    continuity: float  # 1: no neighbour lost
    kept: float  # share of the k nearest neighbours in the space that are among the k nearest on the map
    trustworthiness_null: float  # mean over shuffled maps
    continuity_null: float
    kept_null: float
    purity_space: float | None  # share of points whose nearest other point in the full space has their label
    purity_map: float | None
    purity_null: float | None  # mean over shuffled labels, in the full space
    purity_null_interval: tuple[float, float] | None  # the middle 95 % of these
    k: int
    n: int
    n_shuffles: int

    def to_dict(self) -> dict:
        """Return the numbers as JSON values."""
        return asdict(self)


def pca_map(X: Float[Tensor, "n d"] | np.ndarray, k: int = 2) -> Map:
    """Return the projection on the k directions of largest variance, in the unit of X.

    The sign of an axis is such that its largest loading is positive, so equal data give equal maps. Raises MapError for
    fewer than k + 1 points, fewer than k columns, or points that do not spread over k dimensions.
    """
    x = as_matrix(X, "X")
    n, d = x.shape
    if not 1 <= k <= d or n < k + 1:
        raise MapError(f"a map in {k} dimensions takes at least {k + 1} points of at least {k} columns, not {n} of {d}")
    mean = x.mean(dim=0)
    _, s, axes = torch.linalg.svd((x - mean).double(), full_matrices=False)
    if float(s[k - 1]) <= 1e-9 * float(s[0]) or float(s[0]) == 0:
        raise MapError(f"the points spread over fewer than {k} dimensions: ask for a smaller k or leave doubles out")
    axes = axes[:k]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    axes = axes.to(x)
    explained = (s[:k] ** 2 / (s**2).sum()).to(x)
    return Map(points=(x - mean) @ axes.T, axes=axes, mean=mean, explained=explained)


def map_quality(
    X: Float[Tensor, "n d"] | np.ndarray,
    Y: Float[Tensor, "n m"] | np.ndarray,
    labels: Sequence[str | int] | None = None,
    k: int = 10,
    seed: int = 0,
    *,
    n_shuffles: int = 20,
) -> MapQuality:
    """Return how much of the neighbourhoods in X the map Y keeps, and label purity in both, each beside its null.

    Euclidean distances; equal ones go to the lower row. The null of the neighbourhoods are `n_shuffles` maps with their
    points shuffled, that of the purity as many shuffles of the labels. Memory grows with the square of the points:
    beyond some 5,000, give a sample. Raises MapError where k is not below half the points, or for labels that are not
    one a point, or are all alike or all different.
    """
    x, y = as_matrix(X, "X"), as_matrix(Y, "Y")
    n = len(x)
    if len(y) != n:
        raise MapError(f"X has {n} points, but the map has {len(y)}")
    if not 1 <= k < n / 2:
        raise MapError(f"k must be at least 1 and below half of the {n} points, not {k}")
    if n_shuffles < 1:
        raise MapError(f"at least one shuffle is needed for a null, not {n_shuffles}")
    order_x, order_y = _order(x), _order(y)
    ranks_x, ranks_y = _ranks(order_x), _ranks(order_y)
    scores = _neighbourhoods(order_x, ranks_x, order_y, ranks_y, k)
    rng = np.random.default_rng(seed)
    shuffled = []
    for _ in range(n_shuffles):
        p = torch.as_tensor(rng.permutation(n), device=x.device)
        back = p.argsort()
        shuffled.append(_neighbourhoods(order_x, ranks_x, back[order_y[p]], ranks_y[p][:, p], k))
    null = np.mean(shuffled, axis=0)
    purity = _purities(order_x, order_y, labels, rng, n_shuffles)
    return MapQuality(
        trustworthiness=scores[0],
        continuity=scores[1],
        kept=scores[2],
        trustworthiness_null=float(null[0]),
        continuity_null=float(null[1]),
        kept_null=float(null[2]),
        purity_space=purity[0],
        purity_map=purity[1],
        purity_null=purity[2],
        purity_null_interval=purity[3],
        k=k,
        n=n,
        n_shuffles=n_shuffles,
    )


def _order(x: Float[Tensor, "n d"]) -> Int[Tensor, "n others"]:
    """Return, a point, the other points from the nearest on; equal distances go to the lower row."""
    # the expansion |a|^2 - 2ab + |b|^2 would swap near neighbours of points far from the origin
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    return distance.sort(dim=1, stable=True).indices[:, :-1]


def _ranks(order: Int[Tensor, "n others"]) -> Int[Tensor, "n n"]:
    """Return the rank of each point among the neighbours of each: 1 the nearest, 0 itself."""
    n = len(order)
    places = torch.arange(1, n, device=order.device).expand_as(order)
    return torch.zeros(n, n, dtype=torch.long, device=order.device).scatter_(1, order, places)


def _neighbourhoods(
    order_x: Tensor, ranks_x: Tensor, order_y: Tensor, ranks_y: Tensor, k: int
) -> tuple[float, float, float]:
    """Return trustworthiness, continuity and the share of neighbours kept (Venna & Kaski 2001, eq. 1-2)."""
    n = len(order_x)
    worst = n * k * (2 * n - 3 * k - 1) / 2
    false_ranks = ranks_x.gather(1, order_y[:, :k])
    lost_ranks = ranks_y.gather(1, order_x[:, :k])
    trust = 1 - float((false_ranks - k).clamp_min(0).sum()) / worst
    continuity = 1 - float((lost_ranks - k).clamp_min(0).sum()) / worst
    return trust, continuity, float((false_ranks <= k).double().mean())


def _purities(
    order_x: Tensor, order_y: Tensor, labels: Sequence[str | int] | None, rng: np.random.Generator, n_shuffles: int
) -> tuple[float, float, float, tuple[float, float]] | tuple[None, None, None, None]:
    if labels is None:
        return None, None, None, None
    n = len(order_x)
    if len(labels) != n:
        raise MapError(f"one label a point is needed, but there are {len(labels)} labels and {n} points")
    kinds, codes = np.unique(np.asarray(labels), return_inverse=True)
    if not 1 < len(kinds) < n:
        raise MapError(f"{len(kinds)} different labels on {n} points say nothing; purity needs at least two, repeated")
    nearest_x, nearest_y = order_x[:, 0].cpu().numpy(), order_y[:, 0].cpu().numpy()
    shuffles = [codes[rng.permutation(n)] for _ in range(n_shuffles)]
    null = [float((mixed[nearest_x] == mixed).mean()) for mixed in shuffles]
    low, high = np.quantile(null, [0.025, 0.975])
    return (
        float((codes[nearest_x] == codes).mean()),
        float((codes[nearest_y] == codes).mean()),
        float(np.mean(null)),
        (float(low), float(high)),
    )
