"""TopK (arXiv:2406.04093): the k strongest latents of each token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.archs.base import SAE
from sae.config import SAEConfig
from sae.kernels import largest_in_rows

__all__ = ["TopK"]


class TopK(SAE):
    """Keep the k largest positive pre-activations of each token, while training and at inference."""

    compares = True

    def __init__(self, config: SAEConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        if config.k is None or config.k != int(config.k):
            raise ValueError(f"k is {config.k}; topk keeps a whole number of latents a token")
        self.n_kept = int(config.k)

    def select(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"]:
        """Return the flattened positions, ascending, of the k largest of each row."""
        flat = largest_in_rows(pre, min(self.n_kept, pre.shape[1]))
        if self.world.latent_size == 1:
            return flat
        values = pre.view(-1)[flat].view(len(pre), -1)
        everywhere = self.world.gather_columns(values)
        cut = everywhere.topk(self.n_kept, dim=1, sorted=False).values.amin(1, keepdim=True)
        return flat[(values >= cut).flatten()]

    def active(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"]:
        """Return the positions of the k largest of each row, those above zero."""
        flat = largest_in_rows(pre, self.n_kept)
        return flat[pre.detach().view(-1)[flat] > 0]

    def gate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the k largest of each token, rectified, among zeros."""
        # through the same selection as `active`: two ways to break a tie would be two results
        rows = pre.reshape(-1, pre.shape[-1])
        mask = torch.zeros(rows.numel(), dtype=torch.bool, device=pre.device)
        mask[largest_in_rows(rows, self.n_kept)] = True
        return torch.relu(pre) * mask.view(pre.shape)
