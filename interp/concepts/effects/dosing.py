"""What a dose curve with its nulls says, as frozen values: one quantity, one strength, the whole report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from interp.acts.direction import Direction

__all__ = ["MEANINGS", "Beside", "DoseRow", "EffectsReport", "Reading", "Side"]

MEANINGS = {
    "margin": "change of log p(match) - log p(other) against the unsteered model, in nats, mean over prompts (choices "
    "in both orders)",
    "reading": "change of the probability that a classifier gives the new text, reading it through the unsteered model",
    "gain": "change of the probability of the concept: the mean of the reading's and of 1 / (1 + exp(-margin))'s, of "
    "those there are",
    "nll": "mean loss of the new text under the unsteered model, in nats a token",
    "distinct2": "share of distinct pairs of neighbouring tokens in a new text",
    "longest_repeat": "length in tokens of the longest run that stands twice in a new text",
    "zlib": "compressed bytes over bytes of a new text, 1 for an empty one",
    "kl": "mean KL(unsteered || steered) on neutral text, steered at every position, in nats a token",
    "extra_nll": "growth of the mean next-token loss on neutral text, in nats",
    "concept": "score: gain over (1 - unsteered probability), the share of the way to certainty that was gone; 0 where "
    "it falls",
    "fluency": "score: exp(-(growth of nll against the prompt's unsteered text, at least 0)) times distinct2 over that "
    "of the unsteered text, at most 1",
    "damage": "score: exp(-kl), and 0 where kl is above the budget",
    "combined": "harmonic mean of the scores concept, fluency and damage of a prompt, 0 where one is 0",
}
SCORES = ("concept", "fluency", "damage", "combined")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """One quantity of the direction, beside the same of random and of label-shuffled directions of equal norm."""

    value: float
    interval: tuple[float, float] | None = None  # 95%, bootstrap over prompts; None where it is not over prompts
    random: tuple[float, ...] = ()
    shuffled: tuple[float, ...] = ()

    @property
    def p_random(self) -> float:
        """(1 + random directions that reach the value) / (1 + random directions): one-sided, small where it is rare."""
        return (1 + sum(x >= self.value for x in self.random)) / (1 + len(self.random))

    @property
    def beats_shuffled(self) -> bool:
        """Whether the value is above that of every label-shuffled direction."""
        return all(x < self.value for x in self.shuffled)

    @property
    def in_random_sd(self) -> float:
        """The value as (value - mean) / sd (n - 1) of the random directions. Raises ValueError where they are alike."""
        sd = float(np.std(self.random, ddof=1)) if len(self.random) > 1 else 0.0
        if not sd:
            raise ValueError("the random directions are all alike here: the value has no unit")
        return (self.value - float(np.mean(self.random))) / sd

    def to_dict(self) -> dict[str, Any]:
        """Return all as JSON holds it; `in_random_sd` is None where it does not exist."""
        sds = self.in_random_sd if len(set(self.random)) > 1 else None
        return asdict(self) | {"in_random_sd": sds, "p_random": self.p_random, "beats_shuffled": self.beats_shuffled}


@dataclass(frozen=True, kw_only=True, eq=False)
class DoseRow:
    """One strength: every quantity on the prompts that did not choose it, and what the choosing ones gave."""

    strength: float  # in median residual norms
    measures: Mapping[str, Beside]  # MEANINGS says what each is
    chosen_on: float  # mean combined score on the choosing prompts

    def __getitem__(self, name: str) -> Beside:
        return self.measures[name]

    def to_dict(self) -> dict[str, Any]:
        """Return all as JSON holds it."""
        measures = {name: value.to_dict() for name, value in self.measures.items()}
        return {"strength": self.strength, "chosen_on": self.chosen_on, "measures": measures}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The classifier that re-read the new text: what it reaches on texts it was not fitted on, and what was checked."""

    hook: str
    auroc: float
    interval: tuple[float, float]
    n_texts: int
    n_groups: int
    separate: str  # in words: how far its texts are known not to be those of the direction


@dataclass(frozen=True, kw_only=True)
class Side:
    """The texts of one prompt side by side, with the probability that the classifier gives each."""

    prompt: str
    unsteered: str
    steered: str
    random: str  # of the first random direction
    shuffled: str | None  # of the first label-shuffled one
    probabilities: tuple[float | None, ...]  # in this order; None without a classifier


@dataclass(frozen=True, kw_only=True, eq=False)
class EffectsReport:
    """What steering along a direction does, costs, and may be recommended at: all beside its nulls.

    Doses, slopes and texts are of the report's prompts; the strength was chosen on the other half.
    """

    model: str
    direction: Direction
    doses: tuple[DoseRow, ...]  # by strength, 0 (the model as it is) among them
    slopes: Mapping[str, Beside]  # of margin, reading and gain, a unit of strength, by least squares
    unsteered: Mapping[str, float]  # mean margin (nats) and reading of the model as it is
    chosen: float | None  # of the highest mean combined score on the choosing prompts; None where all are 0
    recommended: float | None  # the chosen one, where the report's prompts confirm it
    reason: str  # one sentence
    reading: Reading | None
    sides: tuple[Side, ...]  # at the chosen strength, or at the smallest where none was
    prompts: tuple[str, ...]  # that all is reported on
    choosing_prompts: tuple[str, ...]  # that the strength was chosen on
    n_neutral: int
    kl_budget: float
    level: float  # of the test against random directions
    positions: str
    per_token: bool
    max_new_tokens: int
    seed: int

    def dose(self, strength: float | int) -> DoseRow:
        """Return the row of one strength. Raises ValueError naming those there are."""
        for row in self.doses:
            if row.strength == strength:
                return row
        raise ValueError(f"{strength:g} is none of the strengths {', '.join(f'{d.strength:g}' for d in self.doses)}")

    @property
    def shown(self) -> float:
        """The strength of the texts side by side: the chosen one, or the smallest where none was."""
        moved = [d.strength for d in self.doses if d.strength]
        return self.chosen if self.chosen is not None else min(moved, key=abs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it, with the meaning of every quantity."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "direction": self.direction.meta(),
            "doses": [row.to_dict() for row in self.doses],
            "slopes": {name: value.to_dict() for name, value in self.slopes.items()},
            "unsteered": dict(self.unsteered),
            "reading": asdict(self.reading) if self.reading else None,
            "sides": [asdict(side) for side in self.sides],
            "meanings": MEANINGS,
        }
