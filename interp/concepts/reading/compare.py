"""Compare directions: cosines beside what chance gives, across layers, and in the unembedding's own geometry."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.acts.resampling import Labels, as_groups, permute_labels
from interp.concepts.reading.causal import CausalInnerProduct, Vector, as_vector, causal_inner_product
from interp.concepts.reading.finders import METHODS, mean_difference
from interp.concepts.reading.regression import choose_C
from interp.concepts.reading.rows import DirectionWarning, Rows, labelled_rows

__all__ = [
    "CausalInnerProduct",
    "CosineTable",
    "LayerAgreement",
    "ReadingGap",
    "SteeringVersusReading",
    "agreement_across_layers",
    "causal_inner_product",
    "chance_cosine",
    "cosine_p_value",
    "cosine_table",
    "reading_gap",
    "steering_versus_reading",
]

PENALISED = {"logistic", "svm"}


@dataclass(frozen=True, kw_only=True, eq=False)
class CosineTable:
    """Cosines between directions, and how often chance alone reaches each."""

    names: tuple[str, ...]
    cosines: Float[np.ndarray, "k k"]
    p_values: Float[np.ndarray, "k k"]  # two-sided, of one pair looked at alone; nan on the diagonal
    null: str  # "random directions", or "shuffled labels" of the rows that the directions were fitted on
    chance: Float[np.ndarray, "k k"]  # |cosine| that the null exceeds in 5 % of draws; nan on the diagonal
    chance_of_any: float  # |cosine| that some pair of the table exceeds in 5 % of draws of the null
    n_draws: int | None  # shuffles; None where the null is exact

    def __getitem__(self, pair: tuple[str, str]) -> float:
        """Return the cosine of two directions by name. Raises KeyError for a name that the table has not."""
        missing = [name for name in pair if name not in self.names]
        if missing:
            raise KeyError(f"no direction {missing[0]!r}; there are: {', '.join(self.names)}")
        return float(self.cosines[self.names.index(pair[0]), self.names.index(pair[1])])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, the diagonals of the null as None."""

        def plain(square: np.ndarray) -> list[list[float | None]]:
            return [[None if np.isnan(v) else float(v) for v in row] for row in square]

        squares = {name: plain(getattr(self, name)) for name in ("cosines", "p_values", "chance")}
        rest = {"null": self.null, "chance_of_any": self.chance_of_any, "n_draws": self.n_draws}
        return {"names": list(self.names), **squares, **rest}

    def __str__(self) -> str:
        wide = max(7, *(len(name) for name in self.names))
        lines = [" " * wide + "".join(f" {name:>{wide}}" for name in self.names)]
        for i, name in enumerate(self.names):
            marks = ["*" if i != j and abs(v) > self.chance_of_any else "" for j, v in enumerate(self.cosines[i])]
            cells = (f"{format(v, '.3f') + mark:>{wide}}" for v, mark in zip(self.cosines[i], marks, strict=True))
            lines.append(f"{name:>{wide}} {' '.join(cells)}")
        return "\n".join(
            [*lines, f"* above {self.chance_of_any:.3f}, which some pair reaches in 5 % of draws of {self.null}"]
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerAgreement:
    """How far the directions of one concept at several layers agree."""

    table: CosineTable  # layers in order
    neighbours: tuple[float, ...]  # cosine of each layer with the next
    mean: float  # of all cosines between different layers
    chance_mean: float  # |mean| that 5 % of random directions exceed (drawn), or of shuffled labels


@dataclass(frozen=True, kw_only=True)
class ReadingGap:
    """How far the direction that steers (mean difference) lies from those that read."""

    cosines: Mapping[str, float]  # method -> cosine with the mean difference
    shuffled: Mapping[str, tuple[float, float, float]]  # the same on shuffled labels: mean, 2.5 % and 97.5 % quantile
    chance: float  # |cosine| that 5 % of random directions exceed
    n_shuffles: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class SteeringVersusReading:
    """Whether the place where a concept reads best is the one where it steers best. All on the scores given."""

    best_to_read: str
    best_to_steer: str
    lost: float  # effect at best_to_steer - effect at best_to_read, in the unit of the effects
    rank_correlation: float  # Spearman's, between reading score and effect over the places
    p_value: float  # two-sided, over permutations of the places
    n_places: int
    n_permutations: int


def chance_cosine(d: int, level: float = 0.95) -> float:
    """Return the |cosine| that a random direction of d dimensions stays below with probability `level`.

    Exact: the squared cosine of a uniform direction with any fixed one follows Beta(1/2, (d - 1)/2).
    """
    from scipy.stats import beta

    if d < 2 or not 0 < level < 1:
        raise ValueError(f"d is {d} and level {level}; below 2 dimensions every cosine is 1, and levels lie in (0, 1)")
    return float(beta.ppf(level, 0.5, (d - 1) / 2) ** 0.5)


def cosine_p_value(cosine: float | int, d: int) -> float:
    """Return the probability that a random direction of d dimensions has at least this |cosine| with a fixed one."""
    from scipy.stats import beta

    if d < 2 or not abs(cosine) <= 1 + 1e-9:
        raise ValueError(f"a cosine between -1 and 1 and d >= 2 are needed, {cosine} and d={d} were given")
    return float(beta.sf(min(1.0, cosine**2), 0.5, (d - 1) / 2))


def cosine_table(
    directions: Mapping[str, Vector],
    *,
    data: Mapping[str, tuple[Rows, Labels]] | None = None,
    groups: Mapping[str, Labels] | None = None,
    method: str = "mean_difference",
    n_shuffles: int = 200,
    seed: int = 0,
    **options: Any,
) -> CosineTable:
    """Return the cosines between directions (Directions or vectors of one width) with a null for each.

    Without data the null is a uniform random direction, exact. Activations vary much more along some lines than along
    others, and two directions fitted on them are closer than that by chance: give the rows and labels that each was
    fitted on (data[name] = (X, y), groups[name]), and the null is refits by `method` (with its options) on labels
    shuffled within groups, each direction's by themselves. Raises ValueError for fewer than two directions, other
    widths, zero or non-finite vectors, or data for other names.
    """
    names, unit = _units(directions)
    if data is None:
        return _exact_table(names, unit)
    return _drawn_table(names, unit, _shuffled_cosines(names, data, groups, method, n_shuffles, seed, options))


def agreement_across_layers(
    directions: Mapping[str, Vector],
    *,
    data: Mapping[str, tuple[Rows, Labels]] | None = None,
    groups: Labels | None = None,
    method: str = "mean_difference",
    n_shuffles: int = 200,
    seed: int = 0,
    **options: Any,
) -> LayerAgreement:
    """Return how far one concept's directions at several layers (keys such as "resid_post.3") agree, beside chance.

    Layers are put in order by the number in their name where every name has exactly one. The null is that of
    cosine_table, but with data all layers get the same shuffle: they share their rows, so what a shuffled labelling
    finds at one layer it finds again at the next, and only agreement beyond that is the concept's. Raises ValueError
    as cosine_table does, and where the layers' labels differ.
    """
    numbers = {name: re.findall(r"\d+", name) for name in directions}
    ordered = dict(directions)
    if all(len(found) == 1 for found in numbers.values()):
        ordered = {name: directions[name] for name in sorted(directions, key=lambda name: int(numbers[name][0]))}
    names, unit = _units(ordered)
    off = ~np.eye(len(names), dtype=bool)
    if data is None:
        rng = np.random.default_rng(seed)
        drawn = np.stack([_cosines(rng.normal(size=unit.shape)) for _ in range(1000)])
        table = _exact_table(names, unit)
    else:
        shared = dict.fromkeys(names, groups) if groups is not None else None
        drawn = _shuffled_cosines(names, data, shared, method, n_shuffles, seed, options, together=True)
        table = _drawn_table(names, unit, drawn)
    return LayerAgreement(
        table=table,
        neighbours=tuple(float(table.cosines[i, i + 1]) for i in range(len(names) - 1)),
        mean=float(table.cosines[off].mean()),
        chance_mean=float(np.quantile(np.abs(drawn[:, off].mean(1)), 0.95)),
    )


def reading_gap(
    X: Rows,
    y: Labels,
    *,
    readers: tuple[str, ...] = ("lda", "logistic"),
    groups: Labels | None = None,
    C: float | int | None = None,
    n_shuffles: int = 20,
    seed: int = 0,
) -> ReadingGap:
    """Return the cosine of the mean difference (steers best) with directions that read best, beside shuffled labels.

    A low cosine says that the rows vary much along the mean difference for reasons other than the label. Shuffled
    labels show what that spread alone gives: a cosine in their range says nothing about the concept. Without C the
    logistic penalty is chosen once, on the true labels. Raises ValueError as the finders do.
    """
    rows, labels = labelled_rows(X, y)
    unknown = [r for r in readers if r not in METHODS]
    if unknown or not readers or n_shuffles < 2:
        raise ValueError(f"readers {readers} must be of {', '.join(METHODS)}, and n_shuffles {n_shuffles} at least 2")
    penalised = {
        r: {"C": C or choose_C(rows, labels, kind=r, groups=groups, seed=seed)} for r in PENALISED & {*readers}
    }
    number, rng = as_groups(groups, len(rows)), np.random.default_rng(seed)

    def cosines(y: np.ndarray) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DirectionWarning)
            found = [METHODS[r](rows, y, **penalised.get(r, {})).numpy() for r in readers]
        return _cosines(np.stack([mean_difference(rows, y).numpy(), *found]))[0, 1:].tolist()

    drawn = np.array([cosines(permute_labels(labels, number, rng)) for _ in range(n_shuffles)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    null = zip(drawn.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return ReadingGap(
        cosines=dict(zip(readers, cosines(labels), strict=True)),
        shuffled=dict(zip(readers, null, strict=True)),
        chance=chance_cosine(rows.shape[1]),
        n_shuffles=n_shuffles,
        seed=seed,
    )


def steering_versus_reading(
    reading: Mapping[str, float | int],
    steering: Mapping[str, float | int],
    *,
    n_permutations: int = 2000,
    seed: int = 0,
) -> SteeringVersusReading:
    """Return how the place that reads best compares with the one that steers best.

    `reading` holds a held-out score a place (hook point), `steering` the effect there, larger meaning more. Both bests
    are taken from these very numbers: give scores of a development half, and report the effect of the other half.
    Raises ValueError for other places on one side, fewer than 3, values that are not finite, or all equal.
    """
    from scipy.stats import rankdata

    if set(reading) != set(steering):
        raise ValueError(f"reading and steering are of other places: {sorted(set(reading) ^ set(steering))}")
    if len(reading) < 3 or n_permutations < 1:
        raise ValueError(f"{len(reading)} places and {n_permutations} permutations were given; 3 and 1 are the least")
    places = list(reading)
    score, effect = (np.array([float(side[p]) for p in places]) for side in (reading, steering))
    for what, values in (("reading scores", score), ("effects", effect)):
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            raise ValueError(f"the {what} must be finite and differ between places: {values.tolist()}")
    ranks = [rankdata(v) - (len(places) + 1) / 2 for v in (score, effect)]
    size = float(np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))
    observed = float(ranks[0] @ ranks[1]) / size
    rng = np.random.default_rng(seed)
    drawn = np.array([float(rng.permutation(ranks[0]) @ ranks[1]) / size for _ in range(n_permutations)])
    best_read, best_steer = int(score.argmax()), int(effect.argmax())
    return SteeringVersusReading(
        best_to_read=places[best_read],
        best_to_steer=places[best_steer],
        lost=float(effect[best_steer] - effect[best_read]),
        rank_correlation=observed,
        p_value=float(1 + (np.abs(drawn) >= abs(observed) - 1e-12).sum()) / (1 + n_permutations),
        n_places=len(places),
        n_permutations=n_permutations,
    )


def _units(directions: Mapping[str, Vector]) -> tuple[tuple[str, ...], Float[np.ndarray, "k d"]]:
    if len(directions) < 2:
        raise ValueError(f"{len(directions)} directions were given; a comparison needs at least 2")
    vectors = {name: as_vector(given, name) for name, given in directions.items()}
    widths = {name: len(v) for name, v in vectors.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"directions of several widths have no cosine: {widths}")
    stacked = np.stack(list(vectors.values()))
    return tuple(vectors), stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def _cosines(vectors: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "k k"]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.clip(unit @ unit.T, -1, 1)


def _exact_table(names: tuple[str, ...], unit: Float[np.ndarray, "k d"]) -> CosineTable:
    cosines, (k, d) = _cosines(unit), unit.shape
    off = ~np.eye(k, dtype=bool)
    chance, p_values = np.full((k, k), np.nan), np.full((k, k), np.nan)
    chance[off] = chance_cosine(d)
    p_values[off] = [cosine_p_value(float(c), d) for c in cosines[off]]
    # Sidak's level over the pairs: the cosines of random directions are pairwise independent
    any_pair = chance_cosine(d, 0.95 ** (2 / (k * (k - 1))))
    return CosineTable(
        names=names, cosines=cosines, p_values=p_values, null="random directions", chance=chance,
        chance_of_any=any_pair, n_draws=None,
    )  # fmt: skip


def _drawn_table(
    names: tuple[str, ...], unit: Float[np.ndarray, "k d"], drawn: Float[np.ndarray, "draws k k"]
) -> CosineTable:
    cosines, size = _cosines(unit), np.abs(drawn)
    off = ~np.eye(len(names), dtype=bool)
    p_values = (1 + (size >= np.abs(cosines) - 1e-12).sum(0)) / (1 + len(drawn))
    return CosineTable(
        names=names,
        cosines=cosines,
        p_values=np.where(off, p_values, np.nan),
        null="shuffled labels",
        chance=np.where(off, np.quantile(size, 0.95, axis=0), np.nan),
        chance_of_any=float(np.quantile(size[:, off].max(1), 0.95)),
        n_draws=len(drawn),
    )


def _shuffled_cosines(
    names: tuple[str, ...],
    data: Mapping[str, tuple[Rows, Labels]],
    groups: Mapping[str, Labels] | None,
    method: str,
    n_shuffles: int,
    seed: int,
    options: Mapping[str, Any],
    together: bool = False,
) -> Float[np.ndarray, "draws k k"]:
    """Return cosines between refits on shuffled labels; `together` shuffles all names alike."""
    if set(data) != set(names) or (groups is not None and set(groups) != set(names)):
        raise ValueError(f"data (and groups, where given) must be of the directions {', '.join(names)}")
    if method not in METHODS or n_shuffles < 1:
        raise ValueError(f"method {method!r} must be one of {', '.join(METHODS)}, n_shuffles {n_shuffles} at least 1")
    checked = [labelled_rows(*data[name]) for name in names]
    given = [None if groups is None else groups[name] for name in names]
    numbers = [as_groups(g, len(y)) for g, (_, y) in zip(given, checked, strict=True)]
    if together and any(not np.array_equal(y, checked[0][1]) for _, y in checked):
        raise ValueError("the layers have other labels: one concept's directions share their rows and labels")
    drawn = []
    for draw in range(n_shuffles):
        refits = []
        for i, (X, y) in enumerate(checked):
            rng = np.random.default_rng([seed, draw, 0 if together else i])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DirectionWarning)
                refits.append(METHODS[method](X, permute_labels(y, numbers[i], rng), **options).numpy())
        drawn.append(_cosines(np.stack(refits)))
    return np.stack(drawn)
