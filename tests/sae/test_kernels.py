"""Sparse kernels against sorting, autograd and loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.kernels import active_from, decode_active, dense_forward, encode_active, largest

B, D, M, K = 48, 12, 40, 4


def weights(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(M, D), (M,), (D,), (M, D)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) / 3 for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30), n=st.integers(0, 70), guess=st.floats(0, 3), coarse=st.booleans())
def test_threshold_selection_keeps_what_a_full_sort_keeps(oracles, seed, n, guess, coarse):
    pre = torch.randn(8, 9, generator=torch.Generator().manual_seed(seed))
    if coarse:  # many ties
        pre = pre.round()
    kept = largest(pre, n, guess).numpy()
    wanted = oracles.batch_top_k(pre.numpy(), n)
    assert len(kept) == wanted.sum() and (np.diff(kept) > 0).all()
    assert sorted(pre.flatten()[kept].tolist()) == sorted(pre.numpy()[wanted].tolist())


@pytest.mark.parametrize("loss", ["square", "cubic"])
def test_sparse_values_and_gradients_equal_autograd_through_dense_products(loss):
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def select(pre):
        return largest(pre, B * K)

    results = []
    for sparse in (True, False):
        enc, enc_bias, dec_bias, dec = (w.clone().requires_grad_() for w in weights(2))
        if sparse:
            values, active = encode_active(x, enc, enc_bias, dec_bias, select)
            recon = decode_active(values, active, dec) + dec_bias
        else:
            recon = dense_forward(x, enc, enc_bias, dec, dec_bias, select)
        error = (recon - x).square() if loss == "square" else (recon - x).abs() ** 3
        error.sum().backward()
        results.append([recon, enc.grad, enc_bias.grad, dec_bias.grad, dec.grad])
    for ours, reference in zip(*results, strict=True):
        assert float(reference.detach().abs().max()) > 0.1  # the comparison is of something
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-8)


def test_selected_entries_that_are_not_positive_carry_neither_value_nor_gradient():
    enc, enc_bias, dec_bias, dec = (w.clone().requires_grad_() for w in weights(3))
    x = torch.randn(B, D, dtype=torch.float64)
    values, active = encode_active(x, enc, enc_bias - 100, dec_bias, lambda pre: torch.arange(0, pre.numel(), 7))
    decode_active(values, active, dec).sum().backward()
    assert float(values.detach().abs().max()) == 0 and float(enc.grad.abs().max()) == 0


def test_tokens_and_latents_without_a_single_active_entry_are_zero():
    flat = torch.tensor([2, 3, 11])  # tokens 0 and 2 of 4; latents 2, 3 of 4 (twice 3)
    active = active_from(flat, (4, 4))
    dec = torch.eye(4).requires_grad_()
    recon = decode_active(torch.tensor([1.0, 2.0, 5.0]), active, dec)
    assert recon.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]]
    recon.sum().backward()
    assert dec.grad.sum(1).tolist() == [0, 0, 4, 28]
