"""Metrics against their definitions, and laws of how they are gathered."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae.archs.base import SAE
from sae.evaluation import DEFINITIONS, Evaluation, Tally, evaluate
from sae.extras import MissingError
from sae.io import FormatError, read_json, write_json


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
    assert result.as_dict() == pytest.approx(wanted, rel=1e-5) and {*wanted, "sites"} == set(DEFINITIONS)
    assert 0 < result.l0 < 20 and 0 < result.dead < 1  # the example is not a trivial one
    assert result["l0"] == pytest.approx(float(result.density.sum()))
    assert all((text in str(result)) == (name != "sites") for name, text in DEFINITIONS.items())


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5))
def test_how_the_tokens_are_cut_into_batches_does_not_matter(cuts):
    x, acts = tiny_sae().double(), tokens()
    whole = evaluate(x, acts)
    parts = evaluate(x, iter(torch.tensor_split(acts, sorted(cuts))))
    assert parts.as_dict() == pytest.approx(whole.as_dict(), rel=1e-12)
    assert torch.equal(parts.density, whole.density)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), owners=st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_tallies_merged_in_any_order_equal_one_tally(cuts, owners):
    generator = torch.Generator().manual_seed(1)
    acts, latents = tokens() + 1000, torch.randn(60, 20, generator=generator).relu()  # far from 0, as activations are
    recon = acts + torch.randn(60, 6, generator=generator)
    tallies = [Tally(20, n_sites=2) for _ in range(3)]
    cut = [torch.tensor_split(t, sorted(cuts)) for t in (acts, recon, latents)]
    for owner, x, y, f in zip(owners, *cut, strict=False):
        tallies[owner].add(x, y, (f != 0).sum(0))
    whole = Tally(20, n_sites=2).add(acts, recon, (latents != 0).sum(0)).value()
    merged = tallies[0].merge(tallies[1]).merge(tallies[2]).value()
    assert merged.sites == pytest.approx(whole.sites, rel=1e-12) and len(whole.sites) == 2
    flat = [{n: v for n, v in e.as_dict().items() if n != "sites"} for e in (merged, whole)]
    assert flat[0] == pytest.approx(flat[1], rel=1e-12)
    assert torch.equal(merged.density, whole.density)


def test_shrinkage_is_exact_for_a_reconstruction_of_half_the_length():
    acts = tokens()
    acts[0] = 0  # has no direction and no ratio
    half = Tally(1).add(acts, acts / 2, torch.zeros(1, dtype=torch.long)).value()
    found = (half.relative_bias, half.l2_ratio, half.nmse, half.cosine)
    assert found == pytest.approx((0.5, 0.5, 0.25, 59 / 60), rel=1e-12)


def test_a_bias_that_does_not_exist_is_none_and_printed_as_such():
    acts, none = tokens(), torch.zeros(1, dtype=torch.long)
    for recon in (torch.zeros_like(acts), -acts):
        result = Tally(1).add(acts, recon, none).value()
        assert result.relative_bias is None and "relative_bias            -  sum" in str(result)


def test_a_latent_that_is_picked_at_value_zero_does_not_count_as_active(monkeypatch):
    x, acts = tiny_sae(), tokens()
    values, active = x.encode_sparse(acts)
    values[::3] = 0
    monkeypatch.setattr(x, "encode_sparse", lambda _: (values, active))
    assert evaluate(x, acts).l0 == pytest.approx(int((values != 0).sum()) / 60, rel=1e-12)


def test_a_transcoder_is_measured_about_its_target(oracles):
    x = sae.build("batchtopk", d_in=6, d_out=4, d_sae=20, k=3, skip=True, seed=3)
    with torch.no_grad():
        x.cut.fill_(0.2)
        x.dec_bias.normal_(generator=torch.Generator().manual_seed(1))
        assert x.skip is not None
        x.skip.normal_(generator=torch.Generator().manual_seed(2))
    acts = tokens()
    with torch.no_grad():
        recon, latents = x(acts)
    target = recon + torch.randn(60, 4, generator=torch.Generator().manual_seed(5)) + 0.5
    wanted = oracles.metrics(target.numpy(), recon.numpy(), latents.numpy())
    assert evaluate(x, (acts, target)).as_dict() == pytest.approx(wanted, rel=1e-5)
    parts = zip(acts.split(7), target.split(7), strict=True)
    assert evaluate(x, parts).as_dict() == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="pairs of input and target"):
        evaluate(x, acts)
    with pytest.raises(ValueError, match=r"target is \[60, 4\]; given: shape \(60, 6\)"):
        evaluate(x, (acts, acts))
    with pytest.raises(ValueError, match=r"tensors \[tok, d_in\]; given: tuple"):
        evaluate(tiny_sae(), [(acts, acts)])


def test_each_site_of_a_crosscoder_has_its_own_fve(oracles):
    x = sae.build("batchtopk", d_in=6, d_sae=20, k=3, n_sites=3, seed=3)
    acts = tokens().view(60, 3, 2) * torch.tensor([1.0, 10.0, 3.0])[:, None]
    with torch.no_grad():
        recon, latents = x(acts)
    assert recon.shape == acts.shape
    flat = oracles.metrics(acts.flatten(1).numpy(), recon.flatten(1).numpy(), latents.numpy())
    each = [oracles.metrics(acts[:, i].numpy(), recon[:, i].numpy(), latents.numpy())["fve"] for i in range(3)]
    for batches in (acts, acts.flatten(1), acts.split(11)):
        result = evaluate(x, batches)
        assert result["fve"] == pytest.approx(flat["fve"], rel=1e-5) and result.sites == pytest.approx(each, rel=1e-5)
        assert result.as_dict()["sites"] == list(result.sites) and DEFINITIONS["sites"] in str(result)
    acts[:, 1] = 0.1
    assert evaluate(x, acts).sites[1] is None and evaluate(x, acts).sites[0] is not None


def test_the_histogram_of_densities_has_fixed_bins_and_leaves_out_what_never_fired():
    density = torch.tensor([0, 1, 1, 0.1, 0.099, 0.001 * (1 - 1e-13), 1e-12], dtype=torch.float64)
    result = dataclasses.replace(evaluate(tiny_sae(), tokens()), density=density)
    edges, counts = result.histogram()
    assert len(edges) == 41 and (edges[0], edges[-1]) == (-10, 0)
    assert {float(edges[i]): int(counts[i]) for i in counts.nonzero()} == {-0.25: 2, -1: 1, -1.25: 1, -3: 1, -10: 1}


def test_an_evaluation_survives_saving_bit_for_bit(tmp_path):
    cross = sae.build("batchtopk", d_in=6, d_sae=20, k=3, n_sites=3, seed=3)
    for name, result in {"a": evaluate(tiny_sae(), tokens()), "b": evaluate(cross, tokens())}.items():
        result.save(tmp_path / name)
        again = Evaluation.load(tmp_path / name)
        assert (again.as_dict(), again.sites) == (result.as_dict(), result.sites)
        assert torch.equal(again.density, result.density)
    with pytest.raises(MissingError):
        Evaluation.load(tmp_path)
    evaluate(tiny_sae(), tokens(50)).save(tmp_path / "c")
    (tmp_path / "c" / "density.safetensors").replace(tmp_path / "a" / "density.safetensors")
    with pytest.raises(FormatError, match="two evaluations"):
        Evaluation.load(tmp_path / "a")
    table = read_json(tmp_path / "b" / "evaluation.json")
    for wrong in (table | {"fve": "1"}, table | {"tokens": None}, table | {"more": 1}, table | {"sites": 3}, [table]):
        write_json(tmp_path / "b" / "evaluation.json", wrong)
        with pytest.raises(FormatError):
            Evaluation.load(tmp_path / "b")


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
        "all 5 tokens are equal": torch.ones(5, 6),
        "all 7 tokens are equal": torch.full((7, 6), 0.1, dtype=torch.float64),  # whose mean is rounded
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
