"""Nested cross-validation over cells and methods, repeated under permuted labels, with an interval that knows of both.

The folds of the inner loop are those of the outer one: with fold k held out, a candidate's inner score is its mean
AUROC on each other fold m, fitted without both. So K (K + 1) / 2 fits a candidate do for the whole nested loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from interp.acts.resampling import FEW_GROUPS, aurocs, fold_area, permutations
from interp.concepts.reading.closed import CLOSED, Columns
from interp.concepts.reading.solver import fit_logistic, training_sets

Candidate = tuple[str, float]  # method, C
Result = TypeVar("Result")
CHUNK = 2**24  # floats in one batch of cells


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """Rows of one cell as the fits read them."""

    F: Tensor  # [n, d] float32, standardised over all rows (a matter of arithmetic: fits are in raw units)
    mean: Tensor  # [d] float64
    deviation: Tensor

    @classmethod
    def of(cls, X: Tensor) -> "Cell":
        mean, deviation = X.mean(0, dtype=torch.float64), X.double().std(0, correction=0)
        deviation = torch.where(deviation <= 1e-12 * mean.abs().clamp_min(1e-30), 1.0, deviation)
        return cls(F=((X - mean) / deviation).float(), mean=mean, deviation=deviation)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The outer score of one labelling, and what it rests on."""

    area: float  # pairs of a positive and a negative of the same held-out fold in the right order, share of all
    spread: float  # standard error, see `standard_error`
    areas: tuple[float, ...]  # one a fold
    winners: tuple[tuple[int, int], ...]  # candidate and cell chosen without each fold
    inner: float  # mean over folds of the winners' inner scores
    agreement: float  # share of pairs of folds that chose the same candidate and cell
    clustered: float  # standard error over groups, for a few of them: deviations from `area`, not from a fold's own


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Inner scores and held-out decisions of every candidate and cell, for a block of labellings."""

    inner: Float[np.ndarray, "candidates cells folds columns"]
    held: list[np.ndarray]  # one a fold: decisions [candidates, cells, columns, rows of the fold]
    alike: Float[np.ndarray, "candidates cells columns folds folds"]  # cosines between the folds' weights


def fit_columns(
    cells: Sequence[Cell], Y: Tensor, folds: Tensor, left_out: Sequence[tuple[int, ...]], candidate: Candidate
) -> tuple[Tensor, Tensor]:
    """Return weights [cell, set, column, d] and biases for cells of one width, rows sorted by fold, Y [column, n]."""
    method, C = candidate
    if method == "logistic":
        fits = [fit_logistic(cell.F, Y.T, folds, left_out, C=C) for cell in cells]
        return torch.stack([f.weight.mT for f in fits]).float(), torch.stack([f.bias for f in fits]).float()
    bounds = [0, *torch.bincount(folds).cumsum(0).tolist()]
    F, deviation = torch.stack([c.F for c in cells]), torch.stack([c.deviation for c in cells]).float()
    return CLOSED[method](Columns(F=F, deviation=deviation, Y=Y.float(), bounds=bounds, left_out=left_out), C)


def score_block(
    cells: Sequence[Cell], labels: Int[np.ndarray, "columns n"], folds: np.ndarray, candidates: Sequence[Candidate]
) -> Scores:
    """Return the scores of labellings that share their folds (rows in the order of their folds)."""
    n_folds, n_columns = int(folds.max()) + 1, len(labels)
    bounds = [0, *np.bincount(folds).cumsum().tolist()]
    sets = training_sets(n_folds, nested=True)
    inner = np.zeros((len(candidates), len(cells), n_folds, n_columns))
    weights = np.zeros((n_folds, n_columns))
    held = [np.empty((len(candidates), len(cells), n_columns, b - a), dtype=np.float32) for a, b in pairwise(bounds)]
    alike = np.empty((len(candidates), len(cells), n_columns, n_folds, n_folds), dtype=np.float32)
    Y, numbers = torch.from_numpy(labels), torch.from_numpy(folds)
    pairs = np.stack([_pairs(labels[:, a:b]) for a, b in pairwise(bounds)])
    for k in range(n_folds):
        weights[k] = pairs.sum(0) - pairs[k]
    square = any(method in ("lda", "ridge") for method, _ in candidates)
    for some in chunks(cells, len(sets) * n_columns, square):
        batch = [cells[i] for i in some]
        for j, candidate in enumerate(candidates):
            W, b = fit_columns(batch, Y, numbers, sets, candidate)
            own = torch.nn.functional.normalize(W[:, :n_folds], dim=-1)
            alike[j, some] = torch.einsum("ckpd,cmpd->cpkm", own, own).numpy()
            for k, (start, stop) in enumerate(pairwise(bounds)):
                others = [i for i, out in enumerate(sets) if k in out]
                seen = torch.einsum(
                    "cqd,cnd->cqn", W[:, others].flatten(1, 2), torch.stack([c.F[start:stop] for c in batch])
                ).view(len(batch), len(others), n_columns, -1)
                seen += b[:, others, :, None]
                held[k][j, some] = seen[:, 0].numpy()
                areas = aurocs(seen[:, 1:].numpy(), labels[:, start:stop])  # [cell, pair of folds, column]
                for q, i in enumerate(others[1:]):
                    outer = next(m for m in sets[i] if m != k)  # fold k judges, for the choice made without `outer`
                    inner[j, some, outer] += areas[:, q] * pairs[k] / weights[outer]
    return Scores(inner=inner, held=held, alike=alike)


def outcomes(scores: Scores, labels: np.ndarray, folds: np.ndarray, groups: np.ndarray) -> list[Outcome]:
    """Return the outer score of every labelling: the best candidate and cell by inner score, judged on its fold."""
    bounds = [0, *np.bincount(folds).cumsum().tolist()]
    n_candidates, n_cells, n_folds, _ = scores.inner.shape
    best = scores.inner.reshape(n_candidates * n_cells, n_folds, -1).argmax(0)  # the first of equals
    found = []
    for p in range(len(labels)):
        winners = [divmod(int(w), n_cells) for w in best[:, p]]
        held = [scores.held[k][j, c, p] for k, (j, c) in enumerate(winners)]
        areas = [fold_area(held[k], labels[p, a:b], groups[a:b]) for k, (a, b) in enumerate(pairwise(bounds))]
        shares = np.array([_pairs(labels[p : p + 1, a:b])[0] for a, b in pairwise(bounds)], dtype=float)
        shares /= shares.sum()
        same = np.array([[u == w for w in winners] for u in winners])
        alike = np.stack([scores.alike[j, c, p][k] for k, (j, c) in enumerate(winners)])
        found.append(
            Outcome(
                area=float(sum(s * a for s, (a, _) in zip(shares, areas, strict=True))),
                spread=standard_error(np.array([v for _, v in areas]), shares, alike, same),
                areas=tuple(a for a, _ in areas),
                winners=tuple(winners),
                inner=float(np.mean([scores.inner[j, c, k, p] for k, (j, c) in enumerate(winners)])),
                agreement=float(same[~np.eye(n_folds, dtype=bool)].mean()),
                clustered=_clustered(held, labels[p], bounds, groups, shares),
            )
        )
    return found


def standard_error(
    variances: Float[np.ndarray, " folds"],
    shares: Float[np.ndarray, " folds"],
    alike: Float[np.ndarray, "folds folds"],
    same: np.ndarray,
) -> float:
    """Return the standard error of a cross-validated AUROC from those of its folds.

    Folds are not independent: a pair of rows of folds k and m counts once with the one as training row, once with the
    other. For a reader that found nothing this correlates fold scores by 1 / (K - 1), and doubles the variance; of one
    that found a direction only the share of its weights that is noise does so. That share is read off the cosine c
    between the weights of two folds, whose training rows overlap by r = (K - 2) / (K - 1): (1 - c) / (1 - r), at most
    1. Folds that chose other cells or methods are taken as independent; permutations correct what that leaves out.
    """
    n = len(variances)
    noise = np.clip((1 - alike) * (n - 1), 0, 1)
    correlation = np.where(same, noise / (n - 1), 0.0)
    np.fill_diagonal(correlation, 1.0)
    scaled = shares * np.sqrt(variances)
    return float(np.sqrt(scaled @ correlation @ scaled))


def _clustered(
    held: Sequence[np.ndarray], labels: np.ndarray, bounds: Sequence[int], groups: np.ndarray, shares: np.ndarray
) -> float:
    placed = np.zeros(len(labels))
    for scores, share, (a, b) in zip(held, shares, pairwise(bounds), strict=True):
        y = labels[a:b]
        wins = np.sign(scores[y == 1][:, None] - scores[y == 0][None, :]) / 2 + 0.5
        placed[a:b][y == 1] = share * wins.mean(1) / len(wins)
        placed[a:b][y == 0] = share * wins.mean(0) / wins.shape[1]
    area = placed[labels == 1].sum()
    for share, (a, b) in zip(shares, pairwise(bounds), strict=True):
        y = labels[a:b]
        placed[a:b] -= share * area / np.where(y == 1, y.sum(), len(y) - y.sum())
    _, local = np.unique(groups, return_inverse=True)
    sums = np.bincount(local, placed)
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()))


def control_outcomes(
    cells: Mapping[str, Cell],
    y: Int[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    types: Int[np.ndarray, " n"],
    candidates: Sequence[Candidate],
    rng: np.random.Generator,
    n: int = 10,
) -> list[Outcome]:
    """Return the outcomes of n control tasks: every type gets one label at random, of the share that label 1 has.

    Raises ValueError where there are so few types that folds keep being left with one label.
    """
    drawn: list[np.ndarray] = []
    for _ in range(50 * n):
        labels = (rng.random(int(types.max()) + 1) < y.mean()).astype(np.int64)[types]
        if all(0 < labels[folds == k].mean() < 1 for k in range(int(folds.max()) + 1)):
            drawn.append(labels)
        if len(drawn) == n:
            break
    else:
        raise ValueError(
            f"{int(types.max()) + 1} types are too few for a control task: random labels leave a fold with one class"
        )
    order = np.argsort(folds, kind="stable")
    labels = np.stack(drawn)[:, order]
    block = score_block([_take(c, order) for c in cells.values()], labels, folds[order], candidates)
    return outcomes(block, labels, folds[order], groups[order])


def run(
    cells: Mapping[str, Cell],
    y: Int[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    candidates: Sequence[Candidate],
    n_permutations: int,
    rng: np.random.Generator,
) -> tuple[Outcome, Scores, list[Outcome]]:
    """Return the outcome of the true labels with its scores, and those of permuted ones (see `repeated`)."""
    kept: list[Scores] = []

    def judge(some: list[Cell], labels: np.ndarray, numbers: np.ndarray, order: np.ndarray) -> list[Outcome]:
        scores = score_block(some, labels, numbers, candidates)
        kept[1:] = []
        kept.append(scores)
        return outcomes(scores, labels, numbers, groups[order])

    true, null = repeated(list(cells.values()), y, folds, units, judge, n_permutations, rng, len(candidates))
    return true, kept[0], null


def repeated(
    cells: list[Cell],
    y: Shaped[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    judge: Callable[[list[Cell], np.ndarray, np.ndarray, np.ndarray], list[Result]],
    n_permutations: int,
    rng: np.random.Generator,
    n_candidates: int,
) -> tuple[Result, list[Result]]:
    """Return what judge(cells, labels [column, n], folds, order), its rows sorted by fold, says of y and permuted y.

    Labels move within units (pairs, or groups of several labels), or between whole units of one label: within a fold
    where there are many units, so that folds stay as they are, and else together with the fold's number. Either way
    the folds are as stratified as the true ones, and rows that are exchangeable under the null are exchanged.
    """
    order = np.argsort(folds, kind="stable")
    ordered = [_take(c, order) for c in cells]
    true = judge(ordered, y[None, order], folds[order], order)[0]
    null: list[Result] = []
    if not n_permutations:
        return true, null
    if int(units.max()) + 1 >= FEW_GROUPS or not _constant(y, units).any():
        draws = permutations(y, units, n_permutations, rng, strata=folds)
        step = max(1, CHUNK * 2 // (len(cells) * len(y) * n_candidates))
        for start in range(0, n_permutations, step):
            null += judge(ordered, y[draws[start : start + step]][:, order], folds[order], order)
        return true, null
    for draw in permutations(y, units, n_permutations, rng):
        moved = folds[draw]
        order = np.argsort(moved, kind="stable")
        null += judge([_take(c, order) for c in cells], y[draw][None, order], moved[order], order)
    return true, null


def _constant(y: np.ndarray, units: np.ndarray) -> np.ndarray:
    return np.array([len(set(y[units == u].tolist())) == 1 for u in np.unique(units)])


def _pairs(labels: np.ndarray) -> np.ndarray:
    positive = labels.sum(1)
    return positive * (labels.shape[1] - positive)


def _take(cell: Cell, order: np.ndarray) -> Cell:
    return Cell(F=cell.F[torch.from_numpy(order)], mean=cell.mean, deviation=cell.deviation)


def chunks(cells: Sequence[Cell], n_lines: int, square: bool = False) -> list[list[int]]:
    """Return indices of cells of equal width, as many together as a batch holds; square: with a matrix a fold."""
    by_width: dict[int, list[int]] = {}
    for i, cell in enumerate(cells):
        by_width.setdefault(cell.F.shape[1], []).append(i)
    found = []
    for d, members in by_width.items():
        each = d * (n_lines + cells[members[0]].F.shape[0] + (16 * d if square else 0))
        size = max(1, CHUNK // each)
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found
