"""Which tokens become rows: the names, the masks, outliers, and what is said of values that are no numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.acts.rows import (
    DEFAULT_EXCLUDE,
    SAE_EXCLUDE,
    Exclude,
    Included,
    keep_mask,
    nonfinite,
    outlying,
    parse_exclude,
    row_norms,
)


@given(st.booleans(), st.booleans(), st.integers(0, 9), st.none() | st.floats(1.5, 1e6))
def test_an_exclusion_survives_its_own_names(bos, special, first, outlier):
    outlier = None if outlier is None else float(f"{outlier:g}")
    exclude = Exclude(bos=bos, special=special, first=first, outlier=outlier)
    assert parse_exclude(exclude.names()) == exclude == parse_exclude(exclude)
    assert exclude.names()[0] == "pad"


def test_the_documented_defaults_are_these():
    assert parse_exclude(DEFAULT_EXCLUDE) == Exclude(bos=True, special=True)
    assert parse_exclude(SAE_EXCLUDE) == Exclude(bos=True, special=True, outlier=10.0)
    assert parse_exclude(["outlier:30", "first:2"]) == Exclude(first=2, outlier=30.0)
    assert parse_exclude([]) == parse_exclude(["pad", "pad"]) == Exclude()


@pytest.mark.parametrize(
    "wrong", ["pad", ["eos"], ["first"], ["first:0"], ["first:-1"], ["outlier:"], ["outlier:1"], ["outlier:nan"],
              ["outlier:x"], ["pad:3"], ["first:1", "first:2"]],
)  # fmt: skip
def test_other_names_are_refused_with_those_allowed(wrong):
    with pytest.raises(ValueError, match=r"exclude is .*must be a list of some of: pad, bos, special, first:N"):
        parse_exclude(wrong)


IDS = torch.tensor([[0, 0, 1, 5, 2, 6], [1, 7, 8, 1, 9, 0]])
MASK = torch.tensor([[False, False, True, True, True, True], [True, True, True, True, True, False]])


def kept(names, positions=None):
    keep = keep_mask(IDS, MASK, parse_exclude(names), special_ids=[0, 1, 2], bos_id=1, positions=positions)
    return [row[k].tolist() for row, k in zip(IDS, keep, strict=True)]


def test_pads_go_by_the_mask_and_specials_by_id_wherever_they_stand():
    assert kept([]) == [[1, 5, 2, 6], [1, 7, 8, 1, 9]]
    assert kept(["bos"]) == [[5, 2, 6], [7, 8, 9]]
    assert kept(["special"]) == [[5, 6], [7, 8, 9]]
    assert bool(MASK.all()) is False and kept(["pad"]) == kept([])  # the mask given is not written into


def test_first_counts_real_tokens_of_a_row_or_of_each_document():
    assert kept(["first:2"]) == [[2, 6], [8, 1, 9]]
    assert kept(["first:1", "special"]) == [[5, 6], [7, 8, 9]]
    restarting = torch.tensor([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 0, 1, -1]])
    assert kept(["first:2"], restarting) == [[2, 6], [8]]


def test_outliers_are_measured_in_float32():
    rows = torch.full((9, 64), 200.0, dtype=torch.float16)  # the square of the norm is above what float16 holds
    rows[4] *= 11
    norms = row_norms(rows)
    assert float(norms.median()) == pytest.approx(1600.0) and norms.dtype == torch.float32
    assert outlying([norms], 10).tolist() == [i == 4 for i in range(9)]
    assert not bool(outlying([norms], 12).any())
    quiet = torch.ones(9)
    quiet[7] = 11.0
    assert outlying([norms, quiet], 10).nonzero().squeeze(1).tolist() == [4, 7]  # at any hook point
    assert outlying([norms[:0]], 10).shape == (0,)


def test_a_user_names_tokens_by_ids_by_masks_or_by_a_function():
    ids = torch.tensor([5, 6, 5])
    for include in ([5], torch.tensor([5]), {5}, [[True, False, True]], [torch.tensor([True, False, True])],
                    lambda row: row == 5):  # fmt: skip
        assert Included(include, 1).mask(0, ids).tolist() == [True, False, True]
    assert Included([], 1).mask(0, ids).tolist() == [False] * 3


@pytest.mark.parametrize("include", [[[True, False]], [[1, 0, 1]], lambda row: row, lambda row: row[:1] == 5])
def test_masks_that_do_not_fit_are_refused(include):
    with pytest.raises(ValueError, match="one bool a token"):
        Included(include, 1).mask(0, torch.tensor([5, 6, 5]))


@pytest.mark.parametrize("include", [[[True], [True]], "w5", 5, None])
def test_what_is_no_choice_of_tokens_is_refused(include):
    with pytest.raises((ValueError, TypeError), match="it must be a list of token ids"):
        Included(include, 1)


def test_the_error_says_where_and_what_to_do():
    row = torch.tensor([1.0, float("inf"), float("nan"), float("-inf")], dtype=torch.float16)
    error = nonfinite("blocks.3.hook_resid_post", 7, 11, row, "gpt2")
    assert isinstance(error, ArithmeticError)
    said = (
        r"blocks\.3\.hook_resid_post of gpt2: 2 infinite and 1 nan of 4 values at document 7, position 11 \(float16\)"
    )
    with pytest.raises(ArithmeticError, match=said + ".*bfloat16 or float32"):
        raise error
