"""How well a text explains a latent: detection and fuzzing scores, with any explainer and any judge."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from interp.acts.capture import Acts
from interp.acts.resampling import bootstrap_counts
from interp.features.examples import Context, token_strings
from interp.features.judges import (
    Explainer,
    Judge,
    LabelError,
    PromptExplainer,
    PromptJudge,
    TokenListExplainer,
    TokenListJudge,
    detection_prompt,
    explain_prompt,
    fuzzing_prompt,
    marked,
    parse_answers,
)
from interp.model.tokens import need_tokenizer
from sae.archs.base import SAE
from sae.stats import bootstrap_interval

if TYPE_CHECKING:
    from interp.model.loading import Model

__all__ = [
    "DEFINITIONS",
    "ExampleSet",
    "Explainer",
    "Judge",
    "LabelError",
    "LabelScore",
    "LabelScores",
    "PromptExplainer",
    "PromptJudge",
    "TokenListExplainer",
    "TokenListJudge",
    "detection_prompt",
    "example_sets",
    "explain_prompt",
    "fuzzing_prompt",
    "marked",
    "parse_answers",
    "score_labels",
]

MIN_WINDOW = 4  # tokens; shorter ends of documents are no contexts
N_BOOT = 2000

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "detection": "balanced accuracy of the judge on whether the latent fires in a text; 0.5 by guessing",
        "fuzzing": "balanced accuracy of the judge on whether the marked tokens of a text are those that fire, "
        "against equally many others of the same text; 0.5 by guessing",
        "shuffled": "the same with the explanation of another latent",
        "random": "the same with a judge that tosses a coin: mean, and the range of 95 % of such judges",
    }
)


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """Contexts of one latent: those for the explainer, and others, in which it fires and in which it does not."""

    latent: int
    shown: tuple[Context, ...]  # strongest first
    active: tuple[Context, ...]
    inactive: tuple[Context, ...]
    n_active: int  # windows of the text in which the latent fires
    n_windows: int


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """One latent's explanation and its scores; DEFINITIONS defines them. Intervals are 95 %, over the texts."""

    latent: int
    explanation: str
    detection: float
    detection_interval: tuple[float, float]
    fuzzing: float
    fuzzing_interval: tuple[float, float]
    shuffled_detection: float
    shuffled_fuzzing: float


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """Scores by latent, their means with intervals over latents, and the means of the nulls."""

    scores: tuple[LabelScore, ...]
    detection: float
    detection_interval: tuple[float, float]  # 95 %, bootstrap over latents
    fuzzing: float
    fuzzing_interval: tuple[float, float]
    shuffled_detection: float
    shuffled_fuzzing: float
    random_detection: float
    random_detection_range: tuple[float, float]
    random_fuzzing: float
    random_fuzzing_range: tuple[float, float]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.scores)} latents"]
        for what in ("detection", "fuzzing"):
            low, high = getattr(self, f"{what}_interval")
            null = getattr(self, f"random_{what}_range")
            lines.append(
                f"{what:9} {getattr(self, what):.3f} [{low:.3f}, {high:.3f}]  "
                f"shuffled {getattr(self, f'shuffled_{what}'):.3f}  "
                f"random {getattr(self, f'random_{what}'):.3f} [{null[0]:.3f}, {null[1]:.3f}]"
            )
        return "\n".join([*lines, *(f"{name}: {text}" for name, text in DEFINITIONS.items())])


@torch.no_grad()
def example_sets(
    model: "Model",
    sae: SAE,
    acts: Acts,
    hook: str,
    *,
    latents: Sequence[int] | None = None,
    n_latents: int = 20,
    n_shown: int = 10,
    n_active: int = 10,
    n_inactive: int = 10,
    n_quantiles: int = 5,
    context: int = 32,
    seed: int = 0,
) -> list[ExampleSet]:
    """Return contexts for explaining and for scoring latents, no window of text in two of the parts.

    A context is a window of `context` positions of one document. Those in which a latent fires are drawn in equal
    numbers from quantiles of its largest activation, and dealt at random to the explainer and to the score; those in
    which it does not fire are drawn from all others. Without `latents`, n_latents random ones that have enough of
    both. Raises LabelError where a latent asked for has not, or where none has; MissingError without a tokenizer.
    """
    if min(n_latents, n_shown, n_active, n_inactive, n_quantiles, context) < 1:
        raise LabelError("n_latents, n_shown, n_active, n_inactive, n_quantiles and context must be at least 1")
    tokenizer = need_tokenizer(model.tokenizer)
    x, rng = acts[model.hook_point(hook).name], np.random.default_rng(seed)
    window, kept = _windows(acts, context)
    fires = _active_windows(sae, x, window, kept)
    enough = (fires >= n_shown + n_active) & (len(kept) - fires >= n_inactive)
    needed = f"{n_shown + n_active} windows in which it fires and {n_inactive} in which it does not"
    if latents is None:
        eligible = enough.nonzero().squeeze(1).numpy()
        chosen = np.sort(rng.permutation(eligible)[:n_latents]).tolist()
        if not chosen:
            raise LabelError(f"none of {sae.d_sae} latents has {needed} of {len(kept)}; give more text")
    else:
        chosen = list(latents)
        for latent in chosen:
            if not 0 <= latent < sae.d_sae:
                raise LabelError(f"the SAE has latents 0 to {sae.d_sae - 1}, not {latent}")
            if not enough[latent]:
                raise LabelError(
                    f"latent {latent} fires in {int(fires[latent])} of {len(kept)} windows; {needed} are needed"
                )
    columns = torch.cat([sae.encode(part.to(sae.W_dec))[:, chosen].float().cpu() for part in x.split(4096)])
    index = window[:, None].expand_as(columns)
    peaks = torch.zeros(int(window.max()) + 1, len(chosen)).scatter_reduce(0, index, columns.abs(), "amax")[kept]
    bounds = torch.cat([window.new_zeros(1), torch.bincount(window).cumsum(0)])
    found = []
    for i, latent in enumerate(chosen):
        order = peaks[:, i].argsort(descending=True, stable=True).numpy()
        n = int(fires[latent])
        drawn = _stratified(order[:n], n_shown + n_active, n_quantiles, rng)
        first = np.sort(rng.permutation(len(drawn))[:n_shown])
        parts = (drawn[first], np.delete(drawn, first), rng.permutation(order[n:])[:n_inactive])
        shown, active, inactive = (
            tuple(_context(acts, columns[:, i], bounds, int(kept[w]), tokenizer) for w in part) for part in parts
        )
        found.append(
            ExampleSet(latent=latent, shown=shown, active=active, inactive=inactive, n_active=n, n_windows=len(kept))
        )
    return found


def score_labels(
    sets: Sequence[ExampleSet], explainer: Explainer, judge: Judge, *, n_random: int = 200, seed: int = 0
) -> LabelScores:
    """Return detection and fuzzing scores of the explanations of latents, beside their nulls.

    Each latent is explained from its shown contexts; the judge then sees the others, in random order, without being
    told how many fit. Detection: does the latent fire in the text. Fuzzing: in each text in which it fires, its
    strongest tokens are marked once, and as many tokens on which it is silent once; texts in which it fires on every
    token are left out. After delphi (arXiv:2410.13928). Raises LabelError for fewer than two latents (a shuffled
    explanation needs another), fewer than two texts to mark, or answers that are not one a text.
    """
    if len(sets) < 2 or n_random < 1:
        raise LabelError(f"{len(sets)} latents and n_random {n_random}: at least two and one are needed")
    rng = np.random.default_rng(seed)
    explanations = [explainer(part.shown) for part in sets]
    turn = rng.permutation(len(sets))
    other = {int(a): explanations[int(b)] for a, b in zip(turn, np.roll(turn, 1), strict=True)}
    scores, sizes = [], []
    for i, part in enumerate(sets):
        detection = [(marked(c), True) for c in part.active] + [(marked(c), False) for c in part.inactive]
        fuzzing = _fuzzed(part, rng)
        hits = {}
        for name, asked in (("detection", detection), ("fuzzing", fuzzing)):
            hits[name] = _hits(judge, explanations[i], asked, rng)
            hits[f"shuffled_{name}"] = _hits(judge, other[i], asked, rng)
        truth = np.array([fits for _, fits in detection])
        pairs = hits["fuzzing"].reshape(-1, 2).mean(1)  # right and wrong marks of one text
        scores.append(
            LabelScore(
                latent=part.latent,
                explanation=explanations[i],
                detection=_balanced(hits["detection"], truth),
                detection_interval=_interval(hits["detection"], truth, seed),
                fuzzing=float(pairs.mean()),
                fuzzing_interval=bootstrap_interval(pairs, seed=seed),
                shuffled_detection=_balanced(hits["shuffled_detection"], truth),
                shuffled_fuzzing=float(hits["shuffled_fuzzing"].mean()),
            )
        )
        sizes.append((int(truth.sum()), int((~truth).sum()), len(pairs)))
    return _summary(scores, sizes, n_random, seed)


def _windows(acts: Acts, context: int) -> tuple[Int[Tensor, "tok"], Int[Tensor, "kept"]]:
    """Return the window of each row, counted from 0, and the windows long enough for a context."""
    if not len(acts):
        raise LabelError("there are no activations to draw contexts from")
    pieces = torch.stack([acts.documents, acts.positions // context])
    window = torch.cat([torch.zeros(1, dtype=torch.long), (pieces.diff(dim=1) != 0).any(dim=0).cumsum(0)])
    return window, (torch.bincount(window) >= min(MIN_WINDOW, context)).nonzero().squeeze(1)


def _active_windows(sae: SAE, x: Tensor, window: Tensor, kept: Tensor) -> Int[Tensor, "d_sae"]:
    """Return in how many of the kept windows each latent fires."""
    keys = []
    for at in range(0, len(x), 4096):
        part = slice(at, at + 4096)
        _, active = sae.encode_sparse(x[part].to(sae.W_dec))
        token = torch.div(active.flat, sae.d_sae, rounding_mode="floor").cpu()
        keys.append((window[part][token] * sae.d_sae + active.cols.cpu()).unique())
    pairs = torch.cat(keys).unique()
    inside = torch.isin(torch.div(pairs, sae.d_sae, rounding_mode="floor"), kept)
    return torch.bincount(pairs[inside] % sae.d_sae, minlength=sae.d_sae)


def _stratified(order: np.ndarray, n: int, n_quantiles: int, rng: np.random.Generator) -> np.ndarray:
    """Return n of the entries, equally many from each quantile, in their order."""
    n_parts = min(n_quantiles, n)
    parts, counts = np.array_split(order, n_parts), [len(p) for p in np.array_split(np.arange(n), n_parts)]
    return np.concatenate([p[np.sort(rng.permutation(len(p))[:k])] for p, k in zip(parts, counts, strict=True)])


def _context(acts: Acts, column: Float[Tensor, "tok"], bounds: Tensor, window: int, tokenizer: Any) -> Context:
    rows = slice(int(bounds[window]), int(bounds[window + 1]))
    values = column[rows]
    peak = int(values.abs().argmax())
    return Context(
        tokens=tuple(token_strings(tokenizer, acts.token_ids[rows].tolist())),
        activations=tuple(values.tolist()),
        peak=peak,
        document=int(acts.documents[rows.start]),
        position=int(acts.positions[rows.start + peak]),
    )


def _fuzzed(part: ExampleSet, rng: np.random.Generator) -> list[tuple[str, bool]]:
    """Return each active text twice: the strongest tokens marked, and as many silent ones."""
    asked = []
    for context in part.active:
        values = np.abs(np.array(context.activations))
        silent = np.flatnonzero(values == 0)
        n = min(len(silent), int((values > 0).sum()))
        if n:
            right, wrong = (
                np.argsort(-values, kind="stable")[:n].tolist(),
                rng.choice(silent, n, replace=False).tolist(),
            )
            asked += [(marked(context, right), True), (marked(context, wrong), False)]
    if len(asked) < 4:
        raise LabelError(f"latent {part.latent} is silent somewhere in {len(asked) // 2} texts; 2 are needed to mark")
    return asked


def _hits(
    judge: Judge, explanation: str, asked: list[tuple[str, bool]], rng: np.random.Generator
) -> Shaped[np.ndarray, "n"]:
    """Return whether the judge is right on each text, which it sees in random order."""
    order = rng.permutation(len(asked))
    answers = np.asarray(judge(explanation, [asked[i][0] for i in order]), dtype=float)
    if answers.shape != order.shape or not ((answers >= 0) & (answers <= 1)).all():
        raise LabelError(f"the judge must answer {len(order)} bools or probabilities; it gave shape {answers.shape}")
    hits = np.empty(len(order))
    hits[order] = (answers >= 0.5) == np.array([asked[i][1] for i in order])
    return hits


def _balanced(hits: np.ndarray, truth: np.ndarray) -> float:
    return float(hits[truth].mean() + hits[~truth].mean()) / 2


def _interval(hits: np.ndarray, truth: np.ndarray, seed: int) -> tuple[float, float]:
    counts = bootstrap_counts(truth, N_BOOT, np.random.default_rng(seed))
    drawn = sum((counts[:, c] @ hits[c]) / c.sum() for c in (truth, ~truth)) / 2
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _summary(scores: list[LabelScore], sizes: list[tuple[int, int, int]], n_random: int, seed: int) -> LabelScores:
    rng, given = np.random.default_rng(seed), {}
    for name in ("detection", "fuzzing"):
        values = [getattr(score, name) for score in scores]
        given[name] = float(np.mean(values))
        given[f"{name}_interval"] = bootstrap_interval(values, seed=seed)
        given[f"shuffled_{name}"] = float(np.mean([getattr(score, f"shuffled_{name}") for score in scores]))
        halves = [(a, b) if name == "detection" else (n, n) for a, b, n in sizes]
        tossed = [[rng.binomial(n, 0.5, n_random) / n for n in half] for half in halves]
        chance = np.mean(tossed, axis=(0, 1))
        given[f"random_{name}"] = float(chance.mean())
        given[f"random_{name}_range"] = tuple(np.quantile(chance, [0.025, 0.975]).tolist())
    return LabelScores(scores=tuple(scores), **given, seed=seed)
