"""What makes each latent of an SAE fire: densities, top contexts and logit effects, from one pass over the text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.acts.capture import Acts
from interp.model.tokens import need_tokenizer
from sae.archs.base import SAE

if TYPE_CHECKING:
    from interp.model.loading import Model

RANKINGS = ("energy", "max", "density")
N_RANDOM = 100  # random directions behind the null of the logit effects


class ExamplesError(ValueError):
    """Activations, latents or parameters from which no examples can be drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentTable:
    """For every latent, over n_tokens tokens: how often and how strongly it fires, and on which rows most."""

    density: Float[Tensor, "d_sae"]  # share of tokens on which the latent is not zero
    max: Float[Tensor, "d_sae"]
    energy: Float[Tensor, "d_sae"]  # mean square of what it writes: activation^2 x |decoder row|^2, a token
    top_values: Float[Tensor, "d_sae k"]  # best first, at most one a window; 0 where there are fewer
    top_rows: Int[Tensor, "d_sae k"]  # rows of the stream; -1 where there are fewer
    n_tokens: int

    @property
    def dead(self) -> float:
        """Share of latents that fired on none of the tokens."""
        return float((self.density == 0).double().mean())

    def strongest(self, n: int, *, by: str = "energy", max_density: float = 1.0) -> list[int]:
        """Return the n first latents by "energy", "max" or "density", those that fire and are no denser than asked.

        Raises ExamplesError for another ranking; fewer than n come back where fewer fire.
        """
        if by not in RANKINGS:
            raise ExamplesError(f"latents are ranked by one of {', '.join(RANKINGS)}, not {by!r}")
        fits = (self.density > 0) & (self.density <= max_density)
        order = getattr(self, by).masked_fill(~fits, -1).argsort(descending=True, stable=True)
        return order[: min(n, int(fits.sum()))].tolist()


@dataclass(frozen=True, kw_only=True)
class Context:
    """Tokens around one activation, with the latent's activation on each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int  # index of the token that the context was chosen for
    document: int
    position: int  # of that token, in its document

    @property
    def value(self) -> float:
        """Activation at the peak."""
        return self.activations[self.peak]


@dataclass(frozen=True, kw_only=True)
class LatentExamples:
    """One latent as a person reads it."""

    latent: int
    density: float
    max: float
    energy: float
    contexts: tuple[Context, ...]  # strongest first, at most one a window of text
    top_logits: tuple[tuple[str, float], ...]  # tokens that the latent's decoder row promotes, directly
    bottom_logits: tuple[tuple[str, float], ...]
    logit_null: float  # mean largest logit effect of random directions of the decoder row's length

    def to_dict(self) -> dict:
        """Return the examples as JSON values."""
        return asdict(self)


class LatentScan:
    """Gather a LatentTable from activations that stream by, in any cut into batches.

    `k` examples a latent are kept, at most one a window. Memory: d_sae x k, and one batch's latents.
    """

    def __init__(self, sae: SAE, k: int = 10):
        if k < 1:
            raise ExamplesError(f"at least one example a latent is needed, not {k}")
        self.sae, self.k, self.n_tokens = sae, k, 0
        device = sae.W_dec.device
        self._fired = torch.zeros(sae.d_sae, dtype=torch.long, device=device)
        self._squares = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        self._values = torch.zeros(sae.d_sae, k, device=device)
        self._rows = torch.full((sae.d_sae, k), -1, dtype=torch.long, device=device)
        self._open: tuple[Tensor, Tensor] | None = None  # the last window, which the next batch may go on with

    def add(self, x: Float[Tensor, "tok d_in"], windows: Int[Tensor, "tok"]) -> "LatentScan":
        """Take in the next rows of the stream and the window of each, windows in order; returns self."""
        x, windows = x.to(self._values), windows.to(self._values.device)
        if self._open is not None:
            x, windows = torch.cat([self._open[0], x]), torch.cat([self._open[1], windows])
        if bool((windows.diff() < 0).any()):
            raise ExamplesError("the rows of a window must come one after another, windows in ascending order")
        whole = int((windows != windows[-1]).sum()) if len(windows) else 0
        self._open = (x[whole:], windows[whole:])
        self._take(x[:whole], windows[:whole])
        return self

    def value(self) -> LatentTable:
        """Return the table of everything seen. Raises ExamplesError where that is nothing."""
        if self._open is not None:
            self._take(*self._open)
            self._open = None
        if not self.n_tokens:
            raise ExamplesError("no rows were given")
        lengths = self.sae.W_dec.detach().double().square().sum(dim=1)
        return LatentTable(
            density=self._fired.double().div(self.n_tokens).float(),
            max=self._values[:, 0].clone(),
            energy=(self._squares * lengths / self.n_tokens).float(),
            top_values=self._values.clone(),
            top_rows=self._rows.clone(),
            n_tokens=self.n_tokens,
        )

    @torch.no_grad()
    def _take(self, x: Tensor, windows: Tensor) -> None:
        """Count whole windows, and merge the best token of each into the running lists."""
        value, active = self.sae.encode_sparse(x)
        token, latent = torch.div(active.flat, self.sae.d_sae, rounding_mode="floor"), active.cols
        self._fired += torch.bincount(latent, minlength=self.sae.d_sae)
        self._squares.index_add_(0, latent, value.double().square())
        enters = value > self._values[latent, -1]  # after the first batches next to none
        token, latent, value = token[enters], latent[enters], value[enters]
        value, order = value.sort(descending=True, stable=True)  # equal values: the earlier row first
        token, latent = token[order], latent[order]
        window = windows.unique_consecutive(return_inverse=True)[1]
        first = _first_of_group(latent * (len(x) + 1) + window[token])
        self._merge(latent[first], value[first], token[first] + self.n_tokens)
        self.n_tokens += len(x)

    def _merge(self, latent: Tensor, value: Tensor, row: Tensor) -> None:
        """Merge entries, strongest first, into the k best of each latent."""
        latent, order = latent.sort(stable=True)
        value, row = value[order], row[order]
        counts = torch.bincount(latent, minlength=len(self._values))
        place = torch.arange(len(latent), device=latent.device) - (counts.cumsum(0) - counts)[latent]
        keep = place < self.k
        new_values, new_rows = torch.zeros_like(self._values), torch.full_like(self._rows, -1)
        new_values[latent[keep], place[keep]] = value[keep]
        new_rows[latent[keep], place[keep]] = row[keep]
        both, order = torch.cat([self._values, new_values], dim=1).sort(dim=1, descending=True, stable=True)
        self._values = both[:, : self.k]
        self._rows = torch.cat([self._rows, new_rows], dim=1).gather(1, order)[:, : self.k]


def scan_acts(sae: SAE, acts: Acts, hook: str, *, k: int = 10, window: int = 64, batch_size: int = 4096) -> LatentTable:
    """Return the LatentTable of captured activations; a window is `window` positions of one document."""
    if window < 1 or batch_size < 1:
        raise ExamplesError(f"window and batch_size must be at least 1, not {window} and {batch_size}")
    x = acts[hook]
    if not len(x):
        raise ExamplesError(f"there are no activations at {hook}")
    pieces = torch.stack([acts.documents, acts.positions // window])
    windows = torch.cat([torch.zeros(1, dtype=torch.long), (pieces.diff(dim=1) != 0).any(dim=0).cumsum(0)])
    scan = LatentScan(sae, k)
    for start in range(0, len(x), batch_size):
        scan.add(x[start : start + batch_size], windows[start : start + batch_size])
    return scan.value()


def top_examples(
    model: "Model",
    sae: SAE,
    acts: Acts,
    hook: str,
    *,
    latents: Sequence[int] | None = None,
    n_latents: int = 20,
    n_examples: int = 5,
    context: int = 12,
    n_logits: int = 8,
    by: str = "energy",
    max_density: float = 1.0,
    window: int = 64,
    table: LatentTable | None = None,
    seed: int = 0,
) -> list[LatentExamples]:
    """Return the examples of the latents asked for, or of the strongest: contexts of their top tokens, logit effects.

    `context` tokens of the same document stand on either side of the peak. `table` spares the pass over the text where
    `scan_acts` has already made it. `by` and `max_density` as in LatentTable.strongest. Raises ExamplesError for a
    latent that the SAE does not have, MissingError without a tokenizer.
    """
    tokenizer = need_tokenizer(model.tokenizer)
    table = table or scan_acts(sae, acts, hook, k=n_examples, window=window)
    chosen = table.strongest(n_latents, by=by, max_density=max_density) if latents is None else list(latents)
    odd = [latent for latent in chosen if not 0 <= latent < sae.d_sae]
    if odd:
        raise ExamplesError(f"the SAE has latents 0 to {sae.d_sae - 1}, not {odd[0]}")
    if not chosen:
        return []
    contexts = _contexts(sae, acts, hook, table.top_rows[chosen, :n_examples].cpu(), chosen, context, tokenizer)
    directions = sae.W_dec.detach()[chosen]
    effects = logit_effects(model, directions).cpu()
    null = _random_effect(model, directions.shape[1], seed) * directions.norm(dim=1).cpu()
    names = {}
    ends = []
    for row in effects:
        top, bottom = row.topk(min(n_logits, len(row))), (-row).topk(min(n_logits, len(row)))
        ends.append((top.indices.tolist(), top.values.tolist(), bottom.indices.tolist(), (-bottom.values).tolist()))
        names.update((i, "") for i in (*ends[-1][0], *ends[-1][2]))
    names = dict(zip(names, token_strings(tokenizer, list(names)), strict=True))
    return [
        LatentExamples(
            latent=latent,
            density=float(table.density[latent]),
            max=float(table.max[latent]),
            energy=float(table.energy[latent]),
            contexts=contexts[i],
            top_logits=tuple((names[t], v) for t, v in zip(*ends[i][:2], strict=True)),
            bottom_logits=tuple((names[t], v) for t, v in zip(*ends[i][2:], strict=True)),
            logit_null=float(null[i]),
        )
        for i, latent in enumerate(chosen)
    ]


@torch.no_grad()
def logit_effects(model: "Model", directions: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
    """Return the direct effect of directions on the logits: W_U (gain * r), through the final norm's gain.

    An approximation: the norm's own scale is left out (divide by the residual's standard deviation before the final
    norm for logits), and so is everything that later layers do. A final soft cap bends large values.
    """
    # The norm is odd but for its bias: (f(r) - f(-r)) / 2 = W_U (gain * r) / rms(r), whatever family f belongs to.
    # A large r, so that the norm's epsilon does not count.
    rms = directions.square().mean(dim=1, keepdim=True).sqrt()
    if bool((rms == 0).any()):
        raise ExamplesError("a direction of length 0 has no effect on the logits")
    large = (directions * (100 / rms)).to(model.device)
    ups, downs = model.unembed(large).float(), model.unembed(-large).float()
    effect = (ups - downs) / 2
    normed = torch.allclose(model.unembed(2 * large[:1]).float(), ups[:1], rtol=1e-2, atol=1e-3)
    if not normed:
        return effect * (rms / 100).to(effect)
    shifted = model.unembed(large[:1] + 100).float()
    if torch.allclose(shifted, ups[:1], rtol=1e-2, atol=1e-3):  # a LayerNorm: it takes the mean out first
        rms = directions.std(dim=1, keepdim=True, correction=0)
    return effect * rms.to(effect)


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token as the text it adds, its leading space kept; incomplete UTF-8 as the replacement character."""
    pieces = need_tokenizer(tokenizer).convert_ids_to_tokens(list(ids))
    texts = []
    for number, piece in zip(ids, pieces, strict=True):
        if piece is None:  # rows of the embedding that the tokenizer does not use
            texts.append(f"<{number}>")
        elif piece.startswith("▁"):  # decoding a sentencepiece token alone would strip its space
            texts.append(piece.replace("▁", " "))
        else:
            texts.append(tokenizer.decode([number], clean_up_tokenization_spaces=False))
    return texts


def _first_of_group(key: Int[Tensor, "n"]) -> Int[Tensor, "groups"]:
    """Return the place of the first entry of each key, in the order of the entries."""
    ordered, order = key.sort(stable=True)
    new = torch.ones(len(key), dtype=torch.bool, device=key.device)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new].sort().values


def _random_effect(model: "Model", d: int, seed: int) -> float:
    """Return the mean largest logit effect of random unit directions."""
    random = torch.randn(N_RANDOM, d, generator=torch.Generator().manual_seed(seed))
    return float(logit_effects(model, random / random.norm(dim=1, keepdim=True)).max(dim=1).values.mean())


@torch.no_grad()
def _contexts(
    sae: SAE, acts: Acts, hook: str, top_rows: Tensor, latents: list[int], width: int, tokenizer: Any
) -> list[tuple[Context, ...]]:
    """Return, a latent, the tokens and activations around its top rows."""
    x = acts[hook]
    spread = top_rows[..., None] + torch.arange(-width, width + 1)
    inside = (spread >= 0) & (spread < len(x)) & (top_rows >= 0)[..., None]
    spread = spread.clamp(0, len(x) - 1)
    inside &= acts.documents[spread] == acts.documents[top_rows.clamp_min(0)][..., None]
    rows, place = spread[inside].unique(return_inverse=True)
    parts = [sae.encode(x[part].to(sae.W_dec))[:, latents].cpu() for part in rows.split(4096)]
    values = torch.cat(parts) if parts else torch.zeros(0, len(latents))
    texts = token_strings(tokenizer, acts.token_ids[rows].tolist())
    at = torch.full(spread.shape, -1).masked_scatter_(inside, place)
    found = []
    for i in range(len(latents)):
        ours = []
        for line, row in zip(at[i], top_rows[i].tolist(), strict=True):
            if row < 0:
                continue
            peak, line = int((line[:width] >= 0).sum()), line[line >= 0]
            ours.append(
                Context(
                    tokens=tuple(texts[j] for j in line.tolist()),
                    activations=tuple(values[line, i].tolist()),
                    peak=peak,
                    document=int(acts.documents[row]),
                    position=int(acts.positions[row]),
                )
            )
        found.append(tuple(ours))
    return found
