"""Rows with labels, targets or pairs, checked; and how a direction gets its sign and its length from them."""

import warnings
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from interp.acts.direction import as_rows
from interp.acts.resampling import Labels, as_groups, as_labels, as_list

__all__ = ["DirectionWarning", "Rows", "joined_groups", "labelled_rows", "oriented", "pair_rows", "target_rows"]

Rows: TypeAlias = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
CERTAIN = 2.0  # a t below it leaves the sign open


class DirectionWarning(UserWarning):
    """A direction was found, but the data leave open its sign, or whether it is that of the labels."""


def labelled_rows(X: Tensor | np.ndarray, y: Labels) -> tuple[Tensor, np.ndarray]:
    """Return checked rows and labels. Raises ValueError where these are not finite, [n, d], two-class, equally many."""
    rows, labels = as_rows(X), as_labels(y)
    if len(rows) != len(labels):
        raise ValueError(f"{len(labels)} labels were given for {len(rows)} rows")
    return rows, labels


def target_rows(X: Tensor | np.ndarray, y: Labels) -> tuple[Tensor, Float[np.ndarray, " n"]]:
    """Return checked rows and float64 targets (0 and 1 where y is two-class).

    Raises ValueError for targets that are not one finite number a row, or are all equal.
    """
    rows = as_rows(X)
    targets = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y, dtype=np.float64)
    if targets.shape != (len(rows),):
        raise ValueError(
            f"targets of shape {targets.shape} were given for {len(rows)} rows; one number a row is needed"
        )
    if not np.isfinite(targets).all():
        raise ValueError("a target is nan or infinite")
    if np.ptp(targets) == 0:
        raise ValueError(f"all {len(targets)} targets are {targets[0]:g}: nothing leads from one value to another")
    return rows, targets


def pair_rows(
    rows: Shaped[Tensor, "n d"], labels: Int[np.ndarray, " n"], pairs: Labels | None, method: str
) -> tuple[Float[Tensor, "pairs d"], Float[Tensor, "pairs d"]]:
    """Return the positive and the negative row of each pair, float64, in the order in which pairs first appear.

    `pairs` names the pair of each row. Raises ValueError where it is missing, or a pair is not one row of each label.
    """
    if pairs is None:
        raise ValueError(f"{method} needs pairs=, the pair that each row belongs to (one row of each label a pair)")
    names = as_list(pairs)
    if len(names) != len(rows):
        raise ValueError(f"{len(names)} pairs were given for {len(rows)} rows")
    if any(name is None for name in names):
        raise ValueError(f"{names.count(None)} rows have no pair (None): leave them out, {method} cannot use them")
    number = as_groups(names, len(names))
    members = np.stack([np.bincount(number[labels == c], minlength=number.max() + 1) for c in (1, 0)])
    wrong = np.flatnonzero((members != 1).any(0))
    if len(wrong):
        name, (positive, negative) = names[int(np.argmax(number == wrong[0]))], members[:, wrong[0]]
        raise ValueError(
            f"{len(wrong)} of {members.shape[1]} pairs are not one row of each label: {name!r} has {positive} of "
            f"label 1 and {negative} of label 0. Pool the rows of a text first, or leave such pairs out"
        )
    found = []
    for label in (1, 0):
        chosen = np.flatnonzero(labels == label)
        found.append(rows[torch.from_numpy(chosen[np.argsort(number[chosen])])].double())
    return found[0], found[1]


def joined_groups(groups: Labels | None, pairs: Labels | None, n: int) -> Int[np.ndarray, " n"]:
    """Return group numbers under which neither a group nor a pair is ever split."""
    if groups is None or pairs is None:
        return as_groups(pairs if groups is None else groups, n)
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    of_group, of_pair = as_groups(groups, n), as_groups(pairs, n)
    first = int(of_group.max()) + 1  # nodes: groups, then pairs; every row joins its two
    size = first + int(of_pair.max()) + 1
    graph = coo_matrix((np.ones(n), (of_group, first + of_pair)), shape=(size, size))
    component = connected_components(graph, directed=False)[1]
    return as_groups(component[of_group], n)


def oriented(
    vector: Float[Tensor, " d"], rows: Shaped[Tensor, "n d"], y: Shaped[np.ndarray, " n"], *, name: str = ""
) -> Float[Tensor, " d"]:
    """Return the vector turned and stretched so that it is the step which rows take along it as y grows by 1.

    With labels 0 and 1 that step is the difference of the class means along the vector: its sign and length are the
    data's, whatever they were. With a name, a DirectionWarning says where the data leave the sign open (a t statistic
    below 2 along the vector). Raises ValueError for a vector without length, or along which y does not move at all.
    """
    length = float(vector.double().norm())
    if not 0 < length < float("inf"):
        raise ValueError(f"a vector of length {length} has no direction")
    unit = vector.double() / length
    along = (rows.double() @ unit).numpy()
    away, moved = y - y.mean(), along - along.mean()
    slope = float(away @ moved / (away @ away))
    if abs(slope) * np.ptp(y) <= 1e-10 * float(np.abs(along).max()):
        raise ValueError("the rows do not move along the direction found as their label changes: it has no sign")
    if name:
        t = _t_statistic(float(away @ moved / np.sqrt((away @ away) * (moved @ moved))), len(y))
        if t < CERTAIN:
            warnings.warn(
                f"{name}: the sign is open, since the classes hardly differ along what was found (t = {t:.2f})",
                DirectionWarning,
                stacklevel=3,
            )
    return unit * slope


def _t_statistic(correlation: float, n: int) -> float:
    """|t| of a correlation; of a two-class label it is the pooled two-sample t."""
    left = 1 - correlation**2
    return float("inf") if left <= 0 or n < 3 else abs(correlation) * ((n - 2) / left) ** 0.5
