"""Measure a dose curve with its nulls: directions, strengths and prompts as rows of common batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int

from interp.acts.direction import Direction, as_rows
from interp.acts.resampling import as_labels
from interp.concepts.effects.damage import damages
from interp.concepts.effects.dosing import EffectsReport, Reading, Side
from interp.concepts.effects.fluency import distinct2_rows, longest_repeat, nll_rows, zlib_ratio
from interp.concepts.effects.margins import STEERED, Contrast, margins
from interp.concepts.effects.nulls import random_directions, shuffled_directions
from interp.concepts.effects.rereading import Reader, fit_reader, mean_rows, parts_of, refuse_overlap
from interp.concepts.effects.scoring import choose, dose_rows, halves, scores, slope_rows, verdict
from interp.concepts.effects.writing import Progress, Written, write
from interp.data.neutral import neutral_texts as bundled
from interp.model.loading import Model, as_model
from interp.model.sources import read_source
from interp.model.tokens import TokenBatch, need_tokenizer

__all__ = ["STRENGTHS", "measure_effects"]

Score: TypeAlias = Callable[[list[str]], Any]
STRENGTHS = (0, 0.05, 0.1, 0.2, 0.3, 0.4)
FEWEST_SHUFFLED = 5
FROM_SOURCE = 24  # texts of a source that damage is measured on


def measure_effects(
    model: Any,
    direction: Direction,
    prompts: Sequence[Contrast] | Sequence[str],
    *,
    labelled: Any = None,
    score: Score | None = None,
    fitting_texts: Sequence[str] | None = None,
    fitting_rows: tuple[Any, ...] | None = None,
    neutral_texts: Sequence[str] | str | None = None,
    strengths: Sequence[float | int] = STRENGTHS,
    n_random: int = 20,
    n_shuffled: int = 10,
    positions: str = "all",
    per_token: bool = False,
    kl_budget: float | int = 0.1,
    max_new_tokens: int = 20,
    level: float = 0.05,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> EffectsReport:
    """Return the dose curve of steering along a direction beside its nulls, and the strength to use, if any.

    The concept is read in up to two ways: contrast answers, where `prompts` are Contrasts (see `margins`; `per_token`
    as there); and the text that the model writes after each prompt, read anew through the unsteered model by a
    classifier fitted on `labelled` (with `texts`, 0/1 `labels` and perhaps `groups`, or a tuple of them), or by
    `score(texts)`, a probability each. Labelled texts that the direction was fitted on are refused (`fitting_texts`
    lets single ones be told). Fluency is measured on the same text, damage on `neutral_texts` (texts, or the first 24
    of a source as `read_source` takes it; bundled: those in which the classifier sees the concept least). MEANINGS
    defines every quantity, and the three scores that make the harmonic mean.

    Nulls of equal norm, at every strength: `n_random` random directions, and `n_shuffled` (0, or 5 at least) fitted to
    shuffled labels of `fitting_rows` (X, y and perhaps groups: rows at the direction's hook point), else of the
    labelled texts; there are none of these where neither is given.

    The strength is chosen by the mean combined score on one half of the prompts (drawn by the seed) and reported on
    the other. It is recommended where there the interval of the gain (95%, bootstrap over prompts) lies above 0, the
    gain's rank among the random directions has p <= `level`, and every shuffled one gains less; otherwise
    `recommended` is None and `reason` says why. `positions`: "all" or "from_last_prompt_token".

    Raises ValueError for options that mean nothing, prompts without any reading, fewer than 4 prompts, or a classifier
    that reads nothing; DirectionError as `steer` does; MissingError without a tokenizer.
    """
    need_tokenizer((model := as_model(model)).tokenizer)
    direction = direction.for_model(model, force=force)
    doses = _checked(strengths, n_random, n_shuffled, positions, kl_budget, level)
    texts, contrasts = _prompts(prompts, labelled, score)
    reader, separate, rows = _reader(model, direction, labelled, fitting_texts, seed)
    directions = [direction, *random_directions(direction, n_random, seed)]
    directions += _shuffled(direction, rows if fitting_rows is None else fitting_rows, n_shuffled, seed)
    pushes = [(d, s) for d in directions for s in doses]
    neutral = _neutral(reader, neutral_texts, seed)
    read = _probabilities(score) if score is not None else reader.read if reader is not None else None

    written = write(model, texts, pushes, max_new_tokens=max_new_tokens, positions=positions, progress=progress)
    table = _table(model, written, read, progress)
    if contrasts:
        table["margin"] = margins(model, contrasts, pushes, positions=positions, per_token=per_token, progress=progress)
    harm = damages(model, pushes, neutral, progress=progress)
    run = _Run(
        doses=doses,
        texts=texts,
        n_random=n_random,
        written=written,
        arrays={name: values.reshape(len(directions), len(doses), -1) for name, values in table.items()},
        harm=harm.reshape(len(directions), len(doses), 2),
        read=read,
    )
    return _report(
        run, model=model.name, direction=direction, reading=None if reader is None else _reading(reader, separate),
        n_neutral=len(neutral), kl_budget=float(kl_budget), level=float(level), positions=positions,
        per_token=per_token, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What was measured, over [directions, strengths, prompts]: the direction, random ones, label-shuffled ones."""

    doses: list[float]
    texts: list[str]  # the prompts
    n_random: int
    written: list[Written]  # one a direction and strength
    arrays: dict[str, Float[np.ndarray, "directions strengths prompts"]]
    harm: Float[np.ndarray, "directions strengths 2"]
    read: Callable | None

    def columns(self, strength: float) -> list[Written]:
        """Return what stands side by side: unsteered, steered, random, and shuffled where there is one."""
        n, s = len(self.doses), self.doses.index(strength)
        places = [self.doses.index(0.0), s, n + s, (1 + self.n_random) * n + s]
        return [self.written[at] for at in places if at < len(self.written)]


def _report(run: _Run, *, kl_budget: float, level: float, seed: int, **about: Any) -> EffectsReport:
    """Choose the strength on one half of the prompts, and report on the other."""
    doses, zero = run.doses, run.doses.index(0.0)
    choosing, held = halves(len(run.texts), seed)
    arrays = run.arrays | scores(run.arrays, run.harm[..., 0], zero, kl_budget)
    absolute = {name: arrays[name] for name in ("margin", "reading") if name in arrays}
    arrays |= {name: values - values[:, [zero]] for name, values in absolute.items()}
    chosen = choose(doses, arrays["combined"][0][:, choosing].mean(1))
    found = dose_rows(doses, arrays, run.harm, choosing, held, run.n_random, seed)
    recommended, reason = verdict(None if chosen is None else found[doses.index(chosen)], level, kl_budget)
    shown = min((s for s in doses if s), key=abs) if chosen is None else chosen
    return EffectsReport(
        doses=found,
        slopes=slope_rows(doses, arrays, held, run.n_random, seed),
        unsteered={name: float(values[0, zero, held].mean()) for name, values in absolute.items()},
        chosen=chosen,
        recommended=recommended,
        reason=reason,
        sides=_sides(run.texts, held, run.columns(shown), run.read),
        prompts=tuple(run.texts[i] for i in held),
        choosing_prompts=tuple(run.texts[i] for i in choosing),
        kl_budget=kl_budget,
        level=level,
        seed=seed,
        **about,
    )


def _checked(
    strengths: Sequence[float | int],
    n_random: int,
    n_shuffled: int,
    positions: str,
    kl_budget: float | int,
    level: float,
) -> list[float]:
    """Return the strengths in order, 0 among them."""
    doses = sorted({0.0, *(float(s) for s in strengths)})
    if len(doses) < 2 or not np.isfinite(doses).all():
        raise ValueError(f"the strengths {list(strengths)} need a finite one that is not 0")
    if not 0 < level < 1 or n_random < 2 or 1 / (1 + n_random) > level:
        raise ValueError(
            f"{n_random} random directions cannot show a p of {level}: give 1 / (1 + n_random) <= level, 0 < level < 1"
        )
    if n_shuffled and n_shuffled < FEWEST_SHUFFLED:
        raise ValueError(f"n_shuffled is {n_shuffled}; give 0, or at least {FEWEST_SHUFFLED}")
    if positions not in STEERED:
        raise ValueError(f"positions is {positions!r}; it is one of {', '.join(STEERED)}")
    if not kl_budget > 0:
        raise ValueError(f"kl_budget is {kl_budget}; it must be above 0")
    return doses


def _prompts(
    prompts: Sequence[Contrast] | Sequence[str], labelled: Any, score: Score | None
) -> tuple[list[str], list[Contrast]]:
    """Return the prompts as texts, and as contrasts where they are such."""
    contrasts = [p for p in prompts if isinstance(p, Contrast)]
    texts = [p.prompt if isinstance(p, Contrast) else p for p in prompts]
    if contrasts and len(contrasts) < len(texts):
        raise ValueError(f"{len(contrasts)} of {len(texts)} prompts have a match and an other: all do, or none")
    if len(texts) < 4 or len(set(texts)) < len(texts):
        raise ValueError(f"{len(set(texts))} different prompts of {len(texts)}: give at least 4, each once")
    if score is not None and labelled is not None:
        raise ValueError("both labelled texts and a score were given: one of them reads the new text")
    if score is None and labelled is None and not contrasts:
        raise ValueError("nothing reads the concept: give prompts with match and other, labelled texts, or a score")
    return texts, contrasts


def _reader(
    model: Model, direction: Direction, labelled: Any, fitting_texts: Sequence[str] | None, seed: int
) -> tuple[Reader | None, str, tuple[Any, ...] | None]:
    """Return the classifier, what is known of its texts, and their rows, labels and groups; or none of these."""
    if labelled is None:
        return None, "", None
    texts, labels, groups = parts_of(labelled)
    rows = mean_rows(model, texts, direction.hook)
    separate = refuse_overlap(model, direction, texts, labels, fitting_texts)
    reader = fit_reader(model, rows, labels, hook=direction.hook, groups=groups, seed=seed)
    return reader, separate, (rows, labels, groups)


def _shuffled(direction: Direction, rows: tuple[Any, ...] | None, n: int, seed: int) -> list[Direction]:
    if rows is None or not n:
        return []
    X, y, groups = as_rows(rows[0]), rows[1], rows[2] if len(rows) > 2 else None
    if X.shape[1] != len(direction.vector):
        raise ValueError(f"the fitting rows have width {X.shape[1]}, the direction {len(direction.vector)}")
    return shuffled_directions(direction, X.float(), as_labels(y), n, groups=groups, seed=seed)


def _neutral(reader: Reader | None, given: Sequence[str] | str | None, seed: int) -> list[str]:
    if isinstance(given, str):
        return list(islice(read_source(given), FROM_SOURCE))
    if given is not None:
        return list(given)
    if reader is None:
        return bundled(seed=seed)
    return bundled(
        seed=seed, evidence=lambda texts: reader.probe.decision(mean_rows(reader.model, texts, reader.hook)).tolist()
    )


def _reading(reader: Reader, separate: str) -> Reading:
    return Reading(
        hook=reader.hook, auroc=reader.auroc, interval=reader.interval, n_texts=reader.n_texts,
        n_groups=reader.n_groups, separate=separate,
    )  # fmt: skip


def _probabilities(score: Score) -> Callable[[list[str]], Float[np.ndarray, " texts"]]:
    """Return the score, checked to give one probability a text."""

    def read(texts: list[str]) -> Float[np.ndarray, " texts"]:
        found = np.asarray(score(texts), dtype=float)
        if found.shape != (len(texts),) or not ((found >= 0) & (found <= 1)).all():
            raise ValueError(f"score must give {len(texts)} probabilities in [0, 1]; it gave shape {found.shape}")
        return found

    return read


def _table(
    model: Model, written: list[Written], read: Callable | None, progress: Progress | None
) -> dict[str, Float[np.ndarray, "pushes prompts"]]:
    """Return what is measured of the new texts, one row a push."""
    batch, n = written[0].batch, len(written[0].texts)
    ids, real = torch.cat([w.ids for w in written]), torch.cat([w.real for w in written])
    first: dict[tuple, int] = {}  # weak pushes write what the model writes anyway: each text is measured once
    place = [first.setdefault((i % n, *row), len(first)) for i, row in enumerate(ids.tolist())]
    unique = torch.from_numpy(np.unique(place, return_index=True)[1])
    texts = [text for w in written for text in w.texts]
    nll = []
    for some in unique.split(256):
        rows = TokenBatch(batch.ids[some % n], batch.mask[some % n], batch.special[some % n])
        nll.append(nll_rows(model, rows, ids[some], real[some]))
        if progress is not None:
            progress("reading", sum(map(len, nll)), len(unique))
    found = {
        "nll": np.concatenate(nll),
        "distinct2": distinct2_rows(ids[unique], real[unique]),
        "longest_repeat": np.array([float(longest_repeat(ids[i][real[i]].tolist())) for i in unique]),
        "zlib": np.array([zlib_ratio(texts[i]) if texts[i] else 1.0 for i in unique]),
    }
    out = {name: values[place].reshape(len(written), n) for name, values in found.items()}
    if read is not None:
        out["reading"] = np.reshape(read(texts), (len(written), n))
    return out


def _sides(  # columns: unsteered, steered, random, and shuffled if there is one
    texts: list[str], held: Int[np.ndarray, " held"], columns: list[Written], read: Callable | None
) -> tuple[Side, ...]:
    out = []
    for i in held:
        shown = [w.texts[i] for w in columns]
        chances = [None] * len(shown) if read is None else [float(p) for p in read(shown)]
        shuffled = shown[3] if len(shown) > 3 else None
        out.append(Side(prompt=texts[i], unsteered=shown[0], steered=shown[1], random=shown[2], shuffled=shuffled,
                        probabilities=tuple(chances)))  # fmt: skip
    return tuple(out)
