"""Sources of activation batches: arrays in memory or on disk, shuffled by epoch; iterables, cut to one batch size."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from sae.extras import MissingError
from sae.io import FormatError, load_tensors

__all__ = ["held_out_mask", "load_array", "rebatched", "shuffled"]


def load_array(source: "Tensor | np.ndarray | str | Path") -> Shaped[Tensor, "tok d_in"]:
    """Return activations [tok, d_in] from a tensor, an array, a .npy file or a .safetensors file with one 2-D tensor.

    Raises MissingError for an absent file, FormatError for a file that is something else, ValueError for rows that are
    not there or not finite.
    """
    if isinstance(source, str | Path):
        rows = _load_file(Path(source))
    else:
        rows = torch.from_numpy(source) if isinstance(source, np.ndarray) else source
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"activations are rows [tok, d_in]; given: shape {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"activations are floating-point numbers; given: {rows.dtype}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the activations hold nan or infinity; drop those rows first")
    return rows.detach()


def held_out_mask(n_rows: int, *, share: float = 0.05, stripe: int = 256) -> Bool[Tensor, " tok"]:
    """Return which rows are kept out of training: stripes of neighbouring rows, spread evenly, at most 65,536 rows.

    Neighbours mostly belong to one document, so that stripes hold what training has not seen; single rows would not.
    """
    count = max(1, min(65_536, int(n_rows * share)) // stripe)
    mask = torch.zeros(n_rows, dtype=torch.bool)
    if n_rows >= stripe / share:
        for begin in torch.linspace(0, n_rows - stripe, count).long().tolist():
            mask[begin : begin + stripe] = True
    return mask


def shuffled(
    rows: Shaped[Tensor, "tok d_in"], batch_size: int, generator: torch.Generator
) -> Iterator[Shaped[Tensor, "batch d_in"]]:
    """Yield batches without end: each epoch a fresh order of all rows, batches running over the seam of two epochs."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(len(rows), generator=generator)])
        pick, left = left[:batch_size], left[batch_size:]
        yield rows[pick.to(rows.device)]


def rebatched(batches: Iterable[Tensor], batch_size: int) -> Iterator[Shaped[Tensor, "batch d_in"]]:
    """Yield the rows of an iterable, in order, in batches of one size; a rest at the end stays out.

    An iterable that can be read again (a list, a loader; not a generator) is, as often as asked for.
    """
    held: list[Tensor] = []
    count = 0
    while True:
        seen = 0
        for batch in batches:
            if batch.ndim != 2:
                raise ValueError(f"a batch is [tok, d_in]; given: shape {tuple(batch.shape)}")
            held.append(batch)
            count, seen = count + len(batch), seen + len(batch)
            if count >= batch_size:
                *whole, rest = torch.cat(held).split(batch_size)
                if len(rest) == batch_size:
                    whole, rest = [*whole, rest], rest[:0]
                held, count = [rest], len(rest)
                yield from whole
        if seen == 0 or iter(batches) is batches:
            return


def _load_file(path: Path) -> Tensor:
    if path.suffix == ".safetensors":
        tables = [t for t in load_tensors(path)[0].values() if t.ndim == 2]
        if len(tables) != 1:
            raise FormatError(f"{path} holds {len(tables)} tables; a source of activations holds exactly one")
        return tables[0]
    if path.suffix != ".npy":
        raise ValueError(f"{path} is neither .npy nor .safetensors: other files are not read as activations")
    if not path.is_file():
        raise MissingError(f"there is no file {path}")
    try:
        array: Any = np.load(path, allow_pickle=False, mmap_mode="r")
        return torch.from_numpy(np.array(array))
    except (ValueError, TypeError, EOFError, OSError, SyntaxError, MemoryError) as error:
        raise FormatError(f"{path} is not a sound .npy file: {error}") from error
