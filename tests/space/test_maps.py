"""Maps and their quality against scikit-learn, exact cases and nulls."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from interp.space.maps import MapError, map_quality, pca_map


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_trust_and_continuity_are_scikit_learns(seed, k):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(25, 6)), rng.normal(size=(25, 2))
    y += x[:, :2]
    quality = map_quality(x, y, k=k, n_shuffles=1)
    assert quality.trustworthiness == pytest.approx(trustworthiness(x, y, n_neighbors=k), abs=1e-12)
    assert quality.continuity == pytest.approx(trustworthiness(y, x, n_neighbors=k), abs=1e-12)


def test_neighbours_kept_and_purity_equal_a_slow_twin():
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(30, 5)), rng.integers(0, 3, 30)
    y = x[:, :2]
    near = [
        [sorted((j for j in range(30) if j != i), key=lambda j: np.linalg.norm(z[i] - z[j])) for i in range(30)]
        for z in (x, y)
    ]
    quality = map_quality(x, y, labels.tolist(), k=4)
    assert quality.kept == pytest.approx(
        np.mean([len(set(a[:4]) & set(b[:4])) / 4 for a, b in zip(*near, strict=True)])
    )
    assert quality.purity_space == pytest.approx(np.mean([labels[a[0]] == labels[i] for i, a in enumerate(near[0])]))
    assert quality.purity_map == pytest.approx(np.mean([labels[b[0]] == labels[i] for i, b in enumerate(near[1])]))


def test_the_map_that_is_the_space_keeps_everything():
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    quality = map_quality(x, x * 3 + 1, k=5)
    assert (quality.trustworthiness, quality.continuity, quality.kept) == (1, 1, 1)


def test_the_null_is_what_a_map_that_keeps_nothing_scores():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(120, 5))
    lost = map_quality(x, rng.normal(size=(120, 2)), k=10)  # a map that has nothing to do with the space
    assert lost.kept == pytest.approx(lost.kept_null, abs=0.03)
    assert lost.kept_null == pytest.approx(10 / 119, abs=0.01)  # a random choice of k others
    assert lost.trustworthiness == pytest.approx(lost.trustworthiness_null, abs=0.03)
    kept = map_quality(x, x[:, :2], k=10)
    assert kept.trustworthiness > kept.trustworthiness_null + 0.1
    assert kept.kept > 2 * kept.kept_null


def test_a_shuffled_map_is_scored_as_if_its_rows_had_been_shuffled():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=(20, 2))
    order = np.random.default_rng(7).permutation(20)  # what map_quality draws first under seed 7
    one = map_quality(x, y, k=3, seed=7, n_shuffles=1)
    assert one.trustworthiness_null == pytest.approx(map_quality(x, y[order], k=3, n_shuffles=1).trustworthiness)
    assert one.kept_null == pytest.approx(map_quality(x, y[order], k=3, n_shuffles=1).kept)


def test_planted_topics_are_pure_and_shuffled_labels_are_not():
    rng = np.random.default_rng(4)
    labels = np.repeat(["finance", "sport", "technology"], 20)
    centres = rng.normal(size=(3, 16)) * 3
    x = np.repeat(centres, 20, axis=0) + rng.normal(size=(60, 16))
    quality = map_quality(x, pca_map(x).points, labels.tolist(), k=5)
    assert quality.purity_space == 1
    assert quality.purity_map > 0.9
    assert 0.2 < quality.purity_null < 0.45
    assert quality.purity_null_interval[0] <= quality.purity_null <= quality.purity_null_interval[1] < 0.6


def test_pca_is_scikit_learns_up_to_the_sign_of_an_axis():
    x = np.random.default_rng(5).normal(size=(50, 8)) * np.arange(8, 0, -1) + 100
    ours, theirs = pca_map(x, 3), PCA(3).fit(x)
    points = theirs.transform(x)
    sign = np.sign((points * ours.points.numpy()).sum(0))
    assert np.allclose(ours.points.numpy(), points * sign, atol=1e-8)
    assert np.allclose(ours.explained.numpy(), theirs.explained_variance_ratio_)
    assert torch.equal(ours.place(x), ours.points)
    assert (ours.axes.gather(1, ours.axes.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_digits_score_what_they_are_known_to_score():
    x, labels = load_digits(return_X_y=True)
    quality = map_quality(x, pca_map(x).points, labels.tolist(), k=15, n_shuffles=2)
    measured = (quality.trustworthiness, quality.continuity, quality.kept)
    assert measured == pytest.approx((0.829, 0.946, 0.151), abs=0.001)
    assert quality.purity_space > 0.98 > 0.7 > quality.purity_map > quality.purity_null


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pca_map(np.eye(2)), "at least 3 points of at least 2 columns, not 2 of 2"),
        (lambda: pca_map(np.ones((5, 3))), "fewer than 2 dimensions"),
        (lambda: map_quality(np.eye(9), np.eye(9), k=5), "below half of the 9 points, not 5"),
        (lambda: map_quality(np.eye(9), np.eye(8), k=2), "has 9 points, but the map has 8"),
        (lambda: map_quality(np.eye(9), np.eye(9), ["a"] * 9, k=2), "1 different labels on 9 points"),
        (lambda: map_quality(np.eye(9), np.eye(9), ["a"], k=2), "1 labels and 9 points"),
    ],
)
def test_too_little_for_a_map_is_refused(call, says):
    with pytest.raises(MapError, match=says):
        call()
