"""Several processes that train one SAE: what they add up, and how its latents are shared out."""

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["ALONE", "World"]


@runtime_checkable
class World(Protocol):
    """The processes that train together."""

    size: int
    rank: int

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all processes, whose numbers may differ, in one list."""
        ...


class _Alone:
    size, rank = 1, 0

    def total(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, values: Tensor) -> Tensor:
        return values


ALONE: World = _Alone()
