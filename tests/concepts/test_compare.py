import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from interp.acts.resampling import permute_labels
from interp.concepts.reading.compare import (
    agreement_across_layers,
    causal_inner_product,
    chance_cosine,
    cosine_p_value,
    cosine_table,
    reading_gap,
    steering_versus_reading,
)
from interp.concepts.reading.finders import fit_direction, mean_difference


def gaussian(n, d, seed, move=0.0, along=0, loud=1.0):
    """Rows whose first coordinate is `loud` times as wide, labels drawn at random, classes `move` apart."""
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1], n // 2)
    X = rng.normal(size=(n, d))
    X[:, 0] *= loud
    X[:, along] += move * y
    return X, y


def test_the_null_of_a_cosine_is_exact():
    assert chance_cosine(3) == pytest.approx(0.95)  # on a sphere in three dimensions the cosine is uniform
    assert cosine_p_value(0.3, 3) == pytest.approx(0.7) and cosine_p_value(-0.3, 3) == pytest.approx(0.7)
    assert chance_cosine(2, 0.5) == pytest.approx(2**-0.5)
    draws = np.random.default_rng(0).normal(size=(100_000, 50))
    sizes = np.abs(draws[:, 0]) / np.linalg.norm(draws, axis=1)
    assert np.quantile(sizes, 0.95) == pytest.approx(chance_cosine(50), rel=0.01)
    assert (sizes >= 0.2).mean() == pytest.approx(cosine_p_value(0.2, 50), rel=0.03)
    with pytest.raises(ValueError, match="below 2 dimensions"):
        chance_cosine(1)


def test_a_table_holds_the_cosines_of_directions_and_vectors_alike():
    X, y = gaussian(40, 6, 0, move=3.0)
    found = fit_direction(X, y)
    table = cosine_table({"a": found, "b": np.eye(6)[1], "c": -7 * found.vector})
    assert table["a", "c"] == pytest.approx(-1) and table["a", "b"] == pytest.approx(float(found.vector[1]), abs=1e-6)
    assert table["a", "a"] == pytest.approx(1) and np.array_equal(table.cosines, table.cosines.T)
    assert table.p_values[0, 2] == pytest.approx(0, abs=1e-6) and np.isnan(np.diag(table.p_values)).all()
    assert table.p_values[0, 1] == pytest.approx(cosine_p_value(table["a", "b"], 6))
    assert json.loads(json.dumps(table.to_dict()))["p_values"][0][0] is None
    assert "-1.000*" in str(table) and "random directions" in str(table)
    with pytest.raises(KeyError, match="there are: a, b, c"):
        table["a", "d"]


def test_the_level_for_any_pair_holds_over_the_whole_table():
    rng = np.random.default_rng(1)
    crossed = [
        (np.abs(t.cosines[np.triu_indices(5, 1)]) > t.chance_of_any).any()
        for t in (cosine_table({str(i): v for i, v in enumerate(rng.normal(size=(5, 20)))}) for _ in range(400))
    ]
    assert 0.02 < np.mean(crossed) < 0.085  # 5 %, +- 3 deviations


def test_directions_of_spread_out_rows_pass_the_random_null_but_not_that_of_shuffled_labels():
    """Two random labellings of rows with one loud coordinate: both mean differences lie along it."""
    (X, y), (other, z) = gaussian(100, 30, 2, loud=300.0), gaussian(100, 30, 3, loud=300.0)
    vectors = {"a": mean_difference(X, y), "b": mean_difference(other, z)}
    plain = cosine_table(vectors)
    shuffled = cosine_table(vectors, data={"a": (X, y), "b": (other, z)}, n_shuffles=99)
    assert abs(plain["a", "b"]) > 0.8 and plain.p_values[0, 1] < 1e-6
    assert shuffled.p_values[0, 1] > 0.05 and shuffled.chance[0, 1] > 0.9 and shuffled.n_draws == 99
    assert np.array_equal(plain.cosines, shuffled.cosines)


def test_one_concept_on_two_sets_of_rows_passes_the_shuffled_null_too():
    (X, y), (other, z) = gaussian(100, 30, 4, move=3.0, along=5), gaussian(100, 30, 5, move=3.0, along=5)
    vectors = {"a": mean_difference(X, y), "b": mean_difference(other, z)}
    table = cosine_table(vectors, data={"a": (X, y), "b": (other, z)}, n_shuffles=99)
    assert table.p_values[0, 1] == pytest.approx(0.01) and table["a", "b"] > table.chance_of_any


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        ({"a": np.eye(3)[0]}, {}, "at least 2"),
        ({"a": np.eye(3)[0], "b": np.eye(4)[0]}, {}, "several widths"),
        ({"a": np.eye(3)[0], "b": np.zeros(3)}, {}, "b must be one finite vector"),
        ({"a": np.eye(3)[0], "b": np.array([1, np.nan, 0])}, {}, "b must be one finite vector"),
        ({"a": np.eye(3)[0], "b": np.eye(3)[1]}, {"data": {"a": (np.eye(3), [0, 1, 1])}}, "data"),
    ],
)
def test_what_cannot_be_compared_is_an_error(directions, options, message):
    with pytest.raises(ValueError, match=message):
        cosine_table(directions, **options)


def test_layers_come_in_the_order_of_their_numbers_and_agreement_is_held_against_one_shuffle_for_all():
    rng = np.random.default_rng(6)
    y = np.repeat([0, 1], 50)
    noise = rng.normal(size=(100, 20))
    hooks = [f"resid_post.{layer}" for layer in (10, 2, 1)]
    shared = {hook: (noise + 0.1 * rng.normal(size=(100, 20)), y) for hook in hooks}  # layers that repeat each other
    vectors = {hook: mean_difference(*rows) for hook, rows in shared.items()}
    plain, drawn = agreement_across_layers(vectors), agreement_across_layers(vectors, data=shared, n_shuffles=99)
    assert plain.table.names == ("resid_post.1", "resid_post.2", "resid_post.10") == drawn.table.names
    assert plain.neighbours == (
        pytest.approx(plain.table["resid_post.1", "resid_post.2"]),
        pytest.approx(plain.table["resid_post.2", "resid_post.10"]),
    )
    # noise agrees with itself across layers: beyond random directions, not beyond shuffled labels
    assert plain.mean > 0.9 > plain.chance_mean and drawn.chance_mean > 0.9
    assert (drawn.table.p_values[np.triu_indices(3, 1)] > 0.02).any()
    with pytest.raises(ValueError, match="other labels"):
        agreement_across_layers(vectors, data={**shared, hooks[0]: (noise, 1 - y)})


def test_reading_and_steering_part_where_the_rows_spread_along_the_mean_difference():
    rng = np.random.default_rng(7)
    y = np.repeat([0, 1], 150)
    X = rng.normal(size=(300, 12))
    X[:, 1] += 6 * X[:, 0]  # the spread lies along (1, 6), the classes differ along (0, 1)
    X[:, 1] += 5 * y
    gap = reading_gap(X, y, n_shuffles=10)
    assert gap.cosines["lda"] < 0.5 and gap.cosines["logistic"] < 0.5
    round_rows = reading_gap(rng.normal(size=(300, 12)) + 3 * np.outer(y, np.eye(12)[1]), y, n_shuffles=10)
    assert round_rows.cosines["lda"] > 0.95 and round_rows.chance == chance_cosine(12)
    low, high = gap.shuffled["lda"][1:]
    assert low <= gap.shuffled["lda"][0] <= high
    with pytest.raises(ValueError, match="readers"):
        reading_gap(X, y, readers=("nothing",))


def test_the_best_place_to_read_is_held_against_the_best_to_steer():
    reading = {"1": 0.99, "2": 0.9, "3": 0.8, "4": 0.7}
    steering = {"4": 0.5, "1": 0.1, "2": 0.3, "3": 0.4}
    found = steering_versus_reading(reading, steering)
    assert (found.best_to_read, found.best_to_steer) == ("1", "4")
    assert found.lost == pytest.approx(0.4) and found.rank_correlation == pytest.approx(-1)
    assert found.p_value == pytest.approx(2 / 24, abs=0.03)
    rng = np.random.default_rng(8)
    a, b = (dict(zip("abcdefghij", rng.integers(0, 5, 10).astype(float), strict=True)) for _ in range(2))
    ties = steering_versus_reading(a, b)
    expected = spearmanr(list(a.values()), list(b.values()))
    assert ties.rank_correlation == pytest.approx(expected.statistic)
    assert ties.p_value == pytest.approx(expected.pvalue, abs=0.05)
    for wrong, message in [({"1": 1.0}, "other places"), ({**steering, "1": np.nan}, "finite"),
                           (dict.fromkeys(steering, 1.0), "differ")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            steering_versus_reading(reading, wrong)


def unembedding(v=300, d=8, seed=9):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(v, d)) @ rng.normal(size=(d, d)) + 5


def test_the_causal_inner_product_is_that_of_the_inverse_covariance():
    W = unembedding()
    product = causal_inner_product(W)
    C = np.cov(W.T, bias=True)
    a, b = np.random.default_rng(10).normal(size=(2, 8))

    def by_hand(M):
        return a @ M @ b / np.sqrt((a @ M @ a) * (b @ M @ b))

    assert product.cosine(a, b, space="unembedding") == pytest.approx(by_hand(np.linalg.inv(C)))
    assert product.cosine(a, b) == pytest.approx(by_hand(C)) and abs(by_hand(C) - by_hand(np.linalg.inv(C))) > 0.01
    assert product.cosine(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(1)
    # a concept's two vectors whiten to the same one
    assert torch.allclose(product.whiten(np.linalg.solve(C, a)), product.whiten(a, space="unembedding"))
    white = product.whiten(W - W.mean(0), space="unembedding").numpy()
    assert np.allclose(white.T @ white / len(W), np.eye(8))


def test_the_causal_inner_product_survives_what_leaves_the_logits_alone():
    """Another basis A for the stream, with the inverse transpose for the head, is the same model."""
    W, (a, b) = unembedding(), np.random.default_rng(11).normal(size=(2, 8))
    A = np.random.default_rng(12).normal(size=(8, 8))
    before, after = causal_inner_product(W), causal_inner_product(W @ np.linalg.inv(A))
    assert after.cosine(A @ a, A @ b) == pytest.approx(before.cosine(a, b))
    plain = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in ((a, b), (A @ a, A @ b))]
    assert abs(plain[0] - plain[1]) > 0.05


def test_pairs_that_share_a_direction_are_told_from_random_ones():
    rng = np.random.default_rng(13)
    W = rng.normal(size=(400, 16)) @ rng.normal(size=(16, 16))
    move = rng.normal(size=16) * 8
    pairs = [(2 * i, 2 * i + 1) for i in range(12)]
    for a, b in pairs:
        W[b] = W[a] + move + rng.normal(size=16)
    found = causal_inner_product(W).held_out_pairs(pairs, n_random=200)
    assert found.mean > 0.6 > found.random_high and found.p_value == pytest.approx(1 / 201)
    assert len(found.cosines) == 12 and abs(found.random_mean) < 0.05
    none = causal_inner_product(W).held_out_pairs([(100 + 3 * i, 101 + 3 * i) for i in range(12)], n_random=200)
    assert none.p_value > 0.02
    with pytest.raises(ValueError, match="outside the vocabulary"):
        causal_inner_product(W).held_out_pairs([(0, 1), (2, 3), (4, 400)])
    with pytest.raises(ValueError, match="two equal"):
        causal_inner_product(W).held_out_pairs([(0, 1), (2, 3), (4, 4)])


def test_plural_is_a_direction_of_the_bundled_models_unembedding_and_not_of_shuffled_rows():
    from interp.model.loading import load_model

    model = load_model("tiny")
    words = ["dog", "cat", "boy", "girl", "tree", "bird", "toy", "flower", "car", "ball", "book", "friend"]
    ids = [[model.tokenizer.encode(f" {w}{s}", add_special_tokens=False) for s in ("", "s")] for w in words]
    pairs = [(one[0], many[0]) for one, many in ids if len(one) == len(many) == 1]
    assert len(pairs) >= 8
    found = causal_inner_product(model).held_out_pairs(pairs, n_random=200)
    assert found.mean > 0.3 > found.random_high and found.p_value == pytest.approx(1 / 201)
    W = model.unembed_matrix()
    mixed = W[torch.randperm(len(W), generator=torch.Generator().manual_seed(3))]
    assert causal_inner_product(mixed).held_out_pairs(pairs, n_random=200).p_value > 0.02


def test_a_models_unembedding_is_taken_and_one_without_inverse_refused(llama):
    found = causal_inner_product(llama)
    assert found.model == llama.fingerprint
    expected = causal_inner_product(llama.unembed_matrix())
    assert torch.equal(found.root, expected.root) and expected.model == ""
    with pytest.raises(ValueError, match="rank 4 of 8"):
        causal_inner_product(unembedding(v=5))
    with pytest.raises(ValueError, match="width 3"):
        found.whiten(np.eye(3))


def test_shuffles_stay_within_groups():
    y, groups = np.array([0, 0, 1, 1]), ["p", "p", "q", "q"]
    seen = {tuple(permute_labels(y, groups, np.random.default_rng(i))) for i in range(20)}
    assert seen == {(0, 0, 1, 1), (1, 1, 0, 0)}
    X = np.random.default_rng(14).normal(size=(4, 5))
    table = cosine_table(
        {"a": X[0], "b": X[1]}, data={"a": (X, y), "b": (X, y)}, groups={"a": groups, "b": groups}, n_shuffles=20
    )
    assert table.chance[0, 1] == pytest.approx(1)  # two labellings only, each the other turned round
