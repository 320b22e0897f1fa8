import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from interp.acts.resampling import fold_numbers, grouped_folds
from interp.concepts.reading import nested
from interp.concepts.reading.nested import Cell, run, standard_error
from interp.concepts.reading.sweep import sweep
from interp.concepts.reading.values import sweep_values


def cells(n, d, n_cells, seed, effect=0.0, at=1):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    X = {f"resid_post.{i}": rng.normal(size=(n, d)) * np.logspace(-1, 1, d) + 5 for i in range(n_cells)}
    X[f"resid_post.{at}"][:, 0] += 0.1 * effect * y  # that coordinate's deviation is 0.1
    return X, y


QUICK = {"n_permutations": 0, "n_random": 2, "shares": ()}


def decisions(method, C, X, y, test):
    """Return what one reader, fitted the long way, says of the test rows."""
    if method == "mean_difference":
        return test @ (X[y == 1].mean(0) - X[y == 0].mean(0))
    mean, deviation = X.mean(0), X.std(0)
    fit = LogisticRegression(C=C, max_iter=10_000, tol=1e-9).fit((X - mean) / deviation, y)
    return fit.decision_function((test - mean) / deviation)


def slow_nested(X, y, folds, candidates):
    """Loop over outer folds, inner folds, cells and methods with scikit-learn; return area and winners."""
    total, weight, winners = 0.0, 0.0, []
    for k in range(folds.max() + 1):
        best = (-1.0, None)
        for method, C in candidates:
            for name in X:
                score, pairs = 0.0, 0
                for m in set(range(folds.max() + 1)) - {k}:
                    train, test = (folds != k) & (folds != m), folds == m
                    area = roc_auc_score(y[test], decisions(method, C, X[name][train], y[train], X[name][test]))
                    count = y[test].sum() * (1 - y[test]).sum()
                    score, pairs = score + count * area, pairs + count
                if score / pairs > best[0] + 1e-9:
                    best = (score / pairs, (name, method, C))
        name, method, C = best[1]
        train, test = folds != k, folds == k
        area = roc_auc_score(y[test], decisions(method, C, X[name][train], y[train], X[name][test]))
        count = y[test].sum() * (1 - y[test]).sum()
        total, weight = total + count * area, weight + count
        winners.append(best[1])
    return total / weight, winners


@pytest.mark.parametrize("groups", [None, np.arange(90) // 2])
def test_the_nested_score_equals_a_loop_over_scikit_learn(groups):
    X, y = cells(90, 6, 3, seed=1, effect=1.5)
    found = sweep(X, y, groups=groups, methods=["logistic", "mean_difference"], Cs=[0.01, 1.0], folds=4, **QUICK)
    number = np.arange(90) if groups is None else groups
    folds = fold_numbers(grouped_folds(number, 4, 0, y))
    area, winners = slow_nested(X, y, folds, [("logistic", 0.01), ("logistic", 1.0), ("mean_difference", 1.0)])
    assert found.auroc == pytest.approx(area, abs=1e-9)
    said = [(c.cell, c.method, c.C or 1.0) for c in found.chosen]
    assert said == winners


def test_a_planted_concept_is_found_where_it_is_and_stands_out_from_every_null():
    X, y = cells(240, 16, 6, seed=2, effect=3.0, at=4)
    bare = {name: np.random.default_rng(9).normal(size=x.shape) for name, x in X.items()}
    found = sweep(X, y, n_permutations=39, untrained=bare, shares=(0.1, 0.5), seed=3)
    assert found.choice.cell == "resid_post.4" and {c.cell for c in found.chosen} == {"resid_post.4"}
    assert found.best.direction().hook == "blocks.4.hook_resid_post"
    assert abs(float(found.best.direction().vector[0])) > 0.05
    assert 0.9 < found.auroc < 1 and found.interval[0] > 0.8 and found.interval[1] - found.interval[0] < 0.15
    assert found.p_value == pytest.approx(1 / 40)
    assert 0.4 < found.control < 0.6 and found.selectivity == pytest.approx(found.auroc - found.control)
    assert 0.45 < found.random_direction < 0.75
    assert found.untrained.interval[0] < 0.5 < found.untrained.interval[1]
    assert found.accuracy > 0.8 > 0.51 > found.majority
    assert found.gap == pytest.approx(found.in_sample - found.auroc) and found.in_sample > 0.95
    assert [p.share for p in found.learning_curve] == [0.1, 0.5, 1.0]
    assert found.learning_curve[0].auroc < found.learning_curve[-1].auroc == pytest.approx(found.auroc)
    assert len(found.table) == 18 and found.table[0].auroc == max(s.auroc for s in found.table)
    assert found.calibration.brier < found.calibration.brier_base == pytest.approx(0.25, abs=0.01)
    assert found.calibration.log_loss < found.calibration.log_loss_base
    assert json.loads(json.dumps(found.to_dict()))["choice"]["cell"] == "resid_post.4"


def test_the_same_seed_gives_the_same_sweep_and_another_seed_another_split():
    X, y = cells(80, 5, 2, seed=3)
    a, b, c = (sweep(X, y, methods=["mean_difference"], n_permutations=20, seed=s).to_dict() for s in (5, 5, 6))
    assert a == b
    assert a["fold_aurocs"] != c["fold_aurocs"] and a["null"] != c["null"]


def test_permutations_of_noise_give_uniform_p_values_and_intervals_that_cover_one_half():
    p_values, covered, naive = [], 0, 0
    for seed in range(40):
        X, y = cells(60, 8, 12, seed=100 + seed)
        found = sweep(X, y, methods=["mean_difference"], n_permutations=39, n_random=1, shares=(), seed=seed)
        p_values.append(found.p_value)
        covered += found.interval[0] <= 0.5 <= found.interval[1]
        naive += found.table[0].interval[0] <= 0.5
    assert covered >= 34
    assert naive < 30, "the best of the table should have looked better than chance"
    assert 0.35 < np.mean(p_values) < 0.65 and np.mean(np.array(p_values) <= 0.2) < 0.4


def template_leak(seed, n_templates=10):
    """Templates of 20 rows with one label each and an offset each, and no concept at all, in 4 cells."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_templates), 20)
    X = {
        f"resid_post.{i}": rng.normal(size=(n_templates, 32))[groups] + 0.5 * rng.normal(size=(len(groups), 32))
        for i in range(4)
    }
    return X, rng.permutation(np.arange(n_templates) % 2)[groups], groups


def test_templates_that_leak_between_folds_pass_for_a_concept_and_whole_templates_do_not():
    covered = 0
    for seed in range(8):
        X, y, groups = template_leak(seed)
        leaky = sweep(X, y, methods=["mean_difference"], **QUICK)
        assert leaky.auroc > 0.98 and leaky.interval[0] > 0.9
        found = sweep(X, y, groups=groups, methods=["mean_difference"], n_permutations=39, n_random=2, shares=())
        assert found.interval_by == "inverted permutation test" and found.n_groups == 10
        covered += found.interval[0] <= 0.5 <= found.interval[1]
    assert covered >= 7


def test_pairs_stay_in_one_fold_and_swap_within_themselves():
    rng = np.random.default_rng(4)
    pairs, y = np.repeat(np.arange(60), 2), np.tile([0, 1], 60)
    X = {"a": 3 * rng.normal(size=(60, 16))[pairs] + rng.normal(size=(120, 16))}
    split = sweep(X, y, methods=["mean_difference"], **QUICK)
    assert split.auroc < 0.35 and split.interval[1] < 0.5, "pairs on both sides should have misled it"
    together = sweep(X, y, pairs=pairs, methods=["mean_difference"], n_permutations=39, n_random=2)
    assert together.n_groups == 60
    assert together.interval[0] < 0.5 < together.interval[1]
    topics = np.repeat(np.arange(12), 10)
    both = sweep(X, y, pairs=pairs, groups=topics, methods=["mean_difference"], n_permutations=39, n_random=2)
    assert both.n_groups == 12


def test_groups_of_one_label_are_permuted_whole_and_rows_never_cross_folds(monkeypatch):
    X, y, groups = template_leak(1)
    seen = []
    original = nested.outcomes

    def note(scores, labels, folds, sorted_groups):
        seen.append((labels[0], folds, sorted_groups))
        return original(scores, labels, folds, sorted_groups)

    monkeypatch.setattr(nested, "outcomes", note)
    sweep(X, y, groups=groups, methods=["mean_difference"], n_permutations=39, n_random=2, shares=())
    assert len(seen) == 40
    for labels, folds, number in seen:
        for g in range(10):
            assert len(set(labels[number == g])) == 1 and len(set(folds[number == g])) == 1
        assert all(set(labels[folds == k]) == {0, 1} for k in range(5))
    assert len({tuple(labels[np.argsort(number, kind="stable")]) for labels, _, number in seen}) > 20


def test_ties_count_half():
    rng = np.random.default_rng(5)
    y = np.arange(60) % 2
    X = {"a": (rng.random((60, 1)) < 0.4 + 0.3 * y[:, None]).astype(float)}  # two values: most pairs are tied
    found = sweep(X, y, methods=["mean_difference"], **QUICK)
    area, _ = slow_nested(X, y, fold_numbers(grouped_folds(np.arange(60), 5, 0, y)), [("mean_difference", 1.0)])
    assert found.auroc == pytest.approx(area, abs=1e-9) and 0.5 < area < 0.9


def test_few_groups_with_both_labels_widen_the_interval_to_how_groups_differ():
    rng = np.random.default_rng(6)
    groups, y = np.repeat(np.arange(8), 40), np.tile([0, 1], 160)
    slope = np.array([3.0, 0, 2, 0, 3, 1, 2, 3])[groups]  # in some groups the concept is not to be seen
    X = {"a": np.stack([slope * y, rng.normal(size=320)], axis=1) + rng.normal(size=(320, 2))}
    found = sweep(X, y, groups=groups, methods=["mean_difference"], folds=4, n_permutations=99, n_random=2)
    assert "8 groups" in found.interval_by
    assert found.interval[1] - found.interval[0] > 0.3 and found.p_value < 0.05


def test_the_control_task_of_types_gives_random_labels_to_types():
    rng = np.random.default_rng(7)
    words = np.arange(240) % 24
    X = {"a": rng.normal(size=(24, 40))[words] + 0.1 * rng.normal(size=(240, 40))}  # a word is read off at once
    y = (words < 12).astype(int)
    found = sweep(X, y, types=words, methods=["mean_difference"], n_permutations=20, n_random=2)
    assert found.auroc > 0.95 and found.p_value < 0.05
    assert found.control > 0.9 and abs(found.selectivity) < 0.1, "a reader that knows the words is not selective"


def test_the_standard_error_doubles_the_variance_of_a_reader_of_noise_and_leaves_that_of_a_sure_one():
    variances, shares, same = np.full(5, 0.01), np.full(5, 0.2), np.ones((5, 5), dtype=bool)
    alone = (0.01 / 5) ** 0.5
    noise = np.where(np.eye(5) > 0, 1.0, 0.75)  # weights that share only their training rows, 3 of 4 folds
    assert standard_error(variances, shares, noise, same) == pytest.approx(2**0.5 * alone)
    assert standard_error(variances, shares, np.ones((5, 5)), same) == pytest.approx(alone)
    assert standard_error(variances, shares, noise, np.eye(5, dtype=bool)) == pytest.approx(alone)


def test_the_standard_error_is_the_spread_over_draws_for_noise_and_for_a_concept():
    for effect in (0.0, 1.5):
        areas, errors = [], []
        for seed in range(80):
            rng = np.random.default_rng([seed, 77])
            y = rng.permutation(np.arange(200) % 2)
            X = rng.normal(size=(200, 24))
            X[:, 0] += effect * y
            folds = fold_numbers(grouped_folds(np.arange(200), 5, seed, y))
            each = np.arange(200)
            true, _, _ = run({"a": Cell.of(torch.tensor(X))}, y, folds, each, each, [("mean_difference", 1.0)], 0, rng)
            areas.append(true.area)
            errors.append(true.spread)
        ratio = np.mean(np.square(errors)) ** 0.5 / np.std(areas, ddof=1)
        assert 0.78 < ratio < 1.28, f"effect {effect}: {ratio:.2f}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": np.repeat([0, 1, 2], 20)}, "5 folds need as many groups, there are 3"),
        ({"y": np.r_[np.ones(58, dtype=int), 0, 0]}, "one class only"),
        ({"y": np.ones(60, dtype=int)}, "both classes"),
        ({"folds": 2}, "at least 3"),
        ({"methods": ["logistik"]}, "logistic"),
        ({"methods": "lda"}, "methods are some of"),
        ({"Cs": [0.0]}, "positive"),
        ({"groups": np.arange(60) // 6}, "at least 39 permutations"),
        ({"X": {}}, "no cells"),
        ({"X": {"a": np.full((60, 3), np.nan)}}, "cell 'a': .*nan"),
        ({"X": {"a": np.zeros((50, 3))}}, "50 rows, but 60 labels"),
        ({"untrained": {"b": np.zeros((60, 4))}}, "other cells"),
        ({"shares": (1.5,)}, "between 0 and 1"),
    ],
)
def test_sweeps_that_mean_nothing_are_refused(change, message):
    X, y = cells(60, 4, 2, seed=8)
    given = {"X": X, "y": y, **QUICK, "methods": ["mean_difference"], **change}
    with pytest.raises(ValueError, match=message):
        sweep(given.pop("X"), given.pop("y"), **given)


def test_a_continuous_target_is_read_where_it_is_and_noise_is_not():
    rng = np.random.default_rng(11)
    groups, y = np.repeat(np.arange(40), 4), rng.normal(size=160) * 10 + 1900
    X = {f"resid_post.{i}": rng.normal(size=(160, 12)) for i in range(4)}
    X["resid_post.2"][:, 3] += 0.2 * (y - 1900)
    found = sweep_values(X, y, groups=groups, n_permutations=39)
    assert {c.cell for c in found.chosen} == {"resid_post.2"} == {found.table[0].cell}
    assert found.spearman > 0.8 and found.interval[0] > 0.5 and found.p_value == pytest.approx(1 / 40)
    # the best reader sees signal of deviation 2 in noise of 1: R2 = 4 / 5
    assert 0.65 < found.r2 < 0.85 and found.r2_null < 0.05
    assert float(found.best.vector[3]) > 0.9
    X = {name: np.random.default_rng(13).normal(size=(160, 12)) for name in ("a", "b")}
    nothing = sweep_values(X, y, groups=groups, n_permutations=39)
    assert nothing.interval[0] < 0 < nothing.interval[1] and nothing.p_value > 0.05
    assert json.loads(json.dumps(nothing.to_dict()))["n_groups"] == 40


def test_the_nested_ridge_equals_a_loop_over_scikit_learn():
    rng = np.random.default_rng(12)
    y = rng.normal(size=60)
    X = {"a": rng.normal(size=(60, 5)), "b": rng.normal(size=(60, 5)) + 0.6 * y[:, None]}
    found = sweep_values(X, y, Cs=[0.01, 1.0], folds=3, n_permutations=39)
    folds = fold_numbers(grouped_folds(np.arange(60), 3, 0))

    def said(name, C, train, test):
        mean, deviation = X[name][train].mean(0), X[name][train].std(0)
        fit = Ridge(alpha=1 / C).fit((X[name][train] - mean) / deviation, y[train])
        return fit.predict((X[name][test] - mean) / deviation)

    total, error, spread = 0.0, 0.0, 0.0
    for k in range(3):
        others = [m for m in range(3) if m != k]
        scores = {
            (name, C): sum(
                (folds == m).sum() * spearmanr(said(name, C, (folds != k) & (folds != m), folds == m), y[folds == m])[0]
                for m in others
            )
            for name in X
            for C in (0.01, 1.0)
        }
        best = max(scores, key=scores.get)
        assert (found.chosen[k].cell, found.chosen[k].C) == best
        outer = said(*best, folds != k, folds == k)
        total += (folds == k).sum() / 60 * spearmanr(outer, y[folds == k])[0]
        error += ((outer - y[folds == k]) ** 2).sum()
        spread += ((y[folds == k] - y[folds != k].mean()) ** 2).sum()
    assert found.spearman == pytest.approx(total, abs=1e-9)
    assert found.r2 == pytest.approx(1 - error / spread, abs=1e-5)


@pytest.mark.parametrize(("y", "message"), [(np.ones(60), "constant in a fold"), (np.full(60, np.inf), "finite")])
def test_targets_that_cannot_be_read_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        sweep_values({"a": np.random.default_rng(0).normal(size=(60, 3))}, y)
