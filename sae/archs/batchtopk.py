"""BatchTopK (arXiv:2412.06410): k latents a token on average, shared out over the batch by strength."""

from jaxtyping import Float, Int
from torch import Tensor

from sae.archs.base import SAE
from sae.config import SAEConfig
from sae.kernels import largest

__all__ = ["BatchTopK"]


class BatchTopK(SAE):
    """Keep the k * n_tok largest of a training batch; at inference, one global threshold.

    The threshold makes the result of a token independent of its neighbours; calibrated after training, it gives the L0
    that was asked for.
    """

    calibrated = True

    def __init__(self, config: SAEConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._guess = 0.0  # smallest value kept in the last batch: makes the next selection fast, not different

    def select(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"]:
        """Return the flattened positions, ascending, of the k * n_tok largest positive pre-activations."""
        assert self.config.k is not None
        n = round(self.config.k * pre.shape[0] * self.world.token_size)
        kept = largest(pre, n, self._guess, self.world.gather if self.world.size > 1 else None)
        if pre.device.type == "cpu":
            self._guess = float(pre.detach().view(-1)[kept].min()) if len(kept) else 0.0
        return kept
