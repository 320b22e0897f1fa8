"""A sparse autoencoder in the middle of a model: run through it, and what that costs in cross entropy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.clock import Clock
from interp.model.hooks import editing, reading
from interp.model.tokens import special_mask
from sae.archs.base import SAE
from sae.stats import Moments

if TYPE_CHECKING:
    from interp.model.loading import Model

Edit = Callable[[Float[Tensor, "tok d_sae"]], Float[Tensor, "tok d_sae"]]


class SpliceError(ValueError):
    """An SAE that does not fit the hook point, or a loss ratio without meaning."""


@dataclass(frozen=True, kw_only=True)
class SpliceLoss:
    """Cross entropies in nats a token, and the recovered shares: (ablated - spliced) / (ablated - clean)."""

    hook: str
    ce_clean: float
    ce_spliced: float
    ce_mean: float  # the stream replaced by its mean over the text's real tokens
    ce_zero: float  # the stream replaced by zero
    recovered: float  # against mean ablation, the stricter one
    recovered_zero: float
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
    writes. Raises HookPointError, and SpliceError for an SAE of another width.
    """
    _check_width(model, sae, hook)

    def through(rows: Tensor) -> Tensor:
        latents = sae.encode(rows)
        chosen = latents if edit is None else edit(latents)
        if not error:
            return sae.decode(chosen)
        # x + decode(edited) - decode(latents): the error term cancels instead of being rounded in and out
        return rows + (sae.decode(chosen) - sae.decode(latents)).to(rows)

    def replace(value: Float[Tensor, "b q d"], clock: Clock) -> Float[Tensor, "b q d"]:
        device = sae.W_dec.device
        return _with_rows(value, clock.mask & ~clock.special, lambda rows: through(rows.to(device)))

    with editing(model, {hook: replace}):
        yield


def ce_recovered(
    model: "Model",
    sae: SAE,
    hook: str,
    ids: Int[Tensor, "n t"],
    mask: Bool[Tensor, "n t"],
    *,
    batch_size: int = 16,
) -> SpliceLoss:
    """Return the share of cross entropy that the SAE recovers at `hook`, with its losses: clean, spliced, ablated.

    Cross entropy in nats over the real next tokens of every row (specials and pads are neither predicted nor replaced).
    Mean ablation is the main measure; zero ablation, which flatters, stands beside it. Raises SpliceError where the
    ablated loss is not above the clean one, or where there is no token to predict.
    """
    name = model.hook_point(hook).name
    _check_width(model, sae, name)
    special = special_mask(ids, model.special_ids)
    wanted = mask[:, :-1] & mask[:, 1:] & ~special[:, 1:]
    n_tokens = int(wanted.sum())
    if not n_tokens:
        raise SpliceError(f"there is no next token to predict in the {len(ids)} rows; give rows of two tokens or more")
    batches = [slice(start, start + batch_size) for start in range(0, len(ids), batch_size)]
    moments, total = Moments(), torch.zeros((), dtype=torch.float64)
    part = slice(0)

    def note(_: str, value: Tensor) -> None:
        moments.add(value[(mask & ~special)[part].to(value.device)])

    with reading(model, [name], note, stop=False):
        for part in batches:
            total += _loss(model, ids[part], mask[part], wanted[part])
    mean = moments.value().mean
    losses = [float(total) / n_tokens]
    for context in (
        lambda: splice(model, sae, name),
        lambda: _constant(model, name, mean),
        lambda: _constant(model, name, torch.zeros_like(mean)),
    ):
        with context():
            parts = [_loss(model, ids[part], mask[part], wanted[part]) for part in batches]
        losses.append(float(torch.stack(parts).sum()) / n_tokens)
    clean, spliced, by_mean, by_zero = losses
    for what, ablated in (("mean", by_mean), ("zero", by_zero)):
        if not ablated > clean:
            raise SpliceError(
                f"{what} ablation at {name} gives {ablated:.4f} nats a token, no more than the clean {clean:.4f}: "
                "a recovered share means nothing here; choose text that the model predicts, or another hook point"
            )
    return SpliceLoss(
        hook=name,
        ce_clean=clean,
        ce_spliced=spliced,
        ce_mean=by_mean,
        ce_zero=by_zero,
        recovered=(by_mean - spliced) / (by_mean - clean),
        recovered_zero=(by_zero - spliced) / (by_zero - clean),
        n_tokens=n_tokens,
    )


def _check_width(model: "Model", sae: SAE, hook: str) -> None:
    point = model.hook_point(hook)
    if sae.d_in != point.d:
        raise SpliceError(f"the SAE reads width {sae.d_in}, but {point.name} of {model.name} has width {point.d}")


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


def _loss(model: "Model", ids: Tensor, mask: Tensor, wanted: Tensor) -> Float[Tensor, ""]:
    """Return the summed cross entropy of the wanted next tokens."""
    logits = model.logits(ids, mask)[:, :-1]
    kept = wanted.to(logits.device)
    targets = ids[:, 1:][wanted].to(logits.device)
    # float64 sum: a mean of 1e5 float32 terms would lose the digits that two good SAEs differ in
    return F.cross_entropy(logits[kept].float(), targets, reduction="none").double().sum().cpu()
