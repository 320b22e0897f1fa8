"""Sparse kernels against sorting, autograd and loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.archs import build
from sae.kernels import (
    active_from,
    by_level,
    decode_active,
    dense_forward,
    encode_active,
    largest,
    largest_in_rows,
)

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
            raw, active = encode_active(x, enc, enc_bias, dec_bias, select)
            recon = decode_active(torch.relu(raw), active, dec) + dec_bias
        else:
            recon = dense_forward(x, enc, enc_bias, dec, dec_bias, select)
        error = (recon - x).square() if loss == "square" else (recon - x).abs() ** 3
        error.sum().backward()
        results.append([recon, enc.grad, enc_bias.grad, dec_bias.grad, dec.grad])
    for ours, reference in zip(*results, strict=True):
        assert float(reference.detach().abs().max()) > 0.1  # the comparison is of something
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-8)


def test_selected_entries_that_are_not_positive_carry_neither_value_nor_gradient():
    x = build("batchtopk", d_in=D, d_sae=M, k=K)
    with torch.no_grad():
        x.enc_bias.sub_(100)
    rows = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    raw, active = encode_active(rows, x.enc, x.enc_bias, x.dec_bias, lambda pre: torch.arange(0, pre.numel(), 7))
    assert active is not None and float(raw.detach().max()) < 0
    values = x.values(raw, lambda parameter: parameter[active.cols])
    decode_active(values, active, x.dec).sum().backward()
    assert float(values.detach().abs().max()) == 0 and float(x.enc.grad.abs().max()) == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30), k=st.integers(1, 20), width=st.sampled_from([40, 512, 1024]), coarse=st.booleans())
def test_selection_by_groups_keeps_what_a_top_k_of_each_row_keeps(seed, k, width, coarse):
    pre = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    if coarse:  # many ties
        pre = pre.round()
    kept = largest_in_rows(pre, k)
    assert len(kept) == 6 * k and bool((kept.diff() > 0).all())
    assert (kept // width).tolist() == [row for row in range(6) for _ in range(k)]
    wanted = pre.topk(k, dim=1).values.sort(dim=1).values
    assert torch.equal(pre.flatten()[kept].view(6, k).sort(dim=1).values, wanted)


def test_rows_of_equal_numbers_have_a_top_k_too():
    assert len(largest_in_rows(torch.zeros(4, 1024), 16)) == 64


def test_a_product_in_bfloat16_chooses_and_the_values_stay_exact():
    enc, enc_bias, dec_bias, _ = (w.float().requires_grad_() for w in weights(5))
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    whole = torch.addmm(enc_bias, x - dec_bias, enc.t())
    raw, active = encode_active(x, enc, enc_bias, dec_bias, lambda pre: largest(pre, B * K), half=True)
    assert active is not None
    torch.testing.assert_close(raw, whole.flatten()[active.flat], rtol=1e-5, atol=1e-5)
    chosen = set(active.flat.tolist())
    assert len(chosen & set(largest(whole, B * K).tolist())) > 0.97 * B * K  # near ties may fall otherwise
    wanted = torch.autograd.grad(whole.flatten()[active.flat].square().sum(), [enc, enc_bias, dec_bias])
    for ours, reference in zip(torch.autograd.grad(raw.square().sum(), [enc, enc_bias, dec_bias]), wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [(40,), (5, 40), (1, 2, 20, 39, 40)])
def test_nested_prefixes_by_one_sparse_product_are_products_of_the_prefixes(levels):
    enc, enc_bias, dec_bias, dec = (w.clone().requires_grad_() for w in weights(4))
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = []
    weight = torch.randn(B, len(levels), D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for sparse in (True, False):
        raw, active = encode_active(x, enc, enc_bias, dec_bias, lambda pre: largest(pre, B * K))
        assert active is not None
        if sparse:
            parts = decode_active(raw, by_level(active, levels), dec).view(B, len(levels), D).cumsum(1)
        else:
            dense = torch.zeros(B * M, dtype=torch.float64).index_put((active.flat,), raw).view(B, M)
            parts = torch.stack([dense[:, :level] @ dec[:level] for level in levels], 1)
        grads.append([parts.detach(), *torch.autograd.grad((parts * weight).sum(), [enc, enc_bias, dec_bias, dec])])
    for ours, reference in zip(*grads, strict=True):
        assert float(reference.abs().max()) > 0.1
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


def test_tokens_and_latents_without_a_single_active_entry_are_zero():
    flat = torch.tensor([2, 3, 11])  # tokens 0 and 2 of 4; latents 2, 3 of 4 (twice 3)
    active = active_from(flat, (4, 4))
    dec = torch.eye(4).requires_grad_()
    recon = decode_active(torch.tensor([1.0, 2.0, 5.0]), active, dec)
    assert recon.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]]
    recon.sum().backward()
    assert dec.grad.sum(1).tolist() == [0, 0, 4, 28]
