import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.concepts.finders import METHODS, fit_direction, mean_difference


def planted(n, d, effect, nuisance, seed):
    """Pairs that differ by effect * u, unit noise, and a large random amount along another axis."""
    rng = np.random.default_rng(seed)
    u, w = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    base = rng.normal(size=(n, d)) * 2
    difference = effect * u + rng.normal(size=(n, d)) + nuisance * rng.normal(size=(n, 1)) * w
    return np.concatenate([base, base + difference]), np.repeat([0, 1], n), u


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_recovers_a_planted_direction_in_noise_and_nuisance(method):
    X, y, u = planted(256, 256, 10.0, 5.0, seed=3)
    found = fit_direction(X, y, method=method)
    assert float(found.vector @ torch.from_numpy(u).float()) > 0.95
    assert found.negative < found.positive


@pytest.mark.parametrize("method", sorted(METHODS))
def test_swapping_the_labels_turns_the_direction_round(method):
    X, y, _ = planted(40, 16, 3.0, 1.0, seed=1)
    there, back = fit_direction(X, y, method=method), fit_direction(X, 1 - y, method=method)
    assert torch.allclose(there.vector, -back.vector, atol=1e-6)


def test_the_mean_difference_is_exact_and_in_raw_units():
    X = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 7.0], [5.0, 9.0], [5.0, 11.0]])
    assert mean_difference(X, [0, 0, 1, 1, 1]).tolist() == [4.0, 8.0]
    found = fit_direction(X, [False, False, True, True, True])
    assert found.scale == pytest.approx(80**0.5) and found.vector.tolist() == pytest.approx([0.2**0.5, 0.8**0.5])
    assert found.positive - found.negative == pytest.approx(80**0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_do_not_drift_in_low_precision(dtype):
    rng = torch.Generator().manual_seed(0)
    X = (100 + torch.randn(20_000, 4, generator=rng)).to(dtype)
    y = np.tile([0, 1], 10_000)
    expected = X.double()[1::2].mean(0) - X.double()[0::2].mean(0)
    assert torch.allclose(mean_difference(X, y), expected, atol=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_order_of_rows_does_not_matter(seed):
    X, y, _ = planted(12, 6, 1.0, 0.5, seed=seed)
    order = np.random.default_rng(seed).permutation(24)
    a, b = fit_direction(X, y), fit_direction(X[order], y[order])
    assert torch.allclose(a.vector, b.vector, atol=1e-6) and a.scale == pytest.approx(b.scale)


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.eye(3), [1, 1, 1], "both classes"),
        (np.ones((4, 3)), [0, 1, 0, 1], "means are equal"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), [0, 1], "nan or infinite"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), [0, 1], "nan or infinite"),
        (np.eye(3), [0, 1], "2 labels were given for 3 rows"),
        (np.zeros((0, 3)), [0, 1], "float array"),
        (np.eye(2), [0, 2], "labels are 0 and 1"),
    ],
)
def test_rows_without_a_direction_are_an_error(X, y, message):
    with pytest.raises(ValueError, match=message):
        fit_direction(X, y)


def test_equal_means_are_found_out_despite_rounding():
    rows = np.random.default_rng(0).normal(size=(50, 8)) + 1e3
    with pytest.raises(ValueError, match="means are equal"):
        fit_direction(np.concatenate([rows, rows[::-1]]), np.repeat([0, 1], 50))


def test_an_unknown_method_names_those_there_are():
    with pytest.raises(ValueError, match="mean_difference"):
        fit_direction(np.eye(2), [0, 1], method="mean_diff")
