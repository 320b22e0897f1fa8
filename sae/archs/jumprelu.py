"""JumpReLU (arXiv:2407.14435): a threshold for each latent, learned through a straight-through window."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.archs.base import SAE, Batch, Pick
from sae.archs.relu import DENSE
from sae.config import SAEConfig, TrainConfig
from sae.kernels import above

__all__ = ["JumpReLU"]


class JumpReLU(SAE):
    """A latent is its pre-activation where that exceeds the latent's own threshold, else 0.

    The penalty is (L0 / k - 1)^2 on the batch: a target instead of a bare coefficient, which saturates under Adam.
    Thresholds stay float32, start where L0 is k, and are scaled together at the end so that L0 is k.
    """

    calibrated = True

    def __init__(self, config: SAEConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        del self.cut  # the base's buffer
        self.cut = nn.Parameter(torch.zeros(config.d_sae))
        self.bandwidth = 0.5

    def begin(self, pre: Float[Tensor, "tok d_sae"], cfg: TrainConfig) -> None:
        """Start every threshold where k latents a token exceed it."""
        self.bandwidth = float(cfg.bandwidth)
        if self.config.k is not None:
            self.cut.data.fill_(max(1e-6, self.exceeded(pre, self.config.k)))

    def select(self, pre: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " n"] | None:
        """Return the positions above the lower end of each threshold's window: what has a value, or moves one."""
        if pre.device.type != "cpu":
            return None
        flat = above(pre, (self.cut - self.bandwidth / 2).clamp_min(0))
        return None if len(flat) > DENSE * pre.numel() else flat

    def values(self, raw: Float[Tensor, "*entries"], pick: Pick) -> Float[Tensor, "*entries"]:
        """Return the pre-activations that exceed their thresholds, 0 for the others."""
        return _Jump.apply(raw, pick(self.cut), self.bandwidth)  # type: ignore[return-value]

    def penalty(self, batch: Batch, cfg: TrainConfig) -> Float[Tensor, ""]:
        """Return this process's share of weight * (L0 / k - 1)^2."""
        assert self.config.k is not None
        steps: Tensor = _Step.apply(batch.raw, batch.pick(self.cut), self.bandwidth)  # type: ignore[assignment]
        count = steps.sum() / (batch.n_tokens * self.config.k)
        # over all processes the value is (sum count - 1)^2, and each one's gradient 2 (sum count - 1) d count
        whole = batch.world.latent_total(batch.world.total(count.detach()))
        weight = 1.0 if cfg.sparsity is None else cfg.sparsity
        return weight * (2 * (whole - 1) * (count - count.detach()) + (whole - 1).square() / batch.world.size)

    def project(self) -> None:
        """Keep thresholds at zero or above."""
        self.cut.data.clamp_min_(0)

    def _level(self, pre: Tensor) -> Tensor:
        # where a threshold is 0, a latent below it stays inactive at any common factor
        return pre / self.cut.detach().clamp_min(1e-6)

    def _set_level(self, cut: float) -> None:
        self.cut.data.clamp_min_(1e-6).mul_(cut)


class _Jump(torch.autograd.Function):
    """x where x > threshold: d threshold = -(threshold / width) [|x - threshold| < width / 2] (eq. 11)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, width: float):
        ctx.save_for_backward(x, threshold)
        ctx.width = width
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.width / 2) * (-threshold / ctx.width) * grads[0]
        return grads[0] * (x > threshold), near if near.shape == threshold.shape else near.sum(0), None


class _Step(torch.autograd.Function):
    """1 where x > threshold: d threshold = -(1 / width) [|x - threshold| < width / 2] (eq. 12); x gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, width: float):
        ctx.save_for_backward(x, threshold)
        ctx.width = width
        return (x > threshold).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.width / 2) * (-1 / ctx.width) * grads[0]
        return None, near if near.shape == threshold.shape else near.sum(0), None
