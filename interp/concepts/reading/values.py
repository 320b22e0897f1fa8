"""Which cell reads a continuous quantity (a position, a count, a date): ridge, nested as `sweep` is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.direction import Direction, direction_from
from interp.acts.resampling import Labels, fold_numbers, grouped_folds
from interp.concepts.reading.closed import Columns, ridge
from interp.concepts.reading.nested import Candidate, Cell, chunks, fit_columns, repeated
from interp.concepts.reading.solver import training_sets
from interp.concepts.reading.sweep import checked_rows, folds_and_units

__all__ = ["ValueCell", "ValueSweep", "sweep_values"]


@dataclass(frozen=True, kw_only=True)
class ValueCell:
    """A cell and penalty with its plain cross-validated Spearman correlation; the best of a table is too good."""

    cell: str
    C: float
    spearman: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueSweep:
    """Outer scores of a nested sweep of ridge regressions on unseen groups."""

    spearman: float  # rank correlation within held-out folds, mean over folds by their rows
    interval: tuple[float, float]  # 95 %: the permutation test inverted; too wide far from 0
    p_value: float  # (1 + permutations that reach spearman) / (1 + permutations)
    r2: float  # 1 - squared error / squared distance from the training mean, held-out rows; below 0: worse than it
    r2_null: float  # mean of the permutations
    null: tuple[float, ...]  # Spearman of each permutation
    table: tuple[ValueCell, ...]  # best first
    chosen: tuple[ValueCell, ...]  # without each fold; here `spearman` is the inner score
    n: int
    n_groups: int
    seed: int
    best: Direction  # the table's best, fitted on all rows; scale is the change of the target a unit of activation

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON holds them, without the direction."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "best"}
        return {
            k: [asdict(x) if isinstance(x, ValueCell) else x for x in v] if isinstance(v, tuple) else v
            for k, v in kept.items()
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    spearman: float
    r2: float
    winners: list[tuple[int, int, float]]  # candidate, cell, inner score
    plain: np.ndarray  # [candidate, cell]


def sweep_values(
    X: Mapping[str, Tensor] | Mapping[str, np.ndarray],
    y: Float[np.ndarray, " n"] | Float[Tensor, " n"] | Sequence[float],
    *,
    groups: Labels | None = None,
    pairs: Labels | None = None,
    Cs: Sequence[float | int] = (1e-4, 1e-2, 1.0),
    folds: int = 5,
    n_permutations: int = 200,
    model: Any = None,
    seed: int = 0,
) -> ValueSweep:
    """Return how well ridge regression reads a continuous target, the cell and penalty chosen inside the loop.

    Rows are standardised by the training folds, the penalty is 1 / C. Folds, groups, pairs and permutations are those
    of `sweep`. Raises ValueError where the data do not allow this, or the target is constant in a fold.
    """
    target = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y, dtype=float)
    if target.ndim != 1 or not np.isfinite(target).all():
        raise ValueError(f"targets are one row of finite numbers, shape {target.shape} was given")
    if not Cs or not all(C > 0 for C in Cs):
        raise ValueError(f"Cs are positive inverse penalties, {list(Cs)} was given")
    if n_permutations < 39:
        raise ValueError(f"the interval inverts a permutation test: n_permutations is {n_permutations}, 39 is least")
    rows = checked_rows(X, len(target))
    group, unit = folds_and_units(groups, pairs, len(target), folds, n_permutations)
    fold = fold_numbers(grouped_folds(group, folds, seed))
    centred = (target - target.mean()) / (target.std() or 1.0)  # of no consequence: for the arithmetic of float32
    cells = {name: Cell.of(x) for name, x in rows.items()}
    candidates: list[Candidate] = [("ridge", float(C)) for C in Cs]

    def judge(some: list[Cell], labels: np.ndarray, numbers: np.ndarray, order: np.ndarray) -> list[_Outcome]:
        return _judge(some, labels, numbers, candidates)

    rng = np.random.default_rng(seed)
    true, null = repeated(list(cells.values()), centred, fold, unit, judge, n_permutations, rng, len(candidates))
    names = list(cells)
    table = [
        ValueCell(cell=name, C=candidates[j][1], spearman=float(true.plain[j, c]))
        for j in range(len(candidates))
        for c, name in enumerate(names)
    ]
    table.sort(key=lambda cell: -cell.spearman)
    away = np.sort([abs(o.spearman) for o in null])
    half = float(away[int(np.ceil(0.95 * (len(away) + 1))) - 1])
    return ValueSweep(
        spearman=true.spearman,
        interval=(max(-1.0, true.spearman - half), min(1.0, true.spearman + half)),
        p_value=(1 + sum(o.spearman >= true.spearman for o in null)) / (1 + len(null)),
        r2=true.r2,
        r2_null=float(np.mean([o.r2 for o in null])),
        null=tuple(o.spearman for o in null),
        table=tuple(table),
        chosen=tuple(ValueCell(cell=names[c], C=candidates[j][1], spearman=s) for j, c, s in true.winners),
        n=len(target),
        n_groups=int(group.max()) + 1,
        seed=seed,
        best=_fitted(rows[table[0].cell], target, table[0], model, seed),
    )


def _judge(cells: list[Cell], y: np.ndarray, folds: np.ndarray, candidates: Sequence[Candidate]) -> list[_Outcome]:
    n_folds, n_columns = int(folds.max()) + 1, len(y)
    bounds = [0, *np.bincount(folds).cumsum().tolist()]
    if any((np.ptp(y[:, a:b], axis=1) == 0).any() for a, b in pairwise(bounds)):
        raise ValueError("the target is constant in a fold: use fewer folds")
    sets = training_sets(n_folds, nested=True)
    sizes = np.diff(bounds) / len(folds)
    inner = np.zeros((len(candidates), len(cells), n_folds, n_columns))
    outer = np.zeros((3, len(candidates), len(cells), n_folds, n_columns))  # Spearman, squared error, squared distance
    for some in chunks(cells, len(sets) * n_columns, square=True):
        batch = [cells[i] for i in some]
        for j, candidate in enumerate(candidates):
            W, b = fit_columns(batch, torch.from_numpy(y), torch.from_numpy(folds), sets, candidate)
            for k, (start, stop) in enumerate(pairwise(bounds)):
                others = [i for i, out in enumerate(sets) if k in out]
                F = torch.stack([c.F[start:stop] for c in batch])
                said = torch.einsum("csqd,cnd->csqn", W[:, others], F) + b[:, others, :, None]
                ranks = _correlation(said.double().numpy(), y[:, start:stop])
                outside = (y.sum(1) - y[:, start:stop].sum(1)) / (len(folds) - (stop - start))
                outer[0, j, some, k] = ranks[:, 0]
                outer[1, j, some, k] = ((said[:, 0].double().numpy() - y[:, start:stop]) ** 2).sum(-1)
                outer[2, j, some, k] = ((y[:, start:stop] - outside[:, None]) ** 2).sum(-1)
                for q, i in enumerate(others[1:], start=1):
                    held = next(m for m in sets[i] if m != k)
                    inner[j, some, held] += ranks[:, q] * sizes[k] / (1 - sizes[held])
    best = inner.reshape(len(candidates) * len(cells), n_folds, n_columns).argmax(0)
    found = []
    for p in range(n_columns):
        winners = [divmod(int(w), len(cells)) for w in best[:, p]]
        picked = np.array([outer[:, j, c, k, p] for k, (j, c) in enumerate(winners)])
        found.append(
            _Outcome(
                spearman=float(sizes @ picked[:, 0]),
                r2=float(1 - picked[:, 1].sum() / picked[:, 2].sum()),
                winners=[(j, c, float(inner[j, c, k, p])) for k, (j, c) in enumerate(winners)],
                plain=np.einsum("jck,k->jc", outer[0, ..., p], sizes),
            )
        )
    return found


def _correlation(said: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of predictions [cell, set, column, n] with targets [column, n]; 0 where nothing is predicted."""
    from scipy.stats import rankdata

    a, b = rankdata(said, axis=-1), rankdata(y, axis=-1)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    spread = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)


def _fitted(X: Tensor, y: np.ndarray, choice: ValueCell, model: Any, seed: int) -> Direction:
    mean, deviation = X.double().mean(0), X.double().std(0, correction=0)
    deviation = torch.where(deviation <= 1e-12 * mean.abs().clamp_min(1e-30), 1.0, deviation)
    data = Columns(
        F=((X - mean) / deviation)[None],
        deviation=deviation[None],
        Y=torch.from_numpy(y)[None],
        bounds=(0, len(y)),
        left_out=((),),
    )
    weight = ridge(data, choice.C)[0][0, 0, 0] / deviation
    return direction_from(weight, hook=choice.cell.split(" @ ")[0], model=model, method="ridge", seed=seed)
