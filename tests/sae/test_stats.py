"""Moments and intervals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.stats import Moments, bootstrap_interval


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=6), far=st.sampled_from([0.0, 1e5]))
def test_moments_do_not_depend_on_the_cut_or_on_merging(cuts, far):
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + far
    parts = torch.tensor_split(rows, sorted(cuts))
    one, other = Moments(), Moments()
    for i, part in enumerate(parts):
        (one if i % 2 else other).add(part)
    value = one.merge(other).value()
    assert value.count == 50
    np.testing.assert_allclose(value.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    assert value.variance == pytest.approx(np.var(rows.numpy(), axis=0).sum(), rel=1e-8)


def test_moments_of_nothing_and_of_two_widths_are_errors():
    with pytest.raises(ValueError, match="no rows"):
        Moments().value()
    with pytest.raises(ValueError, match="2 dimensions, those before had 3"):
        Moments().add(torch.ones(4, 3)).add(torch.ones(4, 2))


def test_the_bootstrap_interval_of_a_mean_has_its_analytic_width():
    values = np.random.default_rng(0).normal(5, 2, 2000)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(
        values.mean() + half, abs=0.02
    )
    assert (low, high) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_an_interval_of_one_value_or_of_nan_is_an_error():
    for values in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="at least 2 finite"):
            bootstrap_interval(values)
