import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from interp.acts.resampling import auroc
from interp.concepts.reading.finders import fit_direction, mean_difference
from interp.concepts.reading.rows import DirectionWarning
from interp.concepts.reading.unsupervised import ccs, lat, pair_pca, top_component


def pairs_of(n, d, effect, nuisance, seed, base=2.0):
    rng = np.random.default_rng(seed)
    u, w = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    low = rng.normal(size=(n, d)) * base
    high = low + effect * u + rng.normal(size=(n, d)) + nuisance * rng.normal(size=(n, 1)) * w
    return np.concatenate([low, high]), np.repeat([0, 1], n), np.tile(np.arange(n), 2), u, w


def cosine(a, b):
    a, b = (np.asarray(v, dtype=float) for v in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def quiet(find, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        return find(*args, **options)


def test_pair_pca_is_not_centred_where_a_centred_one_loses_the_direction():
    X, y, pairs, u, _ = pairs_of(256, 64, 10.0, 3.0, seed=0)
    found = pair_pca(X, y, pairs=pairs)
    differences = X[y == 1] - X[y == 0]
    assert cosine(found, u) > 0.98 > 0.2 > abs(cosine(PCA(1).fit(differences).components_[0], u))
    exact = np.linalg.svd(differences, full_matrices=False)[2][0]
    assert abs(cosine(found, exact)) > 1 - 1e-10
    assert float(found.norm()) == pytest.approx(abs(exact @ mean_difference(X, y).numpy()))


def test_pair_pca_needs_no_order_and_repe_pairs_with_shuffled_signs_give_the_same_line():
    X, y, pairs, _, _ = pairs_of(60, 16, 5.0, 1.0, seed=1)
    order = np.random.default_rng(0).permutation(120)
    found = pair_pca(X, y, pairs=pairs)
    assert torch.allclose(found, pair_pca(X[order], y[order], pairs=[f"p{p}" for p in pairs[order]]))
    signs = np.random.default_rng(1).choice([-1, 1], 60)[:, None]
    half = signs * (X[y == 1] - X[y == 0])
    assert abs(cosine(found, PCA(1).fit(np.concatenate([half, -half])).components_[0])) > 1 - 1e-8


@pytest.mark.parametrize(("effect", "nuisance", "warned"), [(10.0, 3.0, False), (3.0, 8.0, True)])
def test_pair_pca_warns_exactly_where_the_nuisance_wins(effect, nuisance, warned):
    for seed in range(5):
        X, y, pairs, u, w = pairs_of(200, 32, effect, nuisance, seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = pair_pca(X, y, pairs=pairs)
        assert any("a nuisance can win" in str(c.message) for c in caught) == warned
        assert (abs(cosine(found, w)) > 0.9) == warned and (abs(cosine(found, u)) > 0.9) != warned


def test_a_varying_effect_alone_is_no_nuisance():
    rng = np.random.default_rng(2)
    X, y, pairs, u, _ = pairs_of(200, 32, 0.0, 0.0, seed=2)
    X[y == 1] += np.outer(8 + 12 * rng.normal(size=200), u)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosine(pair_pca(X, y, pairs=pairs), u) > 0.98


def test_an_open_sign_is_reported_and_a_clear_one_is_not():
    X, y, pairs, _, _ = pairs_of(100, 16, 0.0, 12.0, seed=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair_pca(X, y, pairs=pairs)
    assert any("the sign is open" in str(c.message) and c.category is DirectionWarning for c in caught)
    X, y, _, _, _ = pairs_of(100, 16, 20.0, 0.0, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosine(lat(X, y), mean_difference(X, y)) > 0.95


def test_lat_depends_on_its_seed_alone_and_finds_what_varies_most():
    X, y, _, u, _ = pairs_of(100, 16, 20.0, 0.0, seed=4)
    np.random.seed(5)
    first = lat(X, y, seed=1)
    np.random.seed(6)
    assert torch.equal(first, lat(X, y, seed=1)) and not torch.allclose(first, lat(X, y, seed=2))
    assert cosine(first, u) > 0.95
    loud = np.random.default_rng(7).normal(size=(200, 1)) * 100 * np.eye(16)[0]
    assert abs(quiet(lat, X + loud, y)[0]) > 0.95 * quiet(lat, X + loud, y).norm()


def truths(n, d, seed, wording=6.0):
    """Statements in two wordings ("yes", "no" at the end), one of each pair true: y is the truth, sides the wording."""
    rng = np.random.default_rng(seed)
    u, w = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    yes_is_true = rng.integers(0, 2, n)
    y, sides = np.concatenate([yes_is_true, 1 - yes_is_true]), np.repeat([0, 1], n)
    X = np.outer(2 * y - 1, 3 * u) + np.outer(2 * sides - 1, wording * w) + rng.normal(size=(2 * n, d)) * 0.5
    return X, y, np.tile(np.arange(n), 2), sides, u, w


def test_ccs_finds_the_truth_once_each_wording_is_centred_and_the_wording_otherwise():
    X, y, pairs, sides, u, w = truths(150, 12, seed=8)
    train = pairs < 100
    found = ccs(X[train], y[train], pairs=pairs[train], sides=sides[train])
    centred = X - np.stack([X[sides == c].mean(0) for c in (0, 1)])[sides]
    assert cosine(found, u) > 0.7 and auroc((centred @ found.numpy())[~train], y[~train]) > 0.98
    X, y, pairs, sides = X[train], y[train], pairs[train], sides[train]
    blind = quiet(ccs, X, y, pairs=pairs, steps=300)
    assert abs(cosine(blind, w)) > 0.5 > abs(cosine(found, w))
    short = ccs(X, y, pairs=pairs, sides=sides, steps=50)
    assert torch.equal(short, ccs(X, y, pairs=pairs, sides=sides, steps=50))
    assert torch.allclose(short, ccs(X / 1000, y, pairs=pairs, sides=sides, steps=50) * 1000)


def test_more_restarts_never_raise_the_loss():
    from interp.concepts.reading.unsupervised import _consistency, _most_consistent

    X, y, *_ = truths(40, 12, seed=9, wording=0.0)
    first, second = (torch.from_numpy(X[y == c]) for c in (1, 0))
    zero = torch.zeros(1, dtype=torch.float64)
    one, ten = (_most_consistent(first, second, n, 150, 2e-2, 0) for n in (1, 10))
    losses = [float(_consistency(first, second, v[None], zero)) for v in (one, ten)]
    assert losses[1] <= losses[0] + 1e-3 and losses[1] < 0.05
    even = torch.zeros(1, 12, dtype=torch.float64)
    assert float(_consistency(first, second, even, zero)) == pytest.approx(0.25)  # p = 1/2 everywhere: 0 + 1/4


def test_ccs_works_where_gradients_are_off():
    X, y, pairs, sides, _, _ = truths(20, 6, seed=10)
    with torch.inference_mode():
        inside = ccs(torch.from_numpy(X), y, pairs=pairs, sides=sides, steps=50)
    assert torch.equal(inside, ccs(X, y, pairs=pairs, sides=sides, steps=50))


@pytest.mark.parametrize("method", ["pair_pca", "ccs"])
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (None, "needs pairs="),
        ([0, 0, 1], "3 pairs were given for 4 rows"),
        ([0, 1, 0, None], r"1 rows have no pair"),
        ([0, 1, 2, 3], "4 of 4 pairs are not one row of each label"),
        (["a", "a", "a", "a"], "'a' has 2 of label 1 and 2 of label 0"),
    ],
)
def test_missing_or_broken_pairs_are_an_error(method, pairs, message):
    X = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(ValueError, match=message):
        fit_direction(X, [0, 0, 1, 1], method=method, pairs=pairs)


def test_sides_that_would_take_the_classes_away_are_refused():
    X, y, pairs, sides, _, _ = truths(10, 4, seed=11)
    with pytest.raises(ValueError, match="sides are the labels"):
        ccs(X, y, pairs=pairs, sides=1 - y)
    sides[0] = sides[10]
    with pytest.raises(ValueError, match="1 pairs have both rows on one side"):
        ccs(X, y, pairs=pairs, sides=sides)


def test_equal_rows_have_no_component():
    with pytest.raises(ValueError, match="two equal rows"):
        pair_pca(np.concatenate([np.eye(3), np.eye(3)]), [0, 0, 0, 1, 1, 1], pairs=[0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match="at least 4"):
        lat(np.eye(3), [0, 1, 1])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_top_component_is_that_of_the_decomposition(shape):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    vector, value = top_component(rows)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    assert abs(float(vector @ basis[0])) == pytest.approx(1) and value == pytest.approx(float(sizes[0] ** 2) / shape[0])
