"""A sparse autoencoder in the middle of a model: run through it, and what that costs in cross entropy and KL."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.clock import Clock
from interp.model.hooks import editing, reading
from interp.model.tokens import Packed, TokenBatch, special_mask
from sae.archs.base import SAE
from sae.stats import Moments

if TYPE_CHECKING:
    from interp.model.loading import Model

Edit = Callable[[Float[Tensor, "tok d_sae"]], Float[Tensor, "tok d_sae"]]
CHUNK = 2**24  # values (latents, log-probabilities) that are held at once: 64 MB in float32


class SpliceError(ValueError):
    """An SAE that does not fit the hook point, or a share without meaning."""


@dataclass(frozen=True, kw_only=True)
class SpliceLoss:
    """Cross entropies and KL divergences in nats a token, and the shares that the SAE recovers of what ablation costs.

    recovered = (ablated - spliced) / (ablated - clean) in cross entropy; kl_score = 1 - KL_spliced / KL_ablated, where
    KL is KL(p_clean || p) over the vocabulary, mean over the predicted tokens.
    """

    hook: str
    ce_clean: float
    ce_spliced: float
    ce_mean: float  # the stream replaced by its mean over the text's real tokens
    ce_zero: float  # the stream replaced by zero
    recovered: float  # against mean ablation
    recovered_zero: float
    kl_spliced: float
    kl_mean: float  # the nulls of kl_spliced
    kl_zero: float
    kl_score: float  # against mean ablation
    kl_score_zero: float
    n_tokens: int  # next tokens that were predicted

    @property
    def delta(self) -> float:
        """What the splice costs, in nats a token: tells good SAEs apart where the shares saturate."""
        return self.ce_spliced - self.ce_clean

    def to_dict(self) -> dict:
        """Return the numbers as JSON values."""
        return {**asdict(self), "delta": self.delta}


@contextmanager
def splice(model: "Model", sae: SAE, hook: str, *, error: bool = False, edit: Edit | None = None) -> Iterator[None]:
    """Replace the stream at `hook` by the SAE's reconstruction in every forward inside the context.

    BOS, other specials and pads keep their values. `edit` takes the latents [tok, d_sae] and returns those to decode.
    With `error` what the SAE misses is added back: without an edit nothing changes then, and an edit adds only what it
    writes. Raises HookPointError, and SpliceError for an SAE of another width, or one that writes something else than
    it reads (a transcoder).
    """
    check_fit(model, sae, hook)

    def through(rows: Tensor) -> Tensor:
        latents = sae.encode(rows)
        chosen = latents if edit is None else edit(latents)
        if not error:
            return sae.decode(chosen, rows)
        # x + decode(edited) - decode(latents): the error term cancels instead of being rounded in and out
        return rows + (sae.decode(chosen, rows) - sae.decode(latents, rows)).to(rows)

    def in_parts(rows: Tensor) -> Tensor:
        rows = rows.to(sae.W_dec.device)
        if edit is not None:  # an edit may look at all tokens
            return through(rows)
        return torch.cat([through(part) for part in rows.split(max(1, CHUNK // sae.d_sae))])

    def replace(value: Float[Tensor, "b q d"], clock: Clock) -> Float[Tensor, "b q d"]:
        return _with_rows(value, clock.mask & ~clock.special, in_parts)

    with editing(model, {hook: replace}):
        yield


def stream_moments(model: "Model", hook: str, batches: Iterable[Any]) -> Moments:
    """Return the moments of the stream at `hook` over the real tokens of batches, specials and pads left out.

    A batch is a pair (ids [n, t], mask [n, t]) or a TokenBatch. The result merges with that of other text; its mean is
    what SpliceTally replaces the stream by.
    """
    name, moments = model.hook_point(hook).name, Moments()
    kept = torch.zeros(0)

    def note(_: str, value: Tensor) -> None:
        moments.add(value[kept.to(value.device)])

    with reading(model, [name], note):
        for ids, mask in map(_pair, batches):
            kept = mask & ~special_mask(ids, model.special_ids)
            model.run(ids, mask)
    return moments


class SpliceTally:
    """Sums of losses over predicted tokens, clean and with the stream replaced; float64, so that cuts do not matter.

    `mean` is the stream's mean over the whole text (stream_moments): tallies of parts of a text share it and merge.
    A batch runs four times, five with a `null`: another SAE, of random directions say, measured beside the first. Of
    the logits two sets are held at once, each of at most some 2^26 values.
    Raises SpliceError for an SAE that does not fit the hook point, or a model that does not predict next tokens.
    """

    def __init__(
        self, model: "Model", sae: SAE, hook: str, mean: Float[Tensor, "d"], *, null: SAE | None = None
    ) -> None:
        self.model, self.hook, self.mean = model, model.hook_point(hook).name, mean
        self.saes = [sae] if null is None else [sae, null]
        for one in self.saes:
            check_fit(model, one, self.hook)
        _need_causal(model)
        self.n_tokens = 0
        self._ce = torch.zeros(3 + len(self.saes), dtype=torch.float64)  # clean, mean, zero, each SAE
        self._kl = torch.zeros(3 + len(self.saes), dtype=torch.float64)

    def add(self, ids: Int[Tensor, "n t"], mask: Bool[Tensor, "n t"]) -> "SpliceTally":
        """Take in the next tokens of padded rows, specials and pads neither predicted nor replaced; returns self."""
        rows = max(1, 4 * CHUNK // (ids.shape[1] * self.model.d_vocab))
        for part_ids, part_mask in zip(ids.split(rows), mask.split(rows), strict=True):
            self._take(part_ids, part_mask)
        return self

    def merge(self, other: "SpliceTally") -> "SpliceTally":
        """Take in what another tally has seen; returns self. Raises SpliceError for another hook point or mean."""
        alike = other.hook == self.hook and len(other.saes) == len(self.saes)
        if not alike or not torch.equal(other.mean, self.mean):
            raise SpliceError(f"tallies at {self.hook} and {other.hook} do not merge unless hook and mean agree")
        self.n_tokens += other.n_tokens
        self._ce, self._kl = self._ce + other._ce, self._kl + other._kl
        return self

    def value(self) -> SpliceLoss:
        """Return the losses. Raises SpliceError for no token, or where ablation costs nothing: no share exists then."""
        return self._value(3)

    def null_value(self) -> SpliceLoss:
        """Return the losses of the null. Raises SpliceError as `value` does, or where none was given."""
        if len(self.saes) == 1:
            raise SpliceError("no null was given to this tally")
        return self._value(4)

    def _value(self, which: int) -> SpliceLoss:
        if not self.n_tokens:
            raise SpliceError("there is no next token to predict; give rows of two tokens or more")
        chosen = [0, which, 1, 2]
        clean, spliced, by_mean, by_zero = (self._ce[chosen] / self.n_tokens).tolist()
        _, kl_spliced, kl_mean, kl_zero = (self._kl[chosen] / self.n_tokens).tolist()
        for what, ablated in (("mean", by_mean), ("zero", by_zero)):
            if not ablated > clean:
                raise SpliceError(
                    f"{what} ablation at {self.hook} gives {ablated:.4f} nats a token, no more than the clean "
                    f"{clean:.4f}: a recovered share means nothing here; choose text that the model predicts, or "
                    "another hook point"
                )
        return SpliceLoss(
            hook=self.hook,
            ce_clean=clean,
            ce_spliced=spliced,
            ce_mean=by_mean,
            ce_zero=by_zero,
            recovered=(by_mean - spliced) / (by_mean - clean),
            recovered_zero=(by_zero - spliced) / (by_zero - clean),
            kl_spliced=kl_spliced,
            kl_mean=kl_mean,
            kl_zero=kl_zero,
            kl_score=1 - kl_spliced / kl_mean,
            kl_score_zero=1 - kl_spliced / kl_zero,
            n_tokens=self.n_tokens,
        )

    def _take(self, ids: Tensor, mask: Tensor) -> None:
        wanted = _wanted(self.model, ids, mask)
        if not bool(wanted.any()):
            return
        targets = ids[:, 1:][wanted]
        clean = _logits(self.model, ids, mask, wanted)
        contexts = [
            _constant(self.model, self.hook, self.mean),
            _constant(self.model, self.hook, torch.zeros_like(self.mean)),
            *(splice(self.model, sae, self.hook) for sae in self.saes),
        ]
        self._note(0, targets, clean, clean)
        for number, context in enumerate(contexts, 1):
            with context:
                changed = _logits(self.model, ids, mask, wanted)
            self._note(number, targets, clean, changed)
        self.n_tokens += len(targets)

    def _note(self, number: int, targets: Tensor, clean: Tensor, changed: Tensor) -> None:
        step = max(1, CHUNK // clean.shape[1])
        for at in range(0, len(targets), step):
            part = slice(at, at + step)
            ce, kl = _losses(clean[part], changed[part], targets[part].to(clean.device))
            self._ce[number] += ce
            self._kl[number] += kl


def ce_recovered(
    model: "Model",
    sae: SAE,
    hook: str,
    ids: Int[Tensor, "n t"] | Sequence[Any],
    mask: Bool[Tensor, "n t"] | None = None,
    *,
    batch_size: int = 16,
) -> SpliceLoss:
    """Return the shares of cross entropy and KL that the SAE recovers at `hook`, with clean, spliced, ablated losses.

    The text is ids and mask, or a list of batches: pairs (ids, mask) or TokenBatches. Losses in nats over the real
    next tokens of every row (specials and pads are neither predicted nor replaced). Ablation by the mean over the
    whole text and by zero stand side by side: which of them flatters depends on the model. How the text is cut does
    not matter. Raises SpliceError where the ablated loss is not above the clean one, where there is no token to
    predict, or for a model that does not predict next tokens.
    """
    if batch_size < 1:
        raise SpliceError(f"batch_size is {batch_size}; it must be at least 1")
    name = model.hook_point(hook).name
    check_fit(model, sae, name)
    batches = [
        pair
        for whole_ids, whole_mask in _batches(ids, mask)
        for pair in zip(whole_ids.split(batch_size), whole_mask.split(batch_size), strict=True)
    ]
    if not any(bool(_wanted(model, *pair).any()) for pair in batches):
        n = sum(len(rows) for rows, _ in batches)
        raise SpliceError(f"there is no next token to predict in the {n} rows; give rows of two tokens or more")
    tally = SpliceTally(model, sae, name, stream_moments(model, name, batches).value().mean)
    for pair in batches:
        tally.add(*pair)
    return tally.value()


def _batches(ids: Tensor | Sequence[Any], mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if isinstance(ids, Tensor):
        return [(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)]
    if mask is not None:
        raise SpliceError("a list of batches holds its own masks; leave mask out")
    return [_pair(batch) for batch in ids]


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Packed) and batch.masked:
        raise SpliceError('windows packed as "masked" hold documents that must not see each other; pack them otherwise')
    ids, mask = (batch.ids, batch.mask) if isinstance(batch, TokenBatch) else batch
    return ids, mask


def _wanted(model: "Model", ids: Tensor, mask: Tensor) -> Bool[Tensor, "n t1"]:
    """Return which tokens are predicted: real ones after a real one, no specials."""
    return mask[:, :-1] & mask[:, 1:] & ~special_mask(ids, model.special_ids)[:, 1:]


def check_fit(model: "Model", sae: SAE, hook: str) -> None:
    """Raise SpliceError for an SAE of another width than the hook point, or one that writes what it does not read."""
    point = model.hook_point(hook)
    if sae.d_in != point.d:
        raise SpliceError(f"the SAE reads width {sae.d_in}, but {point.name} of {model.name} has width {point.d}")
    width = sae.W_dec.shape[1]
    if width != sae.d_in or sae.config.transcoder:
        raise SpliceError(
            f"this SAE reads width {sae.d_in} and predicts something else, of width {width} (a transcoder): what it "
            "writes cannot stand where it reads; give an autoencoder"
        )


def _need_causal(model: "Model") -> None:
    if not model.is_causal:
        raise SpliceError(f"{model.name} does not predict next tokens from those before: it has no loss to recover")


def _with_rows(value: Tensor, chosen: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a copy of the stream with `fn` of the chosen tokens in their place."""
    rows = value[chosen]
    if not len(rows):
        return value
    new = value.clone()
    new[chosen] = fn(rows).to(value)
    return new


@contextmanager
def _constant(model: "Model", hook: str, vector: Float[Tensor, "d"]) -> Iterator[None]:
    def replace(value: Float[Tensor, "b q d"], clock: Clock) -> Float[Tensor, "b q d"]:
        return _with_rows(value, clock.mask & ~clock.special, lambda rows: vector.expand_as(rows))

    with editing(model, {hook: replace}):
        yield


def _logits(model: "Model", ids: Tensor, mask: Tensor, wanted: Tensor) -> Float[Tensor, "n v"]:
    """Return the logits of the wanted next tokens."""
    logits = model.logits(ids, mask)[:, :-1]
    return logits[wanted.to(logits.device)]


def _losses(
    clean: Float[Tensor, "n v"], changed: Float[Tensor, "n v"], targets: Int[Tensor, "n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return summed cross entropy of the targets and summed KL(clean || changed), in nats."""
    before, after = clean.float().log_softmax(-1), changed.float().log_softmax(-1)
    p = before.exp()
    # a token that the clean model rules out adds nothing; 0 x (-inf + inf) would be nan
    kl = torch.where(p > 0, p * (before - after), 0.0).sum(-1)
    # float64 sum: a mean of 1e5 float32 terms would lose the digits that two good SAEs differ in
    return F.nll_loss(after, targets, reduction="none").double().sum().cpu(), kl.double().sum().cpu()
