"""Several processes that train one SAE: each a part of the tokens, or each a part of the latents.

A World says what to add up over whom. With one process every method gives back what it is given.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "LatentParallel", "TokenParallel", "World", "join_world", "leave_world"]


class World:
    """The processes that train together; this one is alone."""

    size, rank = 1, 0
    token_size = 1
    """Processes that share the tokens of a batch out between them."""
    latent_size = 1
    """Processes that share the latents out between them."""

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of what the processes hold of a sum over tokens."""
        return tensor

    def latent_total(self, tensor: Tensor) -> Tensor:
        """Return the sum of what the processes hold of a sum over latents."""
        return tensor

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all processes, whose numbers may differ, in one list."""
        return values

    def gather_columns(self, values: Tensor) -> Tensor:
        """Return [tok, n] of all processes that share the latents side by side."""
        return values

    def joined(self, part: Tensor) -> Tensor:
        """Return the sum of reconstructions by the latents of each process; each gets the whole gradient."""
        return part

    def spread(self, parameter: Tensor) -> Tensor:
        """Return a parameter that each process uses for its own latents: its gradients are added up."""
        return parameter


ALONE = World()


class TokenParallel(World):
    """Data parallel: every process holds the whole SAE and sees its share of each batch."""

    def __init__(self) -> None:
        self.size = self.token_size = dist.get_world_size()
        self.rank = dist.get_rank()

    def total(self, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    def gather(self, values: Tensor) -> Tensor:
        return _gathered(values, self.size)


class LatentParallel(World):
    """Every process sees all tokens and holds its share of the latents."""

    def __init__(self) -> None:
        self.size = self.latent_size = dist.get_world_size()
        self.rank = dist.get_rank()

    def latent_total(self, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    def gather(self, values: Tensor) -> Tensor:
        return _gathered(values, self.size)

    def gather_columns(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, 1)

    def joined(self, part: Tensor) -> Tensor:
        return _Joined.apply(part)  # type: ignore[return-value]

    def spread(self, parameter: Tensor) -> Tensor:
        return _Spread.apply(parameter)  # type: ignore[return-value]

    def rows(self, n: int) -> slice:
        """Return which of n latents are this process's. Raises ValueError where they cannot be shared out evenly."""
        if n % self.size:
            raise ValueError(f"{n} latents cannot be shared out evenly over {self.size} processes")
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def whole(self, part: Tensor) -> Tensor:
        """Return a tensor of all latents, of which each process holds a part (a DTensor, sharded by rows)."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = init_device_mesh(part.device.type, (self.size,))
        return DTensor.from_local(part.detach().contiguous(), mesh, [Shard(0)]).full_tensor()


def join_world(share: str = "tokens") -> World:
    """Return the processes that torchrun started, ALONE where it started none: nccl with CUDA, gloo otherwise.

    share: "tokens" (data parallel) or "latents" (each process a part of the SAE, for wide ones).
    """
    if share not in ("tokens", "latents"):
        raise ValueError(f"processes share tokens or latents, not {share!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    return TokenParallel() if share == "tokens" else LatentParallel()


def leave_world() -> None:
    """Take leave of the other processes, if there are any, once all have come this far."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # a process that leaves while another still talks to it takes that one down
        dist.destroy_process_group()


def _summed(tensor: Tensor) -> Tensor:
    out = tensor.detach().clone()
    dist.all_reduce(out)
    return out


def _gathered(values: Tensor, size: int) -> Tensor:
    own = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(counts, own)
    most = max(int(count) for count in counts)
    padded = torch.zeros(most, dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor):
        return _summed(part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0]  # every process computes the same loss from the sum


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor):
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return _summed(grads[0])
