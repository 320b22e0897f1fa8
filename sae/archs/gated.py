"""Gated SAE (arXiv:2404.16014): one part of the encoder decides whether a latent is active, another how strongly."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.archs.base import Batch, Pick
from sae.archs.relu import ReLU, site_norms
from sae.config import SAEConfig, TrainConfig
from sae.kernels import decode_active

__all__ = ["Gated"]


class Gated(ReLU):
    """A latent is active where its gate's pre-activation is positive; its magnitude has a scale and bias of its own.

    The encoder bias is the gate's. The penalty falls on the gate alone, which also has to reconstruct by itself, the
    decoder held fixed (the paper's, and not SAELens's, which lets the gradient reach the decoder).
    """

    biases = ("enc_bias", "cut", "mag_bias")

    def __init__(self, config: SAEConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.log_gain = nn.Parameter(torch.zeros(config.d_sae))
        self.mag_bias = nn.Parameter(torch.zeros(config.d_sae))

    @property
    def r_mag(self) -> Float[Tensor, " d_sae"]:
        """Logarithm of the magnitude's gain over the gate's weights."""
        return self.log_gain

    @property
    def b_mag(self) -> Float[Tensor, " d_sae"]:
        """Bias of the magnitude, in the data's units."""
        return self.weights()["mag_bias"]

    def begin(self, pre: Float[Tensor, "tok d_sae"], cfg: TrainConfig) -> None:
        """Start gate and magnitude alike."""
        super().begin(pre, cfg)
        self.mag_bias.data.copy_(self.enc_bias.data)

    def values(self, raw: Float[Tensor, "*entries"], pick: Pick) -> Float[Tensor, "*entries"]:
        """Return the magnitudes where the gate is open."""
        size = pick(self.log_gain).exp() * (raw - pick(self.enc_bias)) + pick(self.mag_bias)
        return F.relu(size) * (raw.detach() > 0)

    def gate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the magnitudes where the gate is open."""
        return self.values(pre, lambda parameter: parameter)

    def active(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"]:
        """Return where the gate is open and the magnitude positive."""
        flat = super().active(pre)
        cols = flat % self.d_sae
        return flat[self.values(pre.view(-1)[flat], lambda parameter: parameter[cols]) > 0]

    def penalty(self, batch: Batch, cfg: TrainConfig) -> Float[Tensor, ""]:
        """Return the sparsity of the gate, and what it leaves unexplained by itself."""
        gate = F.relu(batch.raw)
        weighted = gate * batch.pick(site_norms(self)) if self.config.n_sites > 1 else gate
        sparsity = batch.pressure * weighted.sum() / (batch.n_tokens * batch.variance**0.5)
        dec = self.dec.detach()
        recon = gate @ dec if batch.active is None else decode_active(gate, batch.active, dec)
        error = (batch.target - self.dec_bias.detach() - batch.world.joined(recon)).square().sum()
        left = error / (batch.n_tokens * batch.variance)
        # where processes share the latents each of them has this term whole: reported once, felt by all
        return sparsity + left - left.detach() * (1 - 1 / batch.world.latent_size)

    def _take_off(self, weights: dict[str, Tensor], shift: Float[Tensor, " d_sae"]) -> None:
        super()._take_off(weights, shift)
        weights["mag_bias"] = weights["mag_bias"] - self.log_gain.exp() * shift
