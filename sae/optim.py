"""Fused Adam with a warm-up, a linear tail, and decoder rows that stay on the unit sphere."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import TrainConfig
from sae.dist import ALONE, World

__all__ = ["Optimiser", "lr_share", "remove_parallel"]


def lr_share(step: int, cfg: TrainConfig) -> float:
    """Return the share of the peak learning rate at a step (from 0): linear rise, plateau, linear fall to 0."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    fall = max(1, round(cfg.decay * cfg.steps))
    return max(0.0, min(1.0, (step + 1) / rise, (cfg.steps - step) / fall))


@torch.no_grad()
def remove_parallel(grad: Float[Tensor, "d_sae d_in"], dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Take from each row of the gradient, in place, what would only change the length of that (unit) decoder row."""
    along = (grad * dec).sum(1, keepdim=True)
    grad.addcmul_(along, dec, value=-1)


class Optimiser:
    """One step of Adam for the weights of an SAE whose decoder rows have unit norm."""

    def __init__(self, parameters: list[torch.nn.Parameter], dec: torch.nn.Parameter, cfg: TrainConfig) -> None:
        self.cfg, self.dec, self.parameters = cfg, dec, parameters
        assert cfg.lr is not None, "resolve() the config first"
        self.adam = torch.optim.Adam(parameters, lr=cfg.lr, betas=cfg.betas, fused=True)

    def step(self, index: int, world: World = ALONE) -> float:
        """Apply the gradients that are there, as step number index; return the learning rate that was used."""
        assert self.dec.grad is not None and self.cfg.lr is not None
        lr = self.cfg.lr * lr_share(index, self.cfg)
        if world.token_size > 1:
            for parameter in self.parameters:
                parameter.grad = world.total(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        remove_parallel(self.dec.grad, self.dec)
        if world.latent_size > 1:
            self._clip(world)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.clip, foreach=True)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.dec.div_(self.dec.norm(dim=1, keepdim=True))
        return lr

    def _clip(self, world: World) -> None:
        """Clip by the norm of the gradient of all processes: what each latent has once, what all share once."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        own = [p.grad.square().sum() for p in self.parameters if p.grad is not None and len(p) == len(self.dec)]
        shared = [p.grad.square().sum() for p in self.parameters if p.grad is not None and len(p) != len(self.dec)]
        norm = (world.latent_total(torch.stack(own).sum()) + torch.stack(shared).sum()).sqrt()
        for grad in grads:
            grad.mul_((self.cfg.clip / (norm + 1e-6)).clamp_max(1.0))

    def state(self) -> dict[str, Tensor]:
        """Return Adam's moments and step counts by name; empty before the first step."""
        return {
            f"{number}.{name}": value
            for number, parameter in enumerate(self.parameters)
            for name, value in self.adam.state.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over moments and step counts."""
        for name, value in state.items():
            number, _, key = name.partition(".")
            parameter = self.parameters[int(number)]
            device = parameter.device if key != "step" or parameter.device.type != "cpu" else value.device
            self.adam.state[parameter][key] = value.to(device).clone()
