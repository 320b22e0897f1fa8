"""Sparse encode and decode with sparse gradients, and the dense reference that they are tested against.

One dense product per step finds the pre-activations. After it, decode, value gradients and both weight gradients touch
the active latents alone: some k of d_sae entries a token.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "Active",
    "above",
    "active_from",
    "by_level",
    "decode_active",
    "dense_forward",
    "encode_active",
    "largest",
    "largest_in_rows",
]


@dataclass(frozen=True, eq=False)
class Active:
    """Where the active latents of a batch are, token by token."""

    flat: Int[Tensor, " n"]  # row * d_sae + latent, ascending
    cols: Int[Tensor, " n"]  # latent
    row_start: Int[Tensor, " rows1"]  # entries of row t: row_start[t] to row_start[t + 1]
    shape: tuple[int, int]  # rows (tokens, or tokens x levels), d_sae

    @property
    def rows(self) -> Int[Tensor, " n"]:
        """Row of each entry."""
        return torch.div(self.flat, self.shape[1], rounding_mode="floor")

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " cols1"]]:
        """The order that sorts the entries by latent, and where each latent begins in it."""
        narrow = torch.int16 if self.shape[1] < 2**15 else torch.int32  # radix sort: a third of int64's time
        return torch.sort(self.cols.to(narrow), stable=True).indices, _starts(self.cols, self.shape[1])


def active_from(flat: Int[Tensor, " n"], shape: tuple[int, int]) -> Active:
    """Return the pattern whose flattened positions, ascending, are given."""
    tokens, width = shape
    rows = torch.div(flat, width, rounding_mode="floor")
    return Active(flat, flat - rows * width, _starts(rows, tokens), shape)


def by_level(active: Active, levels: Sequence[int], first: int = 0) -> Active:
    """Return the pattern with one row a token and level: the latents of a level that no level before it has.

    The entries keep their order, so values that belong to `active` belong to the result. `first` is the number of the
    pattern's first latent, where it holds a part of them.
    """
    tokens, width = active.shape
    ends = torch.tensor(levels[:-1], device=active.cols.device)
    row = active.rows * len(levels) + torch.bucketize(active.cols + first, ends, right=True)
    shape = (tokens * len(levels), width)
    nested = Active(row * width + active.cols, active.cols, _starts(row, shape[0]), shape)
    nested.__dict__["by_latent"] = active.by_latent  # the same entries in the same order: sorted once
    return nested


def largest(
    pre: Float[Tensor, "tok d_sae"],
    n: int,
    guess: int | float = 0.0,
    gather: Callable[[Float[Tensor, " _"]], Float[Tensor, " _"]] | None = None,
) -> Int[Tensor, " n_kept"]:
    """Return the flattened positions, ascending, of the n largest entries of a batch, among the positive ones.

    On the CPU this compares with a threshold and partitions the few survivors, which is exact whatever the guess: where
    too few survive it, it is lowered. guess is the smallest value kept in the batch before (0 where there is none).
    Fewer than n positions come back where fewer are positive; on other devices always n, in order not to wait for a
    count. With gather, which returns the values of all processes, n counts over all of them.
    """
    flat = pre.detach().flatten()
    if flat.device.type != "cpu":
        return _largest_anywhere(flat, n, gather)
    at = _exceeding(flat, 0.95 * guess)
    values = flat[at]
    everywhere = values if gather is None else gather(values)
    if len(everywhere) < n and guess > 0:
        at = _exceeding(flat, 0.0)
        values = flat[at]
        everywhere = values if gather is None else gather(values)
    if n == 0:
        return at[:0]
    if len(everywhere) <= n:
        return at
    held = everywhere.numpy()
    cut = np.partition(held, len(held) - n)[len(held) - n]
    above = values.numpy() > cut
    if gather is None:
        ties = np.flatnonzero(values.numpy() == cut)[: n - int(above.sum())]
        above[ties] = True
    else:  # which process may keep a tie is nobody's to say: all of them keep it
        above |= values.numpy() == cut
    return at[torch.from_numpy(above)]


def _largest_anywhere(flat: Tensor, n: int, gather: Callable[[Tensor], Tensor] | None) -> Tensor:
    top = torch.topk(flat, min(n, flat.numel()), sorted=False)
    if gather is None:
        return top.indices.sort().values
    everywhere = gather(top.values)
    cut = torch.topk(everywhere, min(n, everywhere.numel()), sorted=False).values.amin()
    return top.indices[top.values >= cut].sort().values


def largest_in_rows(pre: Float[Tensor, "tok d_sae"], k: int) -> Int[Tensor, " n_kept"]:
    """Return the flattened positions, ascending, of the k largest entries of each row; k times tok of them.

    On the CPU through the maxima of groups of columns: the k-th largest maximum is a bound that k entries reach, and
    few more do; only those are sorted. Exact, at a third to a half of the time of a top-k over whole rows.
    """
    pre = pre.detach()
    tokens, width = pre.shape
    groups = 1 << max(6, (4 * k - 1).bit_length())
    if pre.device.type != "cpu" or width % groups or width < 4 * groups:
        cols = torch.topk(pre, k, dim=1, sorted=False).indices
    else:
        maxima = pre.view(tokens, width // groups, groups).amax(1)
        bound = maxima.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        at = _nonzero(pre >= bound)
        counts = _starts(torch.div(at, width, rounding_mode="floor"), tokens)
        fewest, most = (int(value) for value in torch.aminmax(counts.diff()))
        if fewest < k or most > 8 * k:  # rows with nan, which exceeds nothing; rows of equal numbers
            cols = torch.topk(pre, k, dim=1, sorted=False).indices
        else:
            slot = counts[:-1, None] + torch.arange(most)
            filled = slot < counts[1:, None]
            candidates = at[slot.clamp_max(len(at) - 1)]
            values = pre.view(-1)[candidates].masked_fill_(~filled, -torch.inf)
            picked = candidates.gather(1, values.topk(k, dim=1, sorted=False).indices)
            return picked.sort(dim=1).values.flatten()
    return (cols.sort(dim=1).values + torch.arange(tokens, device=cols.device)[:, None] * width).flatten()


def above(pre: Float[Tensor, "tok d_sae"], threshold: Float[Tensor, " d_sae"]) -> Int[Tensor, " n_kept"]:
    """Return the flattened positions, ascending, of the entries that exceed their latent's threshold."""
    return _nonzero(pre.detach() > threshold.detach())


def _exceeding(flat: Tensor, bound: float) -> Tensor:
    return _nonzero(flat > bound)


def _nonzero(mask: Tensor) -> Tensor:
    flat = mask.flatten()
    if flat.device.type != "cpu":
        return flat.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(flat.numpy()))  # torch's takes two to four times as long on a CPU (measured)


def encode_active(
    x: Float[Tensor, "tok d_in"],
    enc: Float[Tensor, "d_sae d_in"],
    enc_bias: Float[Tensor, " d_sae"],
    dec_bias: Float[Tensor, " d_in"] | None,
    select: Callable[[Tensor], Int[Tensor, " n"] | None],
    *,
    half: bool = False,
) -> tuple[Float[Tensor, "..."], Active | None]:
    """Return the pre-activations of the selected latents and their pattern.

    select maps all pre-activations to ascending flattened positions, or to None where so many are wanted that dense
    products are faster: then all of them are returned. dec_bias is taken from x first, unless it is None. Gradients
    reach enc, enc_bias and dec_bias, not x: the data is given. With half the product that selects is in bfloat16; the
    values of what is selected are computed anew in the weights' precision.
    """
    with torch.no_grad():
        centred = x if dec_bias is None else x - dec_bias
        if half:
            pre = (centred.bfloat16() @ enc.bfloat16().t()).to(enc.dtype).add_(enc_bias)
        else:
            pre = torch.addmm(enc_bias, centred, enc.t())
        flat = select(pre)
        if flat is not None:
            active = active_from(flat, (pre.shape[0], pre.shape[1]))
            raw = _sampled_product(active, centred, enc) + enc_bias[active.cols] if half else pre.view(-1)[flat]
    if flat is None:
        return F.linear(x if dec_bias is None else x - dec_bias, enc, enc_bias), None
    return _ActiveValues.apply(enc, enc_bias, dec_bias, centred, raw, active), active  # type: ignore[return-value]


def decode_active(
    values: Float[Tensor, " n"], active: Active, dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "rows d_out"]:
    """Return the sum of the active decoder rows, each times its value: the reconstruction without its bias."""
    return _ActiveDecode.apply(values, dec, active)  # type: ignore[return-value]


def dense_forward(
    x: Float[Tensor, "tok d_in"],
    enc: Float[Tensor, "d_sae d_in"],
    enc_bias: Float[Tensor, " d_sae"],
    dec: Float[Tensor, "d_sae d_in"],
    dec_bias: Float[Tensor, " d_in"],
    select: Callable[[Tensor], Int[Tensor, " n"]],
) -> Float[Tensor, "tok d_in"]:
    """Return the reconstruction by dense products and autograd alone: the reference of the two functions above."""
    pre = (x - dec_bias) @ enc.t() + enc_bias
    mask = torch.zeros_like(pre).flatten()
    mask[select(pre)] = 1
    return (F.relu(pre) * mask.view_as(pre)) @ dec + dec_bias


class _ActiveValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, enc: Tensor, enc_bias: Tensor, dec_bias: Tensor | None, centred: Tensor, raw: Tensor, active: Active
    ):
        ctx.save_for_backward(enc, centred)
        ctx.active, ctx.biased = active, dec_bias is not None
        return raw

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        enc, centred = ctx.saved_tensors
        active: Active = ctx.active
        d_enc = _transposed_product(active, grads[0], centred)
        d_bias = enc.new_zeros(active.shape[1]).index_add_(0, active.cols, grads[0])
        # sum over tokens of dL/d(x - dec_bias), without a product over the batch
        d_dec_bias = -(d_bias @ enc) if ctx.biased else None
        return d_enc, d_bias, d_dec_bias, None, None, None


class _ActiveDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dec: Tensor, active: Active):
        ctx.save_for_backward(values, dec)
        ctx.active = active
        return _bags(dec, active.cols, active.row_start, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        values, dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        return _sampled_product(ctx.active, grad, dec), _transposed_product(ctx.active, values, grad), None


def _starts(groups: Tensor, count: int) -> Tensor:
    """Return where each group begins in a list that is sorted by group, and where the last ends."""
    starts = torch.zeros(count + 1, dtype=torch.int64, device=groups.device)
    ones = torch.ones_like(groups)
    return starts.index_add_(0, groups + 1, ones).cumsum_(0)


def _bags(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return sum over entries e of bag b of weights[e] * table[rows[e]]: a CSR product, at embedding_bag's speed."""
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _transposed_product(active: Active, values: Tensor, dense: Tensor) -> Tensor:
    """Return A^T dense [d_sae, d_in], where A [rows, d_sae] holds the values at the active places."""
    order, starts = active.by_latent
    return _bags(dense, active.rows[order], starts, values[order])


def _sampled_product(active: Active, left: Tensor, right: Tensor) -> Tensor:
    """Return left[token] . right[latent] at the active places."""
    if left.device.type == "cpu" and not torch.backends.mkl.is_available():
        return (left @ right.t()).view(-1)[active.flat]
    pattern = torch.sparse_csr_tensor(
        active.row_start, active.cols, torch.zeros_like(active.cols, dtype=left.dtype), active.shape,
        check_invariants=False,
    )  # fmt: skip
    return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()


with warnings.catch_warnings():
    # torch says once a process that CSR is in beta; said here, to nobody, rather than in a user's first step
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)
