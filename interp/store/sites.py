"""Batches of several hook points, of a store or a stream, as what transcoders and crosscoders learn from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.model.hooks import canonical_name, unknown_hook
from sae.data import Feed

__all__ = ["paired", "stacked"]


def paired(batches: Feed, x: str, y: str) -> Feed:
    """Return batches of several hook points as pairs for a transcoder: what it reads, [tok, d], and what it predicts.

    Of a stream or a store. Raises, when a batch is read, HookPointError for a hook point that they do not have.
    """
    return _Made(batches, lambda batch: (_of(batch, x), _of(batch, y)))


def stacked(batches: Feed, names: Sequence[str] | None = None) -> Feed:
    """Return batches of several hook points of one width as those of a crosscoder, [tok, n_sites, d].

    Sites are in the order of `names`, that of the batches unless given. Of a stream or a store. Raises, when a batch is
    read, HookPointError for a hook point that they do not have and ValueError for different widths.
    """

    def make(batch: Mapping[str, Tensor]) -> Tensor:
        chosen = {name: _of(batch, name) for name in (batch if names is None else names)}
        widths = {name: rows.shape[1] for name, rows in chosen.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"sites of a crosscoder are equally wide; these are {widths}")
        return torch.stack(list(chosen.values()), 1)

    return _Made(batches, make)


def _of(batch: Mapping[str, Tensor], hook: str) -> Tensor:
    name = hook if hook in batch else canonical_name(hook) or hook
    if name not in batch:
        raise unknown_hook("a batch", hook, batch)
    return batch[name]


class _Made:
    """Batches made of other batches, with their position."""

    def __init__(self, batches: Feed, make: Callable[[Mapping[str, Tensor]], Any]) -> None:
        self._batches, self._make = batches, make

    def state(self) -> dict[str, Any]:
        return self._batches.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batches.restore(state)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if not isinstance(batch, Mapping):
                raise ValueError("these batches are of one hook point; ask for several: batches(n, [hook, hook])")
            yield self._make(batch)
