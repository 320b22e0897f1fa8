import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from interp.acts.resampling import (
    auroc,
    auroc_interval,
    aurocs,
    bootstrap_counts,
    fold_area,
    fold_numbers,
    grouped_folds,
    permutations,
    permute_labels,
    placebo_directions,
    score_interval,
)


def slow_auroc(scores, y):
    """Count every pair of a positive and a negative."""
    pairs = [(s, t) for s, a in zip(scores, y, strict=True) for t, b in zip(scores, y, strict=True) if a and not b]
    return sum(1.0 if s > t else 0.5 if s == t else 0.0 for s, t in pairs) / len(pairs)


@st.composite
def scored(draw):
    n = draw(st.integers(2, 30))
    scores = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 2.0, 1e12]), min_size=n, max_size=n))
    y = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda v: len(set(v)) == 2))
    return scores, y


@given(scored())
@settings(max_examples=150, deadline=None)
def test_auroc_with_ties_equals_the_count_over_all_pairs_and_scikit_learn(case):
    scores, y = case
    assert auroc(scores, y) == pytest.approx(slow_auroc(scores, y), abs=1e-12)
    assert auroc(scores, y) == pytest.approx(roc_auc_score(y, scores), abs=1e-12)


@given(scored())
@settings(max_examples=50, deadline=None)
def test_auroc_of_negated_scores_is_one_minus_it(case):
    scores, y = case
    assert auroc([-s for s in scores], y) == pytest.approx(1 - auroc(scores, y), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "y", "message"),
    [
        ([1.0, 2.0], [1, 1], "both classes"),
        ([1.0, float("nan")], [0, 1], "nan"),
        ([1.0, 2.0, 3.0], [0, 1], "one score a label"),
        ([1.0, 2.0], [1, 2], "labels are 0 and 1"),
    ],
)
def test_an_area_that_does_not_exist_is_an_error(scores, y, message):
    with pytest.raises(ValueError, match=message):
        auroc(scores, y)


def test_the_bootstrap_equals_repeating_the_drawn_groups_rows():
    rng = np.random.default_rng(3)
    y, groups = np.tile([0, 1], 40), np.arange(80) // 2
    scores = (rng.normal(size=80) + y).round(1)
    counts = bootstrap_counts(np.zeros(40, dtype=int), 400, np.random.default_rng(5))
    slow = []
    for count in counts:
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), count[g]) for g in range(40)])
        slow.append(slow_auroc(scores[rows], y[rows]) if len(slow) < 3 else roc_auc_score(y[rows], scores[rows]))
    expected = np.quantile(slow, [0.025, 0.975])
    assert auroc_interval(scores, y, groups, n_boot=400, seed=5) == pytest.approx(tuple(expected), abs=1e-9)


def test_bootstrap_draws_keep_the_number_of_groups_of_each_stratum():
    strata = np.array([0, 1, 1, 2, 2, 2])
    counts = bootstrap_counts(strata, 50, np.random.default_rng(0))
    for stratum in range(3):
        assert (counts[:, strata == stratum].sum(1) == stratum + 1).all()


@pytest.mark.parametrize(("n_groups", "constant"), [(6, False), (10, True), (40, False)])
def test_the_interval_covers_one_half_on_noise_where_rows_share_their_groups_offset(n_groups, constant):
    groups = np.repeat(np.arange(n_groups), 12)
    covered, by_rows = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y = groups % 2 if constant else np.tile([0, 1], len(groups) // 2)
        slope = rng.normal(size=n_groups)[groups] * (1 if constant else y)
        scores = slope * 1.5 + rng.normal(size=len(groups))
        low, high = auroc_interval(scores, y, groups, n_boot=300, seed=seed)
        covered += low <= 0.5 <= high
        low, high = auroc_interval(scores, y, n_boot=300, seed=seed)
        by_rows += low <= 0.5 <= high
    assert covered >= 51  # 85 % or more
    assert by_rows < 0.75 * 60, "resampling rows should have failed here: the groups do nothing"


def test_perfect_separation_of_few_groups_does_not_look_certain():
    y = np.tile([0, 1], 20)
    low, high = auroc_interval(y * 1.0, y, np.arange(40) // 4)
    assert high == pytest.approx(1.0) and 0.6 < low < 0.95
    below, above = auroc_interval(-y * 1.0, y, np.arange(40) // 4)
    assert (below, above) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_an_interval_from_one_group_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        auroc_interval([0.0, 1.0, 2.0], [0, 1, 1], [7, 7, 7])


@given(st.integers(2, 5), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_folds_cut_no_group_and_cover_every_row_once(n, seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 12, 60)
    groups[:12] = np.arange(12)
    folds = grouped_folds(groups, n, seed)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(60))
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
        assert len(train) + len(test) == 60
    again = grouped_folds([f"template {g}" for g in groups], n, seed)
    assert all((a[1] == b[1]).all() for a, b in zip(folds, again, strict=True)), "names of groups must not matter"


def test_folds_are_stratified_even_where_each_group_holds_one_class():
    groups = np.repeat(np.arange(20), 10)
    y = (groups >= 15).astype(int)  # 5 positive groups, 15 negative
    for _, test in grouped_folds(groups, 5, seed=1, y=y):
        assert y[test].mean() == 0.25 and len(test) == 40


def test_fewer_groups_than_folds_and_folds_of_one_class_are_refused():
    with pytest.raises(ValueError, match="3 groups"):
        grouped_folds([0, 1, 2, 2], 4)
    with pytest.raises(ValueError, match="one class only"):
        grouped_folds([0, 0, 1, 1, 2, 2], 3, y=[1, 1, 0, 0, 0, 0])


def test_labels_are_shuffled_within_mixed_groups_and_between_constant_ones():
    groups = np.array([0] * 6 + [1] * 6 + [2] * 3 + [3] * 3 + [4] * 3)
    y = np.array([0, 1] * 3 + [1, 1, 0, 0, 0, 0] + [1] * 3 + [0] * 3 + [0] * 3)
    seen = set()
    for seed in range(200):
        shuffled = permute_labels(y, groups, np.random.default_rng(seed))
        assert [shuffled[groups == g].sum() for g in (0, 1)] == [3, 2]
        constant = [tuple(shuffled[groups == g]) for g in (2, 3, 4)]
        assert sorted(constant) == [(0, 0, 0), (0, 0, 0), (1, 1, 1)]
        seen.add(tuple(shuffled))
    assert len(seen) > 100


def test_without_groups_all_labels_are_shuffled():
    y = np.arange(40) < 10
    draws = np.stack([permute_labels(y, None, np.random.default_rng(s)) for s in range(400)])
    assert (draws.sum(1) == 10).all()
    assert np.abs(draws.mean(0) - 0.25).max() < 0.1


def test_placebo_directions_are_unit_seeded_and_uncorrelated():
    a = placebo_directions(64, 500, seed=1)
    assert torch.allclose(a.norm(dim=1), torch.ones(500), atol=1e-6)
    assert torch.equal(a, placebo_directions(64, 500, seed=1))
    assert not torch.equal(a, placebo_directions(64, 500, seed=2))
    cosines = (a @ a.T)[~torch.eye(500, dtype=torch.bool)]
    assert abs(float(cosines.mean())) < 0.005
    assert float(cosines.std()) == pytest.approx(64**-0.5, rel=0.03)


@given(st.integers(0, 10**6), st.sampled_from([1, 3, 50]))
@settings(max_examples=60, deadline=None)
def test_many_aurocs_at_once_equal_one_at_a_time(seed, levels):
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=(3, 4, 25)) * levels).round(0 if levels < 50 else 6).astype(np.float32)
    labels = np.stack([rng.permutation(np.arange(25) < 9).astype(int) for _ in range(4)])
    found = aurocs(scores, labels)
    for i in range(3):
        for j in range(4):
            assert found[i, j] == pytest.approx(auroc(scores[i, j], labels[j]), abs=1e-12)


def test_many_aurocs_refuse_what_has_none():
    with pytest.raises(ValueError, match="nan"):
        aurocs(np.array([[0.0, np.nan]]), np.array([0, 1]))
    with pytest.raises(ValueError, match="one is absent"):
        aurocs(np.array([[0.0, 1.0]]), np.array([1, 1]))


def delong(scores, y):
    """DeLong's variance, by counting pairs."""
    wins = np.sign(scores[y == 1][:, None] - scores[y == 0][None, :]) / 2 + 0.5
    by_positive, by_negative = wins.mean(1), wins.mean(0)
    return by_positive.var(ddof=1) / len(by_positive) + by_negative.var(ddof=1) / len(by_negative)


def test_the_variance_of_a_folds_area_is_delongs_where_rows_are_their_own_groups():
    rng = np.random.default_rng(2)
    y = np.arange(41) % 3 // 2
    scores = (rng.normal(size=41) + y).round(1)
    area, variance = fold_area(scores, y, np.arange(41) + 7)
    assert area == pytest.approx(auroc(scores, y)) and variance == pytest.approx(delong(scores, y))


@pytest.mark.parametrize("kind", ["offset", "pairs"])
def test_the_variance_of_a_folds_area_is_its_spread_over_draws_of_groups(kind):
    areas, variances, by_rows = [], [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(30), 6 if kind == "offset" else 2)
        y = groups % 2 if kind == "offset" else np.tile([0, 1], 30)
        scores = 2 * rng.normal(size=30)[groups] + rng.normal(size=len(groups)) + y
        area, variance = fold_area(scores, y, groups)
        areas.append(area)
        variances.append(variance)
        by_rows.append(delong(scores, y))
    spread = np.var(areas, ddof=1)
    assert np.mean(variances) == pytest.approx(spread, rel=0.25)
    wrong = np.mean(by_rows) / spread
    assert wrong < 0.6 or wrong > 1.6, "taking rows as independent should have failed here"


def test_permutations_within_strata_stay_there_and_keep_groups_whole():
    groups = np.repeat(np.arange(12), 3)
    y = groups % 2
    y[:3] = [0, 1, 1]  # one mixed group
    strata = (groups >= 6).astype(int)
    draws = permutations(y, groups, 100, np.random.default_rng(0), strata)
    for draw in draws:
        assert (strata[draw] == strata).all()
        assert sorted(draw[:3]) == [0, 1, 2]
        whole = y[draw].reshape(12, 3)[1:]
        assert (whole.min(1) == whole.max(1)).all()
        assert [y[draw][strata == s].sum() for s in (0, 1)] == [y[strata == s].sum() for s in (0, 1)]
    assert len({tuple(d) for d in draws}) > 90


def test_permutations_are_uniform():
    counts = {}
    for draw in permutations(np.arange(3), None, 6000, np.random.default_rng(1)):
        counts[tuple(draw)] = counts.get(tuple(draw), 0) + 1
    assert len(counts) == 6 and all(abs(c - 1000) < 150 for c in counts.values())


def test_the_numbers_of_folds_are_those_of_their_test_rows():
    folds = grouped_folds(np.arange(11) // 2, 3, seed=4)
    number = fold_numbers(folds)
    assert all((np.flatnonzero(number == k) == test).all() for k, (_, test) in enumerate(folds))


def test_newcombes_interval_has_a_width_at_the_end_and_solves_its_equation():
    low, high = score_interval(1.0, 20, 20)
    assert high == pytest.approx(1.0) and 0.8 < low < 0.95
    low, high = score_interval(0.8, 30, 50)
    for x in (low, high):
        spread = 1 + 39 * ((1 - x) / (2 - x) + x / (1 + x))
        assert (0.8 - x) ** 2 == pytest.approx(1.959964**2 * x * (1 - x) * spread / 1500, rel=1e-4)
