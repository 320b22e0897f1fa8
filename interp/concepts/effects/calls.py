"""What steering does and what it costs: dose curve, placebo band, fluency and damage, with no model as judge."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

import numpy as np
from jaxtyping import Float

from interp.acts.direction import Direction
from interp.concepts.effects.damage import damage
from interp.concepts.effects.dosing import EffectsReport
from interp.concepts.effects.fluency import distinct2, fluency
from interp.concepts.effects.margins import Contrast
from interp.concepts.effects.measuring import measure_effects
from interp.concepts.effects.nulls import random_directions
from interp.concepts.effects.writing import Push, Written, write
from interp.model.loading import Model, as_model
from interp.model.tokens import need_tokenizer
from sae.stats import bootstrap_interval

__all__ = ["Dose", "Effects", "NoUsableStrengthError", "Sample", "effects", "effects_by_score"]

Score = Callable[[list[str]], Any]


class NoUsableStrengthError(ValueError):
    """Every strength that was tried damages neutral text more than the budget allows; `doses` holds the curve."""

    def __init__(self, message: str, doses: "tuple[Dose, ...]"):
        super().__init__(message)
        self.doses = doses


@dataclass(frozen=True, kw_only=True)
class Dose:
    """One strength on the dev prompts and on neutral text."""

    strength: float  # in units of the median residual norm
    effect: float  # mean score of the steered continuations minus that of the unsteered ones
    kl: float  # mean KL(base || steered) a token of neutral text, in nats
    extra_nll: float  # growth of the mean next-token loss on neutral text, in nats
    nll: float  # of the steered continuations under the unsteered model, in nats a token
    distinct2: float  # share of distinct pairs of neighbouring tokens in a continuation, mean over prompts
    usable: bool  # within the budget, and not 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The continuations of one prompt side by side, with their scores."""

    prompt: str
    unsteered: str
    steered: str
    placebos: tuple[str, ...]
    unsteered_score: float
    steered_score: float
    placebo_scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """The effect of a direction at one strength, chosen on other prompts, beside random directions of equal norm."""

    doses: tuple[Dose, ...]
    chosen: float  # the strength of everything below
    effect: float  # mean over the prompts of score(steered) - score(unsteered)
    interval: tuple[float, float]  # 95%, bootstrap over prompts
    placebo_effects: tuple[float, ...]  # the same for each random direction
    nll: float  # of the steered continuations under the unsteered model, in nats a token
    unsteered_nll: float
    distinct2: float
    unsteered_distinct2: float
    samples: tuple[Sample, ...]
    kl_budget: float
    positions: str
    max_new_tokens: int
    seed: int
    direction: Direction

    @property
    def placebo_mean(self) -> float:
        """Mean effect of the random directions."""
        return float(np.mean(self.placebo_effects))

    @property
    def placebo_sd(self) -> float:
        """Standard deviation (n - 1) of the effects of the random directions."""
        return float(np.std(self.placebo_effects, ddof=1))

    @property
    def in_placebo_sd(self) -> float:
        """The effect as (effect - placebo mean) / placebo sd. Raises ValueError where no placebo changes the score."""
        if self.placebo_sd == 0:
            raise ValueError("no random direction changes the score: the effect has no unit; give more prompts")
        return (self.effect - self.placebo_mean) / self.placebo_sd

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it; `in_placebo_sd` is None where it does not exist."""
        table = {f.name: getattr(self, f.name) for f in fields(self)}
        table |= {"doses": [asdict(d) for d in self.doses], "samples": [asdict(x) for x in self.samples]}
        sds = self.in_placebo_sd if self.placebo_sd else None
        nulls = {"placebo_mean": self.placebo_mean, "placebo_sd": self.placebo_sd, "in_placebo_sd": sds}
        return table | {"direction": self.direction.meta()} | nulls


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What was written after some prompts, with a score a text."""

    written: Written
    scores: Float[np.ndarray, " rows"]


@overload
def effects(
    model: Any,
    direction: Direction,
    prompts: Sequence[str],
    *,
    score: Score,
    strengths: Sequence[float | int] = ...,
    dev_prompts: Sequence[str] | None = ...,
    neutral_texts: Sequence[str] | None = ...,
    n_placebo: int = ...,
    kl_budget: float = ...,
    max_new_tokens: int = ...,
    positions: str = ...,
    seed: int = ...,
    force: bool = ...,
) -> Effects: ...


@overload
def effects(
    model: Any, direction: Direction, prompts: Sequence[Contrast] | Sequence[str], **options: Any
) -> EffectsReport: ...


def effects(
    model: Any, direction: Direction, prompts: Sequence[Any], *, score: Score | None = None, **options: Any
) -> Effects | EffectsReport:
    """Return what steering along a direction does and costs, beside directions that mean nothing.

    With `score` (a number a text, in any unit): `effects_by_score`, one strength within a KL budget. Without:
    `measure_effects`, the whole dose curve of contrast answers and re-read text with all nulls, and the strength to
    use, if any. Options and errors are theirs.
    """
    if score is None:
        return measure_effects(model, direction, prompts, **options)
    return effects_by_score(model, direction, prompts, score=score, **options)


def effects_by_score(
    model: Any,
    direction: Direction,
    prompts: Sequence[str],
    *,
    score: Score,
    strengths: Sequence[float | int] = (0, 0.25, 0.5, 0.75, 1),
    dev_prompts: Sequence[str] | None = None,
    neutral_texts: Sequence[str] | None = None,
    n_placebo: int = 20,
    kl_budget: float = 0.1,
    max_new_tokens: int = 20,
    positions: str = "all",
    seed: int = 0,
    force: bool = False,
) -> Effects:
    """Return what steering along a direction does to generated text, and what random directions do.

    The strength is the largest (by size) whose mean KL(base || steered) a token of `neutral_texts`, steered at every
    position, is within `kl_budget` nats; the dose curve is taken on `dev_prompts` and the effect on `prompts`. Without
    `dev_prompts` every second prompt is one; without neutral texts the dev prompts with their unsteered continuations
    are the neutral text.
    `score(texts)` gives one number a continuation (the new text alone, which may be empty): a classifier trained on
    other texts that reads them anew, never the steering direction on steered activations. Placebos are random unit
    vectors of the same hook point at the same strength. Text is greedy, so equal seeds give equal results.
    Raises NoUsableStrengthError where no strength other than 0 is within the budget, ValueError for options that mean
    nothing, DirectionError as `steer` does, MissingError without a tokenizer.
    """
    need_tokenizer((model := as_model(model)).tokenizer)
    direction = direction.for_model(model, force=force)
    strengths = [float(s) for s in strengths]
    prompts, dev = _split(prompts, dev_prompts)
    if not strengths or n_placebo < 2 or not kl_budget > 0:
        raise ValueError(f"{len(strengths)} strengths, n_placebo {n_placebo}, kl_budget {kl_budget}: give 1, 2 and > 0")
    written = _writer(model, score, max_new_tokens, positions)
    doses = _dose_curve(model, direction, strengths, dev, neutral_texts, written, kl_budget)
    chosen = _choose(doses, kl_budget)

    everything = [(direction, 0.0), (direction, chosen)]
    everything += [(placebo, chosen) for placebo in random_directions(direction, n_placebo, seed)]
    plain, steered, *placebos = written(prompts, everything)
    gain, (before, after) = steered.scores - plain.scores, (plain.written, steered.written)
    return Effects(
        doses=doses,
        chosen=chosen,
        effect=float(gain.mean()),
        interval=bootstrap_interval(gain, seed=seed),
        placebo_effects=tuple(float((p.scores - plain.scores).mean()) for p in placebos),
        nll=fluency(model, after.batch, after.ids, after.real),
        unsteered_nll=fluency(model, before.batch, before.ids, before.real),
        distinct2=distinct2(after.ids, after.real),
        unsteered_distinct2=distinct2(before.ids, before.real),
        samples=tuple(_sample(i, prompt, plain, steered, placebos) for i, prompt in enumerate(prompts)),
        kl_budget=kl_budget,
        positions=positions,
        max_new_tokens=max_new_tokens,
        seed=seed,
        direction=direction,
    )


def _choose(doses: tuple[Dose, ...], kl_budget: float) -> float:
    """Return the largest usable strength, by size."""
    usable = [d.strength for d in doses if d.usable]
    if not usable:
        tried = ", ".join(f"{d.strength:g}: {d.kl:.3g}" for d in doses)
        raise NoUsableStrengthError(f"no strength stays within a KL of {kl_budget:g} nats a token ({tried})", doses)
    return max(usable, key=abs)


def _sample(i: int, prompt: str, plain: _Scored, steered: _Scored, placebos: list[_Scored]) -> Sample:
    return Sample(
        prompt=prompt,
        unsteered=plain.written.texts[i],
        steered=steered.written.texts[i],
        placebos=tuple(p.written.texts[i] for p in placebos),
        unsteered_score=float(plain.scores[i]),
        steered_score=float(steered.scores[i]),
        placebo_scores=tuple(float(p.scores[i]) for p in placebos),
    )


def _split(prompts: Sequence[str], dev: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return report and dev prompts, disjoint."""
    held, chosen_on = (list(prompts), list(dev)) if dev is not None else (list(prompts)[::2], list(prompts)[1::2])
    both = set(held) & set(chosen_on)
    if len(held) < 2 or not chosen_on or both:
        raise ValueError(
            f"{len(held)} prompts and {len(chosen_on)} dev prompts, {len(both)} of them the same: give at least 2 "
            "prompts, and others to choose the strength on"
        )
    return held, chosen_on


def _writer(model: Model, score: Score, max_new_tokens: int, positions: str) -> Callable[..., list[_Scored]]:
    """Return write(prompts, pushes), which continues all prompts under every push and scores the new texts."""

    def written(prompts: Sequence[str], pushes: Sequence[Push]) -> list[_Scored]:
        found = write(model, prompts, pushes, max_new_tokens=max_new_tokens, positions=positions)
        return [_Scored(written=w, scores=scores_of(score, w.texts)) for w in found]

    return written


def scores_of(score: Score, texts: list[str]) -> Float[np.ndarray, " texts"]:
    """Return the score of each text. Raises ValueError where they are not finite or not one a text."""
    scores = np.asarray(score(texts), dtype=float)
    if scores.shape != (len(texts),) or not np.isfinite(scores).all():
        raise ValueError(f"score must return {len(texts)} finite numbers, one a text; it gave shape {scores.shape}")
    return scores


def _dose_curve(
    model: Model,
    direction: Direction,
    strengths: list[float],
    dev: list[str],
    neutral: Sequence[str] | None,
    written: Callable[..., list[_Scored]],
    kl_budget: float,
) -> tuple[Dose, ...]:
    plain, *steered = written(dev, [(direction, s) for s in (0.0, *strengths)])  # the whole curve in one batch
    neutral = list(neutral or [p + t for p, t in zip(dev, plain.written.texts, strict=True)])
    harm = damage(model, direction, strengths, neutral)
    doses = []
    for strength, (kl, extra), s in zip(strengths, harm, steered, strict=True):
        w = s.written
        dose = Dose(
            strength=strength,
            effect=float((s.scores - plain.scores).mean()),
            kl=kl,
            extra_nll=extra,
            nll=fluency(model, w.batch, w.ids, w.real),
            distinct2=distinct2(w.ids, w.real),
            usable=bool(strength) and kl <= kl_budget,
        )
        doses.append(dose)
    return tuple(doses)
