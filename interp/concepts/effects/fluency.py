"""How fluent new text is: its loss under the model as it is, and how much of it repeats itself.

Read them together: text that repeats itself has a low loss.
"""

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.concepts.effects.writing import rows_at_once
from interp.model.loading import as_model
from interp.model.tokens import TokenBatch

__all__ = ["distinct2", "distinct2_rows", "fluency", "longest_repeat", "nll_rows", "zlib_ratio"]


def fluency(model: Any, batch: TokenBatch, new: Int[Tensor, "rows new"], real: Bool[Tensor, "rows new"]) -> float:
    """Return the mean loss of new tokens after left-padded prompts under the model as it is, in nats a token.

    Low for text that repeats itself: read it beside distinct2. Raises ValueError where there is no new token.
    """
    if not bool(real.any()):
        raise ValueError("no token was generated: its loss does not exist")
    return float(_sums(model, batch, new, real).sum()) / int(real.sum())


def nll_rows(
    model: Any, batch: TokenBatch, new: Int[Tensor, "rows new"], real: Bool[Tensor, "rows new"]
) -> Float[np.ndarray, " rows"]:
    """Return the mean loss of each row's new tokens under the model as it is, in nats a token.

    Raises ValueError where a row has no new token.
    """
    if not bool(real.any(1).all()):
        raise ValueError("a row has no new token: its loss does not exist")
    return (_sums(model, batch, new, real) / real.sum(1)).numpy()


def _sums(
    model: Any, batch: TokenBatch, new: Int[Tensor, "rows new"], real: Bool[Tensor, "rows new"]
) -> Float[Tensor, " rows"]:
    """Return the summed loss of each row's new tokens, float64."""
    model = as_model(model)
    width = batch.ids.shape[1]
    sums = torch.zeros(len(new), dtype=torch.float64)
    for rows in torch.arange(len(new)).split(rows_at_once(model, width + new.shape[1])):
        ids = torch.cat([batch.ids[rows], new[rows]], 1)
        mask = torch.cat([batch.mask[rows], real[rows]], 1)
        logp = model.logits(ids, mask)[:, width - 1 : -1].float().log_softmax(-1).cpu()
        chosen = logp.gather(2, new[rows][..., None])[..., 0].double()
        sums[rows] = -torch.where(real[rows], chosen, 0.0).sum(1)
    return sums


def distinct2(new: Int[Tensor, "rows new"], real: Bool[Tensor, "rows new"]) -> float:
    """Return the share of distinct pairs of neighbouring tokens a row, mean over the rows that have a pair.

    1 where nothing repeats. Raises ValueError where no row has two tokens.
    """
    shares = distinct2_rows(new, real)
    paired = shares[(real.sum(1) > 1).numpy()]
    if not len(paired):
        raise ValueError("no row has two tokens: it has no pair to repeat")
    return float(paired.mean())


def distinct2_rows(new: Int[Tensor, "rows new"], real: Bool[Tensor, "rows new"]) -> Float[np.ndarray, " rows"]:
    """Return the share of distinct pairs of neighbouring tokens of each row; 1 for a row without a pair."""
    shares = np.ones(len(new))
    for i, (row, keep) in enumerate(zip(new, real, strict=True)):
        pairs = list(pairwise(row[keep].tolist()))
        if pairs:
            shares[i] = len(set(pairs)) / len(pairs)
    return shares


def longest_repeat(tokens: Sequence[int]) -> int:
    """Return the length in tokens of the longest run that stands in a sequence twice; the two may overlap.

    0 where every token is another; n - 1 for n times the same token.
    """
    longest, before = 0, [0] * (len(tokens) + 1)
    for i, token in enumerate(tokens):
        now = [0] * (len(tokens) + 1)
        for j in range(i):  # now[j + 1]: how long the run is that ends at both i and j
            if tokens[j] == token:
                now[j + 1] = before[j] + 1
        longest, before = max(longest, *now), now
    return longest


def zlib_ratio(text: str) -> float:
    """Return compressed bytes over bytes of a text (UTF-8, zlib level 9): low where it repeats itself.

    Above 1 for texts of a few words, so compare it only between texts alike in length. Raises ValueError for "".
    """
    data = text.encode("utf-8", "surrogatepass")
    if not data:
        raise ValueError("an empty text does not compress")
    return len(zlib.compress(data, 9)) / len(data)
