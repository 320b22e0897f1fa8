"""Directions of pairs and of spread, which labels only turn the right way round: pair PCA, LAT, CCS."""

import warnings

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.resampling import Labels, as_labels
from interp.concepts.reading.rows import DirectionWarning, Rows, labelled_rows, oriented, pair_rows

__all__ = ["ccs", "lat", "pair_pca"]

LOW_COSINE = 0.7  # below it the first component of pair differences is hardly their mean


def pair_pca(X: Rows, y: Labels, *, pairs: Labels | None = None) -> Float[Tensor, " d"]:
    """Return the first principal component of the pair differences, not centred, as the step between the classes.

    `pairs` names the pair of each row, one row of each label. Centring would take away the mean difference, which is
    what is sought. Warns (DirectionWarning) where a nuisance can win: where its variance over pairs exceeds the squared
    mean difference, or the component is far from the mean difference. Raises ValueError as pair_rows and labelled_rows
    do, and where every pair is of two equal rows.
    """
    rows, labels = labelled_rows(X, y)
    positive, negative = pair_rows(rows, labels, pairs, "pair_pca")
    differences = positive - negative
    mean = differences.mean(0)
    if float(differences.abs().max()) <= 1e-12 * float(rows.abs().max()):
        raise ValueError("every pair consists of two equal rows: these rows show no difference between the labels")
    component, _ = top_component(differences)
    length = float(mean.norm())
    if length > 0:
        along = mean / length
        off = differences - (differences @ along)[:, None] * along
        _warn_of_nuisance(length**2, top_component(off)[1] if len(off) > 1 else 0.0, abs(float(component @ along)))
    return oriented(component, rows, labels, name="pair_pca")


def lat(X: Rows, y: Labels, *, seed: int = 0) -> Float[Tensor, " d"]:
    """Return the first component of length-1 differences between random disjoint pairs of rows, as the class step.

    Labels decide nothing but sign and length, so it finds what varies most; read the warning (DirectionWarning) where
    the sign is open. After linear artificial tomography (arXiv:2310.01405), drawn from the seed alone. Raises
    ValueError for fewer than 4 rows, or rows that are all equal.
    """
    rows, labels = labelled_rows(X, y)
    if len(rows) < 4:
        raise ValueError(f"lat draws pairs of rows and needs at least 4, {len(rows)} were given")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))
    half = len(rows) // 2
    differences = rows[order[:half]].double() - rows[order[half : 2 * half]].double()
    lengths = differences.norm(dim=1, keepdim=True)
    differs = lengths[:, 0] > 1e-12 * float(rows.abs().max())  # duplicated rows may meet
    if not bool(differs.any()):
        raise ValueError("the rows of every random pair are equal: nothing varies")
    component, _ = top_component(differences[differs] / lengths[differs])
    return oriented(component, rows, labels, name="lat")


def ccs(
    X: Rows,
    y: Labels,
    *,
    pairs: Labels | None = None,
    sides: Labels | None = None,
    restarts: int = 10,
    steps: int = 1000,
    lr: float = 1e-3,
    seed: int = 0,
) -> Float[Tensor, " d"]:
    """Return the direction of the most consistent and confident reader of pairs (arXiv:2212.03827), as the class step.

    A reader p = sigmoid(x @ w + b) of standardised rows minimises mean[(p1 + p2 - 1)^2 + min(p1, p2)^2] over pairs by
    AdamW; the best of `restarts` is kept. `sides` (0 and 1 a row) says which wording a row has, such as "yes" and "no"
    at its end: each wording is then centred by itself, so that the wording is not what is found. Without it all rows
    are centred together. Labels decide nothing but sign and length. Taking the better of an accuracy and its opposite
    flatters CCS; here the sign comes from these labels, so score it on other rows, where it may fall below a half.

    Raises ValueError as pair_rows does, where sides are the labels (centring would remove the classes), or where a
    pair has both rows on one side.
    """
    rows, labels = labelled_rows(X, y)
    if restarts < 1 or steps < 1 or not lr > 0:
        raise ValueError(f"restarts {restarts} and steps {steps} must be at least 1, and lr {lr} positive")
    order = np.arange(len(rows))[:, None].astype(np.float64)
    at = [p[:, 0].long() for p in pair_rows(torch.from_numpy(order), labels, pairs, "ccs")]  # rows of each pair
    centred = _centred(rows.double(), labels, sides, [index.numpy() for index in at])
    deviation = centred.std(0, correction=0)
    if not float(deviation.max()) > 0:
        raise ValueError("the rows do not vary once each side is centred: nothing can be read from them")
    flat = deviation <= 1e-12 * float(deviation.max())
    deviation = torch.where(flat, torch.ones_like(deviation), deviation)
    Z = centred / deviation
    weight = _most_consistent(Z[at[0]], Z[at[1]], restarts, steps, lr, seed)
    return oriented(weight / deviation, rows, labels, name="ccs")


def top_component(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], float]:
    """Return the unit vector along which the rows have the largest mean square (not centred), and that mean square."""
    n, d = rows.shape
    if n < d:  # the smaller Gram matrix has the same top eigenvalue
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        component = rows.T @ vectors[:, -1]
        length = float(component.norm())
        return component / length if length > 0 else component, max(float(values[-1]), 0.0) / n
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, -1], max(float(values[-1]), 0.0) / n


def _warn_of_nuisance(signal: float, nuisance: float, cosine: float) -> None:
    if signal >= nuisance and cosine >= LOW_COSINE:
        return
    warnings.warn(
        f"pair_pca: a nuisance can win. The squared mean difference is {signal:.3g}, the largest variance across it "
        f"{nuisance:.3g}, the component's cosine to the mean difference {cosine:.2f}; mean_difference does not mind",
        DirectionWarning,
        stacklevel=3,
    )


def _centred(rows: Tensor, labels: np.ndarray, sides: Labels | None, at: list[np.ndarray]) -> Tensor:
    if sides is None:
        return rows - rows.mean(0)
    side = as_labels(sides)
    if len(side) != len(rows):
        raise ValueError(f"{len(side)} sides were given for {len(rows)} rows")
    if (side == labels).all() or (side != labels).all():
        raise ValueError(
            "sides are the labels: centring each side would take away the difference between the classes. Sides are "
            "the wordings of a pair; leave them out where the positive row always has the same one"
        )
    if (side[at[0]] == side[at[1]]).any():
        raise ValueError(f"{int((side[at[0]] == side[at[1]]).sum())} pairs have both rows on one side")
    second = torch.from_numpy(side == 1)[:, None]
    means = [rows[torch.from_numpy(side == c)].mean(0) for c in (0, 1)]
    return rows - torch.where(second, means[1], means[0])


def _most_consistent(first: Tensor, second: Tensor, restarts: int, steps: int, lr: float, seed: int) -> Tensor:
    """Return the weight with the lowest loss after all restarts, which are trained side by side."""
    d = first.shape[1]
    draws = torch.randn(restarts, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.nn.Parameter(draws / draws.norm(dim=1, keepdim=True))
        bias = torch.nn.Parameter(torch.zeros(restarts, dtype=torch.float64))
        optimiser = torch.optim.AdamW([weight, bias], lr=lr)
        first, second = first.clone(), second.clone()
        for _ in range(steps):
            optimiser.zero_grad()
            _consistency(first, second, weight, bias).sum().backward()
            optimiser.step()
        losses = _consistency(first, second, weight, bias).detach()
    return weight.detach()[int(losses.argmin())]


def _consistency(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    p, q = torch.sigmoid(first @ weight.T + bias), torch.sigmoid(second @ weight.T + bias)
    return ((p + q - 1) ** 2 + torch.minimum(p, q) ** 2).mean(0)
