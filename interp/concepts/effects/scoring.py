"""Scores in [0, 1] of what was measured, the choice of a strength, and whether other prompts confirm it.

Arrays run over [directions, strengths, prompts]; the first direction is the one in question.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from interp.concepts.effects.dosing import Beside, DoseRow
from interp.concepts.effects.margins import slopes

__all__ = ["choose", "dose_rows", "halves", "harmonic_mean", "scores", "slope_rows", "verdict"]

Array = Float[np.ndarray, "directions strengths prompts"]
RESAMPLES = 2000


def harmonic_mean(*parts: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the harmonic mean of scores in [0, 1], elementwise; 0 where one is 0. Raises ValueError outside [0, 1]."""
    stacked = np.stack(parts)
    if not ((stacked >= 0) & (stacked <= 1)).all():
        raise ValueError(f"scores lie in [0, 1], these from {stacked.min()} to {stacked.max()}")
    none = (stacked == 0).any(0)
    return np.where(none, 0.0, len(parts) / (1 / np.where(none, 1.0, stacked)).sum(0))


def scores(
    measured: Mapping[str, Array], kl: Float[np.ndarray, "directions strengths"], zero: int, kl_budget: float
) -> dict[str, Array]:
    """Return gain, concept, fluency, damage and combined, as MEANINGS defines them.

    `measured` has nll and distinct2, and margin or reading (as they are, not as changes); `zero` is the index of the
    strength 0.
    """
    read = [measured["reading"]] if "reading" in measured else []
    if "margin" in measured:
        read.append(1 / (1 + np.exp(-np.clip(measured["margin"], -700, 700))))
    probability = np.mean(read, axis=0)
    at_zero = [slice(None), [zero]]
    gain = probability - probability[*at_zero]
    room = 1 - probability[*at_zero]
    concept = np.where(room > 0, np.clip(gain / np.where(room > 0, room, 1.0), 0, 1), 0.0)
    rise = np.maximum(0.0, measured["nll"] - measured["nll"][*at_zero])
    varied = np.minimum(1.0, measured["distinct2"] / measured["distinct2"][*at_zero])
    fluency = np.exp(-rise) * varied
    kept = np.where(kl <= kl_budget, np.exp(-np.maximum(kl, 0.0)), 0.0)
    damage = np.broadcast_to(kept[..., None], gain.shape)
    combined = harmonic_mean(concept, fluency, damage)
    return {"gain": gain, "concept": concept, "fluency": fluency, "damage": damage, "combined": combined}


def halves(n: int, seed: int) -> tuple[Int[np.ndarray, " choosing"], Int[np.ndarray, " held"]]:
    """Return the prompts that choose the strength and those that it is reported on, disjoint, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def choose(strengths: Sequence[float], combined: Float[np.ndarray, " strengths"]) -> float | None:
    """Return the strength of the highest combined score, the smaller of equals; None where none is above 0."""
    order = sorted(range(len(strengths)), key=lambda i: (-combined[i], abs(strengths[i])))
    return float(strengths[order[0]]) if combined[order[0]] > 0 else None


def dose_rows(
    strengths: Sequence[float],
    arrays: Mapping[str, Array],
    harm: Float[np.ndarray, "directions strengths 2"],
    choosing: Int[np.ndarray, " choosing"],
    held: Int[np.ndarray, " held"],
    n_random: int,
    seed: int,
) -> tuple[DoseRow, ...]:
    """Return one row a strength: every quantity on the held prompts beside its nulls."""
    rows = []
    for s, strength in enumerate(strengths):
        measures = {
            name: _beside(values[:, s][:, held], n_random, seed if name != "damage" else None)
            for name, values in arrays.items()
        }
        for k, name in enumerate(("kl", "extra_nll")):
            measures[name] = _beside(harm[:, s, k][:, None], n_random, None)
        on = float(arrays["combined"][0, s, choosing].mean())
        rows.append(DoseRow(strength=float(strength), measures=measures, chosen_on=on))
    return tuple(rows)


def slope_rows(
    strengths: Sequence[float], arrays: Mapping[str, Array], held: Int[np.ndarray, " held"], n_random: int, seed: int
) -> dict[str, Beside]:
    """Return the slope over strength of margin, reading and gain, of those there are, on the held prompts."""
    names = [name for name in ("margin", "reading", "gain") if name in arrays]
    return {name: _beside(slopes(strengths, arrays[name][:, :, held]), n_random, seed) for name in names}


def _beside(values: Float[np.ndarray, "directions prompts"], n_random: int, seed: int | None) -> Beside:
    """Return the mean over prompts of the first row beside those of the others, with its interval for a seed."""
    means = values.mean(1).tolist()
    interval = None
    if seed is not None:
        picks = np.random.default_rng(seed).integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
        low, high = np.quantile(values[0][picks].mean(1), [0.025, 0.975])
        interval = (float(low), float(high))
    return Beside(
        value=means[0], interval=interval, random=tuple(means[1 : 1 + n_random]), shuffled=tuple(means[1 + n_random :])
    )


def verdict(row: DoseRow | None, level: float, kl_budget: float) -> tuple[float | None, str]:
    """Return (the strength, or None; the reason in one sentence) for the chosen row on prompts that did not choose it.

    Without a row nothing was chosen.
    """
    if row is None:
        return None, (
            "No usable strength: on the choosing prompts no strength has a combined score above 0 (each is over the KL "
            f"budget of {kl_budget:g} nats a token, or raises nothing)."
        )
    gain, n = row["gain"], len(row["gain"].random)
    low, high = gain.interval or (gain.value, gain.value)
    found = f"{gain.value:+.3f} [{low:+.3f}, {high:+.3f}]"
    ahead = sum(x >= gain.value for x in gain.random)
    shuffled = sum(x >= gain.value for x in gain.shuffled)
    against = []
    if low <= 0:
        against.append("the interval reaches 0")
    if gain.p_random > level:
        against.append(f"{ahead} of {n} random directions gain as much (p = {gain.p_random:.2f})")
    if not gain.beats_shuffled:
        against.append(f"{shuffled} of {len(gain.shuffled)} label-shuffled directions gain as much")
    if against:
        return None, (
            f"No usable strength: {row.strength:g} was the best on the choosing prompts, but on the others its gain is "
            f"{found}, and {'; '.join(against)}."
        )
    beside = f", above all {len(gain.shuffled)} label-shuffled and" if gain.shuffled else ", above"
    return row.strength, (
        f"Use {row.strength:g}: on prompts that did not choose it the probability of the concept changes by "
        f"{found}{beside} {n - ahead} of {n} random directions (p = {gain.p_random:.3f}), at a KL of "
        f"{row['kl'].value:.3g} nats a token."
    )
