"""What comes out of an analogy evaluation: counts, intervals over pairs, and the choice of a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from interp.space.neighbors import Space, SpaceError

LEVEL = 0.95
Interval = tuple[float, float]


class AnalogyError(SpaceError):
    """An analogy that cannot be asked, or an evaluation in which nothing was."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of right answers, and their 95 % bootstrap intervals over pairs."""

    accuracy: float  # query words left out of the candidates
    honest: float  # nothing left out
    only_b: float  # the nearest neighbour of b alone, b left out: what no relation is needed for
    accuracy_interval: Interval
    honest_interval: Interval
    only_b_interval: Interval
    correct: int  # right answers under `accuracy`
    n: int  # questions asked
    n_pairs: int


@dataclass(frozen=True, kw_only=True)
class AnalogyResult:
    """The scores of a method over relations or sections: pooled over questions, and one by one."""

    method: str
    protocol: str  # "pairs of pairs", "leave one out" or "question file"
    total: Score
    by_relation: dict[str, Score]
    given: int  # questions of a file, else pairs
    covered: int  # of these, those of which the space holds every word
    not_covered: dict[str, tuple[tuple[str, ...], ...]]
    missing: tuple[str, ...]  # words that the space lacks
    not_scored: dict[str, str]  # relations of which nothing could be asked, and why
    unanswerable: int  # not asked: the answer is among the excluded words, or no example is left
    n_candidates: int
    chance: float  # of a guess among all candidates

    @property
    def accuracy(self) -> float:
        """Share of right answers with the query words left out."""
        return self.total.accuracy

    @property
    def honest(self) -> float:
        """Share of right answers with nothing left out."""
        return self.total.honest

    @property
    def only_b(self) -> float:
        """Share of answers that are simply the nearest neighbour of b."""
        return self.total.only_b

    @property
    def n(self) -> int:
        """Number of questions asked."""
        return self.total.n

    @property
    def interval(self) -> Interval:
        """The 95 % interval of `accuracy`."""
        return self.total.accuracy_interval

    @property
    def macro(self) -> float:
        """Mean of the relations' accuracies, each relation counting once."""
        return float(np.mean([score.accuracy for score in self.by_relation.values()]))

    def to_dict(self) -> dict:
        """Return the result as JSON values, the pooled scores at the top."""
        rest = asdict(self)
        return {**rest.pop("total"), "macro": self.macro, **rest}


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """A layer chosen on one half of the pairs and scored on the other, with every layer's scores on both."""

    layer: str
    by: str
    choosing: dict[str, AnalogyResult]  # layer -> scores on the half that chose
    scoring: dict[str, AnalogyResult]  # layer -> scores on the half that did not
    not_covered: dict[str, tuple[tuple[str, ...], ...]]

    @property
    def chosen(self) -> AnalogyResult:
        """The chosen layer on the pairs that did not choose it."""
        return self.scoring[self.layer]

    @property
    def accuracy(self) -> float:
        """Accuracy of the chosen layer on the other half, query words left out."""
        return self.chosen.accuracy

    @property
    def honest(self) -> float:
        """The same with nothing left out."""
        return self.chosen.honest

    @property
    def only_b(self) -> float:
        """The same for the nearest neighbour of b alone."""
        return self.chosen.only_b

    @property
    def interval(self) -> Interval:
        """The 95 % interval of `accuracy`, over the pairs of the half that did not choose."""
        return self.chosen.interval

    def to_dict(self) -> dict:
        """Return the choice as JSON values: the chosen layer's scores, and below them every layer's pooled ones."""
        layers = {
            name: {"choosing": asdict(self.choosing[name].total), "scoring": asdict(self.scoring[name].total)}
            for name in self.scoring
        }
        return {"layer": self.layer, "by": self.by, **self.chosen.to_dict(), "layers": layers}


@dataclass(frozen=True)
class Tally:
    """Right and wrong in one relation: a row a question, a column a measure; and the pairs that made the question."""

    hits: Bool[Tensor, "q 3"]
    first: Int[Tensor, "q"]
    second: Int[Tensor, "q"] | None  # None: a question is a single pair
    n_pairs: int
    skipped: int = 0


@dataclass
class Asked:
    """What was given and what of it the space covers, as it is gathered."""

    given: int = 0
    covered: int = 0
    unanswerable: int = 0
    not_covered: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    missing: dict[str, None] = field(default_factory=dict)  # a set that keeps its order

    def cover(self, space: Space, name: str, rows: Sequence[tuple[str, ...]]) -> list:
        """Return the rows of which the space holds every word, and note the others."""
        covered = [row for row in rows if all(word in space for word in row)]
        others = tuple(tuple(row) for row in rows if any(word not in space for word in row))
        self.given += len(rows)
        self.covered += len(covered)
        self.missing.update((word, None) for row in others for word in row if word not in space)
        if others:
            self.not_covered[name] = others
        return covered


def summarise(
    tallies: Sequence[tuple[str, Tally]],
    asked: Asked,
    reasons: Mapping[str, str],
    method: str,
    protocol: str,
    n_candidates: int,
    n_boot: int,
    seed: int,
) -> AnalogyResult:
    """Return the pooled and single scores with intervals; raise AnalogyError where nothing was asked.

    Intervals resample the pairs of each relation with replacement; a question made of two pairs counts as often as the
    product of their draws (the bootstrap of a U-statistic), so that questions that share a pair are not taken for
    independent ones.
    """
    if not tallies:
        some = ", ".join(list(asked.missing)[:5])
        raise AnalogyError(
            f"nothing could be asked: {asked.covered} of {asked.given} entries are covered"
            + (f"; missing, for one: {some}" if some else "; a relation needs two pairs that share no word")
        )
    rng = np.random.default_rng(seed)
    scores, pooled_right, pooled_asked = {}, np.zeros((n_boot, 3)), np.zeros(n_boot)
    for name, tally in tallies:
        right, count = _resample(tally, n_boot, rng)
        scores[name] = _score(tally.hits.numpy(), right, count, tally.n_pairs)
        pooled_right, pooled_asked = pooled_right + right, pooled_asked + count
    hits = np.concatenate([tally.hits.numpy() for _, tally in tallies])
    total = _score(hits, pooled_right, pooled_asked, sum(tally.n_pairs for _, tally in tallies))
    return AnalogyResult(
        method=method,
        protocol=protocol,
        total=total,
        by_relation=scores,
        given=asked.given,
        covered=asked.covered,
        not_covered=asked.not_covered,
        missing=tuple(asked.missing),
        not_scored=dict(reasons),
        unanswerable=asked.unanswerable,
        n_candidates=n_candidates,
        chance=1 / n_candidates,
    )


def halves(relations: Mapping[str, Sequence[tuple[str, str]]], seed: int) -> tuple[dict, dict]:
    """Return each relation's pairs in two random halves; pairs that share a word stay together."""
    rng = np.random.default_rng(seed)
    one, other = {}, {}
    for name, pairs in relations.items():
        groups = _groups(list(dict.fromkeys((a, b) for a, b in pairs)))
        left: list[tuple[str, str]] = []
        right: list[tuple[str, str]] = []
        order = rng.permutation(len(groups))
        for group in sorted((groups[i] for i in order), key=len, reverse=True):
            (left if len(left) <= len(right) else right).extend(group)
        one[name], other[name] = left, right
    return one, other


def _groups(pairs: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Return the pairs in groups that share no word with one another."""
    groups: list[list[tuple[str, str]]] = []
    for pair in pairs:
        near = [group for group in groups if any(set(pair) & set(member) for member in group)]
        groups = [group for group in groups if group not in near]
        groups.append([member for group in near for member in group] + [pair])
    return groups


def _resample(tally: Tally, n_boot: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted right answers [n_boot, 3] and questions [n_boot] of each draw of the pairs."""
    draws = rng.multinomial(tally.n_pairs, np.full(tally.n_pairs, 1 / tally.n_pairs), size=n_boot).astype(np.float32)
    weights = draws[:, tally.first.numpy()]
    if tally.second is not None:
        weights = weights * draws[:, tally.second.numpy()]
    return weights @ tally.hits.numpy().astype(np.float32), weights.sum(axis=1)


def _score(hits: np.ndarray, right: np.ndarray, asked: np.ndarray, n_pairs: int) -> Score:
    drawn = asked > 0  # a draw of one pair alone makes no question of two
    shares = right[drawn] / asked[drawn, None]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(shares, [tail, 1 - tail], axis=0)
    means = [float(mean) for mean in hits.mean(axis=0)]
    intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Score(
        accuracy=means[0],
        honest=means[1],
        only_b=means[2],
        accuracy_interval=intervals[0],
        honest_interval=intervals[1],
        only_b_interval=intervals[2],
        correct=int(hits[:, 0].sum()),
        n=len(hits),
        n_pairs=n_pairs,
    )
