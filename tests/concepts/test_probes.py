import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from interp.acts.direction import DirectionError
from interp.acts.resampling import auroc, grouped_folds
from interp.concepts.reading.probes import PROBES, Probe, evaluate_layers, evaluate_probe, fit_probe
from sae.io import FormatError


def concept(n, d, effect, seed, n_groups=20):
    """Rows of templates (groups) with both labels in each, the concept on one axis beside template offsets."""
    rng = np.random.default_rng(seed)
    y, groups = rng.permutation(np.arange(n) % 2), rng.integers(0, n_groups, n)
    X = rng.normal(size=(n, d)) + rng.normal(size=(n_groups, d))[groups]
    X[:, 0] += effect * y
    return X, y, groups


def split(X, y, groups, first_test):
    test = groups >= first_test
    names = np.array([f"template {g}" for g in groups])
    return {
        "X_train": X[~test], "y_train": y[~test], "groups_train": names[~test],
        "X_test": X[test], "y_test": y[test], "groups_test": names[test],
    }  # fmt: skip


def test_the_logistic_probe_equals_scikit_learns_pipeline_in_raw_units():
    X, y, _ = concept(300, 12, 1.5, seed=0)
    X = X * np.logspace(-3, 3, 12) + 50
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=50_000, tol=1e-10)).fit(X, y)
    probe = fit_probe(X, y)
    assert np.allclose(probe.decision(X).numpy(), pipeline.decision_function(X), atol=1e-5)


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_the_logistic_direction_does_not_depend_on_the_units_of_a_coordinate(C):
    X, y, _ = concept(300, 8, 2.0, seed=2)
    units = np.array([1e-3, 1.0, 10.0, 100.0, 1.0, 1.0, 1.0, 1e3])
    a, b = fit_probe(X, y, C=C), fit_probe(X * units, y, C=C)
    assert np.allclose(a.decision(X), b.decision(X * units), atol=1e-3)
    assert np.allclose(a.weight.numpy(), b.weight.numpy() * units, atol=1e-3)


def test_a_constant_coordinate_gets_no_weight():
    X, y, _ = concept(100, 5, 2.0, seed=1)
    X[:, 3] = 1e5 + 0.1
    assert abs(float(fit_probe(X, y).weight[3])) < 1e-6


@pytest.mark.parametrize("method", sorted(PROBES))
def test_every_probe_reads_the_planted_concept_and_points_to_label_one(method):
    train = concept(600, 32, 4.0, seed=4)
    probe = fit_probe(train[0], train[1], method=method)
    assert float(probe.direction().vector[0]) > 0.85
    assert auroc(probe.decision(train[0]), train[1]) > 0.97
    assert (probe.decision(train[0]) > 0).numpy().mean() == pytest.approx(0.5, abs=0.06)


def test_the_support_vector_machine_is_scikit_learns_in_raw_units():
    X, y, _ = concept(200, 6, 1.0, seed=3)
    X = X * np.logspace(-2, 2, 6) + 10
    pipeline = make_pipeline(StandardScaler(), LinearSVC(C=0.1, dual=False, tol=1e-8, max_iter=100_000)).fit(X, y)
    probe = fit_probe(X, y, method="svm", C=0.1)
    assert np.allclose(probe.decision(X).numpy(), pipeline.decision_function(X), atol=1e-3)


def test_lda_of_normal_classes_gives_their_log_odds():
    rng = np.random.default_rng(4)
    y = (np.arange(20_000) % 4 == 0).astype(int)  # a quarter is positive
    X = rng.normal(size=(20_000, 2)) @ np.array([[2.0, 0.0], [1.0, 0.5]]) + np.outer(y, [1.0, 1.0])
    covariance = np.array([[2.0, 0.0], [1.0, 0.5]]).T @ np.array([[2.0, 0.0], [1.0, 0.5]])
    weight = np.linalg.solve(covariance, [1.0, 1.0])
    probe = fit_probe(X, y, method="lda")
    assert np.allclose(probe.weight.numpy(), weight, rtol=0.06)
    assert probe.bias == pytest.approx(np.log(1 / 3) - weight @ [0.5, 0.5], rel=0.06)


def test_the_mean_difference_probes_threshold_lies_half_way():
    probe = fit_probe(np.array([[0.0, 0.0], [4.0, 0.0]]), [0, 1], method="mean_difference")
    assert probe.decision(np.array([[2.0, 9.0], [3.0, 0.0]])).tolist() == [0.0, 4.0]


def test_a_saved_probe_decides_as_before(tmp_path):
    X, y, _ = concept(80, 6, 2.0, seed=5)
    probe = fit_probe(X, y, hook="resid_post.3")
    probe.save(tmp_path / "p.safetensors")
    back = Probe.load(tmp_path / "p.safetensors")
    assert torch.equal(back.decision(X), probe.decision(X))
    assert back.direction().meta() == probe.direction().meta()
    probe.direction().save(tmp_path / "d.safetensors")
    with pytest.raises(FormatError, match="no probe"):
        Probe.load(tmp_path / "d.safetensors")


def test_a_probe_of_another_width_is_refused():
    X, y, _ = concept(80, 6, 2.0, seed=5)
    with pytest.raises(ValueError, match="width 5"):
        fit_probe(X, y).decision(X[:, :5])


def test_held_out_scores_of_a_planted_concept_stand_out_from_both_nulls():
    result = evaluate_probe(**split(*concept(800, 24, 4.0, seed=6), first_test=12), seed=1)
    # the best reader sees normal classes 4 apart, variance 2 with the templates' offsets: Phi(4 / 2) = 0.977
    assert 0.90 < result.auroc < 0.985
    assert result.interval[0] <= result.auroc <= result.interval[1] and result.interval[0] > 0.75
    assert 0.4 < result.control < 0.6 and len(result.control_scores) == 20
    assert result.p_value == pytest.approx(1 / 21)
    assert 0.4 < result.random_direction < 0.75
    assert (result.n_groups_train, result.n_groups) == (12, 8) and result.n_train + result.n_test == 800
    assert result.accuracy > 0.75


def test_the_same_seed_gives_the_same_result_and_another_seed_another_control():
    parts = split(*concept(200, 8, 1.0, seed=7), first_test=12)
    a, b, c = (evaluate_probe(**parts, seed=s, n_shuffles=3).to_dict() for s in (0, 0, 1))
    assert a == b
    assert a["auroc"] == c["auroc"] and a["control_scores"] != c["control_scores"]


def test_on_pure_noise_the_interval_covers_one_half_and_the_control_lies_there():
    covered, controls = 0, []
    for seed in range(30):
        result = evaluate_probe(
            **split(*concept(160, 16, 0.0, seed=100 + seed), first_test=12),
            method="mean_difference", n_shuffles=20, n_boot=300, seed=seed,
        )  # fmt: skip
        covered += result.interval[0] <= 0.5 <= result.interval[1]
        controls.append(result.control)
    assert covered >= 26
    assert 0.47 < np.mean(controls) < 0.53 and all(0.35 < c < 0.65 for c in controls)


def template_leak(seed, d=256):
    """10 templates x 20 rows, one label a template, an offset a template, and no concept at all."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(10), 20)
    X = rng.normal(size=(10, d))[groups] + 0.5 * rng.normal(size=(200, d))
    return X, rng.permutation(np.arange(10) % 2)[groups], groups


def test_templates_on_both_sides_pass_for_a_concept_and_whole_templates_do_not():
    leaky, honest = [], []
    for seed in range(10):
        X, y, groups = template_leak(seed)
        rows = np.random.default_rng(seed).permutation(200)
        train, test = rows[40:], rows[:40]
        leaky.append(auroc(fit_probe(X[train], y[train], method="mean_difference").decision(X[test]), y[test]))
        for train, test in grouped_folds(groups, 5, seed=seed, y=y):
            honest.append(auroc(fit_probe(X[train], y[train], method="mean_difference").decision(X[test]), y[test]))
    assert np.mean(leaky) > 0.99
    assert 0.35 < np.mean(honest) < 0.65


def test_a_group_on_both_sides_is_refused():
    X, y, groups = template_leak(0)
    rows = np.random.default_rng(0).permutation(200)
    train, test = rows[40:], rows[:40]
    with pytest.raises(ValueError, match="10 groups are in both"):
        evaluate_probe(X[train], y[train], X[test], y[test], groups_train=groups[train], groups_test=groups[test])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "logistik"}, "logistic"), ({"C": 0.0}, "must be positive"), ({"n_shuffles": 0}, "at least 1")],
)
def test_options_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_probe(**split(*concept(60, 4, 1.0, seed=8), first_test=10), **change)


def test_layers_are_scored_by_the_same_rules_and_carry_their_hook_point():
    X, y, groups = concept(240, 8, 3.0, seed=9)
    parts = split(X, y, groups, 12)
    noise = np.random.default_rng(0).normal(size=X.shape)
    test = groups >= 12
    found = evaluate_layers(
        {"resid_post.1": noise[~test], "resid_post.2": parts["X_train"]}, parts["y_train"],
        {"resid_post.1": noise[test], "resid_post.2": parts["X_test"]}, parts["y_test"],
        groups_train=parts["groups_train"], groups_test=parts["groups_test"], n_shuffles=3,
    )  # fmt: skip
    assert found["resid_post.2"].auroc > 0.9 > 0.7 > found["resid_post.1"].auroc
    assert found["resid_post.2"].probe.direction().hook == "blocks.2.hook_resid_post"
    with pytest.raises(DirectionError):
        found["resid_post.2"].probe.direction().for_model(_model())


def _model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=20, n_positions=16)).eval()
