"""ReLU with a penalty on the activations (Bricken et al. 2023; norm-weighted as in Anthropic's April 2024 update)."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs.base import SAE, Batch
from sae.config import TrainConfig
from sae.kernels import above

__all__ = ["ReLU", "site_norms"]

DENSE = 0.1  # share of active entries from which dense products are faster


class ReLU(SAE):
    """Every positive pre-activation counts; a penalty sum |f|^p keeps most of them from being positive.

    The penalty's coefficient is steered towards an L0 of k unless it is given. Decoder rows have unit norm, so that the
    penalty is the norm-weighted one; a crosscoder's latent pays for the sum of its norms over the sites.
    """

    pressured = True

    def select(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"] | None:
        """Return the positions above zero, None where they are too many for sparse products."""
        if pre.device.type != "cpu":  # counting them would make the host wait
            return None
        flat = above(pre, self.cut)
        return None if len(flat) > DENSE * pre.numel() else flat

    def begin(self, pre: Float[Tensor, "tok d_sae"], cfg: TrainConfig) -> None:
        """Start with some 4 k active latents a token: half of them all would take the penalty long to bring down."""
        if self.config.k is not None and 4 * self.config.k < self.d_sae / 2:
            self.enc_bias.data.sub_(self.exceeded(pre, 4 * self.config.k))

    def penalty(self, batch: Batch, cfg: TrainConfig) -> Float[Tensor, ""]:
        """Return the coefficient times sum f^p |W_dec| a token, f in units of the target's standard deviation."""
        values = batch.values * batch.pick(site_norms(self)) if self.config.n_sites > 1 else batch.values
        if cfg.lp != 1:
            values = values.clamp_min(1e-6) ** cfg.lp
        return batch.pressure * values.sum() / (batch.n_tokens * batch.variance ** (0.5 * cfg.lp))


def site_norms(sae: SAE) -> Float[Tensor, " d_sae"]:
    """Return the sum over sites of the norms of each decoder row: 1 where there is one site."""
    sites = sae.config.n_sites
    if sites == 1:
        return sae.dec.new_ones(len(sae.dec))
    return F.normalize(sae.dec, dim=1).view(len(sae.dec), sites, -1).norm(dim=2).sum(1)
