"""AbsTopK (arXiv:2510.00404): the k latents of each token that are furthest from zero, on either side."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs.base import Pick
from sae.archs.topk import TopK
from sae.kernels import largest_in_rows

__all__ = ["AbsTopK"]


class AbsTopK(TopK):
    """Keep the k pre-activations of largest magnitude with their signs: a latent may write in both directions."""

    def select(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"]:
        """Return the flattened positions, ascending, of the k largest magnitudes of each row."""
        return largest_in_rows(pre.detach().abs(), self.n_kept)

    def values(self, raw: Float[Tensor, "*entries"], pick: Pick) -> Float[Tensor, "*entries"]:
        """Return the pre-activations as they are."""
        return raw

    def active(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"]:
        """Return the positions of the k largest magnitudes of each row, those other than zero."""
        flat = self.select(pre)
        return flat[pre.detach().view(-1)[flat] != 0]

    def gate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the k largest magnitudes of each token with their signs, among zeros."""
        mask = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device)
        mask[self.select(pre.reshape(-1, self.d_sae))] = True
        return torch.where(mask.view(pre.shape), pre, 0.0)
