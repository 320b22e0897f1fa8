"""Feature absorption on first letters: latents that stay silent where a more special one says what they would say."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from interp.acts.capture import capture_acts
from interp.acts.direction import as_rows
from interp.concepts.reading.probes import logistic
from interp.features.examples import token_strings
from interp.features.probing import choose_latents
from interp.features.splice import check_fit
from interp.model.tokens import encode, need_tokenizer
from sae.archs.base import SAE

if TYPE_CHECKING:
    from interp.model.loading import Model

__all__ = [
    "DEFINITIONS",
    "Absorption",
    "AbsorptionError",
    "LetterAbsorption",
    "absorption",
    "first_letter_absorption",
    "vocabulary_words",
    "word_absorption",
]

SILENT = 1e-8  # below it a latent counts as off
FULL_COSINE, FULL_SHARE = 0.025, 0.4
ABSORBER_COSINE, ABSORBER_SHARE, N_ABSORBERS = 0.1, 0.4, 3

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "fraction": "share of the probe's projection that other latents carry in the main latents' place, mean over "
        "held-out words that the probe gets right, then letters",
        "full": "share of those words on which all main latents are off and one other carries 40 % of the projection "
        "or more, mean over letters",
        "splits": "mean number of main latents a letter: more than 1 where a letter is split over several",
        "null": "the same with the decoder rows dealt out anew among the latents",
    }
)


class AbsorptionError(ValueError):
    """Activations on which absorption has no meaning: too few letters can be read from them."""


@dataclass(frozen=True, kw_only=True)
class LetterAbsorption:
    """One letter: how well a probe reads it, which latents stand for it, how much of it others absorb."""

    letter: str
    f1: float  # of the probe, on held-out words
    n_words: int  # held-out words of the letter that the probe gets right
    main: tuple[int, ...]
    fraction: float
    full: float
    null_fraction: float
    null_full: float


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """Absorption by letter and its means; DEFINITIONS defines them."""

    letters: tuple[LetterAbsorption, ...]  # those that the probe reads
    n_asked: int  # letters with enough words
    n_train: int
    n_test: int
    min_f1: float
    seed: int

    @property
    def fraction(self) -> float:
        """Mean absorption fraction over letters."""
        return float(np.mean([letter.fraction for letter in self.letters]))

    @property
    def full(self) -> float:
        """Mean rate of full absorption over letters."""
        return float(np.mean([letter.full for letter in self.letters]))

    @property
    def splits(self) -> float:
        """Mean number of main latents a letter."""
        return float(np.mean([len(letter.main) for letter in self.letters]))

    @property
    def null_fraction(self) -> float:
        """Mean absorption fraction with the decoder rows dealt out anew."""
        return float(np.mean([letter.null_fraction for letter in self.letters]))

    @property
    def null_full(self) -> float:
        """Mean rate of full absorption with the decoder rows dealt out anew."""
        return float(np.mean([letter.null_full for letter in self.letters]))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        means = ("fraction", "full", "splits", "null_fraction", "null_full")
        return asdict(self) | {name: getattr(self, name) for name in means}

    def __str__(self) -> str:
        lines = [
            f"{len(self.letters)} of {self.n_asked} letters are read with F1 > {self.min_f1} "
            f"({self.n_train} words to learn from, {self.n_test} held out)",
            f"fraction {self.fraction:.4f} (null {self.null_fraction:.4f})  full {self.full:.4f} "
            f"(null {self.null_full:.4f})  splits {self.splits:.2f}",
        ]
        lines += [
            f"{x.letter}  F1 {x.f1:.3f}  words {x.n_words:>4}  fraction {x.fraction:.3f}  full {x.full:.3f}  "
            f"main {', '.join(map(str, x.main))}"
            for x in self.letters
        ]
        return "\n".join([*lines, *(f"{name}: {text}" for name, text in DEFINITIONS.items())])


def word_absorption(
    latents: Float[Tensor, "n m"],
    W_dec: Float[Tensor, "m d"],
    probe: Float[Tensor, "d"],
    projection: Float[Tensor, "n"],
    main: Sequence[int],
) -> tuple[Float[Tensor, "n"], Bool[Tensor, "n"]]:
    """Return, a word, the absorption fraction and whether absorption is full (arXiv:2409.14507, SAEBench).

    With u the unit probe, a latent carries c_i = activation x (W_dec_i . u) of the word's `projection` p = x . u.
    main = sum of c over the main latents, abs = sum of the 3 largest c of others with cos(W_dec_i, u) >= 0.1.
    The fraction is 0 where abs / p < 0.4 or main >= p (or p <= 0), 1 where main <= 0, and else
    min(abs, p - main) / (min(abs, p - main) + main). Full: every main latent is below 1e-8, p > 0, and the latent
    that carries most has cos >= 0.025 and carries 0.4 p or more.
    """
    unit = F.normalize(probe.double(), dim=0)
    rows = W_dec.double()
    cosine = F.cosine_similarity(rows, unit[None], dim=1)
    carried = latents.double() * (rows @ unit)
    p = projection.double()
    chosen = torch.tensor(list(main))
    by_main = carried[:, chosen].sum(1)
    other = carried.clone()
    other[:, chosen] = 0
    allowed = other * (cosine >= ABSORBER_COSINE)
    absorbed = allowed.topk(min(N_ABSORBERS, allowed.shape[1]), dim=1).values.sum(1)
    absorbs = (p > 0) & (absorbed >= ABSORBER_SHARE * p) & (by_main < p)
    taken = torch.minimum(absorbed, p - by_main)
    fraction = torch.where(by_main <= 0, 1.0, taken / (taken + by_main))
    most = carried.max(dim=1)
    off = (latents[:, chosen] < SILENT).all(dim=1)
    full = off & (p > 0) & (cosine[most.indices] >= FULL_COSINE) & (most.values >= FULL_SHARE * p)
    return torch.where(absorbs, fraction, 0.0), full


def absorption(
    x: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    letters: Sequence[str],
    latents: Float[Tensor, "n m"] | Float[np.ndarray, "n m"],
    W_dec: Float[Tensor, "m d"],
    *,
    test: Sequence[bool] | np.ndarray | None = None,
    origin: Float[Tensor, "d"] | None = None,
    min_f1: float | int = 0.6,
    min_letters: int = 20,
    min_words: int = 10,
    max_k: int = 10,
    f1_jump: float | int = 0.03,
    C: float | int = 1.0,
    n_null: int = 5,
    seed: int = 0,
) -> Absorption:
    """Return how much of each first letter other latents absorb, from one row a word: activation and latents.

    For each letter of min_words words or more a logistic probe (one letter against all) learns from the training
    words; letters whose probe has F1 > min_f1 on the held-out words are read. Main latents: the one whose mean over the
    letter's words exceeds that over the others most, and the next ones while a logistic probe on them all gains more
    than f1_jump in F1 on the training words, up to max_k. Absorption is that of the held-out words of the letter that
    the probe gets right (word_absorption). `test` marks the held-out words, a quarter by chance unless given. `origin`
    is taken from x before it is projected; SAEBench takes none off.
    Raises AbsorptionError where fewer than min_letters letters are read: the figure would mean nothing; ValueError for
    lengths that differ or rows that are not finite.
    """
    rows, codes = as_rows(x), as_rows(latents)
    if not len(rows) == len(codes) == len(letters) or codes.shape[1] != len(W_dec) or rows.shape[1] != W_dec.shape[1]:
        raise ValueError(
            f"{len(rows)} rows, {len(codes)} rows of latents and {len(letters)} letters, {codes.shape[1]} latents and "
            f"{len(W_dec)} decoder rows, widths {rows.shape[1]} and {W_dec.shape[1]}: each pair must agree"
        )
    names = np.array(list(letters))
    held = np.random.default_rng(seed).random(len(rows)) < 0.25 if test is None else np.asarray(test, dtype=bool)
    if len(held) != len(rows):
        raise ValueError(f"test marks {len(held)} words of {len(rows)}")
    counted = {c: (int((names[~held] == c).sum()), int((names[held] == c).sum())) for c in sorted(set(letters))}
    asked = [c for c, (n_train, n_test) in counted.items() if n_train + n_test >= min_words and n_train and n_test]
    words = _Words(rows, codes, W_dec.detach().double().cpu(), names, held, origin, float(C), n_null, seed)
    probes = {c: _probe(words, c) for c in asked}
    read = [c for c, probe in probes.items() if probe.f1 > min_f1]
    if len(read) < min_letters:
        best = max((probe.f1 for probe in probes.values()), default=0.0)
        raise AbsorptionError(
            f"first letters cannot be read here: {len(read)} of {len(asked)} letters (of {min_words} words or more) "
            f"have a probe with F1 > {min_f1} (the best: {best:.2f}), {min_letters} are needed; absorption means "
            "nothing on these activations. Take another hook point or a larger model"
        )
    found = [_letter(words, probes[c], c, max_k, float(f1_jump)) for c in read]
    return Absorption(
        letters=tuple(found),
        n_asked=len(asked),
        n_train=int((~held).sum()),
        n_test=int(held.sum()),
        min_f1=float(min_f1),
        seed=seed,
    )


def vocabulary_words(tokenizer: Any, *, min_length: int = 2) -> tuple[list[int], list[str]]:
    """Return ids and words of the tokens that are a space and then letters a to z alone, of min_length or more."""
    ids = list(range(len(need_tokenizer(tokenizer))))
    texts = token_strings(tokenizer, ids)
    kept = [
        (i, text[1:])
        for i, text in zip(ids, texts, strict=True)
        if text[:1] == " " and text[1:].isascii() and text[1:].isalpha() and len(text) > min_length
    ]
    return [i for i, _ in kept], [word for _, word in kept]


@torch.no_grad()
def first_letter_absorption(
    model: "Model",
    sae: SAE,
    hook: str,
    *,
    prefix: str = "",
    words: tuple[Sequence[int], Sequence[str]] | None = None,
    max_words: int = 10_000,
    seed: int = 0,
    **options: Any,
) -> Absorption:
    """Return first-letter absorption at `hook`, on words that are one token of the model's own vocabulary.

    Each word stands after BOS and `prefix`, and is read at its own token. `words` are (ids, words) instead of all that
    vocabulary_words finds; of more than max_words a random part is taken. A word in lower and upper case is on one
    side of the split. Options go to `absorption`, which raises AbsorptionError where the model does not hold letters.
    Raises SpliceError for a transcoder, MissingError without a tokenizer.
    """
    check_fit(model, sae, hook)
    ids, names = vocabulary_words(model.tokenizer) if words is None else (list(words[0]), list(words[1]))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(ids))[:max_words])
    ids, names = [ids[i] for i in chosen], [names[i] for i in chosen]
    distinct = sorted({name.lower() for name in names})
    held = {name for name, out in zip(distinct, rng.random(len(distinct)) < 0.25, strict=True) if out}
    front = encode(need_tokenizer(model.tokenizer), prefix)
    documents = [torch.tensor([*front, i]) for i in ids]
    acts = capture_acts(model, documents, [hook], exclude=("pad",), include=_last)
    x = acts[model.hook_point(hook).name]
    latents = torch.cat([sae.encode(part.to(sae.W_dec)).cpu() for part in x.split(2048)])
    test = np.array([name.lower() in held for name in names])
    return absorption(
        x, [name[0].lower() for name in names], latents, sae.W_dec.detach().cpu(), test=test, seed=seed, **options
    )


def _last(ids: Any) -> list[bool]:
    return [False] * (len(ids) - 1) + [True]


@dataclass(frozen=True)
class _Words:
    rows: Tensor
    latents: Tensor
    W_dec: Tensor
    names: np.ndarray
    held: np.ndarray
    origin: Tensor | None
    C: float
    n_null: int
    seed: int


@dataclass(frozen=True)
class _Probe:
    weight: Tensor
    f1: float  # on held-out words
    right: np.ndarray  # held-out words of the letter that it gets right


def _probe(words: _Words, letter: str) -> _Probe:
    y, test = words.names == letter, words.held
    weight, bias = logistic(words.rows[~test], y[~test].astype(np.int64), words.C)
    read = (words.rows[test].double() @ weight + bias > 0).numpy()
    return _Probe(weight, _f1(read, y[test]), np.flatnonzero(test)[read & y[test]])


def _letter(words: _Words, probe: _Probe, letter: str, max_k: int, jump: float) -> LetterAbsorption:
    y, weight, at = (words.names == letter).astype(np.int64), probe.weight, probe.right
    main = _main_latents(words.latents[~words.held], y[~words.held], max_k, jump, words.C)
    x = words.rows[at].double() if words.origin is None else words.rows[at].double() - words.origin.double()
    latents, projection = words.latents[at], x @ F.normalize(weight, dim=0)
    fraction, full = word_absorption(latents, words.W_dec, weight, projection, main)
    generator = torch.Generator().manual_seed(words.seed)
    nulls = []
    for _ in range(words.n_null):
        dealt = words.W_dec[torch.randperm(len(words.W_dec), generator=generator)]
        chance = word_absorption(latents, dealt, weight, projection, main)
        nulls.append([float(part.double().mean()) for part in chance])
    null_fraction, null_full = np.mean(nulls, axis=0).tolist()
    return LetterAbsorption(
        letter=letter,
        f1=probe.f1,
        n_words=len(at),
        main=tuple(main),
        fraction=float(fraction.mean()),
        full=float(full.double().mean()),
        null_fraction=null_fraction,
        null_full=null_full,
    )


def _main_latents(latents: Tensor, y: np.ndarray, max_k: int, jump: float, C: float) -> list[int]:
    """Return the best latent, and the next ones while F1 rises by more than `jump`."""
    ranked, before = choose_latents(latents, y, max_k, signed=True), -np.inf
    for k in range(1, len(ranked) + 1):
        columns = latents[:, ranked[:k]]
        weight, bias = logistic(columns, y, C)
        f1 = _f1((columns.double() @ weight + bias > 0).numpy(), y)
        if k > 1 and not f1 - before > jump:
            return ranked[: k - 1]
        before = f1
    return ranked


def _f1(read: Bool[np.ndarray, "n"], truth: Shaped[np.ndarray, "n"]) -> float:
    hits = int((read & (truth == 1)).sum())
    return 2 * hits / max(1, int(read.sum()) + int(truth.sum()))
