"""Planted worlds and the scores against them."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sae import synthetic
from sae.synthetic import PRESETS, Planted, best_matches, mcc, mmcs, planted

TREES: dict[str, Any] = {"d_in": 16, "n_features": 60, "active": 6, "hierarchy": (4, 3, 2), "seed": 3}
LONE: dict[str, Any] = {"d_in": 8, "n_features": 30, "seed": 1}
LINKED: dict[str, Any] = {"d_in": 16, "n_features": 60, "active": 6, "correlation": 0.6, "rank": 3, "seed": 3}


def also(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**base, **more}


def drawn_at_once(world: Planted, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what an independent world has drawn since its first version: whole tables, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, len(world.rates), generator=generator) < world.rates
    lengths = 1 + world.spread * torch.randn(active.shape, generator=generator).abs()
    codes = active * lengths * world.unit
    noise = world.noise * torch.randn(n, world.features.shape[1], generator=generator)
    return codes @ world.features + world.offset + noise, codes


@pytest.mark.parametrize("piece", [256, synthetic.PIECE])
def test_independent_worlds_keep_the_draws_of_the_first_version(piece, monkeypatch):
    monkeypatch.setattr(synthetic, "PIECE", piece)
    for options in (LONE, also(LONE, d_in=24, n_features=48, active=3), also(LONE, n_features=7, seed=2)):
        world = planted(**options)
        generator = torch.Generator().manual_seed(options["seed"] * 7_919 + 104_729)
        features = F.normalize(torch.randn(options["n_features"], options["d_in"], generator=generator), dim=1)
        assert torch.equal(world.features, features)
        assert torch.equal(world.offset, 0.3 * torch.randn(options["d_in"], generator=generator) * world.unit)
        raw = Planted(
            features=features, rates=world.rates, offset=world.offset / world.unit, unit=1.0, spread=0.5, noise=0.02
        )
        norm = float(drawn_at_once(raw, 16_384, options["seed"] + 1)[0].square().sum(1).mean())
        assert world.unit == pytest.approx((options["d_in"] / norm) ** 0.5, rel=1e-6)
        for n in (1, 2, 15, 16, 17, 31, 32, 33, 101):
            acts, codes = world.sample(n, seed=n)
            wanted, wanted_codes = drawn_at_once(world, n, n)
            assert torch.equal(codes, wanted_codes) and torch.equal(acts, wanted)
        batches = world.batches(9, seed=4)
        assert torch.equal(next(batches), drawn_at_once(world, 9, 4 * 1_000_003)[0])
        assert torch.equal(next(batches), drawn_at_once(world, 9, 4 * 1_000_003 + 1)[0])


def test_a_planted_world_is_what_it_says():
    world = planted(d_in=32, n_features=64, active=5, exponent=0.5, spread=0.5, offset=0.3, noise=0.02, seed=4)
    acts, codes = world.sample(20_000, seed=9)
    assert float((codes > 0).sum(1).float().mean()) == pytest.approx(5, rel=0.03)
    assert float(acts.square().sum(1).mean()) == pytest.approx(32, rel=0.03)
    rates = (codes > 0).float().mean(0)
    assert float(rates[0] / rates[63]) == pytest.approx(8, rel=0.25)  # 64 ** 0.5
    assert float(codes[codes > 0].min()) >= world.unit * 0.999
    rest = acts - codes @ world.features - world.offset
    assert float(rest.std()) == pytest.approx(world.noise, rel=0.02)


def test_seeds_decide_every_draw_and_batches_are_fresh():
    world, same, other = (planted(d_in=16, n_features=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(world.features, same.features) and not torch.equal(world.features, other.features)
    assert torch.equal(world.sample(5, seed=3)[0], same.sample(5, seed=3)[0])
    batches = world.batches(8, seed=3)
    first, second = next(batches), next(batches)
    assert not torch.equal(first, second) and torch.equal(first, next(same.batches(8, seed=3)))


def test_the_matching_score_is_the_best_one_to_one_matching(oracles):
    left, right = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.randn(6, 4)
    cosines = (F.normalize(left.double(), dim=1) @ F.normalize(right.double(), dim=1).t()).abs().numpy()
    assert mcc(left, right) == pytest.approx(oracles.best_matching(cosines))
    assert mmcs(left, right) == pytest.approx(cosines.max(0).mean())


def test_scores_are_one_for_the_truth_in_any_order_sign_and_length_and_count_what_is_not_found():
    truth = torch.eye(4)
    learned = torch.cat([-3 * truth.flip(0), torch.ones(2, 4)])
    assert mcc(learned, truth) == pytest.approx(1) and mmcs(learned, truth) == pytest.approx(1)
    assert mcc(truth[:2], truth) == pytest.approx(0.5) and mmcs(truth[:2], truth) == pytest.approx(0.5)


@pytest.mark.parametrize("options", [TREES, LINKED, also(TREES, correlation=0.6, rank=3)])
def test_hierarchies_and_correlations_leave_every_rate_as_it_is(options):
    world = planted(**options)
    assert torch.equal(world.rates, planted(d_in=16, n_features=60, active=6, seed=3).rates)
    n = 60_000
    acts, codes = world.sample(n, seed=2)
    off = ((codes > 0).double().mean(0) - world.rates) / (world.rates * (1 - world.rates) / n).sqrt()
    assert float(off.abs().max()) < 4.5 and float(off.std()) < 1.4  # in standard errors
    assert float(acts.square().sum(1).mean()) == pytest.approx(16, rel=0.03)
    assert float(codes[codes > 0].min()) >= world.unit * 0.999
    rest = acts - codes @ world.features - world.offset
    assert float(rest.std()) == pytest.approx(world.noise, rel=0.02)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_children_fire_only_when_their_parents_do_and_trees_have_the_shape_asked_for(correlation, oracles):
    world = planted(**TREES, correlation=correlation, rank=1)
    assert world.parents is not None
    parents = world.parents.numpy()
    depths = [oracles.depth_in_forest(parents, i) for i in range(60)]
    assert np.bincount(depths).tolist() == [4 + 60 - 52, 12, 36]
    assert set(np.bincount(parents[parents >= 0]).tolist()) == {0, 3}
    _, codes = world.sample(30_000, seed=5)
    fires = codes > 0
    child = world.parents >= 0
    assert not bool((fires[:, child] & ~fires[:, world.parents[child]]).any())
    free = planted(d_in=16, n_features=60, active=6, seed=3).sample(30_000, seed=5)[1] > 0
    assert bool((free[:, child] & ~free[:, world.parents[child]]).any())  # without a hierarchy they do
    # siblings are independent given their parent, unless factors are shared
    first, second = (world.parents == world.parents[child][0]).nonzero().squeeze(1)[:2]
    there = fires[fires[:, world.parents[first]]][:, [first, second]].double()
    joint, apart = float(there.prod(1).mean()), float(there.mean(0).prod())
    assert (abs(joint - apart) < 0.03) == (correlation == 0)


def test_features_fire_together_as_often_as_a_gaussian_copula_says():
    from scipy.stats import multivariate_normal, norm

    world = planted(**LINKED)
    assert world.loadings is not None
    _, codes = world.sample(100_000, seed=2)
    fires, rates = (codes > 0).double(), world.rates.double().numpy()
    hidden = (world.loadings @ world.loadings.t()).double().numpy()
    assert np.diag(hidden) == pytest.approx(0.6, abs=1e-6) and hidden.min() < -0.4
    for i, j in [(0, 1), (0, 2), (1, 2), (3, 5), (0, 30)]:
        cov = [[1, hidden[i, j]], [hidden[i, j], 1]]
        wanted = multivariate_normal.cdf(norm.ppf(rates[[i, j]]), cov=np.array(cov))  # type: ignore[arg-type]
        found = float((fires[:, i] * fires[:, j]).mean())
        assert found == pytest.approx(wanted, abs=4 * (wanted / 100_000) ** 0.5)
    i, j = divmod(int(np.argmax(np.triu(hidden, 1))), 60)  # the pair that is tied most closely
    assert float((fires[:, i] * fires[:, j]).mean()) > 2 * rates[[i, j]].prod()


def test_tokens_do_not_know_of_each_other_and_roots_without_factors_are_independent():
    world = planted(**TREES)
    assert world.parents is not None
    fires = (world.sample(40_000, seed=1)[1] > 0).double()
    top = world.parents < 0
    variance = float((world.rates * (1 - world.rates))[top].sum())
    assert float(fires[:, top].sum(1).var()) == pytest.approx(variance, rel=0.04)
    assert abs(float(torch.corrcoef(torch.stack([fires[:-1, 0], fires[1:, 0]]))[0, 1])) < 0.02


@pytest.mark.parametrize("options", [TREES, LINKED, LONE])
def test_sparse_samples_are_the_dense_ones_and_seeds_decide_them(options):
    world = planted(**options)
    acts, codes = world.sample(200, seed=4)
    sparse, values, active = world.sample_sparse(200, seed=4)
    assert torch.equal(acts, sparse) and torch.equal(values, codes[codes > 0])
    assert torch.equal(active.flat, codes.flatten().nonzero().squeeze(1)) and active.shape == tuple(codes.shape)
    assert torch.equal(acts, planted(**options).sample(200, seed=4)[0])
    assert not torch.equal(acts, world.sample(200, seed=5)[0])


def test_no_draw_is_larger_than_a_piece(monkeypatch):
    drawn = []
    for name in ("_rand", "_randn"):
        own = getattr(synthetic, name)
        monkeypatch.setattr(
            synthetic, name, lambda shape, *rest, own=own: drawn.append(np.prod(shape)) or own(shape, *rest)
        )
    monkeypatch.setattr(synthetic, "PIECE", 2048)
    for options in (also(TREES, correlation=0.5), TREES, also(LONE, n_features=100, active=2)):
        world = planted(**options)
        drawn.clear()
        world.sample_sparse(600, seed=1)
        assert max(drawn) <= 600 * 16  # the noise, or what fires; a table would have 36,000 or more
    with pytest.raises(ValueError, match=r"6\.0 GiB; draw fewer tokens, or use sample_sparse"):
        monkeypatch.setattr(synthetic, "DENSE", 1000)
        planted(**TREES).sample(26_843_546, seed=0)
    world = planted(d_in=2, n_features=100, active=2, seed=1)
    acts, codes = world.sample(10, seed=3)
    assert torch.equal(codes, drawn_at_once(world, 10, 3)[1])
    acts = world.sample_sparse(11, seed=3)[0]  # beyond the bound: the same, by sparse products
    torch.testing.assert_close(acts, drawn_at_once(world, 11, 3)[0])


def test_orthogonal_directions_are_orthogonal_as_far_as_they_fit():
    few = planted(d_in=16, n_features=12, directions="orthogonal", seed=1).features
    torch.testing.assert_close(few @ few.t(), torch.eye(12), atol=1e-6, rtol=0)
    many = planted(d_in=16, n_features=40, directions="orthogonal", seed=1).features
    for begin, end in ((0, 16), (16, 32), (32, 40)):
        torch.testing.assert_close(many[begin:end] @ many[begin:end].t(), torch.eye(end - begin), atol=1e-6, rtol=0)
    assert float((many[:16] @ many[16:].t()).abs().max()) > 0.1  # the bases are different ones


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("half_normal", lambda z: 1 + 0.4 * z.abs()),
        ("normal", lambda z: (1 + 0.4 * z).abs()),
        ("lognormal", lambda z: (0.4 * z).exp()),
    ],
)
def test_coefficients_follow_their_law(name, law):
    from scipy.stats import ks_2samp

    world = planted(d_in=8, n_features=30, active=5, spread=0.4, coefficients=name, seed=2)
    codes = world.sample(2000, seed=1)[1]
    wanted = law(torch.randn(20_000, generator=torch.Generator().manual_seed(9)))
    result: Any = ks_2samp((codes[codes > 0] / world.unit).numpy(), wanted.numpy())
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("options", [TREES, LONE])
def test_restored_batches_go_on_behind_the_last_one(options):
    world = planted(**options)
    straight = world.batches(8, seed=3)
    wanted = [next(straight) for _ in range(5)]
    begun = planted(**options).batches(8, seed=3)
    assert begun.state()["batches"] == 0 and iter(begun) is begun
    for _ in range(3):
        next(begun)
    resumed = world.batches(8, seed=3)
    resumed.restore(json.loads(json.dumps(begun.state())))
    assert torch.equal(next(resumed), wanted[3]) and torch.equal(next(resumed), wanted[4])
    resumed.restore(begun.state())  # back again
    assert torch.equal(next(resumed), wanted[3])


def test_a_state_of_other_batches_is_refused():
    world = planted(**TREES)
    batches = world.batches(8, seed=3)
    state = batches.state()
    other = planted(**also(TREES, seed=4))
    for words, wrong in {
        "no 'batches'": {},
        "has seed 3, these batches 4": world.batches(8, seed=4),
        "has batch_size 8, these batches 9": world.batches(9, seed=3),
        "has world": other.batches(8, seed=3),
        "must be a count": state | {"batches": -1},
        "batches True": state | {"batches": True},
    }.items():
        with pytest.raises(ValueError, match=words):
            batches.restore(wrong) if isinstance(wrong, dict) else wrong.restore(state)
    assert batches.state() == state
    assert world.fingerprint == planted(**TREES).fingerprint != planted(**also(TREES, noise=0.03)).fingerprint


def test_the_preset_has_the_size_and_the_law_that_it_names():
    options: dict[str, Any] = dict(PRESETS["bench_16k"])
    assert (options["n_features"], options["d_in"], options["hierarchy"], options["rank"]) == (
        16_384,
        768,
        (128, 4, 3),
        25,
    )
    small = also(options, d_in=24, n_features=256, hierarchy=(2, 4, 3))  # a sixty-fourth of it
    world = planted(**small, seed=1)
    _, values, _ = world.sample_sparse(8000, seed=2)
    assert len(values) / 8000 == pytest.approx(float(world.rates.sum()), rel=0.03)
    assert float(world.rates.sum()) == pytest.approx(34, rel=0.1)  # so few features meet the bound of .5


def test_impossible_worlds_raise():
    for words, options in {
        "52 features; the world has 20": {"n_features": 20, "hierarchy": (4, 3, 2)},
        "must each be at least 1": {"hierarchy": (4, 0, 2)},
        "below 1": {"correlation": 1.0},
        "rank 0": {"correlation": 0.5, "rank": 0},
        "one of: random, orthogonal": {"directions": "near"},
        "one of: half_normal, normal, lognormal": {"coefficients": "flat"},
    }.items():
        with pytest.raises(ValueError, match=words):
            planted(**also(also(LONE, n_features=60), **options))
    world = planted(**TREES)
    assert world.parents is not None
    with pytest.raises(ValueError, match="n is 0"):
        world.sample(0, seed=1)
    wrong: dict[str, dict[str, Any]] = {"exceeds that of its parent": {"parents": world.parents.flip(0) % 60},
                           "sum to less than 1": {"loadings": torch.ones(60, 1)}}  # fmt: skip
    for words, options in wrong.items():
        with pytest.raises(ValueError, match=words):
            Planted(features=world.features, rates=world.rates, offset=world.offset, unit=1.0, spread=0.5, noise=0.1,
                    **options)  # fmt: skip


def test_best_matches_are_those_of_the_whole_table(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 4, generator=generator), torch.randn(7, 4, generator=generator)
    table = (F.normalize(left.double(), dim=1) @ F.normalize(right.double(), dim=1).t()).abs()
    monkeypatch.setattr(synthetic, "PIECE", 14)  # two rows at a time
    values, indices = best_matches(left, right)
    assert torch.equal(indices, table.argmax(1)) and values.tolist() == pytest.approx(table.amax(1).tolist())
