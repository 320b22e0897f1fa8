"""Metrics against their definitions, and laws of how they are gathered."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae.archs.base import SAE
from sae.evaluation import DEFINITIONS, Tally, evaluate


def tiny_sae(seed: int = 3) -> SAE:
    x = sae.build("batchtopk", d_in=6, d_sae=20, k=3, seed=seed)
    with torch.no_grad():
        x.enc_bias.normal_(-0.3, 0.2, generator=torch.Generator().manual_seed(seed))
        x.dec_bias.normal_(0, 1, generator=torch.Generator().manual_seed(seed + 1))
        x.cut.fill_(0.4)
        x.enc_bias[:2] = -100  # two that never fire
    return x


def tokens(n: int = 60) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


def test_every_metric_is_what_its_printed_definition_says(oracles):
    x, acts = tiny_sae(), tokens()
    recon, latents = oracles.sae_forward(acts, *(getattr(x, n).detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec")),
                                         x.threshold)  # fmt: skip
    wanted = oracles.metrics(acts.numpy(), recon, latents)
    result = evaluate(x, acts)
    assert result.as_dict() == pytest.approx(wanted, rel=1e-5) and set(wanted) == set(DEFINITIONS)
    assert 0 < result.l0 < 20 and 0 < result.dead < 1  # the example is not a trivial one
    assert result["l0"] == pytest.approx(float(result.density.sum()))
    assert all(text in str(result) for text in DEFINITIONS.values())


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5))
def test_how_the_tokens_are_cut_into_batches_does_not_matter(cuts):
    x, acts = tiny_sae(), tokens()
    whole = evaluate(x, acts)
    parts = evaluate(x, iter(torch.tensor_split(acts, sorted(cuts))))
    assert parts.as_dict() == pytest.approx(whole.as_dict(), rel=1e-6)
    assert torch.equal(parts.density, whole.density)


def test_merged_tallies_equal_one_tally():
    acts, recon, latents = tokens(), tokens() + 0.1, torch.randn(60, 20).relu()
    one, other = Tally(20), Tally(20)
    one.add(acts[:7], recon[:7], (latents[:7] != 0).sum(0))
    other.add(acts[7:], recon[7:], (latents[7:] != 0).sum(0))
    whole = Tally(20).add(acts, recon, (latents != 0).sum(0))
    assert one.merge(other).value().as_dict() == pytest.approx(whole.value().as_dict(), rel=1e-9)


def test_fve_sees_a_constant_bias_and_uses_one_mean_for_all_batches():
    acts = torch.cat([torch.randn(50, 4) + 10, torch.randn(50, 4) - 10])
    none = torch.zeros(1, dtype=torch.long)
    tally = Tally(1)
    for half in acts.split(50):
        tally.add(half, half.mean(0).expand(50, 4), none)
    assert tally.value().fve == pytest.approx(1 - 1 / 101, abs=0.005)  # about each batch's own mean it would be 0
    biased = Tally(1).add(acts, acts + 20, none).value()
    assert biased.fve == pytest.approx(1 - 400 / 101, rel=0.1)


def test_what_cannot_be_measured_raises():
    x = tiny_sae()
    for words, batches in {
        "no tokens": [],
        "are equal": torch.ones(5, 6),
        "nan or infinity": torch.full((5, 6), torch.nan),
        "width 6; the batch has width 7": torch.ones(5, 7),
        r"\[tok, d_in\]": torch.ones(2, 5, 6),
    }.items():
        with pytest.raises(ValueError, match=words):
            evaluate(x, batches)
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(x, torch.ones(0, 6))
    with pytest.raises(KeyError, match="l0, fve"):
        evaluate(x, tokens())["l1"]


def test_a_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluate(tiny_sae(), tokens()).fve = 1.0  # type: ignore[misc]
