"""Splits, nulls and intervals that respect groups: rows that share a template, a document or a pair stay together."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

__all__ = [
    "auroc",
    "auroc_interval",
    "aurocs",
    "bootstrap_counts",
    "fold_area",
    "fold_numbers",
    "grouped_folds",
    "permutations",
    "permute_labels",
    "placebo_directions",
    "score_interval",
]

Labels = Sequence | np.ndarray | Tensor
FEW_GROUPS = 30  # below it a percentile bootstrap over groups covers too rarely, and Student's t is used


def as_labels(y: Labels) -> Int[np.ndarray, " n"]:
    """Return two-class labels as 0 and 1. Raises ValueError for other values, or where a class is absent."""
    array = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"labels form one non-empty row, shape {array.shape} was given")
    values = set(array.tolist())
    if not values <= {0, 1}:
        raise ValueError(f"labels are 0 and 1 (or False and True), {sorted(values - {0, 1}, key=str)[:3]} was given")
    if len(values) == 1:
        raise ValueError(f"both classes are needed, but all {len(array)} labels are {int(values.pop())}")
    return array.astype(np.int64)


def as_groups(groups: Labels | None, n: int) -> Int[np.ndarray, " n"]:
    """Return group numbers 0..n_groups-1, one a row; without groups every row is its own. Raises ValueError."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups were given for {n} rows")
    number: dict = {}
    return np.array([number.setdefault(key, len(number)) for key in as_list(groups)])


def as_list(values: Labels) -> list:
    """Return labels or group names as a list of plain Python values."""
    return values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)


def auroc(scores: Shaped[Tensor, " n"] | Shaped[np.ndarray, " n"] | Sequence[float], y: Labels) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Exact for ties (the Mann-Whitney statistic). Raises ValueError for one class only, scores that are not finite, or
    lengths that differ.
    """
    values, labels = _scored(scores, y)
    return float(_weighted_auroc(values, labels, np.ones((1, len(values))))[0])


def aurocs(scores: Float[np.ndarray, "*batch n"], labels: Int[np.ndarray, "*labels n"]) -> Float[np.ndarray, "*batch"]:
    """Return the AUROC of every row of scores; labels (0 and 1) are broadcast to them. Exact for ties.

    The label rides in the lowest bit of the float64 of a float32 score (29 of them are free), so that one plain sort
    does it. Float64 scores are rounded to float32. Raises ValueError as auroc does.
    """
    keys = np.asarray(scores, dtype=np.float32).astype(np.float64) + 0.0  # + 0.0: no negative zero
    if not np.isfinite(keys).all():
        raise ValueError("a score is nan or infinite: its rank does not exist")
    labels = np.broadcast_to(labels, keys.shape)
    n_positive = labels.sum(-1)
    n = keys.shape[-1]
    if (n_positive == 0).any() or (n_positive == n).any():
        raise ValueError("both classes are needed for an AUROC, and one is absent")
    bits = keys.view(np.int64)
    bits |= labels
    keys.sort(axis=-1)
    one = bits & 1
    wins = (one * np.arange(1, n + 1)).sum(-1) - n_positive * (n_positive + 1) / 2
    area = wins / (n_positive * (n - n_positive))
    level = bits & ~1
    tied = (level[..., 1:] == level[..., :-1]).any(-1)
    for at in zip(*np.nonzero(tied), strict=True):
        area[at] = _weighted_auroc(level[at].view(np.float64), one[at], np.ones((1, n)))[0]
    return area


def fold_area(
    scores: Shaped[np.ndarray, " n"], labels: Int[np.ndarray, " n"], number: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """Return AUROC and variance over groups of one fold's rows, its scorer held fixed.

    DeLong's variance (Biometrics 44:837, 1988) summed over groups (Obuchowski, Biometrics 53:567, 1997), within
    strata of groups (positive, negative, mixed), so that groups of one row give DeLong's figure exactly.
    """
    positive, negative = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    placement = np.where(labels == 1, _below(negative, scores), 1 - _below(positive, scores))
    area = float(placement[labels == 1].mean())
    share = (placement - area) / np.where(labels == 1, len(positive), len(negative))
    _, local = np.unique(number, return_inverse=True)
    influence = np.bincount(local, share)
    holds = (np.bincount(local, labels) > 0) * 2 + (np.bincount(local, 1 - labels) > 0)
    variance = 0.0
    for stratum in np.unique(holds):
        members = influence[holds == stratum]
        count = len(members)
        variance += count / (count - 1) * ((members - members.mean()) ** 2).sum() if count > 1 else members[0] ** 2
    return area, float(variance)


def auroc_interval(
    scores: Shaped[Tensor, " n"] | Shaped[np.ndarray, " n"] | Sequence[float],
    y: Labels,
    groups: Labels | None = None,
    *,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return an interval for the AUROC over resampled groups (the rows of a group are drawn together).

    Groups are drawn within strata (only positives, only negatives, both), so that no draw loses a class. From 30
    groups on it is the percentile interval. Below, percentiles of so few groups are too narrow, and the interval is
    auroc +- t * sd, with the bootstrap's sd corrected by sqrt(m / (m - 1)), m being the smallest number of groups that
    hold one class, and t of m - 1 degrees of freedom. Where every draw separates perfectly the bootstrap knows no
    spread, and Newcombe's score interval (Stat. Med. 25:559, 2006, method 5) on numbers of groups stands in.
    Raises ValueError where a class lies in one group only: one group says nothing of how groups vary.
    """
    values, labels = _scored(scores, y)
    if not 0 < level < 1 or n_boot < 1:
        raise ValueError(f"level {level} must lie between 0 and 1, and n_boot {n_boot} be at least 1")
    number = as_groups(groups, len(values))
    holds = np.stack([np.bincount(number[labels == c], minlength=number.max() + 1) > 0 for c in (0, 1)])
    n_negative, n_positive = (int(n) for n in holds.sum(1))
    fewest = min(n_negative, n_positive)
    if fewest < 2:
        raise ValueError(f"a class lies in {fewest} group only; an interval over groups needs at least 2 a class")
    rng = np.random.default_rng(seed)
    step = max(1, 2**22 // len(values))  # 32 MB of weights at a time
    parts = []
    for start in range(0, n_boot, step):
        counts = bootstrap_counts(holds[1] * 2 + holds[0], min(step, n_boot - start), rng)
        parts.append(_weighted_auroc(values, labels, counts[:, number]))
    drawn = np.concatenate(parts)
    if np.ptp(drawn) == 0:
        return score_interval(float(drawn[0]), n_positive, n_negative, level=level)
    if holds.shape[1] >= FEW_GROUPS:
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)
    from scipy.special import stdtrit

    half = float(stdtrit(fewest - 1, (1 + level) / 2)) * float(drawn.std()) * (fewest / (fewest - 1)) ** 0.5
    centre = auroc(values, labels)
    return max(0.0, centre - half), min(1.0, centre + half)


def _below(ordered: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Share of ordered values below each of `at`, equal ones counted half."""
    return (np.searchsorted(ordered, at, "left") + np.searchsorted(ordered, at, "right")) / (2 * len(ordered))


def bootstrap_counts(
    strata: Shaped[np.ndarray, " groups"], n_draws: int, rng: np.random.Generator
) -> Int[np.ndarray, "draws groups"]:
    """Return how often each group is drawn in each bootstrap draw: with replacement, as many as each stratum has."""
    counts = np.zeros((n_draws, len(strata)), dtype=np.int64)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        picks = members[rng.integers(0, len(members), (n_draws, len(members)))]
        np.add.at(counts, (np.arange(n_draws)[:, None], picks), 1)
    return counts


def grouped_folds(
    groups: Labels, n: int = 5, seed: int = 0, y: Labels | None = None
) -> list[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]]:
    """Return n pairs (train rows, test rows) in which no group lies on both sides.

    With labels, whole groups are dealt, largest first, to the fold whose class counts they even out most; without,
    to the smallest fold. The seed decides between equals. Raises ValueError where there are fewer groups than folds,
    or where a fold would be left with one class in its test or its training rows.
    """
    number = as_groups(groups, len(groups))
    n_groups = int(number.max()) + 1 if len(number) else 0
    if not 2 <= n <= n_groups:
        raise ValueError(f"{n} folds need at least 2 and at most as many folds as groups, {n_groups} groups were given")
    labels = np.zeros(len(number), dtype=np.int64) if y is None else as_labels(y)
    if len(labels) != len(number):
        raise ValueError(f"{len(labels)} labels were given for {len(number)} rows")
    n_classes = int(labels.max()) + 1
    table = np.zeros((n_groups, n_classes))
    np.add.at(table, (number, labels), 1)
    order = np.random.default_rng(seed).permutation(n_groups)
    order = order[np.argsort(-table[order].sum(1), kind="stable")]
    share = table.sum(0) / n
    held = np.zeros((n, n_classes))
    fold_of = np.empty(n_groups, dtype=np.int64)
    for group in order:
        excess = ((held + table[group] - share) / share) ** 2 - ((held - share) / share) ** 2
        fold_of[group] = np.lexsort((held.sum(1), excess.sum(1).round(9)))[0]
        held[fold_of[group]] += table[group]
    if y is not None and ((held == 0) | (held == table.sum(0))).any():
        raise ValueError(f"with {n} folds of {n_groups} groups a fold holds one class only; use fewer folds")
    rows = fold_of[number]
    return [(np.flatnonzero(rows != fold), np.flatnonzero(rows == fold)) for fold in range(n)]


def fold_numbers(folds: Sequence[tuple[np.ndarray, np.ndarray]]) -> Int[np.ndarray, " n"]:
    """Return the number of the fold whose test rows hold each row."""
    number = np.empty(sum(len(test) for _, test in folds), dtype=np.int64)
    for k, (_, test) in enumerate(folds):
        number[test] = k
    return number


def permute_labels(y: Labels, groups: Labels | None, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Return labels shuffled as the null hypothesis allows: within every group that holds both classes, and between
    whole groups where a group holds one class only (rows of such a group are not exchangeable with others).
    """
    labels = as_labels(y)
    return labels[permutations(labels, groups, 1, rng)[0]]


def permutations(
    y: Shaped[np.ndarray, " n"],
    groups: Labels | None,
    n: int,
    rng: np.random.Generator,
    strata: Shaped[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, "draws rows"]:
    """Return n draws of the row whose label each row takes under the null: labels become y[draw].

    Rows of a group that holds several labels swap among themselves; a group of one label takes that of another whole
    group of one label (of its own stratum, where the rows of a group share one).
    """
    number = as_groups(groups, len(y))
    n_groups = int(number.max()) + 1
    by_group = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[by_group], np.arange(n_groups))
    ordered = y[by_group]
    mixed = np.maximum.reduceat(ordered, starts) != np.minimum.reduceat(ordered, starts)
    first = by_group[starts]
    constant = np.flatnonzero(~mixed)
    stratum = np.zeros(n_groups, dtype=np.int64) if strata is None else np.asarray(strata)[first]
    layers = stratum[constant]
    layered = constant[np.argsort(layers, kind="stable")]
    draws = np.empty((n, len(y)), dtype=np.int64)
    source = np.arange(n_groups)
    for draw in draws:
        if mixed.any():
            draw[np.lexsort((rng.random(len(y)), number))] = by_group
        source[constant[np.lexsort((rng.random(len(constant)), layers))]] = layered
        whole = ~mixed[number]
        draw[whole] = first[source[number[whole]]]
    return draws


def placebo_directions(d: int, n: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Return n random unit vectors, uniform on the sphere: what a direction must beat."""
    if d < 1 or n < 1:
        raise ValueError(f"placebo directions need a width and a number of at least 1, d={d} and n={n} were given")
    draws = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draws / draws.norm(dim=1, keepdim=True)).float()


def _scored(scores: object, y: Labels) -> tuple[np.ndarray, np.ndarray]:
    array = scores.detach().cpu().double().numpy() if isinstance(scores, Tensor) else np.asarray(scores, dtype=float)
    labels = as_labels(y)
    if array.shape != labels.shape:
        raise ValueError(f"{array.shape} scores were given for {len(labels)} labels; one score a label is needed")
    if not np.isfinite(array).all():
        raise ValueError("a score is nan or infinite: its rank does not exist")
    return array, labels


def _weighted_auroc(
    scores: Shaped[np.ndarray, " n"], labels: Int[np.ndarray, " n"], weights: Shaped[np.ndarray, "draws n"]
) -> Float[np.ndarray, " draws"]:
    """Mann-Whitney over levels of equal score: positives at a level beat the negatives below it and half of its own."""
    order = np.argsort(scores, kind="stable")
    level_starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))
    weights = weights[:, order].astype(float)
    positive = np.add.reduceat(weights * labels[order], level_starts, axis=1)
    negative = np.add.reduceat(weights * (1 - labels[order]), level_starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(1)
    return wins / (positive.sum(1) * negative.sum(1))


def score_interval(area: float | int, n_positive: int, n_negative: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Newcombe's score interval of an AUROC (Stat. Med. 25:559, 2006, method 5), from numbers of rows alone.

    Solves |area - x| = z * sqrt(V(x)) for x on either side by bisection; it has a width where area is 0 or 1.
    """
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    mean_n = (n_positive + n_negative) / 2

    def outside(x: float) -> bool:
        spread = 1 + (mean_n - 1) * ((1 - x) / (2 - x) + x / (1 + x))
        return (area - x) ** 2 > z2 * x * (1 - x) * spread / (n_positive * n_negative)

    limits = []
    for end in (0.0, 1.0):
        far, near = end, area
        for _ in range(60):
            middle = (far + near) / 2
            far, near = (middle, near) if outside(middle) else (far, middle)
        limits.append(near)
    return min(limits), max(limits)
