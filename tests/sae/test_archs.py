"""What every architecture must do, as autoencoder, transcoder and crosscoder; and what single ones promise."""

import pytest
import torch

import sae
from sae.archs import ARCHS, build
from sae.archs.base import SAE
from sae.config import NORMALISATIONS
from sae.synthetic import mcc

ARCH = pytest.mark.parametrize("arch", sorted(ARCHS))
KINDS = {
    "sae": {},
    "transcoder": {"d_out": 20},
    "skip transcoder": {"d_out": 20, "skip": True},
    "crosscoder": {"n_sites": 2},
}
KIND = pytest.mark.parametrize("kind", KINDS)
NORMALIZE = pytest.mark.parametrize("normalize", NORMALISATIONS)


def teach(x: SAE, world, steps: int = 400, lr: float = 1e-2, **kwargs) -> SAE:
    for _ in sae.train(x, world.batches(256, seed=11), sae.TrainConfig(steps=steps, batch_size=256, lr=lr, **kwargs)):
        pass
    return x


def pairs(world, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows, and other rows that follow from the same features: [tok, 24] and [tok, 20]."""
    acts, codes = world.sample(n, seed=seed)
    return acts, codes @ world.features.roll(1, 0)[:, :20] * 7 + 3


def briefly(arch: str, kind: str, world, steps: int = 30, **kwargs) -> tuple[SAE, torch.Tensor]:
    """Return an SAE of a kind after some steps, and rows that it reads."""
    x = build(arch, d_in=24, d_sae=64, k=3, seed=5, **KINDS[kind])
    cfg = sae.TrainConfig(steps=steps, batch_size=128, lr=1e-2, **kwargs)
    rows = pairs(world, 128 * steps, 11)
    batches = (
        list(zip(*(part.split(128) for part in rows), strict=True)) if kind.endswith("coder") else rows[0].split(128)
    )
    if kind == "crosscoder":
        batches = [batch.view(-1, 2, 12) for batch in rows[0].split(128)]
    for _ in sae.train(x, batches, cfg):
        pass
    acts = world.sample(50, seed=12)[0]
    return x, acts.view(50, 2, 12) if kind == "crosscoder" else acts


@ARCH
def test_every_arch_learns_the_planted_dictionary(arch, world):
    x = build(arch, d_in=24, d_sae=64, k=3, seed=5)
    acts, _ = world.sample(8192, seed=12)
    before, fve_before = mcc(x.W_dec, world.features), sae.evaluate(x, acts).fve
    teach(x, world)
    after = sae.evaluate(x, acts)
    assert before < 0.6 and fve_before < 0.6
    # nested levels of 4 and 8 latents must explain what 48 features make; a penalty shrinks what it does not remove
    aim = {"relu": 0.45, "matryoshka": 0.7, "matryoshka_topk": 0.7}.get(arch, 0.8)
    assert mcc(x.W_dec, world.features) > 0.85 and after.fve > aim
    assert after.l0 == pytest.approx(3, rel=0.6 if x.pressured else 0.05)


@ARCH
@KIND
def test_every_kind_learns_and_ends_in_the_data_s_units(arch, kind, world):
    x, acts = briefly(arch, kind, world, steps=250)
    assert x.inward is None and x.outward is None
    _, y = pairs(world, 50, 12)
    target = y if "transcoder" in kind else acts
    error = (x(acts).recon.detach() - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.75  # 1 is the mean
    assert x(acts).recon.shape == target.shape and x.encode(acts).shape == (50, 64)


@pytest.mark.parametrize("arch", sorted(set(ARCHS) - {"abstopk"}))
def test_the_public_weights_give_the_output_and_have_the_public_orientation(arch, world, oracles):
    x = teach(build(arch, d_in=24, d_sae=64, k=3, seed=5), world, steps=20)
    assert x.W_enc.shape == (24, 64) and x.W_dec.shape == (64, 24) and x.threshold.shape == (64,)
    acts, _ = world.sample(30, seed=12)
    weights = [getattr(x, n).detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")]
    more = {"r_mag": x.r_mag.detach(), "b_mag": x.b_mag.detach()} if arch == "gated" else {}
    recon, latents = oracles.sae_forward(acts, *weights, k=3 if x.compares else None, **more)
    out = x(acts)
    torch.testing.assert_close(out.latents.detach().double(), torch.from_numpy(latents), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.recon.detach().double(), torch.from_numpy(recon), rtol=1e-4, atol=1e-5)


@ARCH
@KIND
@NORMALIZE
def test_leaving_the_training_space_changes_nothing_that_is_computed(arch, kind, normalize, world):
    x, acts = briefly(arch, kind, world, steps=1)
    stream = briefly_begun(x, kind, world, normalize)
    before = x(acts)
    assert x.outward is not None
    x.fold()
    after = x(acts)
    stream.close()
    exact = normalize != "whiten" and "transcoder" not in kind  # the mean of the input moves into the biases
    for ours, theirs in zip(after, before, strict=True):
        if kind == "crosscoder" and not x.compares:  # latents are in new units: rows of unit norm
            ours = ours if ours.shape == acts.shape else ours * 0 + theirs
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        elif exact:
            assert torch.equal(ours, theirs)
        elif normalize == "whiten" and ours.shape != before.recon.shape and not x.compares:
            continue  # likewise
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def briefly_begun(x: SAE, kind: str, world, normalize: str):
    """Return the stream of a training that has done three steps and gone no further."""
    rows = pairs(world, 1024, 11)
    batches = (
        list(zip(*(part.split(128) for part in rows), strict=True)) if "transcoder" in kind else rows[0].split(128)
    )
    stream = sae.train(x, batches, sae.TrainConfig(steps=8, batch_size=128, lr=1e-2, normalize=normalize))
    for _ in range(3):
        next(stream)
    return stream


@ARCH
def test_a_token_s_latents_do_not_depend_on_its_neighbours_or_on_the_shape(arch, world):
    x = teach(build(arch, d_in=24, d_sae=64, k=3, seed=5), world, steps=20)
    acts, _ = world.sample(24, seed=12)
    whole = x.encode(acts)
    torch.testing.assert_close(x.encode(acts.view(2, 3, 4, 24)).reshape(24, 64), whole)
    torch.testing.assert_close(torch.cat([x.encode(row[None]) for row in acts]), whole)


@ARCH
@KIND
def test_sparse_latents_are_the_dense_ones_without_the_zeros(arch, kind, world):
    x, acts = briefly(arch, kind, world)
    values, active = x.encode_sparse(acts)
    dense = torch.zeros(50, 64).flatten()
    dense[active.flat] = values.detach()
    assert torch.equal(dense.view(50, 64), x.encode(acts).detach()) and 50 < len(values) < 1500
    assert bool((values > 0).all()) or (arch == "abstopk" and bool((values != 0).all()))
    recon = x.reconstruct_sparse(values, active, acts)
    torch.testing.assert_close(recon, x(acts).recon.detach().view(recon.shape), rtol=1e-4, atol=1e-4)


@ARCH
def test_seeds_reproduce_bits(arch, world):
    one, two = (teach(build(arch, d_in=24, d_sae=64, k=3, seed=5), world, steps=30) for _ in range(2))
    other = teach(build(arch, d_in=24, d_sae=64, k=3, seed=6), world, steps=30)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert not torch.equal(one.W_dec, other.W_dec)


@ARCH
def test_a_model_and_a_world_of_the_same_seed_share_no_draw(arch):
    from sae.synthetic import planted

    world = planted(d_in=24, n_features=64, seed=5)
    x = build(arch, d_in=24, d_sae=64, k=3, seed=5)
    assert mcc(x.W_dec, world.features) < 0.7


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_training_does_not_depend_on_the_unit_of_the_data(world, scale):
    # scales a power of two apart give the same bits; others fall between two powers, and learn as well
    x = build("batchtopk", d_in=24, d_sae=64, k=3, seed=5)
    batches = (batch * scale for batch in world.batches(256, seed=11))
    for _ in sae.train(x, batches, sae.TrainConfig(steps=400, batch_size=256, lr=1e-2)):
        pass
    result = sae.evaluate(x, world.sample(4096, seed=12)[0] * scale)
    assert result.fve > 0.8 and result.l0 == pytest.approx(3, rel=0.05)
    torch.testing.assert_close(x.W_dec.norm(dim=1), torch.ones(64))


def test_powers_of_two_change_no_bit(world):
    trained = []
    for scale in (1.0, 2.0**-20):
        x = build("batchtopk", d_in=24, d_sae=64, k=3, seed=5)
        for _ in sae.train(x, (b * scale for b in world.batches(256, seed=11)), sae.TrainConfig(steps=20)):
            pass
        trained.append(x)
    assert torch.equal(trained[0].W_enc, trained[1].W_enc)
    assert torch.equal(trained[0].b_dec * 2.0**-20, trained[1].b_dec)
    assert torch.equal(trained[0].threshold * 2.0**-20, trained[1].threshold)


@pytest.mark.parametrize("k", [1, 2.5, 7])
def test_the_calibrated_threshold_gives_exactly_the_l0_that_was_asked_for(world, k):
    x = build("batchtopk", d_in=24, d_sae=64, k=k, seed=5)
    acts, _ = world.sample(1000, seed=12)
    assert sae.evaluate(x, acts).l0 > 8  # before: plain relu
    x.calibrate(acts.split(300))
    assert sae.evaluate(x, acts).l0 == pytest.approx(k, abs=1e-9)
    x.calibrate(acts[:500].split(77))  # again, from a threshold that is there already
    assert sae.evaluate(x, acts[:500]).l0 == pytest.approx(k, abs=1e-9)


def test_the_threshold_is_strict_and_never_below_zero():
    x = build("batchtopk", d_in=4, d_sae=4, k=2, seed=0)
    with torch.no_grad():
        x.enc.copy_(torch.eye(4))
        x.cut.fill_(1.0)
    assert x.encode(torch.tensor([[0.5, 1.0, 1.0000001, 3.0]])).tolist() == [[0, 0, pytest.approx(1.0000001), 3]]
    x.calibrate([torch.tensor([[-1.0, -2.0, -3.0, 4.0]])])  # one positive where two are wanted
    assert float(x.threshold.max()) == 0 and float((x.encode(torch.full((1, 4), -1.0)) != 0).sum()) == 0


def test_what_cannot_be_built_or_read_says_so():
    with pytest.raises(ValueError, match="closest: batchtopk"):
        build("batchtop", d_in=4, d_sae=8, k=2)
    for sizes in ({"d_in": 0}, {"k": 0}, {"k": 9}):
        with pytest.raises(ValueError, match=r"at least 1|above 0"):
            build("batchtopk", **({"d_in": 4, "d_sae": 8, "k": 2} | sizes))
    with pytest.raises(ValueError, match="width 4; the batch has width 5"):
        build("batchtopk", d_in=4, d_sae=8, k=2)(torch.ones(3, 5))
