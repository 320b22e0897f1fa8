import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from interp.acts.direction import Direction, DirectionError
from interp.concepts.erasing import erasure
from interp.concepts.erasing.erasure import (
    LeaceFitter,
    OracleEraser,
    fit_leace,
    fit_oracle,
    fit_projection,
    load_eraser,
    project_out,
)
from interp.concepts.erasing.guarded import fit_inlp, guardedness
from interp.concepts.steering.context import steer
from interp.model.hooks import reading
from sae.extras import MissingError
from sae.io import FormatError, load_tensors, save_tensors

BENCH = Path(__file__).parents[2] / "experiments" / "bench"


def planted(n=400, d=12, classes=2, effect=3.0, seed=0):
    """Return rows of correlated noise far from the origin with one offset a class, and their labels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    offsets = torch.randn(classes, d, generator=g, dtype=torch.float64) * effect
    y = torch.randint(classes, (n,), generator=g)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + offsets[y] + 5, y.numpy()


def spread(X):
    return float((X - X.mean(0)).square().sum(1).mean())


def gap(X, y):
    means = torch.stack([X[y == c].mean(0) for c in np.unique(y)])
    return float((means - means[0]).abs().max())


def in_sample_gain(X, y):
    """Return how much of the label's variance least squares explains."""
    design = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
    target = torch.from_numpy(y).double()[:, None]
    fitted = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    return float(1 - (target - fitted).square().sum() / (target - target.mean()).square().sum())


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_class_means_are_equal_after_and_no_linear_reader_is_left(classes, shrinkage):
    X, y = planted(classes=classes)
    eraser = fit_leace(X, y, shrinkage=shrinkage)
    after = eraser.apply(X)
    assert eraser.rank == classes - 1
    assert gap(X, y) > 1 and gap(after, y) < 1e-10
    assert in_sample_gain(X, y) > 0.3 and abs(in_sample_gain(after, y)) < 1e-9
    torch.testing.assert_close(after.mean(0), X.mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(eraser.apply(after), after, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_continuous_concept_is_erased_whatever_its_unit(scale):
    X, _ = planted()
    g = torch.Generator().manual_seed(9)
    z = (X[:, :2] @ torch.randn(2, 2, generator=g, dtype=torch.float64) + torch.randn(400, 2, generator=g)) * scale

    def correlation(rows):
        both = torch.corrcoef(torch.cat([rows, z], 1).T)
        return float(both[:12, 12:].abs().max())

    eraser = fit_leace(X, z)
    assert eraser.rank == 2
    assert correlation(X) > 0.5 and correlation(eraser.apply(X)) < 1e-10
    single = fit_leace(X, z[:, 0])
    assert single.rank == 1 and abs(float(np.corrcoef(single.apply(X)[:, 0], z[:, 0])[0, 1])) < 1e-10


@given(seed=st.integers(0, 10_000), shift=st.floats(-0.9, 0.9))
@settings(max_examples=25, deadline=None)
def test_no_other_map_that_equalises_the_means_changes_less_in_any_inner_product(seed, shift):
    X, y = planted(seed=3)
    eraser = fit_leace(X, y, shrinkage=False)
    g = torch.Generator().manual_seed(seed)
    offset = (X[y == 1].mean(0) - X[y == 0].mean(0))[:, None]
    reader = torch.randn(12, 1, generator=g, dtype=torch.float64) * abs(shift) + eraser.right.T
    other = X - (X - X.mean(0)) @ (reader @ torch.linalg.inv(offset.T @ reader)) @ offset.T
    assert gap(other, y) < 1e-8
    root = torch.randn(12, 12, generator=g, dtype=torch.float64)
    for metric in (torch.eye(12, dtype=torch.float64), root @ root.T):
        least = ((eraser.apply(X) - X) @ metric * (eraser.apply(X) - X)).sum()
        assert float(((other - X) @ metric * (other - X)).sum()) >= float(least) * (1 - 1e-9)


def test_the_oracle_changes_least_then_leace_then_projection():
    X, y = planted()
    leace, oracle, flat = fit_leace(X, y, shrinkage=False), fit_oracle(X, y), fit_projection(X, y)
    precision = torch.linalg.inv(torch.cov(X.T))
    for metric in (torch.eye(12, dtype=torch.float64), precision):
        moved = [rows - X for rows in (oracle.apply(X, y), leace.apply(X), flat.apply(X))]
        costs = [float((m @ metric * m).sum()) for m in moved]
        assert costs[0] < 0.95 * costs[1] and costs[1] < 0.95 * costs[2]
    for rows in (oracle.apply(X, y), flat.apply(X)):
        assert gap(rows, y) < 1e-10
        torch.testing.assert_close(rows.mean(0), X.mean(0), rtol=0, atol=1e-10)


def test_the_oracle_is_the_residual_of_a_regression_on_the_label():
    X, y = planted(classes=3)
    names = np.array(["red", "green", "blue"])[y]
    oracle = fit_oracle(X, names)
    expected = X.clone()
    for c in range(3):
        expected[y == c] += X.mean(0) - X[y == c].mean(0)
    torch.testing.assert_close(oracle.apply(X, names), expected, rtol=0, atol=1e-9)
    assert oracle.classes == ("blue", "green", "red")
    with pytest.raises(ValueError, match="none"):
        oracle.apply(X[:1], ["yellow"])


def test_the_fit_does_not_depend_on_batches_or_the_order_of_merging():
    X, y = planted(classes=3)
    whole = fit_leace(X, y)
    parts = [LeaceFitter([0, 1, 2]).add(X[a:b], y[a:b]) for a, b in ((0, 7), (7, 250), (250, 400))]
    streamed = LeaceFitter([0, 1, 2]).merge(parts[2]).merge(parts[0]).merge(parts[1]).value()
    torch.testing.assert_close(streamed.left @ streamed.right, whole.left @ whole.right, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(streamed.centre, whole.centre, rtol=1e-12, atol=1e-12)
    assert streamed.n == whole.n == 400 and streamed.data != whole.data


def test_float64_moments_survive_a_mean_far_from_zero():
    X, y = planted()
    far = fit_leace(X + 1e6, y)
    near = fit_leace(X, y)
    torch.testing.assert_close(far.left @ far.right, near.left @ near.right, rtol=1e-5, atol=1e-6)


def test_shrinkage_goes_to_a_sphere_with_few_rows_and_vanishes_with_many():
    from interp.concepts.erasing.moments import shrunk

    X, _ = planted(n=6, d=40)
    S = torch.cov(X.T, correction=0)
    few, many = shrunk(S, 6), shrunk(S, 10**9)
    assert torch.trace(few) == pytest.approx(float(torch.trace(S)))
    assert torch.linalg.matrix_rank(S) == 5 and torch.linalg.matrix_rank(few) == 40
    torch.testing.assert_close(many, S, rtol=1e-5, atol=1e-5)
    trace = torch.trace(S)
    a = 1 - trace**2 / 6 / (S.square().sum() - trace**2 / 40)
    torch.testing.assert_close(few, a * S + (1 - a) * trace / 40 * torch.eye(40, dtype=torch.float64))


def test_an_oblique_map_that_would_inflate_the_variance_is_bounded_and_still_guards():
    S = torch.diag(torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64))
    left = torch.tensor([[1.0], [0], [0]], dtype=torch.float64)
    right = torch.tensor([[1.0, 0, 3.0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.trace((eye - left @ right) @ S @ (eye - left @ right).T) > torch.trace(S)
    bounded = erasure._bounded(left, right, S)
    kept = eye - left @ bounded
    assert torch.trace(kept @ S @ kept.T) == pytest.approx(6.0)
    assert float(bounded @ left) == pytest.approx(1.0) and 0 < float(bounded[0, 2]) < 3
    harmless = torch.tensor([[1.0, 0.1, 0]], dtype=torch.float64)
    assert torch.equal(erasure._bounded(left, harmless, S), harmless)


@pytest.mark.parametrize("n", [6, 12, 30, 400])
def test_the_total_variance_never_grows(n):
    X, y = planted(n=n)
    assert spread(fit_leace(X, y).apply(X)) <= spread(X) * (1 + 1e-9)


def test_projection_takes_out_the_span_of_dependent_vectors_of_any_length():
    g = torch.Generator().manual_seed(4)
    rows = torch.randn(2, 6, generator=g)
    eraser = project_out(torch.stack([rows[0] * 100, rows[1], rows[0] + rows[1]]))
    X = torch.randn(5, 6, generator=g)
    after = eraser.apply(X)
    assert eraser.rank == 2 and after.dtype == torch.float32
    torch.testing.assert_close(after @ rows.T, torch.zeros(5, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(eraser.apply(after), after, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="length zero"):
        project_out(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="at least one"):
        project_out([])


def test_directions_of_one_place_give_it_to_the_projection_and_of_two_are_refused():
    made = [
        Direction(vector=torch.eye(4)[i], hook=f"blocks.{i}.hook_resid_post", method="", scale=1.0, norm=1.0, model="m")
        for i in range(2)
    ]
    alone = project_out(made[0])
    assert (alone.hook, alone.model, alone.rank) == ("blocks.0.hook_resid_post", "m", 1)
    with pytest.raises(ValueError, match="several hook points"):
        project_out(made)


def test_a_fresh_probe_falls_to_chance_on_rows_the_eraser_never_saw():
    X, y = planted(n=4000, effect=1.5)
    for eraser in (fit_leace(X[:3000], y[:3000]), fit_projection(X[:3000], y[:3000])):
        found = guardedness(eraser, X[3000:], y[3000:], n_shuffles=5, n_placebos=2)
        assert found.before > 0.9 and found.before_interval[0] > 0.8
        assert found.at_chance and found.after < 0.56 and abs(found.control - 0.5) < 0.05
        assert found.placebo > found.before - 0.15
        assert 0 < found.change <= found.change_projection * (1 + 1e-9) < found.variance
        assert (found.change == pytest.approx(found.change_projection)) == (eraser.method == "projection")
    leace = guardedness(fit_leace(X[:3000], y[:3000]), X[3000:], y[3000:], n_shuffles=1, n_placebos=1)
    oracle = guardedness(fit_oracle(X[:3000], y[:3000]), X[3000:], y[3000:], n_shuffles=1, n_placebos=1)
    assert oracle.change < leace.change < leace.change_projection
    assert json.loads(json.dumps(leace.to_dict()))["at_chance"] is True


def test_an_eraser_of_few_rows_leaks_as_much_as_its_sampling_error_allows():
    X, y = planted(n=4200, d=48, effect=2.0)
    few = guardedness(fit_leace(X[:200], y[:200]), X[200:], y[200:], n_shuffles=2, n_placebos=1)
    many = guardedness(fit_leace(X[:3200], y[:3200]), X[3200:], y[3200:], n_shuffles=2, n_placebos=1)
    assert few.leak and many.leak
    assert not few.at_chance and 0.6 < few.after < few.leak + 0.05 < few.before
    assert many.after < 0.6 and many.leak < 0.6


def test_what_rounding_leaves_of_an_erased_coordinate_is_not_read():
    g = torch.Generator().manual_seed(6)
    y = np.arange(400) % 2
    X = torch.randn(400, 8, generator=g, dtype=torch.float64)
    X[:, 0] = torch.from_numpy(y) * 7.3 + 1e3
    for centre in (None, X.mean(0)):
        found = guardedness(project_out(torch.eye(8)[:1], centre=centre), X, y, n_shuffles=2, n_placebos=1)
        assert found.before == 1.0 and found.at_chance and found.leak is None


def test_guardedness_is_not_judged_on_the_fitting_rows_nor_across_a_group():
    X, y = planted(n=200)
    with pytest.raises(ValueError, match="fitted on"):
        guardedness(fit_leace(X, y), X, y)
    with pytest.raises(ValueError, match="group"):
        guardedness(fit_leace(X[:100], y[:100]), X[100:], y[100:], groups=[0] * 50 + [1] * 50)


def test_iterative_nullspace_stops_at_chance_and_takes_out_more_than_leace():
    X, y = planted(n=3000, effect=1.0)
    inlp = fit_inlp(X[:2000], y[:2000])
    areas = inlp.options["held_out_auroc"]
    assert inlp.options["at_chance"] and areas[0] > 0.8 and areas[-1] < 0.56 and inlp.rank >= 1
    assert inlp.options["rounds"] == len(areas) - 1
    torch.testing.assert_close(inlp.right @ inlp.left, torch.eye(inlp.rank, dtype=torch.float64), rtol=0, atol=1e-9)
    found = guardedness(inlp, X[2000:], y[2000:], n_shuffles=2, n_placebos=1)
    assert found.before > 0.8 and found.after < 0.58
    assert found.change > guardedness(fit_leace(X[:2000], y[:2000]), X[2000:], y[2000:], n_shuffles=1).change
    single = fit_inlp(X[:2000], y[:2000], rounds=1)
    assert single.rank == 1 and len(single.options["held_out_auroc"]) == 2


def test_iterative_nullspace_of_several_classes_and_of_nothing():
    X, y = planted(n=900, classes=3, effect=1.5)
    eraser = fit_inlp(X, np.array(["a", "b", "c"])[y])
    assert eraser.options["held_out_auroc"][0] > 0.8 > eraser.options["held_out_auroc"][-1]
    noise, labels = planted(n=300, effect=0.0)
    with pytest.raises(ValueError, match="nothing to erase"):
        fit_inlp(noise, labels)
    with pytest.raises(ValueError, match="labels"):
        fit_inlp(X, X[:, 0])


def test_groups_that_carry_the_label_stay_on_one_side_of_the_nullspace_probes():
    g = torch.Generator().manual_seed(2)
    offsets = torch.randn(40, 64, generator=g, dtype=torch.float64) * 5  # templates: they tell the label, no concept
    groups = np.repeat(np.arange(40), 20)
    X = offsets[groups] + torch.randn(800, 64, generator=g, dtype=torch.float64)
    y = (groups % 2).astype(int)
    assert fit_inlp(X, y, rounds=1).options["held_out_auroc"][0] > 0.95
    with pytest.raises(ValueError, match="nothing to erase"):
        fit_inlp(X, y, groups)


@pytest.mark.parametrize("make", [fit_leace, fit_projection, fit_oracle, fit_inlp])
def test_an_eraser_comes_back_from_its_file_bit_for_bit(tmp_path, make):
    X, y = planted(n=300)
    eraser = make(X, y)
    eraser.save(tmp_path / "e.safetensors")
    back = load_eraser(tmp_path / "e.safetensors")
    arguments = (X, y) if isinstance(eraser, OracleEraser) else (X,)
    assert torch.equal(back.apply(*arguments), eraser.apply(*arguments))
    assert (back.method, back.data, back.n, dict(back.options)) == (
        eraser.method, eraser.data, 300, dict(eraser.options),
    )  # fmt: skip
    assert type(back) is type(eraser) and back.versions["torch"] == str(torch.__version__)


@pytest.mark.parametrize(
    "change",
    [{"kind": "else"}, {"form": "other"}, {"form": ["x"]}, {"hook": 3}, {"n": "1"}, {"extra": 1}, {"options": 2}],
)
def test_a_malformed_eraser_is_a_format_error(tmp_path, change):
    X, y = planted(n=50)
    fit_leace(X, y).save(tmp_path / "e.safetensors")
    tensors, meta = load_tensors(tmp_path / "e.safetensors")
    save_tensors(tmp_path / "bad.safetensors", tensors, meta | change)
    with pytest.raises(FormatError):
        load_eraser(tmp_path / "bad.safetensors")
    save_tensors(tmp_path / "bad.safetensors", tensors | {"left": tensors["left"][:3]}, meta)
    with pytest.raises(FormatError):
        load_eraser(tmp_path / "bad.safetensors")
    save_tensors(tmp_path / "bad.safetensors", tensors | {"left": tensors["left"][:, 0]}, meta)
    with pytest.raises(FormatError):
        load_eraser(tmp_path / "bad.safetensors")
    with pytest.raises(MissingError):
        load_eraser(tmp_path / "none.safetensors")


def test_an_eraser_acts_inside_a_model_and_another_model_refuses_it(llama, build):
    ids = torch.randint(3, 100, (40, 6), generator=torch.Generator().manual_seed(1))
    rows = []
    with reading(llama, ["resid_post.1"], lambda name, value: rows.append(value.clone())):
        llama.run(ids)
    X, y = rows[0].reshape(-1, 32), np.arange(240) % 2
    eraser = fit_leace(X, y, hook="resid_post.1", model=llama)
    assert (eraser.hook, eraser.model) == ("blocks.1.hook_resid_post", llama.fingerprint)
    inside = []
    with (
        steer(llama, eraser.for_model(llama).operation("all")),
        reading(llama, ["resid_post.1"], lambda name, value: inside.append(value.clone())),
    ):
        llama.run(ids)
    torch.testing.assert_close(inside[0], eraser.apply(rows[0]), rtol=1e-4, atol=1e-5)
    assert gap(X, y) > 0.01 > 1e-4 > gap(inside[0].reshape(-1, 32), y)
    other = build("llama", seed=5)
    with pytest.raises(DirectionError, match="force=True"):
        eraser.for_model(other)
    with pytest.raises(DirectionError, match="not at"):
        eraser.for_model(llama, hook="resid_post.0")
    assert eraser.for_model(other, force=True).model != eraser.model
    alone = fit_leace(*planted(n=50))
    with pytest.raises(ValueError, match="no hook point"):
        alone.operation()
    with pytest.raises(DirectionError, match="width"):
        alone.for_model(llama, hook="resid_post.0", force=True)


def test_what_cannot_be_erased_is_refused_with_the_reason():
    X, y = planted(n=40)
    with pytest.raises(ValueError, match="does not vary"):
        LeaceFitter().add(X, np.zeros(40, dtype=int)).value()
    with pytest.raises(ValueError, match="does not vary"):
        LeaceFitter(["a", "b", "c"]).add(X, np.array(["a", "b"])[y]).value()
    with pytest.raises(ValueError, match="classes="):
        LeaceFitter().add(X, np.array(["a", "b"])[y])
    with pytest.raises(ValueError, match="at least 2"):
        LeaceFitter().add(X[:1], y[:1]).value()
    with pytest.raises(ValueError, match="39"):
        fit_leace(X, y[:39])
    with pytest.raises(ValueError, match="nan"):
        fit_leace(X, torch.full((40,), float("nan")))
    with pytest.raises(ValueError, match="svd_tol"):
        fit_leace(X, y, svd_tol=0.0)
    with pytest.raises(ValueError, match="width 12"):
        fit_leace(X, y).apply(X[:, :5])


CASES = ("binary", "classes", "continuous", "few rows", "unshrunk")


def parity_case(case) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return rows, a concept and options that the package of the paper's authors is given too."""
    X, y = planted(n=15 if case == "few rows" else 300, classes=4 if case == "classes" else 2, effect=1.0)
    z = torch.from_numpy(y).double()
    if case == "classes":
        z = torch.nn.functional.one_hot(torch.from_numpy(y)).double()
    if case == "continuous":
        z = X[:, :2] + torch.randn(300, 2, generator=torch.Generator().manual_seed(5))
    return X, z.contiguous(), {"shrinkage": case != "unshrunk"}


@pytest.fixture(scope="module")
def their_erasers(tmp_path_factory):
    """Return the folder in which every case has been through the concept-erasure package."""
    python = BENCH / ".venvs" / "concept_erasure" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment of concept-erasure: make it with experiments/bench/concept_peers.sh")
    folder = tmp_path_factory.mktemp("erasers")
    for case in CASES:
        X, z, options = parity_case(case)
        (folder / case).mkdir()
        save_file({"x": X, "z": z}, folder / case / "in.safetensors")
        (folder / case / "options.json").write_text(json.dumps(options))
    command = [str(python), str(BENCH / "concept_peer.py"), "erase", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120, capture_output=True)
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_the_maps_are_those_of_the_concept_erasure_package(their_erasers, case):
    X, z, options = parity_case(case)
    theirs = load_file(their_erasers / case / "out.safetensors")
    eraser, oracle = fit_leace(X, z, **options), fit_oracle(X, z)
    scale = float((X - X.mean(0)).abs().max())
    torch.testing.assert_close(eraser.apply(X), theirs["leace"], rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(eraser.left @ eraser.right, theirs["taken"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(oracle.apply(X, z), theirs["oracle"], rtol=0, atol=1e-9 * scale)
    assert float((eraser.apply(X) - X).abs().max()) > 0.1
