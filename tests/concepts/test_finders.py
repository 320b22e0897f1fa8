import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import StandardScaler

from interp.concepts.reading import regression
from interp.concepts.reading.finders import (
    METHODS,
    DirectionWarning,
    fit_direction,
    labelled_direction,
    lda,
    leace,
    mean_difference,
)
from interp.concepts.reading.regression import choose_C, logistic, ridge, sparse, svm
from interp.concepts.reading.rows import joined_groups, oriented

PAIRED = ("pair_pca", "ccs")
READERS = {"lda": lda, "logistic": partial(logistic, C=0.1), "svm": partial(svm, C=0.1), "ridge": ridge}


def planted(n, d, effect, nuisance, seed):
    """Pairs that differ by effect * u, unit noise, and a large random amount along another axis."""
    rng = np.random.default_rng(seed)
    u, w = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    base = rng.normal(size=(n, d)) * 2
    difference = effect * u + rng.normal(size=(n, d)) + nuisance * rng.normal(size=(n, 1)) * w
    return np.concatenate([base, base + difference]), np.repeat([0, 1], n), u


def cosine(a, b):
    a, b = (torch.as_tensor(v).double().flatten() for v in (a, b))
    return float(a @ b / a.norm() / b.norm())


def found_by(method, X, y, **options):
    options.setdefault("pairs", np.tile(np.arange(len(y) // 2), 2))
    if method == "ccs":
        options.setdefault("steps", 300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        return fit_direction(X, y, method=method, **options)


def test_the_default_recovers_a_planted_direction_in_noise_and_nuisance():
    X, y, u = planted(256, 256, 10.0, 5.0, seed=3)
    assert cosine(fit_direction(X, y).vector, u) > 0.95


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_recovers_an_easy_planted_direction(method):
    X, y, u = planted(128, 8, 12.0, 1.0, seed=3)
    found = found_by(method, X, y, **({"k": 8} if method == "sparse" else {}))
    assert cosine(found.vector, u) > (0.8 if method == "ccs" else 0.9)  # any consistent line will do for ccs
    assert found.negative < found.positive and found.scale == pytest.approx(found.positive - found.negative, rel=1e-5)
    assert found.method.split("(")[0] == method and (found.seed is None) == (
        method in ("mean_difference", "lda", "leace", "sparse", "pair_pca")
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_swapping_the_labels_turns_the_direction_round(method):
    X, y, _ = planted(40, 16, 6.0, 1.0, seed=1)
    there, back = found_by(method, X, y), found_by(method, X, 1 - y)
    assert torch.allclose(there.vector, -back.vector, atol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_fewer_rows_than_coordinates_give_a_finite_float64_vector_and_leave_the_rows_alone(method):
    X, y, _ = planted(10, 40, 6.0, 1.0, seed=5)
    X = torch.from_numpy(X)
    before = X.clone()
    options = {"pairs": np.tile(np.arange(10), 2)} if method in PAIRED else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        vector = METHODS[method](X, y, **options)
    assert vector.dtype == torch.float64 and bool(torch.isfinite(vector).all()) and vector.shape == (40,)
    assert torch.equal(X, before)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lat"}))
def test_duplicated_rows_are_no_obstacle(method):
    X, y, u = planted(30, 6, 8.0, 0.5, seed=7)
    twice = found_by(method, np.concatenate([X, X]), np.tile(y, 2), pairs=np.concatenate([np.tile(np.arange(30), 2),
                     np.tile(np.arange(30, 60), 2)]))  # fmt: skip
    assert cosine(twice.vector, u) > 0.8


@pytest.mark.parametrize("method", sorted(METHODS))
def test_shifting_all_rows_changes_no_direction(method):
    X, y, _ = planted(40, 12, 5.0, 0.5, seed=2)
    assert cosine(found_by(method, X, y).vector, found_by(method, X + 7.0, y).vector) > 0.9999


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lat"}))  # lat draws rows by their place
def test_the_order_of_rows_does_not_matter_to_any_method(method):
    X, y, _ = planted(40, 12, 5.0, 0.5, seed=4)
    pairs, order = np.tile(np.arange(40), 2), np.random.default_rng(0).permutation(80)
    options = {"C": 0.1} if method in ("logistic", "svm") else {}  # which rows a fold gets follows their order
    a = found_by(method, X, y, pairs=pairs, **options)
    b = found_by(method, X[order], y[order], pairs=pairs[order], **options)
    assert cosine(a.vector, b.vector) > 0.99999


@pytest.mark.parametrize("method", sorted(READERS))
def test_stretching_a_coordinate_changes_no_reading(method):
    X, y, _ = planted(40, 12, 2.0, 0.5, seed=6)
    stretch = np.geomspace(1e-3, 1e3, 12)
    plain = X @ READERS[method](X, y).numpy()
    stretched = (X * stretch) @ READERS[method](X * stretch, y).numpy()
    assert np.ptp(plain - stretched) < 1e-6 * np.ptp(plain)


def test_weights_that_are_not_unscaled_point_elsewhere():
    X, y, _ = planted(100, 4, 2.0, 0.0, seed=8)
    X = X * [1.0, 1.0, 100.0, 0.01]
    scaler = StandardScaler().fit(X)
    raw = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaler.transform(X), y).coef_[0]
    ours = logistic(X, y, C=1.0)
    assert cosine(ours, raw / scaler.scale_) > 1 - 1e-9 and abs(cosine(ours, raw)) < 0.9
    assert np.allclose(ours.numpy(), raw / scaler.scale_, rtol=1e-4)


def test_the_mean_difference_is_exact_and_in_raw_units():
    X = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 7.0], [5.0, 9.0], [5.0, 11.0]])
    assert mean_difference(X, [0, 0, 1, 1, 1]).tolist() == [4.0, 8.0]
    found = fit_direction(X, [False, False, True, True, True])
    assert found.scale == pytest.approx(80**0.5) and found.vector.tolist() == pytest.approx([0.2**0.5, 0.8**0.5])
    assert found.positive - found.negative == pytest.approx(80**0.5)


def test_pairs_give_the_same_mean_difference_and_are_checked():
    X, y, _ = planted(20, 6, 2.0, 1.0, seed=9)
    assert torch.equal(mean_difference(X, y, pairs=np.tile(np.arange(20), 2)), mean_difference(X, y))
    with pytest.raises(ValueError, match="40 of 40 pairs"):
        mean_difference(X, y, pairs=np.arange(40))


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


@pytest.mark.parametrize(("n", "d"), [(60, 10), (15, 40)])
def test_lda_is_the_shrunk_covariance_solved_for_the_mean_difference(n, d):
    X, y, _ = planted(n, d, 3.0, 2.0, seed=11)
    within = X - np.stack([X[y == 0].mean(0), X[y == 1].mean(0)])[y]
    deviation = within.std(0)
    shrunk, _ = ledoit_wolf(within / deviation, assume_centered=True)
    expected = np.linalg.solve(shrunk * np.outer(deviation, deviation), X[y == 1].mean(0) - X[y == 0].mean(0))
    assert np.allclose(lda(X, y).numpy(), expected, rtol=1e-8)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(X, y)  # shrinks each class by itself
    assert cosine(lda(X, y), peer.coef_[0]) > 0.96


def test_lda_reads_log_odds_where_the_classes_are_gaussian():
    rng = np.random.default_rng(12)
    root = rng.normal(size=(5, 5))
    move = rng.normal(size=5)
    y = np.tile([0, 1], 100_000)
    X = rng.normal(size=(200_000, 5)) @ root + np.outer(y, move)
    assert np.allclose(lda(X, y).numpy(), np.linalg.solve(root.T @ root, move), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("n", "d"), [(60, 10), (15, 40)])
@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_is_the_converged_estimator_of_scikit_learn(n, d, C):
    X, y, _ = planted(n, d, 2.0, 2.0, seed=13)
    scaler = StandardScaler().fit(X)
    peer = LogisticRegression(C=C, tol=1e-10, max_iter=100_000).fit(scaler.transform(X), y).coef_[0] / scaler.scale_
    assert np.allclose(logistic(X, y, C=C).numpy(), peer, atol=1e-5 * np.abs(peer).max())


@pytest.mark.parametrize("kind", ["logistic", "svm"])
@pytest.mark.parametrize("n", [60, 15])
def test_both_minimisers_agree_and_a_path_equals_single_fits(kind, n, monkeypatch):
    X, y, _ = planted(n, 20, 2.0, 2.0, seed=14)
    weights, biases = regression._path(kind, X, y, [0.01, 0.1, 1.0])
    alone = regression._path(kind, X, y, [1.0])
    assert np.allclose(weights[2], alone[0][0], rtol=1e-6, atol=1e-9) and np.isclose(biases[2], alone[1][0])
    monkeypatch.setattr(regression, "SMALL", 0)
    other, _ = regression._path(kind, X, y, [0.01, 0.1, 1.0])
    assert np.allclose(weights, other, atol=2e-4 * np.abs(weights).max())


def test_svm_minimises_the_squared_hinge_loss():
    X, y, _ = planted(40, 5, 1.0, 1.0, seed=15)
    Z, signs, C = StandardScaler().fit_transform(X), 2 * y - 1, 0.3

    def objective(x):
        return x[:-1] @ x[:-1] / 2 + C * (np.maximum(0, 1 - signs * (Z @ x[:-1] + x[-1])) ** 2).sum()

    slow = minimize(objective, np.zeros(6), tol=1e-10).x[:-1] / X.std(0)
    assert np.allclose(svm(X, y, C=C).numpy(), slow, atol=1e-4 * np.abs(slow).max())
    pooled = LogisticRegression(C=C).fit(Z, y).coef_[0] / X.std(0)
    assert cosine(svm(X, y, C=C), pooled) < 0.99999  # another loss, another line


@pytest.mark.parametrize(("n", "d"), [(80, 10), (30, 50)])
def test_ridge_and_its_leave_one_out_choice_are_those_of_scikit_learn(n, d):
    rng = np.random.default_rng(16)
    X = rng.normal(size=(n, d)) * np.geomspace(0.1, 10, d) + 3
    target = X @ rng.normal(size=d) / 5 + rng.normal(size=n) * 4
    scaler = StandardScaler().fit(X)
    peer = RidgeCV(alphas=regression.ALPHAS).fit(scaler.transform(X), target)
    assert peer.alpha_ not in (regression.ALPHAS[0], regression.ALPHAS[-1])
    assert np.allclose(ridge(X, target).numpy(), peer.coef_ / scaler.scale_, rtol=1e-6)
    assert not np.allclose(ridge(X, target, alpha=100 * peer.alpha_).numpy(), peer.coef_ / scaler.scale_, rtol=0.1)


def test_ridge_chooses_by_whole_groups_where_these_are_given():
    """A target constant within groups of near-equal rows: one row left out has its twins, so no penalty is best."""
    rng = np.random.default_rng(17)
    groups = np.repeat(np.arange(12), 10)
    X = rng.normal(size=(12, 30))[groups] + 0.01 * rng.normal(size=(120, 30))
    target = rng.normal(size=12)[groups]
    assert ridge(X, target).norm() > 5 * ridge(X, target, groups=groups).norm()


def test_a_continuous_target_gives_a_direction_whose_scale_is_the_step_per_unit():
    rng = np.random.default_rng(18)
    u, target = np.linalg.qr(rng.normal(size=(20, 1)))[0][:, 0], rng.normal(size=2000) * 3
    X = np.outer(target, 2 * u) + rng.normal(size=(2000, 20)) * 0.1
    for method in ("ridge", "leace"):
        found = fit_direction(X, target, method=method)
        assert cosine(found.vector, u) > 0.99 and found.scale == pytest.approx(2, rel=0.01)
        assert found.negative is None and found.data
    with pytest.raises(ValueError, match="labels are 0 and 1"):
        fit_direction(X, target, method="lda")


def test_erasing_with_leaces_two_parts_leaves_no_covariance_and_moves_the_rows_along_one_line():
    rng = np.random.default_rng(19)
    X, y, _ = planted(60, 12, 3.0, 2.0, seed=19)
    for z in (y, rng.normal(size=120) + X[:, 0]):
        s, w = leace(X, z), leace(X, z, part="read")
        assert float(s @ w) == pytest.approx(1.0)
        erased = X - np.outer((X - X.mean(0)) @ w.numpy(), s.numpy())
        away = z - z.mean()
        assert np.abs(away @ erased).max() < 1e-10 * np.abs(away @ X).max()
    assert torch.allclose(leace(X, y), mean_difference(X, y))
    assert cosine(leace(X, y, part="read"), lda(X, y)) > 0.98 > cosine(leace(X, y, part="read"), leace(X, y))


def test_sparse_finds_the_planted_coordinates_and_no_others():
    rng = np.random.default_rng(20)
    y = np.tile([0, 1], 200)
    X = rng.normal(size=(400, 50)) * np.geomspace(1, 1000, 50)  # loud coordinates that say nothing
    X[:, 3] += 2 * y
    X[:, 10] -= 3 * 5 * y
    assert sparse(X, y, k=2).nonzero().flatten().tolist() == [3, 10]
    assert sparse(X, y, k=1).nonzero().flatten().tolist() == [10] and sparse(X, y, k=1)[10] < 0
    pooled = logistic(X[:, [3, 10]], y, C=1.0)
    assert torch.allclose(sparse(X, y, k=2)[[3, 10]], pooled)
    with pytest.raises(ValueError, match="50 differ"):
        sparse(X, y, k=51)


def test_the_penalty_is_chosen_by_what_whole_groups_say():
    """Rows of a template share an offset that gives the label away: split rows ask for no penalty, groups for much."""
    rng = np.random.default_rng(21)
    groups = np.repeat(np.arange(20), 10)
    y = groups % 2
    X = rng.normal(size=(20, 40))[groups] + 0.3 * rng.normal(size=(200, 40))
    assert choose_C(X, y, groups=groups) < choose_C(X, y)
    assert choose_C(X, y, groups=groups, kind="svm") <= choose_C(X, y, kind="svm")


def test_neither_a_group_nor_a_pair_is_split():
    number = joined_groups(["a", "b", "c", "a", "d"], [0, 0, 1, 2, 1], 5)
    assert number.tolist() == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.eye(4), [1, 1, 1, 1], "both classes|all 4 targets"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), [0, 1], "nan or infinite"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), [0, 1], "nan or infinite"),
        (np.eye(3), [0, 1], r"2 labels were given for 3 rows|targets of shape \(2,\)"),
        (np.zeros((0, 3)), [0, 1], "float array"),
        (np.ones((4, 3)), [0, 1, 0, 1], "equal|varies|vary|no covariance|differ|held out|standard"),
    ],
)
def test_rows_without_a_direction_are_an_error(X, y, message, method):
    with pytest.raises(ValueError, match=message):
        fit_direction(X, y, method=method, pairs=[0, 0, 1, 1][: len(y)])


def test_labels_other_than_two_are_an_error():
    with pytest.raises(ValueError, match="labels are 0 and 1"):
        fit_direction(np.eye(2), [0, 2])


def test_equal_means_are_found_out_despite_rounding():
    rows = np.random.default_rng(0).normal(size=(50, 8)) + 1e3
    X, y = np.concatenate([rows, rows[::-1]]), np.repeat([0, 1], 50)
    for method in ("mean_difference", "lda", "leace", "sparse"):
        with pytest.raises(ValueError, match=r"means are equal|no covariance|0 differ"):
            fit_direction(X, y, method=method)


def test_a_class_in_one_group_asks_for_a_penalty():
    X, y, _ = planted(10, 4, 3.0, 0.0, seed=22)
    with pytest.raises(ValueError, match="give C"):
        logistic(X, y, groups=y)
    assert logistic(X, y, groups=y, C=1).shape == (4,)
    with pytest.raises(ValueError, match="positive"):
        logistic(X, y, C=0)


def test_unknown_methods_and_options_name_those_there_are():
    with pytest.raises(ValueError, match="mean_difference"):
        fit_direction(np.eye(2), [0, 1], method="mean_diff")
    with pytest.raises(ValueError, match="logistic has no option 'alpha'; it has: C, Cs"):
        fit_direction(np.eye(2), [0, 1], method="logistic", alpha=3)


def test_a_direction_is_turned_and_stretched_to_the_step_between_the_classes():
    X, y, _ = planted(50, 6, 4.0, 0.0, seed=23)
    v = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = oriented(-3 * v, torch.from_numpy(X), y)
    unit = v / v.norm()
    assert torch.allclose(step, unit * (unit @ mean_difference(X, y)))
    with pytest.raises(ValueError, match="length 0"):
        oriented(0 * v, torch.from_numpy(X), y)
    assert (
        labelled_direction(-step, torch.from_numpy(X), y, method="m", hook=None, model=None).vector @ step.float() > 0
    )


def test_the_weight_of_a_logistic_fit_is_the_log_odds_it_states():
    rng = np.random.default_rng(24)
    X = rng.normal(size=(20_000, 3))
    weight = np.array([1.5, -0.5, 0.0])
    y = (rng.random(20_000) < expit(X @ weight)).astype(int)
    assert np.allclose(logistic(X, y, C=100.0).numpy(), weight, atol=0.08)
