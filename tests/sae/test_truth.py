"""Scores against planted features: exact for the truth itself, for hand-made latents, and against a slow count."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae.archs.base import SAE
from sae.kernels import active_from
from sae.synthetic import Planted, mcc, mmcs, planted
from sae.truth import TRUTH_DEFINITIONS, FiringTally, score_against_truth


def clear_world() -> Planted:
    return planted(d_in=16, n_features=12, active=2, noise=0, directions="orthogonal", seed=4)


def knowing(world: Planted, order: list[int]) -> SAE:
    """Return an SAE whose latents are the features in that order, -1 for one that never fires."""
    x = sae.build("batchtopk", d_in=world.features.shape[1], d_sae=len(order), k=2, seed=8)
    rows = world.features[torch.tensor(order).clamp_min(0)]
    with torch.no_grad():
        x.enc.copy_(rows)
        x.dec.copy_(rows)
        x.dec_bias.copy_(world.offset)
        x.enc_bias[torch.tensor(order) < 0] = -1e6
        x.cut.fill_(world.unit / 2)
    return x


def test_the_truth_scores_one_and_directions_at_random_do_not():
    world = clear_world()
    found = score_against_truth(knowing(world, list(range(12))[::-1]), world, tokens=6000, seed=1)
    for name in ("mmcs", "mcc", "uniqueness", "precision", "recall", "f1", "fve", "relative_bias"):
        assert found.as_dict()[name] == pytest.approx(1, abs=1e-6)
    assert found.match.tolist() == list(range(12))[::-1] and found.evaluation.tokens == 6000
    assert found.evaluation.l0 == pytest.approx(float(world.rates.sum()), rel=0.05)
    assert found.null is not None and found.null.null is None
    assert found.null.mcc < 0.7 and (found.null.f1 or 0) < 0.6 and found.null.evaluation.fve < 0.7
    assert found.null.evaluation.l0 == pytest.approx(found.evaluation.l0, rel=0.05)


def test_the_untrained_sae_knows_the_mean_and_nothing_else():
    far = planted(d_in=16, n_features=12, active=2, offset=5, seed=4)
    null = score_against_truth(knowing(far, list(range(12))), far, tokens=3000, seed=1).null
    assert null is not None and 0 < null.evaluation.fve < 0.7 and null.evaluation.nmse < 0.1
    again = score_against_truth(knowing(far, list(range(12))), far, tokens=3000, seed=2).null
    assert again is not None and not torch.equal(again.cosine, null.cosine)  # its directions follow the seed


def test_copies_and_dead_latents_lower_what_their_definitions_say():
    world = clear_world()
    found = score_against_truth(knowing(world, [*range(11), 0, 0, -1]), world, tokens=4000, seed=1)
    assert found.uniqueness == pytest.approx(11 / 14)
    assert found.mmcs == pytest.approx(found.mcc) and found.mcc < 1  # the twelfth feature is nobody's
    assert found.precision == pytest.approx(1)  # of those that fire
    assert found.recall == pytest.approx(13 / 14) and found.f1 == pytest.approx(13 / 14)
    assert found.evaluation.dead == pytest.approx(1 / 14)
    assert found.counts.precision.isnan().tolist() == [False] * 13 + [True] and float(found.counts.f1[-1]) == 0


def test_a_latent_of_two_features_is_half_precise_and_one_that_sees_half_has_half_recall():
    codes = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]])
    latents = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0.5], [1, 1, 0]])
    counts = tally_of(latents, codes, torch.tensor([0, 1, 0])).value()
    assert counts.precision.tolist() == [0.5, 1, 1]
    assert counts.recall.tolist() == [1, 0.5, 0.5]
    assert counts.f1.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3])


def tally_of(latents: torch.Tensor, codes: torch.Tensor, match: torch.Tensor) -> FiringTally:
    """Return the tally of dense latents; every tenth place is active at value 0."""
    places = latents.flatten() != 0
    places[::10] = True
    flat = places.nonzero().squeeze(1)
    truth = codes.flatten().nonzero().squeeze(1)
    tally = FiringTally(match, codes.shape[1])
    active = active_from(flat, (len(latents), latents.shape[1]))
    return tally.add(latents.flatten()[flat], active, active_from(truth, (len(codes), codes.shape[1])))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 99), rate=st.sampled_from([0.0, 0.05, 0.4]))
def test_counts_are_those_of_a_slow_loop_however_the_tokens_are_cut(cuts, seed, rate, oracles):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.rand(40, 9, generator=generator) * (torch.rand(40, 9, generator=generator) < 0.3)
    codes = torch.rand(40, 5, generator=generator) < rate
    match = torch.randint(5, (9,), generator=generator)
    whole = FiringTally(match, 5)
    for part, truth in zip(*(torch.tensor_split(t, sorted(cuts)) for t in (latents, codes)), strict=True):
        whole.merge(tally_of(part, truth, match))
    counts = whole.value()
    found = list(zip(counts.latent.tolist(), counts.feature.tolist(), counts.both.tolist(), strict=True))
    assert found == oracles.firing_counts(latents.numpy(), codes.numpy(), match.numpy())


def test_training_raises_the_scores_from_those_of_the_untrained_sae(world):
    x = sae.build("batchtopk", d_in=24, d_sae=72, k=3, seed=7)
    before = score_against_truth(x, world, tokens=4000, seed=5)
    assert before.null is not None and before.mcc == pytest.approx(before.null.mcc, abs=0.05)
    for _ in sae.train(x, world.batches(512, seed=3), sae.TrainConfig(steps=400, batch_size=512)):
        pass
    after = score_against_truth(x, world, tokens=4000, seed=5)
    assert after.mcc == mcc(x.W_dec, world.features) > before.mcc + 0.3
    assert after.mmcs == pytest.approx(mmcs(x.W_dec, world.features), rel=1e-12)
    assert (after.f1 or 0) > (before.f1 or 0) + 0.2 and after.null is not None
    text = str(after)
    assert all(line in text for line in TRUTH_DEFINITIONS.values()) and f"{after.null.mcc:.4g}" in text
    assert json.loads(json.dumps(after.as_dict())) == after.as_dict()
    assert set(after.as_dict()) == {*TRUTH_DEFINITIONS, "null"}


def test_an_sae_that_never_fires_has_no_precision():
    world = clear_world()
    found = score_against_truth(knowing(world, [-1, -1]), world, tokens=500, seed=0)
    assert found.precision is None and found.recall == 0 and "precision              -" in str(found)
    assert found.null is not None and found.null.evaluation.l0 > 0


def test_scores_at_four_thousand_latents_and_features_need_no_table_of_tokens(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    match = torch.randint(4096, (4096,), generator=generator)
    flat = torch.randperm(512 * 4096, generator=generator)[:20_000].sort().values
    codes = active_from(flat, (512, 4096))
    # latent i copies feature i: it meets its match where both features fire
    counts = FiringTally(match, 4096).add(torch.ones(20_000), codes, codes).value()
    dense = torch.zeros(512, 4096)
    dense.view(-1)[flat] = 1
    assert torch.equal(counts.both, (dense * dense[:, match]).sum(0).long()) and int(counts.both.sum()) > 0


def test_what_cannot_be_scored_raises():
    world, match = clear_world(), torch.zeros(3, dtype=torch.long)
    cross = sae.build("batchtopk", d_in=16, d_out=16, d_sae=9, k=2)
    for words, x, options in (
        ("width 16", sae.build("batchtopk", d_in=15, d_sae=9, k=2), {}),
        ("an autoencoder", cross, {}),
        ("at least 2", knowing(world, [0, 1]), {"tokens": 1}),
        ("seed -1", knowing(world, [0, 1]), {"seed": -1}),
    ):
        with pytest.raises(ValueError, match=words):
            score_against_truth(x, world, **{"seed": 0, **options})
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="3 latents and 5 features"):
        FiringTally(match, 5).add(torch.zeros(0), active_from(none, (4, 3)), active_from(none, (3, 5)))
    with pytest.raises(ValueError, match="other matches"):
        FiringTally(match, 5).merge(FiringTally(match + 1, 5))
