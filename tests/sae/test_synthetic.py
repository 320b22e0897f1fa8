"""Planted worlds and the scores against them."""

import pytest
import torch
import torch.nn.functional as F

from sae.synthetic import mcc, mmcs, planted


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
