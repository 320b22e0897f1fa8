"""Measure an SAE on activations: one table of metrics, each with its definition."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs.base import SAE
from sae.data import load_array
from sae.formats import load_sae
from sae.kernels import decode_active
from sae.stats import Moments

__all__ = ["DEFINITIONS", "Evaluation", "Tally", "evaluate", "evaluate_saved"]

DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "tokens": "tokens measured",
        "l0": "mean number of latents other than 0 a token",
        "fve": "1 - sum |x - x_hat|^2 / sum |x - mean x|^2 over all tokens, one mean for all",
        "nmse": "sum |x - x_hat|^2 / sum |x|^2 over all tokens",
        "cosine": "mean over tokens of cos(x, x_hat)",
        "dead": "share of latents that fired on none of these tokens",
        "dense": "share of latents that fired on more than 10 % of these tokens",
    }
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured. Each number is defined in DEFINITIONS, and printed beside it."""

    tokens: int
    l0: float
    fve: float
    nmse: float
    cosine: float
    dead: float
    dense: float
    density: Float[Tensor, " d_sae"]
    """Share of tokens on which each latent fires (float64, CPU)."""

    def __getitem__(self, name: str) -> Any:
        """Return a metric by its name. Raises KeyError for another name."""
        if name != "density" and name not in DEFINITIONS:
            raise KeyError(f"there is no metric {name!r}; there are: {', '.join(DEFINITIONS)}, density")
        return getattr(self, name)

    def as_dict(self) -> dict[str, int | float]:
        """Return the metrics by name, without the density of each latent."""
        return {name: getattr(self, name) for name in DEFINITIONS}

    def __str__(self) -> str:
        rows = (f"{name:8} {getattr(self, name):>12.6g}  {text}" for name, text in DEFINITIONS.items())
        return "\n".join(rows)


class Tally:
    """Sums over tokens, from which the metrics follow; float64 and whole numbers, so that cuts do not matter."""

    def __init__(self, d_sae: int) -> None:
        self.tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.long)
        self.error = self.power = self.cosine = 0.0
        self.moments = Moments()

    def add(
        self,
        x: Float[Tensor, "tok d_in"],
        recon: Float[Tensor, "tok d_in"],
        fired: Int[Tensor, " d_sae"],
    ) -> "Tally":
        """Take in a batch, fired being the number of its tokens on which each latent is active; returns self.

        Raises ValueError for values that are not finite.
        """
        x, recon = x.double(), recon.double()
        error, power = float((x - recon).square().sum()), float(x.square().sum())
        if not (error < float("inf") and power < float("inf")):  # nan fails too
            raise ValueError("the activations or their reconstruction hold nan or infinity")
        self.tokens += len(x)
        self.fired += fired.cpu()
        self.error, self.power = self.error + error, self.power + power
        self.cosine += float(F.cosine_similarity(x, recon, dim=1).sum())
        self.moments.add(x)
        return self

    def merge(self, other: "Tally") -> "Tally":
        """Take in what another tally has seen; returns self."""
        self.tokens += other.tokens
        self.fired += other.fired
        self.error, self.power = self.error + other.error, self.power + other.power
        self.cosine += other.cosine
        self.moments.merge(other.moments)
        return self

    def value(self) -> Evaluation:
        """Return the metrics. Raises ValueError where they do not exist: no tokens, or all tokens equal."""
        if not self.tokens:
            raise ValueError("there are no tokens to evaluate on")
        total = self.moments.value().variance * self.tokens
        if not total > 0:
            raise ValueError(f"all {self.tokens} tokens are equal: a share of their variance does not exist")
        density = self.fired.double() / self.tokens
        return Evaluation(
            tokens=self.tokens,
            l0=float(density.sum()),
            fve=1 - self.error / total,
            nmse=self.error / self.power,
            cosine=self.cosine / self.tokens,
            dead=float((self.fired == 0).double().mean()),
            dense=float((density > 0.1).double().mean()),
            density=density,
        )


@torch.no_grad()
def evaluate(sae: SAE, batches: Tensor | Iterable[Tensor]) -> Evaluation:
    """Return the metrics of an SAE on activations: one tensor [tok, d_in], or an iterable of them.

    How the tokens are cut into batches does not matter. Raises ValueError for no tokens, values that are not finite,
    another width than d_in, or tokens that are all equal.
    """
    tally = Tally(sae.d_sae)
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        if batch.ndim != 2:
            raise ValueError(f"a batch is [tok, d_in]; given: shape {tuple(batch.shape)}")
        for part in batch.split(2048):
            x = part.to(sae.enc)
            values, active = sae.encode_sparse(x)
            recon = decode_active(values, active, sae.dec) + sae.b_dec
            tally.add(x, recon, torch.bincount(active.cols, minlength=sae.d_sae))
    return tally.value()


def evaluate_saved(run: str | Path, data: str | Path) -> Evaluation:
    """Return the metrics of a saved SAE on a file of activations (.npy or .safetensors): `sae eval RUN DATA`."""
    return evaluate(load_sae(run), load_array(data))
