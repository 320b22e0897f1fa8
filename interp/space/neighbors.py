"""Named vectors, and their exact nearest neighbours."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

METRICS = ("cosine", "dot", "euclidean")
BLOCK_FLOATS = 2**24  # scores held at a time: 64 MiB of float32


class SpaceError(ValueError):
    """Vectors, items or parameters from which no answer could be computed."""


class UnknownItemError(KeyError):
    """An item that the space does not hold."""

    def __str__(self) -> str:  # KeyError prints the repr of its argument, quotes and all
        return str(self.args[0])


def as_matrix(x: Float[Tensor, "n d"] | np.ndarray, name: str = "vectors") -> Float[Tensor, "n d"]:
    """Return `x` as a float32 (or, if it was, float64) matrix; raise SpaceError for another shape, nan or infinity."""
    matrix = torch.as_tensor(x).detach()
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise SpaceError(f"{name} must be a matrix with at least one row and one column, not {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    if not torch.isfinite(matrix).all():
        row = int((~torch.isfinite(matrix)).any(dim=1).nonzero()[0])
        raise SpaceError(f"{name} must be finite numbers, but row {row} holds nan or infinity")
    return matrix


def unit_rows(x: Float[Tensor, "n d"], names: Sequence[str] = ()) -> Float[Tensor, "n d"]:
    """Return the rows at length 1; raise SpaceError for a row of length 0, which has no direction."""
    norm = x.norm(dim=1, keepdim=True)
    if bool((norm == 0).any()):
        row = int((norm[:, 0] == 0).nonzero()[0])
        label = f" ({names[row]!r})" if names else ""
        raise SpaceError(f"row {row}{label} has length 0 and so no cosine to anything; leave it out")
    return x / norm


@dataclass(frozen=True, init=False, eq=False)
class Space:
    """Vectors with names: row i of `vectors` belongs to `items[i]`. Raw, unless taken through `centred`.

    Raises SpaceError for values that are not a finite matrix, or for items that are not one unique string a row.
    """

    vectors: Float[Tensor, "n d"]
    items: tuple[str, ...]

    def __init__(self, vectors: Float[Tensor, "n d"] | np.ndarray, items: Iterable[str]):
        matrix, names = as_matrix(vectors), tuple(items)
        if len(names) != len(matrix):
            raise SpaceError(f"one item a vector is needed, but there are {len(names)} items and {len(matrix)} vectors")
        if len(set(names)) != len(names):
            seen: set[str] = set()
            double = next(name for name in names if name in seen or seen.add(name))
            raise SpaceError(f"items must be unique, but {double!r} is there twice")
        object.__setattr__(self, "vectors", matrix)
        object.__setattr__(self, "items", names)

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each item."""
        return {item: row for row, item in enumerate(self.items)}

    @cached_property
    def unit(self) -> Float[Tensor, "n d"]:
        """The vectors at length 1; raise SpaceError where one has length 0."""
        return unit_rows(self.vectors, self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: object) -> bool:
        return item in self.index

    def __getitem__(self, item: str) -> Float[Tensor, "d"]:
        return self.vectors[self.row(item)]

    def __repr__(self) -> str:
        return f"Space({len(self)} items x {self.vectors.shape[1]})"

    def row(self, item: str) -> int:
        """Return the row of `item`; raise UnknownItemError, with the closest items, where it is not there."""
        try:
            return self.index[item]
        except KeyError:
            close = difflib.get_close_matches(str(item), self.items, n=3, cutoff=0.5)
            hint = f"closest: {', '.join(close)}" if close else f"it holds, for one, {self.items[0]!r}"
            raise UnknownItemError(f"the space of {len(self)} items has no {item!r}; {hint}") from None

    def rows(self, items: Iterable[str]) -> Int[Tensor, "q"]:
        """Return the rows of `items`; raise UnknownItemError for the first that is not there."""
        return torch.tensor([self.row(item) for item in items], dtype=torch.long, device=self.vectors.device)

    def centred(self) -> "Space":
        """Return the space with the mean of its vectors taken from each."""
        return Space(self.vectors - self.vectors.mean(dim=0), self.items)

    def subset(self, items: Iterable[str]) -> "Space":
        """Return the space of these items alone, in this order; raise UnknownItemError for one that is not there."""
        names = tuple(items)
        return Space(self.vectors[self.rows(names)], names)

    def nearest(
        self, query: str | Float[Tensor, "d"], k: int = 10, *, metric: str = "cosine", exclude: Iterable[str] = ()
    ) -> list[tuple[str, float]]:
        """Return the k items nearest to an item (itself left out) or to a vector, with their cosine, dot or distance.

        Raises UnknownItemError for an item that is not there, SpaceError where fewer than k items are left.
        """
        left_out = list(exclude)
        if isinstance(query, str):
            left_out.append(query)
            query = self[query]
        hits = nearest(self.vectors, query[None], k, metric=metric, exclude=self.rows(left_out)[None])
        return hits.named(self.items)[0]

    def most_similar(
        self, positive: str | Sequence[str] = (), negative: str | Sequence[str] = (), topn: int = 10, **kwargs
    ) -> list[tuple[str, float]]:
        """Return what `interp.space.analogy.most_similar` says of this space: king + woman - man."""
        from interp.space.analogy import most_similar

        return most_similar(self, positive, negative, topn, **kwargs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """The k nearest rows of each query, best first; equal values in the order of their row."""

    indices: Int[Tensor, "q k"]
    values: Float[Tensor, "q k"]  # cosine, dot product, or Euclidean distance
    metric: str

    def named(self, items: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Return, a query, the (item, value) pairs."""
        rows: list[list[int]] = self.indices.tolist()
        return [
            [(items[i], v) for i, v in zip(row, self.values[q].tolist(), strict=True)] for q, row in enumerate(rows)
        ]


def nearest(
    vectors: Float[Tensor, "n d"] | np.ndarray,
    queries: Float[Tensor, "q d"] | np.ndarray,
    k: int = 10,
    *,
    metric: str = "cosine",
    exclude: Int[Tensor, "q e"] | None = None,
    block: int | None = None,
) -> Neighbours:
    """Return the exact k nearest rows of `vectors` to each query, computed in blocks of `block` queries.

    `exclude` names, a query, rows that may not answer it (-1: none). Raises SpaceError for an unknown metric, unequal
    widths, a vector of length 0 under cosine, or where fewer than k rows are left.
    """
    x, q = as_matrix(vectors), as_matrix(queries, "queries")
    _check(x, q, k, metric, exclude)
    q = q.to(x)
    if metric == "cosine":
        x, q = unit_rows(x), unit_rows(q)
    elif metric == "euclidean":
        mean = x.mean(dim=0)  # |a|^2 - 2ab + |b|^2 cancels where a mean is shared: take it out first
        x, q = x - mean, q - mean
    half_norms = (x * x).sum(dim=1) / 2 if metric == "euclidean" else None
    step = block or max(1, BLOCK_FLOATS // len(x))
    indices, values = [], []
    for start in range(0, len(q), step):
        part = q[start : start + step]
        scores = part @ x.T
        if half_norms is not None:
            scores -= half_norms
        if exclude is not None:
            mask_rows(scores, exclude[start : start + step])
        index, value = _best(scores, x, part, k, metric)
        indices.append(index)
        values.append(value)
    found = Neighbours(indices=torch.cat(indices), values=torch.cat(values), metric=metric)
    if not torch.isfinite(found.values).all():
        raise SpaceError(f"k is {k}, but with what is excluded fewer than {k} of {len(x)} rows are left; ask for fewer")
    return found


def mask_rows(scores: Float[Tensor, "q n"], exclude: Int[Tensor, "q e"]) -> None:
    """Set, in place, the scores of the excluded rows to minus infinity; -1 excludes nothing."""
    query, column = (exclude >= 0).nonzero(as_tuple=True)
    scores[query, exclude[query, column]] = -torch.inf


def top(scores: Float[Tensor, "q n"], k: int) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Return the k largest of each row and their columns; equal scores go to the lower column."""
    n = scores.shape[1]
    values, columns = scores.topk(min(k + 1, n), dim=1)
    # topk breaks ties as it likes: where the first one left out equals the last one kept, sort that whole row instead
    tied = values[:, k] == values[:, k - 1] if n > k else torch.zeros(len(scores), dtype=torch.bool)
    columns, order = columns[:, :k].sort(dim=1)
    values, order = values[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if bool(tied.any()):
        full, place = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = full[:, :k], place[:, :k]
    return values, columns


def _best(scores: Tensor, x: Tensor, queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    if metric != "euclidean":
        values, indices = top(scores, k)
        return indices, values
    # a few more than k, then distances from the differences themselves: free of the expansion's rounding
    rough, indices = top(scores, min(k + 8, len(x)))
    indices, order = indices.sort(dim=1)
    distance = (x[indices] - queries[:, None]).norm(dim=2)
    distance = distance.masked_fill(rough.gather(1, order) == -torch.inf, torch.inf)
    values, order = distance.sort(dim=1, stable=True)
    return indices.gather(1, order)[:, :k], values[:, :k]


def _check(x: Tensor, queries: Tensor, k: int, metric: str, exclude: Tensor | None) -> None:
    if metric not in METRICS:
        close = difflib.get_close_matches(metric, METRICS, n=1) or METRICS
        raise SpaceError(f"there is no metric {metric!r}; closest: {', '.join(close)}")
    if queries.shape[1] != x.shape[1]:
        raise SpaceError(f"queries have {queries.shape[1]} columns, but vectors have {x.shape[1]}")
    if not 1 <= k <= len(x):
        raise SpaceError(f"k must lie between 1 and the {len(x)} rows, not {k}")
    if exclude is not None and bool((exclude >= len(x)).any()):
        raise SpaceError(f"exclude names row {int(exclude.max())}, but the last row is {len(x) - 1}")
