"""What steering does and what it costs: dose curve, placebo band, fluency and damage, with no model as judge."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.acts.direction import Direction
from interp.acts.resampling import placebo_directions
from interp.concepts.steering import Operation, add, generate_ids, prompt_batch, steer
from interp.model.loading import Model, as_model
from interp.model.tokens import TokenBatch, need_tokenizer
from sae.stats import bootstrap_interval

__all__ = ["Dose", "Effects", "NoUsableStrengthError", "Sample", "damage", "distinct2", "effects", "fluency"]

Score = Callable[[list[str]], Any]
ROWS = 256  # rows of one generate call


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
class _Written:
    """Continuations as ids (up to and with the end token), texts and scores, one a row."""

    batch: TokenBatch
    ids: Int[Tensor, "rows new"]
    real: Bool[Tensor, "rows new"]
    texts: list[str]
    scores: Float[np.ndarray, " rows"]

    def part(self, i: int, n: int) -> "_Written":
        """Return the i-th run of n rows."""
        at = slice(i * n, (i + 1) * n)
        batch = TokenBatch(self.batch.ids[at], self.batch.mask[at], self.batch.special[at])
        return _Written(batch=batch, ids=self.ids[at], real=self.real[at], texts=self.texts[at], scores=self.scores[at])


def effects(
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
    write = _writer(model, score, max_new_tokens)
    plain_dev = write(dev, None)
    neutral = list(neutral_texts or [p + t for p, t in zip(dev, plain_dev.texts, strict=True)])
    doses = _dose_curve(model, direction, strengths, dev, plain_dev, neutral, write, positions, kl_budget)
    chosen = _choose(doses, kl_budget)

    plain, steered = write(prompts, None), write(prompts, add(direction, chosen, positions))
    placebos = _placebos(direction, n_placebo, chosen, prompts, write, positions, seed)
    gain = steered.scores - plain.scores
    return Effects(
        doses=doses,
        chosen=chosen,
        effect=float(gain.mean()),
        interval=bootstrap_interval(gain, seed=seed),
        placebo_effects=tuple(float((p.scores - plain.scores).mean()) for p in placebos),
        nll=fluency(model, steered.batch, steered.ids, steered.real),
        unsteered_nll=fluency(model, plain.batch, plain.ids, plain.real),
        distinct2=distinct2(steered.ids, steered.real),
        unsteered_distinct2=distinct2(plain.ids, plain.real),
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


def _sample(i: int, prompt: str, plain: _Written, steered: _Written, placebos: list[_Written]) -> Sample:
    return Sample(
        prompt=prompt,
        unsteered=plain.texts[i],
        steered=steered.texts[i],
        placebos=tuple(p.texts[i] for p in placebos),
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


def _writer(model: Model, score: Score, max_new_tokens: int) -> Callable[..., _Written]:
    """Return write(prompts, operation), which continues all prompts in one generate call and scores the new text."""

    def write(prompts: Sequence[str], operation: Operation | None) -> _Written:
        with steer(model, *([] if operation is None else [operation])):
            ids = generate_ids(model, prompts, max_new_tokens)
        real = _until_end(model, ids)
        texts = model.tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(ids, real, strict=True)], skip_special_tokens=True
        )
        scores = np.asarray(score(texts), dtype=float)
        if scores.shape != (len(texts),) or not np.isfinite(scores).all():
            raise ValueError(f"score must return {len(texts)} finite numbers, one a text; it gave shape {scores.shape}")
        return _Written(batch=prompt_batch(model, prompts), ids=ids, real=real, texts=texts, scores=scores)

    return write


def _until_end(model: Model, ids: Int[Tensor, "rows new"]) -> Bool[Tensor, "rows new"]:
    """Return which new tokens are real: up to and with the first end token."""
    given = getattr(model.hf.generation_config, "eos_token_id", None)
    ends = given if isinstance(given, (list, tuple)) else [given]
    ended = torch.isin(ids, torch.tensor([i for i in ends if isinstance(i, int)], dtype=torch.long))
    return (ended.long().cumsum(1) - ended.long()) == 0


def _dose_curve(
    model: Model,
    direction: Direction,
    strengths: list[float],
    dev: list[str],
    plain: _Written,
    neutral: list[str],
    write: Callable[..., _Written],
    positions: str,
    kl_budget: float,
) -> tuple[Dose, ...]:
    harm = damage(model, direction, strengths, neutral)
    a_row = [s for s in strengths for _ in dev]
    all_steered = write(dev * len(strengths), add(direction, a_row, positions))  # the whole curve in one batch
    doses = []
    for i, (strength, (kl, extra)) in enumerate(zip(strengths, harm, strict=True)):
        steered = all_steered.part(i, len(dev))
        dose = Dose(
            strength=strength,
            effect=float((steered.scores - plain.scores).mean()),
            kl=kl,
            extra_nll=extra,
            nll=fluency(model, steered.batch, steered.ids, steered.real),
            distinct2=distinct2(steered.ids, steered.real),
            usable=bool(strength) and kl <= kl_budget,
        )
        doses.append(dose)
    return tuple(doses)


def _placebos(
    direction: Direction,
    n: int,
    strength: float,
    prompts: list[str],
    write: Callable[..., _Written],
    positions: str,
    seed: int,
) -> list[_Written]:
    """Return what random directions write, many of them in one generate call (a direction a row)."""
    vectors = placebo_directions(len(direction.vector), n, seed)
    directions = [replace(direction, vector=v, method="placebo") for v in vectors]
    step = max(1, ROWS // len(prompts))
    out = []
    for start in range(0, n, step):
        some = directions[start : start + step]
        written = write(prompts * len(some), add([d for d in some for _ in prompts], strength, positions))
        out += [written.part(i, len(prompts)) for i in range(len(some))]
    return out


def damage(
    model: Any, direction: Direction, strengths: Sequence[float | int], texts: Sequence[str], *, max_len: int = 64
) -> list[tuple[float, float]]:
    """Return (mean KL(base || steered) a token, growth of the mean next-token loss) for each strength, in nats.

    Measured on texts steered at every position; predictions at BOS and pads do not count, and a text is cut at
    `max_len` tokens. Raises ValueError for texts that leave nothing to predict.
    """
    model = as_model(model)
    found = np.zeros((len(strengths), 4))  # sums of KL and of extra loss, and their counts
    step = _rows_at_once(model, max_len)
    for start in range(0, len(texts), step):
        batch = model.tokenize(list(texts[start : start + step]), max_len=min(max_len, model.n_ctx))
        keep = batch.mask & ~batch.special
        last = keep[:, :-1] & batch.mask[:, 1:]
        base = model.logits(batch.ids, batch.mask).float().log_softmax(-1)
        for i, strength in enumerate(strengths):
            with steer(model, add(direction, strength)):
                steered = model.logits(batch.ids, batch.mask).float().log_softmax(-1)
            kl = (base.exp() * (base - steered)).sum(-1).cpu()[keep].double()
            targets = batch.ids[:, 1:, None].to(base.device)
            extra = (base - steered)[:, :-1].gather(2, targets)[..., 0].cpu()[last].double()
            found[i] += [float(kl.sum()), float(extra.sum()), len(kl), len(extra)]
    if not (found[:, 2:] > 0).all():
        raise ValueError("the neutral texts leave nothing to predict: give texts of several tokens")
    return [(float(row[0] / row[2]), float(row[1] / row[3])) for row in found]


def fluency(model: Any, batch: TokenBatch, new: Int[Tensor, "rows new"], real: Bool[Tensor, "rows new"]) -> float:
    """Return the mean loss of new tokens after left-padded prompts under the model as it is, in nats a token.

    Low for text that repeats itself: read it beside distinct2. Raises ValueError where there is no new token.
    """
    model = as_model(model)
    if not bool(real.any()):
        raise ValueError("no token was generated: its loss does not exist")
    total, width = 0.0, batch.ids.shape[1]
    for rows in torch.arange(len(new)).split(_rows_at_once(model, width + new.shape[1])):
        ids = torch.cat([batch.ids[rows], new[rows]], 1)
        mask = torch.cat([batch.mask[rows], real[rows]], 1)
        logp = model.logits(ids, mask)[:, width - 1 : -1].float().log_softmax(-1).cpu()
        total -= float(logp.gather(2, new[rows][..., None])[..., 0][real[rows]].double().sum())
    return total / int(real.sum())


def _rows_at_once(model: Model, width: int) -> int:
    """Return how many rows' log-probabilities fit into some 64 MB."""
    return max(1, min(32, 2**24 // (model.d_vocab * width)))


def distinct2(new: Int[Tensor, "rows new"], real: Bool[Tensor, "rows new"]) -> float:
    """Return the share of distinct pairs of neighbouring tokens a row, mean over the rows that have a pair.

    1 where nothing repeats. Raises ValueError where no row has two tokens.
    """
    shares = []
    for row, keep in zip(new, real, strict=True):
        tokens = row[keep].tolist()
        pairs = list(pairwise(tokens))
        if pairs:
            shares.append(len(set(pairs)) / len(pairs))
    if not shares:
        raise ValueError("no row has two tokens: it has no pair to repeat")
    return float(np.mean(shares))
