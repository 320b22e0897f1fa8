"""Sparse encode and decode with sparse gradients, and the dense reference that they are tested against.

One dense product per step finds the pre-activations. After it, decode, value gradients and both weight gradients touch
the active latents alone: some k of d_sae entries a token.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Active", "above", "active_from", "decode_active", "dense_forward", "encode_active", "largest"]


class Active(NamedTuple):
    """Where the active latents of a batch are, token by token."""

    flat: Int[Tensor, " n"]  # token * d_sae + latent, ascending
    cols: Int[Tensor, " n"]  # latent
    row_start: Int[Tensor, " tok1"]  # entries of token t: row_start[t] to row_start[t + 1]
    shape: tuple[int, int]  # tokens, d_sae


def active_from(flat: Int[Tensor, " n"], shape: tuple[int, int]) -> Active:
    """Return the pattern whose flattened positions, ascending, are given."""
    tokens, width = shape
    rows = torch.div(flat, width, rounding_mode="floor")
    return Active(flat, flat - rows * width, _starts(rows, tokens), shape)


def largest(pre: Float[Tensor, "tok d_sae"], n: int, guess: int | float = 0.0) -> Int[Tensor, " n_kept"]:
    """Return the flattened positions, ascending, of the n largest entries of a batch, among the positive ones.

    On the CPU this compares with a threshold and sorts the few survivors, which is exact whatever the guess: where too
    few survive it, it is lowered. guess is the smallest value kept in the batch before (0 where there is none). Fewer
    than n positions come back where fewer are positive; on other devices always n, in order not to wait for a count.
    """
    flat = pre.detach().flatten()
    if flat.device.type != "cpu":
        return torch.topk(flat, min(n, flat.numel()), sorted=False).indices.sort().values
    array = flat.numpy()  # numpy: torch's nonzero takes two to three times as long on a CPU (measured)
    at = np.flatnonzero(array > 0.95 * guess)
    if len(at) < n and guess > 0:
        at = np.flatnonzero(array > 0)
    if n == 0:
        at = at[:0]
    if len(at) > n:
        values = array[at]
        cut = np.partition(values, len(at) - n)[len(at) - n]
        above = values > cut
        ties = np.flatnonzero(values == cut)[: n - int(above.sum())]
        above[ties] = True
        at = at[above]
    return torch.from_numpy(at)


def above(pre: Float[Tensor, "tok d_sae"], threshold: Float[Tensor, " d_sae"]) -> Int[Tensor, " n_kept"]:
    """Return the flattened positions, ascending, of the entries that exceed their latent's threshold."""
    mask = (pre.detach() > threshold.detach()).flatten()
    if mask.device.type != "cpu":
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def encode_active(
    x: Float[Tensor, "tok d_in"],
    enc: Float[Tensor, "d_sae d_in"],
    enc_bias: Float[Tensor, " d_sae"],
    dec_bias: Float[Tensor, " d_in"],
    select: Callable[[Tensor], Int[Tensor, " n"]],
) -> tuple[Float[Tensor, " n"], Active]:
    """Return the values of the selected latents and their pattern.

    select maps pre-activations to ascending flattened positions; entries that are not positive get value and gradient
    0. Gradients reach enc, enc_bias and dec_bias, not x: the data is given.
    """
    with torch.no_grad():
        centred = x - dec_bias
        pre = torch.addmm(enc_bias, centred, enc.t())
        active = active_from(select(pre), (pre.shape[0], pre.shape[1]))
    return _ActiveValues.apply(enc, enc_bias, dec_bias, centred, pre, active), active  # type: ignore[return-value]


def decode_active(
    values: Float[Tensor, " n"], active: Active, dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "tok d_in"]:
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
        ctx: Any, enc: Tensor, enc_bias: Tensor, dec_bias: Tensor, centred: Tensor, pre: Tensor, active: Active
    ):
        values = F.relu(pre.view(-1)[active.flat])
        ctx.save_for_backward(enc, centred, values)
        ctx.active = active
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        enc, centred, values = ctx.saved_tensors
        active: Active = ctx.active
        slope = grads[0] * (values > 0)
        d_enc = _transposed_product(active, slope, centred)
        d_bias = enc.new_zeros(active.shape[1]).index_add_(0, active.cols, slope)
        # sum over tokens of dL/d(x - dec_bias), without a product over the batch
        return d_enc, d_bias, -(d_bias @ enc), None, None, None


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
    """Return A^T dense [d_sae, d_in], where A [tok, d_sae] holds the values at the active places."""
    width = active.shape[1]
    narrow = torch.int16 if width < 2**15 else torch.int32  # radix sort: a third of int64's time
    order = torch.sort(active.cols.to(narrow), stable=True).indices
    rows = torch.div(active.flat, width, rounding_mode="floor")[order]
    return _bags(dense, rows, _starts(active.cols, width), values[order])


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
