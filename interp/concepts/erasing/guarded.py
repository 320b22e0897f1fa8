"""Show that a concept is erased: a fresh probe at chance; and iterative nullspace projection, which asks for that."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from interp.acts.direction import as_rows
from interp.acts.resampling import Labels, as_groups, auroc, auroc_interval, grouped_folds, permute_labels
from interp.acts.resampling import placebo_directions as random_directions
from interp.concepts.erasing.erasure import Eraser, OracleEraser, fingerprint, origin, orthonormal, project_out
from interp.concepts.erasing.moments import concept_columns
from interp.concepts.reading.finders import labelled_rows

__all__ = ["Guardedness", "fit_inlp", "guardedness"]

Rows: TypeAlias = Shaped[Tensor, "n d"] | Shaped[np.ndarray, "n d"]


@dataclass(frozen=True, kw_only=True)
class Guardedness:
    """What a fresh probe still reads after erasure, beside what it read before, and what erasing cost.

    AUROCs are of logistic probes fitted on one half of the groups and scored on the other, 0.5 being chance.
    """

    before: float
    before_interval: tuple[float, float]  # 95%, over the groups of the scored half
    after: float
    after_interval: tuple[float, float]
    control: float  # mean AUROC on erased rows of probes refit on shuffled training labels
    control_scores: tuple[float, ...]
    placebo: float  # mean AUROC after erasing as many random directions: erasing anything at all is not enough
    leak: float | None  # AUROC that a perfect reader would get out of the eraser's own sampling error; None: not fitted
    change: float  # mean squared length of what erasure moves a row by, in squared residual-stream units
    change_projection: float  # the same for the orthogonal projection off the span of what the eraser takes out
    variance: float  # mean squared distance of the rows from their mean: the scale of both
    n_train: int
    n_test: int
    n_groups: int  # of the scored half: what the intervals are drawn over
    method: str
    rank: int
    seed: int

    @property
    def at_chance(self) -> bool:
        """Whether the interval after erasure holds 0.5."""
        return self.after_interval[0] <= 0.5 <= self.after_interval[1]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON holds them."""
        return asdict(self) | {"at_chance": self.at_chance}


def guardedness(
    eraser: Eraser | OracleEraser,
    X: Rows,
    y: Labels,
    groups: Labels | None = None,
    *,
    n_shuffles: int = 20,
    n_placebos: int = 5,
    C: float = 1.0,
    seed: int = 0,
) -> Guardedness:
    """Return how far a fresh probe falls on erased rows that the eraser was not fitted on.

    Rows are split in two halves by whole groups; the probe is fitted on one and scored on the other. An oracle eraser
    is given the labels. Of a concept of several classes ask for each: y is 0 and 1.
    Raises ValueError for the very rows that the eraser was fitted on (there no reader can do better than chance by
    construction, and cross-validation falls below it), for one class only, or too few groups.

    An eraser fitted on few rows in many dimensions leaves what it did not know of the class means: `leak` is the AUROC
    that this allows, and `after` up to there is what more fitting rows, not another method, would take away.
    """
    rows, labels = labelled_rows(X, y)
    if n_shuffles < 1 or n_placebos < 1:
        raise ValueError(f"n_shuffles is {n_shuffles}, n_placebos {n_placebos}; each null needs at least 1")
    if fingerprint(rows, torch.from_numpy(labels).double()[:, None]) == eraser.data:
        raise ValueError("these are the rows that the eraser was fitted on; judge it on others")
    rows, number = rows.double(), as_groups(groups, len(rows))
    train, test = grouped_folds(number, 2, seed, labels)[0]
    erased = eraser.apply(rows, labels) if isinstance(eraser, OracleEraser) else eraser.apply(rows)
    scores = [_scores(values, labels[train], train, test, C) for values in (rows, erased)]
    intervals = [auroc_interval(s, labels[test], number[test], seed=seed) for s in scores]
    rng = np.random.default_rng(seed)
    shuffled = [permute_labels(labels[train], number[train], rng) for _ in range(n_shuffles)]
    control = [auroc(_scores(erased, y_train, train, test, C), labels[test]) for y_train in shuffled]
    rank = max(1, eraser.left.shape[1])
    placebo = []
    for i in range(n_placebos):
        elsewhere = project_out(random_directions(rows.shape[1], rank, seed + i), centre=rows.mean(0)).apply(rows)
        placebo.append(auroc(_scores(elsewhere, labels[train], train, test, C), labels[test]))
    middle = rows.mean(0) if isinstance(eraser, OracleEraser) else eraser.centre
    flat = project_out(eraser.left.T, centre=middle).apply(rows) if eraser.left.numel() else rows
    return Guardedness(
        before=auroc(scores[0], labels[test]),
        before_interval=intervals[0],
        after=auroc(scores[1], labels[test]),
        after_interval=intervals[1],
        control=float(np.mean(control)),
        control_scores=tuple(control),
        placebo=float(np.mean(placebo)),
        leak=_leak(rows.shape[1], eraser.n, float(labels.mean())),
        change=_mean_square(erased - rows),
        change_projection=_mean_square(flat - rows),
        variance=_mean_square(rows - rows.mean(0)),
        n_train=len(train),
        n_test=len(test),
        n_groups=len(np.unique(number[test])),
        method=eraser.method,
        rank=rank,
        seed=seed,
    )


def fit_inlp(
    X: Rows,
    y: Labels | Sequence,
    groups: Labels | None = None,
    *,
    rounds: int = 30,
    C: float = 1.0,
    seed: int = 0,
    hook: str | None = None,
    model: Any = None,
) -> Eraser:
    """Return the projection off the weights of logistic probes, refitted until a fresh one is at chance.

    Iterative nullspace projection (Ravfogel et al., arXiv:2004.07667). One fold in four, of whole groups, is held out
    of the probes: a round ends the search where the 95 % interval of its AUROC there (of each class against the rest)
    holds 0.5. `options` of the eraser tells the held-out AUROC before each round and whether chance was reached within
    `rounds`. Takes out more than LEACE does. Raises ValueError for a single class or too few groups.
    """
    rows = as_rows(X).double()
    columns, _ = concept_columns(y, None, len(rows), find=True)
    index = columns[:, 0].long() if columns.shape[1] == 1 else columns.argmax(1)
    if columns.shape[1] == 1 and not bool(torch.equal(columns[:, 0], index.double())):
        raise ValueError("the probes of a nullspace projection need labels; erase a continuous concept with fit_leace")
    labels, number = index.numpy(), as_groups(groups, len(rows))
    indicators = [labels == c for c in np.unique(labels)][1 if columns.shape[1] == 1 else 0 :]
    if len(np.unique(labels)) < 2:
        raise ValueError("all labels are of one class; a probe needs two")
    train, held = grouped_folds(number, 4, seed, labels if len(indicators) == 1 else None)[0]
    centre = rows[train].mean(0)
    weights = torch.zeros(0, rows.shape[1], dtype=torch.float64)
    areas: list[float] = []
    at_chance = False
    for step in range(rounds + 1):
        erased = project_out(weights, centre=centre).apply(rows) if len(weights) else rows
        found = torch.from_numpy(_weights(erased[train].numpy(), labels[train], C))
        scores = (erased[held] @ found.T).T.numpy()
        pairs = [(s, i[held]) for s, i in zip(scores, indicators, strict=True)]
        areas.append(max(auroc(s, i) for s, i in pairs))
        spans = [auroc_interval(s, i, number[held], seed=seed) for s, i in pairs]
        at_chance = all(low <= 0.5 for low, _ in spans)
        if at_chance or step == rounds or len(weights) >= rows.shape[1] - len(found):
            break
        weights = orthonormal(torch.cat([weights, found]))
    if not len(weights):
        raise ValueError(f"a probe is at chance already (held-out AUROC {areas[0]:.3f}): there is nothing to erase")
    place: dict[str, Any] = origin(hook, model)
    options = {"rounds": len(areas) - 1, "held_out_auroc": areas, "at_chance": at_chance, "C": C}
    return Eraser(
        left=weights.T,
        right=weights,
        centre=centre,
        method="inlp",
        n=len(rows),
        data=fingerprint(rows, columns),
        seed=seed,
        options=options,
        **place,
    )


def _scores(
    rows: Float[Tensor, "n d"],
    labels: Int[np.ndarray, " train"],
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    C: float,
) -> Float[np.ndarray, " test"]:
    return rows[test].numpy() @ _weights(rows[train].numpy(), labels, C)[0]


def _weights(rows: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], C: float) -> Float[np.ndarray, "k d"]:
    """Return the weights of logistic regression on standardised rows, in raw units: one row, or one a class.

    A coordinate whose spread is rounding alone counts as constant: standardised, it would be noise at full size.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    centred = rows - rows.mean(0)
    deviation = centred.std(0)
    deviation[deviation <= 1e-9 * np.abs(rows).max()] = np.inf
    with threadpool_limits(1, "blas"):  # many small products: threads that wait for each other take 20 times as long
        fit = LogisticRegression(C=C, max_iter=2000).fit(centred / deviation, labels)
    return fit.coef_ / deviation


def _leak(d: int, n: int, share: float) -> float | None:
    """Return the AUROC of two normal classes apart by the squared Mahalanobis distance d / (n share (1 - share)).

    It is the expected one between the errors of two class means of that many fitting rows.
    """
    if not n:
        return None
    return NormalDist().cdf((d / (n * share * (1 - share)) / 2) ** 0.5)


def _mean_square(rows: Float[Tensor, "n d"]) -> float:
    return float(rows.square().sum(1).mean())
