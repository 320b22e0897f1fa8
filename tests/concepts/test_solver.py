import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge

from interp.concepts.reading import solver
from interp.concepts.reading.closed import CLOSED, Columns
from interp.concepts.reading.solver import ConvergenceError, fit_logistic, training_sets


def rows(n, d, effect, seed, spread=1.5):
    """Correlated coordinates of very different units, a mean far from 0, and a concept along a random axis."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * np.logspace(0, -spread, d)[:, None])
    y = rng.permutation(np.arange(n) % 2)
    X += effect * np.outer(y, rng.normal(size=d)) / d**0.5
    return X * np.logspace(-2, 2, d) + 30 * rng.normal(size=d), y


def scikit_learn(X, y, C):
    mean, deviation = X.mean(0), X.std(0)
    deviation[deviation == 0] = 1
    fit = LogisticRegression(C=C, max_iter=100_000, tol=1e-9).fit((X - mean) / deviation, y)
    weight = fit.coef_[0] / deviation
    return weight, fit.intercept_[0] - weight @ mean


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("n", "d", "effect", "C"),
    [
        (40, 1, 1.0, 1.0),
        (300, 20, 0.0, 1.0),
        (300, 20, 3.0, 1.0),
        (300, 20, 3.0, 100.0),
        (60, 90, 1.0, 1.0),
        (60, 90, 1.0, 0.01),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_fold_and_column_is_converged_scikit_learns_fit(n, d, effect, C, dtype):
    X, y = rows(n, d, effect, seed=n + d)
    folds = np.random.default_rng(1).permutation(np.arange(n) % 3)
    Y = np.stack([y, np.random.default_rng(2).permutation(y)], axis=1)
    sets = training_sets(3, nested=True)
    fits = fit_logistic(torch.tensor(X), torch.tensor(Y), torch.tensor(folds), sets, C=C, tol=1e-5, dtype=dtype)
    for i, out in enumerate(sets):
        train = ~np.isin(folds, out)
        for j in range(2):
            weight, bias = scikit_learn(X[train], Y[train, j], C)
            ours = fits.weight[i, :, j].numpy()
            scale = X[train].std(0)
            assert cosine(weight * scale, ours * scale) > 0.9999
            expected, found = X @ weight + bias, X @ ours + float(fits.bias[i, j])
            assert np.abs(expected - found).max() < 5e-3 * np.abs(expected).max()
    assert fits.decrement <= 1e-5


def test_rows_left_out_do_not_matter():
    X, y = rows(90, 8, 2.0, seed=3)
    folds = torch.arange(90) % 3
    changed = X.copy()
    changed[folds.numpy() == 1] += np.random.default_rng(0).normal(size=(30, 8)) * X.std(0)
    labels = y.copy()
    labels[folds.numpy() == 1] = 1 - labels[folds.numpy() == 1]
    a, b = (
        fit_logistic(torch.tensor(x), torch.tensor(t)[:, None], folds, [(1,)], tol=1e-8, dtype=torch.float64)
        for x, t in ((X, y), (changed, labels))
    )
    assert torch.allclose(a.weight, b.weight, rtol=1e-4)


def test_a_coordinate_that_is_constant_in_the_training_rows_gets_no_weight():
    X, y = rows(90, 5, 2.0, seed=4)
    X[:, 2] = 7.0
    X[:, 3] = np.where(np.arange(90) % 3 == 0, X[:, 3], -1.0)  # constant but in fold 0
    fits = fit_logistic(torch.tensor(X), torch.tensor(y)[:, None], torch.arange(90) % 3, [(0,), (1,)], tol=1e-7)
    assert fits.weight[:, 2].abs().max() < 1e-9
    assert abs(float(fits.weight[0, 3, 0])) < 1e-3 * abs(float(fits.weight[1, 3, 0]))


def test_a_fit_that_is_stopped_early_is_an_error():
    X, y = rows(200, 30, 3.0, seed=5)
    with pytest.raises(ConvergenceError, match="smaller C"):
        fit_logistic(torch.tensor(X), torch.tensor(y)[:, None], max_steps=2)


def test_a_bound_on_the_hessian_far_above_it_does_not_pass_for_convergence():
    X, y = rows(400, 40, 20.0, seed=12)  # separable, hardly penalised: p(1 - p) is far below 1/4
    fits = fit_logistic(torch.tensor(X), torch.tensor(y)[:, None], C=1e4)
    weight, _ = scikit_learn(X, y, 1e4)
    assert cosine(weight * X.std(0), fits.weight[0, :, 0].numpy() * X.std(0)) > 0.999


def test_where_float32_is_exhausted_the_steps_go_on_in_float64():
    X, y = rows(200, 30, 3.0, seed=6)
    fits = fit_logistic(torch.tensor(X), torch.tensor(y)[:, None], tol=1e-10)
    weight, _ = scikit_learn(X, y, 1.0)
    assert fits.decrement <= 1e-10
    assert np.allclose(fits.weight[0, :, 0].numpy(), weight, rtol=1e-5, atol=1e-6 * np.abs(weight).max())


def test_the_optimum_does_not_depend_on_when_the_hessian_is_computed(monkeypatch):
    X, y = rows(200, 30, 6.0, seed=7)
    give = lambda: fit_logistic(torch.tensor(X), torch.tensor(y)[:, None], tol=1e-8, dtype=torch.float64)  # noqa: E731
    often = give()
    monkeypatch.setattr(solver, "WAIT", 10**6)
    never = give()
    assert often.grams > 1 == never.grams and often.steps < never.steps
    assert torch.allclose(often.weight, never.weight, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C": 0}, "must be positive"),
        ({"left_out": [(5,)]}, "numbered from 0"),
        ({"Y": torch.zeros(20, 1)}, "one class only"),
        ({"Y": torch.arange(20)[:, None]}, "0 and 1"),
    ],
)
def test_fits_that_do_not_exist_are_refused(change, message):
    given = {"X": torch.randn(20, 3), "Y": torch.arange(20)[:, None] % 2, "folds": torch.arange(20) // 10, **change}
    with pytest.raises(ValueError, match=message):
        fit_logistic(given.pop("X"), given.pop("Y"), given.pop("folds"), given.pop("left_out", ((),)), **given)


def columns(X, Y, folds, left_out, dtype=torch.float64):
    """Return the closed forms' input with rows sorted by fold, and the order."""
    order = np.argsort(folds, kind="stable")
    mean, deviation = X.mean(0), X.std(0)
    F = torch.tensor((X - mean) / deviation, dtype=dtype)[order][None]
    data = Columns(
        F=F,
        deviation=torch.tensor(deviation)[None].to(dtype),
        Y=torch.tensor(Y[:, order], dtype=dtype),
        bounds=[0, *np.bincount(folds).cumsum().tolist()],
        left_out=left_out,
    )
    return data, lambda W, b: (W / deviation, b - (W / deviation) @ torch.tensor(mean, dtype=W.dtype))


def direct(method, X, y):
    """Return weight and bias of one training set, computed the long way with scikit-learn's pieces."""
    mean, deviation = X.mean(0), X.std(0)
    if method == "mean_difference":
        weight = X[y == 1].mean(0) - X[y == 0].mean(0)
        return weight, -weight @ (X[y == 1].mean(0) + X[y == 0].mean(0)) / 2
    Z = (X - mean) / deviation
    if method == "ridge":
        fit = Ridge(alpha=1.0).fit(Z, 2 * y - 1)
        weight, bias = fit.coef_, fit.intercept_
    else:
        within = Z - np.stack([Z[y == 0].mean(0), Z[y == 1].mean(0)])[y]
        shrinkage = ledoit_wolf_shrinkage(within, assume_centered=True)
        S = within.T @ within / len(Z)
        S = (1 - shrinkage) * S + shrinkage * np.trace(S) / len(S) * np.eye(len(S))
        high, low = Z[y == 1].mean(0), Z[y == 0].mean(0)
        weight = np.linalg.solve(S, high - low)
        bias = -weight @ (high + low) / 2 + np.log(y.mean() / (1 - y.mean()))
    return weight / deviation, bias - (weight / deviation) @ mean


@pytest.mark.parametrize("method", sorted(CLOSED))
@pytest.mark.parametrize(("n", "d"), [(120, 10), (60, 80)])
def test_closed_forms_by_subtraction_of_folds_equal_the_direct_fit(method, n, d):
    X, y = rows(n, d, 2.0, seed=8)
    rng = np.random.default_rng(9)
    folds = rng.permutation(np.arange(n) % 4)
    Y = np.stack([y, rng.permutation(y), (rng.random(n) < 0.3).astype(int)])
    sets = training_sets(4, nested=True)
    data, raw = columns(X, Y, folds, sets)
    W, b = raw(*CLOSED[method](data, 1.0))
    for i, out in enumerate(sets):
        train = ~np.isin(folds, out)
        for p in range(3):
            weight, bias = direct(method, X[train], Y[p][train])
            scale = X[train].std(0)
            assert np.allclose(W[0, i, p] * scale, weight * scale, rtol=1e-3, atol=2e-5 * np.abs(weight * scale).max())
            assert float(b[0, i, p]) == pytest.approx(bias, rel=1e-3, abs=1e-3 * (1 + abs(weight @ X.mean(0))))


def test_lda_with_many_rows_is_scikit_learns():
    X, y = rows(4000, 6, 2.0, seed=10, spread=0.3)
    data, raw = columns(X, y[None], np.zeros(4000, dtype=int), ((),))
    W, _ = raw(*CLOSED["lda"](data, 1.0))
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(X, y).coef_[0]
    assert cosine(reference * X.std(0), W[0, 0, 0].numpy() * X.std(0)) > 0.999  # it shrinks each class by itself


def test_ridge_of_continuous_targets_is_scikit_learns():
    X, _ = rows(80, 12, 0.0, seed=11)
    y = X @ np.random.default_rng(0).normal(size=12) / 100 + 5
    data, raw = columns(X, y[None], np.zeros(80, dtype=int), ((),))
    W, b = raw(*CLOSED["ridge"](data, 0.5))
    Z = (X - X.mean(0)) / X.std(0)
    reference = Ridge(alpha=2.0).fit(Z, y)
    assert np.allclose(X @ W[0, 0, 0].numpy() + float(b[0, 0, 0]), reference.predict(Z), atol=1e-3)
