"""AuxK: the share of the residual that the dead latents leave unexplained."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dist import ALONE, World

__all__ = ["aux_k_loss"]


def aux_k_loss(
    residual: Float[Tensor, "tok d_out"],
    pre: Float[Tensor, "tok n_dead"],
    dec: Float[Tensor, "n_dead d_out"],
    k: int,
    world: World = ALONE,
) -> Float[Tensor, ""]:
    """Return the share of the residual that the k strongest dead latents of each token leave unexplained.

    AuxK of Gao et al. (arXiv:2406.04093), with three choices: the residual is detached (the live latents are not asked
    to leave something over), the decoder bias stays out (it is in the residual already), and the pre-activations are
    not rectified, so that a latent below zero on the whole batch still gets an encoder gradient. Scaled by the share of
    the k places that can be filled, so that a few dead latents do not shout. With several processes each returns its
    part of a sum over tokens; where they share the latents, each brings its own dead ones and returns the whole.
    """
    counts = [pre.shape[1]]
    if world.latent_size > 1:
        counts = world.gather(torch.tensor(counts, device=pre.device)).tolist()
    n_dead = sum(counts)
    if n_dead > k:
        strongest = pre.detach().topk(min(k, pre.shape[1]), sorted=False).values
        if world.latent_size > 1:
            room = min(k, max(counts)) - strongest.shape[1]
            filled = torch.nn.functional.pad(strongest, (0, room), value=-torch.inf)
            strongest = world.gather_columns(filled).topk(k, sorted=False).values
        pre = pre * (pre.detach() >= strongest.amin(dim=1, keepdim=True))
    residual = residual.detach()
    if world.latent_size > 1:
        left = (residual - world.joined(pre @ dec)).square().sum()
    else:
        left = torch.addmm(residual, pre, dec, alpha=-1).square().sum()
    return left / world.total(residual.square().sum()).clamp_min(1e-30) * min(n_dead / k, 1.0)
