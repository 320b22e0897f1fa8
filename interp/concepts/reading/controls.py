"""What a nested sweep is held against: random directions, its own training rows, less data, its probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from interp.acts.resampling import as_groups, auroc, aurocs, placebo_directions
from interp.concepts.reading.nested import Candidate, Cell, Scores
from interp.concepts.reading.probes import PROBES

__all__ = ["Calibration", "LearningPoint", "calibration", "random_directions", "refits"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the logistic probabilities of held-out rows are worth, each figure beside its null."""

    brier: float  # mean squared error of the probability
    brier_base: float  # of always saying the share of label 1
    log_loss: float  # nats a row
    log_loss_base: float
    ece: float  # mean |share of label 1 - mean probability| over 10 bins of equal size
    ece_calibrated: float  # mean of it where labels are drawn from these very probabilities


@dataclass(frozen=True, kw_only=True)
class LearningPoint:
    """Held-out AUROC of the chosen cells, fitted on part of the training groups."""

    share: float
    n_rows: float  # mean number of training rows
    auroc: float


def random_directions(
    cells: Mapping[str, Cell], labels: np.ndarray, split: Sequence, chosen: Sequence[str], n: int, seed: int
) -> float:
    """Return the mean held-out AUROC of n random directions in the cell chosen for each fold."""
    total, weight = 0.0, 0.0
    for (train, test), name in zip(split, chosen, strict=True):
        cell = cells[name]
        directions = placebo_directions(cell.F.shape[1], n, seed).T * cell.deviation[:, None].float()
        along = (cell.F @ directions).T.numpy()
        seen, held = aurocs(along[:, train], labels[train]), aurocs(along[:, test], labels[test])
        pairs = labels[test].sum() * (1 - labels[test]).sum()
        total += pairs * float(np.where(seen >= 0.5, held, 1 - held).mean())
        weight += pairs
    return total / weight


def refits(
    rows: Mapping[str, Tensor],
    labels: np.ndarray,
    split: Sequence,
    group: np.ndarray,
    chosen: Sequence[tuple[str, Candidate]],
    shares: Sequence[float],
    areas: Sequence[float],
    rng: np.random.Generator,
) -> tuple[float, tuple[LearningPoint, ...]]:
    """Return the AUROC on training rows, and held-out AUROC with shares of the training groups, of the chosen."""
    seen, points = [], {float(s): [] for s in shares}
    weights = np.array([labels[test].sum() * (1 - labels[test]).sum() for _, test in split], dtype=float)
    weights /= weights.sum()
    for (train, test), (name, (method, C)) in zip(split, chosen, strict=True):
        weight, _ = PROBES[method](rows[name][train], labels[train], C)
        seen.append(auroc(rows[name][train].double() @ weight, labels[train]))
        for share in points:
            some = train[_part(labels[train], group[train], share, rng)]
            weight, _ = PROBES[method](rows[name][some], labels[some], C)
            points[share].append((len(some), auroc(rows[name][test].double() @ weight, labels[test])))
    curve = [
        LearningPoint(
            share=s, n_rows=float(np.mean([n for n, _ in p])), auroc=float(np.dot(weights, [a for _, a in p]))
        )
        for s, p in points.items()
    ]
    full = LearningPoint(share=1.0, n_rows=float(np.mean([len(t) for t, _ in split])), auroc=float(weights @ areas))
    return float(weights @ seen), (*curve, full)


def _part(labels: np.ndarray, group: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return the rows of a share of the groups of each kind (one label or the other, both), at least one a label."""
    if not 0 < share < 1:
        raise ValueError(f"shares of the training groups lie between 0 and 1, {share} was given")
    number = as_groups(group, len(labels))
    kind = np.bincount(number, labels) / np.bincount(number)
    kept = []
    for members in (np.flatnonzero(kind == 0), np.flatnonzero(kind == 1), np.flatnonzero((kind > 0) & (kind < 1))):
        kept += rng.permutation(members)[: int(np.ceil(share * len(members)))].tolist()
    return np.isin(number, kept)


def calibration(
    scores: Scores, candidates: list[Candidate], labels: np.ndarray, folds: np.ndarray, rng: np.random.Generator
) -> Calibration | None:
    """Return what the logistic probabilities of held-out rows are worth, None where no candidate is logistic."""
    logistic = [j for j, (method, _) in enumerate(candidates) if method == "logistic"]
    if not logistic:
        return None
    inner = scores.inner[logistic][..., 0]
    decisions = []
    for k, held in enumerate(scores.held):
        j, c = np.unravel_index(inner[:, :, k].argmax(), inner.shape[:2])
        decisions.append(held[logistic[j], c, 0])
    z = np.concatenate(decisions).astype(float)
    p = 1 / (1 + np.exp(-z.clip(-500, 500)))
    base = np.concatenate([np.full((folds == k).sum(), labels[folds != k].mean()) for k in range(len(scores.held))])
    bins = np.array_split(np.argsort(p, kind="stable"), min(10, len(p)))

    def ece(y: np.ndarray) -> float:
        return float(sum(abs(y[b].mean() - p[b].mean()) * len(b) for b in bins) / len(p))

    return Calibration(
        brier=float(((p - labels) ** 2).mean()),
        brier_base=float(((base - labels) ** 2).mean()),
        log_loss=float(np.logaddexp(0, np.where(labels == 1, -z, z)).mean()),
        log_loss_base=float(-np.log(np.where(labels == 1, base, 1 - base)).mean()),
        ece=ece(labels),
        ece_calibrated=float(np.mean([ece(rng.random(len(p)) < p) for _ in range(200)])),
    )
