"""Which cell (layer, position) and method reads a concept, and how well on groups that had no say in the choice."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from interp.acts.direction import as_rows
from interp.acts.resampling import (
    FEW_GROUPS,
    Labels,
    as_groups,
    as_labels,
    as_list,
    fold_area,
    fold_numbers,
    grouped_folds,
    score_interval,
)
from interp.concepts.reading.closed import CLOSED
from interp.concepts.reading.controls import Calibration, LearningPoint, calibration, random_directions, refits
from interp.concepts.reading.nested import Candidate, Cell, Outcome, Scores, control_outcomes, run, standard_error
from interp.concepts.reading.probes import Probe, fit_probe
from interp.concepts.reading.rows import joined_groups

__all__ = ["Calibration", "CellScore", "Choice", "LearningPoint", "Sweep", "Untrained", "sweep"]

METHODS = ("logistic", *CLOSED)
SHOWN = 8  # cells of the printed table
SETTLED = (3.0, 5.0)  # standard errors from chance between which the correction measured at chance fades out


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A cell and the method that reads it."""

    cell: str
    method: str
    C: float | None  # inverse penalty; None for methods without one


@dataclass(frozen=True, kw_only=True)
class CellScore:
    """Plain cross-validated AUROC of one cell and method; the best of a table is too good, its interval too."""

    cell: str
    method: str
    C: float | None
    auroc: float
    interval: tuple[float, float]  # 95 %, not corrected for the choice among the cells


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """The whole sweep on the rows of an untrained model."""

    auroc: float
    interval: tuple[float, float]
    p_value: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """Outer scores of a nested sweep: what the procedure, its choice included, reaches on unseen groups."""

    auroc: float  # chance that a positive scores above a negative of the same held-out fold
    interval: tuple[float, float]  # 95 %
    interval_by: str  # how it was made
    p_value: float | None  # (1 + permutations that reach auroc) / (1 + permutations); None without permutations
    accuracy: float
    majority: float  # accuracy of always saying the commoner label
    control: float | None  # mean AUROC of the same procedure on control labels
    control_task: str  # what these are
    selectivity: float | None  # auroc - control
    random_direction: float  # mean AUROC of random directions in the chosen cells, their sign from the training rows
    untrained: Untrained | None
    calibration: Calibration | None  # None where no method is logistic
    inner: float  # mean inner score of what was chosen: what a choice on the test rows would have reported
    in_sample: float  # AUROC on the rows that the chosen readers were fitted on
    gap: float  # in_sample - auroc
    learning_curve: tuple[LearningPoint, ...]
    table: tuple[CellScore, ...]  # best first
    choice: Choice  # the table's best: fitted on all rows, it is `best`
    chosen: tuple[Choice, ...]  # what was chosen without each fold
    fold_aurocs: tuple[float, ...]
    null: tuple[float, ...]  # AUROC of each permutation
    n: int
    n_groups: int
    seed: int
    best: Probe

    def __str__(self) -> str:
        c, low, high = self.choice, *self.interval
        nulls = [f"random directions {self.random_direction:.3f}", f"majority {self.majority:.3f} (of accuracy)"]
        if self.control is not None:
            nulls.insert(0, f"{self.control_task} {self.control:.3f}")
        if self.untrained is not None:
            fresh = self.untrained
            nulls.append(f"untrained model {fresh.auroc:.3f} [{fresh.interval[0]:.3f}, {fresh.interval[1]:.3f}]")
        p = "" if self.p_value is None else f", p {self.p_value:.3g} of {len(self.null)} permutations"
        lines = [
            f"AUROC {self.auroc:.3f} [{low:.3f}, {high:.3f}]{p}; unseen groups, the choice of cell and method included",
            f"accuracy {self.accuracy:.3f}; AUROC on the rows fitted on {self.in_sample:.3f}; {self.n} rows, "
            f"{self.n_groups} groups; interval: {self.interval_by}",
            f"nulls: {', '.join(nulls)}",
            f"best on all rows: {c.cell}, {c.method}; each cell alone, not corrected for the choice:",
        ]
        for row in self.table[:SHOWN]:
            lines.append(f"  {row.auroc:.3f} [{row.interval[0]:.3f}, {row.interval[1]:.3f}]  {row.cell}, {row.method}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON holds them, without the probe."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "best"}
        return {k: _plain(v) for k, v in kept.items()}


def sweep(
    X: Mapping[str, Tensor] | Mapping[str, np.ndarray],
    y: Labels,
    *,
    groups: Labels | None = None,
    pairs: Labels | None = None,
    methods: Sequence[str] = ("logistic", "lda", "mean_difference"),
    Cs: Sequence[float | int] = (1.0,),
    folds: int = 5,
    n_permutations: int = 200,
    n_random: int = 20,
    shares: Sequence[float] = (0.1, 0.25, 0.5),
    types: Labels | None = None,
    untrained: Mapping[str, Tensor] | Mapping[str, np.ndarray] | None = None,
    model: Any = None,
    seed: int = 0,
) -> Sweep:
    """Return what nested, grouped, stratified cross-validation over cells and methods finds, and its nulls.

    X maps a cell ("resid_post.2", or "resid_post.2 @ last") to its rows [n, d] in raw units; y holds 0 and 1. Rows of
    a group, and of a pair, stay in one fold. The best of all cells, methods and inverse penalties (Cs, for logistic
    and ridge) is chosen without each outer fold and judged on it; AUROC is taken within folds, since scores of
    different fits are no common scale. Permutations repeat the whole choice; labels move within pairs or groups, and
    between whole groups where a group holds one label.

    The interval takes the training rows that folds share into account (see nested.standard_error) and is scaled to
    the spread of the permutations; below 30 groups it inverts the permutation test, which needs 39 permutations.
    Types (say, the word of a token) add Hewitt and Liang's control task (arXiv:1909.03368): one random label a type.
    `untrained` holds rows of the same examples from an untrained model. Continuous targets: `values.sweep_values`.
    Raises ValueError where the data do not allow this (too few groups, one class in a fold, rows that are not finite).
    """
    labels = as_labels(y)
    rows = checked_rows(X, len(labels))
    candidates = _candidates(methods, Cs)
    group, unit = folds_and_units(groups, pairs, len(labels), folds, n_permutations)
    few = int(group.max()) + 1 < FEW_GROUPS
    split = grouped_folds(group, folds, seed, labels)
    fold = fold_numbers(split)
    rng = np.random.default_rng(seed)
    cells = {name: Cell.of(x) for name, x in rows.items()}
    true, scores, null = run(cells, labels, fold, group, unit, candidates, n_permutations, rng)
    interval, by = _interval(true, null, labels, group)
    names = list(cells)
    chosen = [(names[c], candidates[j]) for j, c in true.winners]
    order = np.argsort(fold, kind="stable")
    held = np.empty(len(labels), dtype=np.float32)
    held[order] = np.concatenate([scores.held[k][j, c, 0] for k, (j, c) in enumerate(true.winners)])
    table = _table(scores, names, candidates, labels[order], fold[order], group[order], interval if few else None, true)
    control, task = _control(cells, labels, fold, group, candidates, types, null, rng)
    in_sample, curve = refits(rows, labels, split, group, chosen, shares, true.areas, rng)
    first = table[0]
    probe = fit_probe(
        rows[first.cell], labels, method=first.method, C=first.C or 1.0, hook=first.cell.split(" @ ")[0], model=model
    )
    return Sweep(
        auroc=true.area,
        interval=interval,
        interval_by=by,
        p_value=_p_value(true, null),
        accuracy=float(((held > 0) == labels).mean()),
        majority=float(max(labels.mean(), 1 - labels.mean())),
        control=control,
        control_task=task,
        selectivity=None if control is None else true.area - control,
        random_direction=random_directions(cells, labels, split, [name for name, _ in chosen], n_random, seed),
        untrained=_untrained(untrained, rows, labels, fold, group, unit, candidates, n_permutations, rng),
        calibration=calibration(scores, candidates, labels[order], fold[order], rng),
        inner=true.inner,
        in_sample=in_sample,
        gap=in_sample - true.area,
        learning_curve=curve,
        table=table,
        choice=Choice(cell=first.cell, method=first.method, C=first.C),
        chosen=tuple(_choice(name, candidate) for name, candidate in chosen),
        fold_aurocs=true.areas,
        null=tuple(o.area for o in null),
        n=len(labels),
        n_groups=int(group.max()) + 1,
        seed=seed,
        best=probe,
    )


def checked_rows(X: Mapping[str, Any], n: int) -> dict[str, Tensor]:
    """Return each cell's rows. Raises ValueError, naming the cell, where they are not finite [n, d]."""
    if not X:
        raise ValueError("no cells were given: X maps names such as 'resid_post.2' to rows [n, d]")
    rows = {}
    for name, x in X.items():
        try:
            rows[name] = as_rows(x)
        except ValueError as error:
            raise ValueError(f"cell {name!r}: {error}") from error
        if len(rows[name]) != n:
            raise ValueError(f"cell {name!r} has {len(rows[name])} rows, but {n} labels were given")
    return rows


def folds_and_units(
    groups: Labels | None, pairs: Labels | None, n: int, folds: int, n_permutations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of what stays in one fold, and of what labels are permuted within. Raises ValueError.

    A row whose pair is None is a pair of its own.
    """
    number, unit = as_groups(groups, n), None
    if pairs is not None:
        unit = as_groups([("row", i) if p is None else p for i, p in enumerate(as_list(pairs))], n)
        number = joined_groups(number, unit, n)
    n_groups = int(number.max()) + 1
    if folds < 3:
        raise ValueError(f"folds is {folds}; a nested choice needs at least 3")
    if n_groups < folds:
        raise ValueError(f"{folds} folds need as many groups, there are {n_groups}: use fewer folds")
    if n_groups < FEW_GROUPS and n_permutations < 39:
        raise ValueError(
            f"with {n_groups} groups the interval is an inverted permutation test: at least 39 permutations are "
            f"needed, n_permutations is {n_permutations}"
        )
    return number, number if unit is None else unit


def _candidates(methods: Sequence[str], Cs: Sequence[float | int]) -> list[Candidate]:
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods or isinstance(methods, str):
        raise ValueError(f"methods are some of {', '.join(METHODS)}, {methods!r} was given")
    if not Cs or not all(C > 0 for C in Cs):
        raise ValueError(f"Cs are positive inverse penalties, {list(Cs)} was given")
    return [(m, float(C)) for m in methods for C in (Cs if m in ("logistic", "ridge") else (1.0,))]


def _choice(cell: str, candidate: Candidate) -> Choice:
    return Choice(cell=cell, method=candidate[0], C=candidate[1] if candidate[0] in ("logistic", "ridge") else None)


def _p_value(true: Outcome, null: Sequence[Outcome]) -> float | None:
    return (1 + sum(o.area >= true.area for o in null)) / (1 + len(null)) if null else None


def _interval(
    true: Outcome, null: Sequence[Outcome], labels: np.ndarray, group: np.ndarray
) -> tuple[tuple[float, float], str]:
    """Return the 95 % interval of the outer AUROC, and how it was made."""
    from scipy.special import stdtrit

    n_groups = int(group.max()) + 1
    freedom = float(n_groups - 1)
    if n_groups < FEW_GROUPS:
        away = np.sort([abs(o.area - 0.5) for o in null])
        half, by = float(away[int(np.ceil(0.95 * (len(away) + 1))) - 1]), "inverted permutation test"
        clustered = true.clustered * float(stdtrit(freedom, 0.975))
        if clustered > half and any(0 < labels[group == g].mean() < 1 for g in range(n_groups)):
            half, by = clustered, f"spread of {n_groups} groups, Student's t"
        return _around(true.area, half), by
    if not true.spread > 0:
        sizes = [len(set(group[labels == c].tolist())) for c in (1, 0)]
        return score_interval(true.area, *sizes), "Newcombe's score interval on numbers of groups"
    scale, by = 1.0, "DeLong over groups, shared training rows"
    ratios = np.array([((o.area - 0.5) / o.spread) ** 2 for o in null if o.spread > 0])
    if len(ratios) >= 20:
        measured = float(ratios.mean())
        away = abs(true.area - 0.5) / (true.spread * measured**0.5)
        chance = 1 - true.agreement * float(np.clip((away - SETTLED[0]) / (SETTLED[1] - SETTLED[0]), 0, 1))
        scale, by = 1 + (measured - 1) * chance, f"{by}, scaled to permutations"
        noise = float(ratios.var()) / (len(ratios) * measured**2)  # squared relative error of `measured`
        freedom = 1 / (1 / freedom + chance**2 * noise / 2)  # a variance so estimated has 2 / noise degrees of freedom
    return _around(true.area, float(stdtrit(freedom, 0.975)) * true.spread * scale**0.5), by


def _around(centre: float, half: float) -> tuple[float, float]:
    return max(0.0, centre - half), min(1.0, centre + half)


def _table(
    scores: Scores,
    names: list[str],
    candidates: list[Candidate],
    labels: np.ndarray,
    folds: np.ndarray,
    groups: np.ndarray,
    inverted: tuple[float, float] | None,
    true: Outcome,
) -> tuple[CellScore, ...]:
    from scipy.special import stdtrit

    quantile = float(stdtrit(int(groups.max()), 0.975))
    parts = [folds == k for k in range(int(folds.max()) + 1)]
    shares = np.array([labels[p].sum() * (1 - labels[p]).sum() for p in parts], dtype=float)
    shares /= shares.sum()
    found = []
    for j, candidate in enumerate(candidates):
        for c, name in enumerate(names):
            each = [fold_area(scores.held[k][j, c, 0], labels[p], groups[p]) for k, p in enumerate(parts)]
            area = float(sum(s * a for s, (a, _) in zip(shares, each, strict=True)))
            every = np.ones((len(parts), len(parts)), dtype=bool)
            error = standard_error(np.array([v for _, v in each]), shares, scores.alike[j, c, 0], every)
            half = quantile * error if inverted is None else max(true.area - inverted[0], inverted[1] - true.area)
            choice = _choice(name, candidate)
            found.append(CellScore(**asdict(choice), auroc=area, interval=_around(area, half)))
    return tuple(sorted(found, key=lambda s: -s.auroc))


def _control(
    cells: Mapping[str, Cell],
    labels: np.ndarray,
    fold: np.ndarray,
    group: np.ndarray,
    candidates: list[Candidate],
    types: Labels | None,
    null: Sequence[Outcome],
    rng: np.random.Generator,
) -> tuple[float | None, str]:
    if types is None:
        return (float(np.mean([o.area for o in null])) if null else None), "permuted labels"
    number = as_groups(types, len(labels))
    found = control_outcomes(cells, labels, fold, group, number, candidates, rng)
    return float(np.mean([o.area for o in found])), "one random label a type"


def _untrained(
    untrained: Mapping[str, Any] | None,
    rows: Mapping[str, Tensor],
    labels: np.ndarray,
    fold: np.ndarray,
    group: np.ndarray,
    unit: np.ndarray,
    candidates: list[Candidate],
    n_permutations: int,
    rng: np.random.Generator,
) -> Untrained | None:
    if untrained is None:
        return None
    if set(untrained) != set(rows):
        raise ValueError(f"the untrained rows are of other cells: {sorted(set(untrained) ^ set(rows))[:3]}")
    cells = {}
    for name, x in untrained.items():
        if len(x) != len(labels):
            raise ValueError(f"untrained cell {name!r} has {len(x)} rows, but {len(labels)} labels were given")
        cells[name] = Cell.of(as_rows(x))
    true, _, null = run(cells, labels, fold, group, unit, candidates, n_permutations, rng)
    interval, _ = _interval(true, null, labels, group)
    return Untrained(auroc=true.area, interval=interval, p_value=_p_value(true, null))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
