"""Scale-free training losses: shares of the data's variance, and of the residual, that are left unexplained."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["aux_k_loss", "reconstruction_loss"]


def reconstruction_loss(error: Float[Tensor, "tok d_in"], variance: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the mean squared error a token over the data's total variance a token: 1 for the mean as a guess.

    Divided by a variance, the loss and every coefficient beside it mean the same at any width and activation scale.
    """
    return error.square().sum() / (error.shape[0] * variance)


def aux_k_loss(
    residual: Float[Tensor, "tok d_out"],
    pre: Float[Tensor, "tok n_dead"],
    dec: Float[Tensor, "n_dead d_out"],
    k: int,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Float[Tensor, ""]:
    """Return the share of the residual that the k strongest dead latents of each token leave unexplained.

    AuxK of Gao et al. (arXiv:2406.04093), with three choices: the residual is detached (the live latents are not asked
    to leave something over), the decoder bias stays out (it is in the residual already), and the pre-activations are
    not rectified, so that a latent below zero on the whole batch still gets an encoder gradient. Scaled by the share of
    the k places that can be filled, so that a few dead latents do not shout. `total` adds up over processes: each
    returns its part.
    """
    n_dead = pre.shape[1]
    if n_dead > k:
        weakest = pre.detach().topk(k, sorted=False).values.amin(dim=1, keepdim=True)
        pre = pre * (pre.detach() >= weakest)
    residual = residual.detach()
    left = torch.addmm(residual, pre, dec, alpha=-1).square().sum()
    return left / total(residual.square().sum()).clamp_min(1e-30) * min(n_dead / k, 1.0)
