"""The loop: losses, dead latents, stopping, sources, and what a run leaves on disk."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import sae
from sae.archs import ARCHS
from sae.config import TrainConfig
from sae.data import Shuffled, held_out_mask, rebatched
from sae.evaluation import evaluate_saved
from sae.formats import save_sae
from sae.io import FormatError, read_json
from sae.losses import aux_k_loss
from sae.optim import Optimiser, lr_share, remove_parallel
from sae.runs import describe, fit
from sae.training import Step, train

CFG = TrainConfig(steps=10, batch_size=128, lr=1e-2)


def fresh(**kwargs) -> sae.SAE:
    return sae.build("batchtopk", **({"d_in": 24, "d_sae": 64, "k": 3, "seed": 5} | kwargs))


def test_the_loss_is_one_for_dead_latents_that_say_nothing_and_zero_for_those_that_say_all(world):
    acts = world.sample(500, seed=2)[0]
    centred = acts - acts.mean(0)
    dec = torch.eye(24)
    assert float(aux_k_loss(centred, centred * 0, dec, 24)) == pytest.approx(1)
    assert float(aux_k_loss(centred, centred, dec, 24)) == pytest.approx(0, abs=1e-6)
    assert float(aux_k_loss(centred, centred[:, :6] * 0, dec[:6], 24)) == pytest.approx(0.25)  # 6 of 24 places


def test_aux_k_lets_only_the_k_strongest_speak():
    residual = torch.tensor([[3.0, 2.0, 1.0]])
    assert float(aux_k_loss(residual, residual, torch.eye(3), 2)) == pytest.approx(1 / 14)


def planted_dead(world, aux_weight: float) -> tuple[float, float]:
    """Return how far a latent that is negative on every token moved, and its share of firing tokens afterwards."""
    x = fresh()
    acts = world.sample(4096, seed=2)[0]
    with torch.no_grad():
        x.enc_bias[7] = -6.0
        before = x.enc[7].clone()
    cfg = TrainConfig(steps=300, batch_size=256, lr=3e-2, dead_after=512, aux_weight=aux_weight)
    for step in train(x, Shuffled(acts, 256, seed=0), cfg):
        if step.step == 1:
            z = (acts - x.b_dec) * x.outward.scale
            assert float((z @ x.enc[7] + x.enc_bias[7]).detach().max()) < 0  # on the whole data
    return float((x.enc[7].detach() - before).norm()), float(sae.evaluate(x, acts).density[7])


def test_aux_k_revives_a_latent_that_is_negative_on_every_token(world):
    moved, density = planted_dead(world, aux_weight=1.0)
    assert moved > 0.1 and density > 0
    assert planted_dead(world, aux_weight=0.0) == (0.0, 0.0)  # without it nothing reaches that latent


def test_a_step_counts_dead_latents_by_tokens_since_they_fired(world):
    x = fresh()
    with torch.no_grad():
        x.enc_bias[:16] = -1e4
    cfg = TrainConfig(steps=4, batch_size=128, lr=1e-9, dead_after=300, aux_weight=0.0)
    dead = [step.dead for step in train(x, world.batches(128, seed=3), cfg)]
    assert dead[:2] == [0, 0] and dead[2] >= 0.25 and dead[3] >= 0.25  # 128, 256 < 300 <= 384


def test_decoder_rows_stay_unit_and_their_gradient_orthogonal(world):
    dec, grad = torch.nn.functional.normalize(torch.randn(9, 5), dim=1), torch.randn(9, 5)
    remove_parallel(grad, dec)
    assert float((grad * dec).sum(1).abs().max()) < 1e-6 and float(grad.norm()) > 1
    x = fresh()
    for _ in train(x, world.batches(128, seed=3), CFG):
        torch.testing.assert_close(x.dec.detach().norm(dim=1), torch.ones(64))


def test_the_learning_rate_rises_stays_and_falls_to_almost_nothing():
    cfg = TrainConfig(steps=100, warmup=0.1, decay=0.2)
    shares = [lr_share(i, cfg) for i in range(100)]
    assert shares[0] == 0.1 and shares[9] == shares[80] == 1 and shares[99] == pytest.approx(0.05)
    assert [lr_share(0, TrainConfig(steps=1, warmup=0, decay=0))] == [1]


def test_the_bias_starts_at_the_mean_and_the_first_step_reports_the_whole_variance(world):
    x = fresh()
    acts = world.sample(1280, seed=2)[0]
    step = next(train(x, acts.split(128), TrainConfig(steps=10, batch_size=128, lr=1e-9)))
    torch.testing.assert_close(x.b_dec.detach(), acts.mean(0), rtol=1e-4, atol=1e-4)
    assert step.l0 == pytest.approx(3, abs=0.01) and step.loss == pytest.approx(1 - step.fve, abs=1e-6)


def test_configs_and_steps_are_frozen_and_resolve_leaves_nothing_open(world):
    cfg = TrainConfig(steps=1000, batch_size=2048)
    resolved = cfg.resolve(192, 4096)
    assert cfg.lr is None and None not in (resolved.lr, resolved.aux_k, resolved.dead_after)
    assert resolved.aux_k == 96 and resolved.dead_after == 102_400
    assert TrainConfig(steps=10**6).resolve(64, 1024).dead_after == 10_000_000
    step = next(train(fresh(), world.batches(128, seed=3), CFG))
    for value, name in ((cfg, "lr"), (step, "lr"), (fresh().config, "k")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1.0)
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"lr": 0}, {"warmup": 0.6, "decay": 0.6}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainConfig(**({"steps": 1} | wrong))


def test_a_caller_who_stops_early_has_a_calibrated_sae(world):
    x = fresh()
    acts = world.sample(2560, seed=2)[0]
    for step in train(x, acts.split(128), TrainConfig(steps=20, batch_size=128, lr=1e-2)):
        if step.step == 7:
            break
    assert x.outward is None and sae.evaluate(x, acts).l0 == pytest.approx(3, abs=1e-6)


def test_no_batch_is_asked_for_after_the_last_step(world):
    source = iter(world.sample(128 * 30, seed=2)[0].split(128))
    cfg = TrainConfig(steps=10, batch_size=128, lr=1e-2, init_tokens=128)
    assert len(list(train(fresh(), source, cfg))) == 10 and len(list(source)) == 20


def test_a_source_that_ends_early_is_told(world):
    with pytest.warns(UserWarning, match="after 3 of 10 steps"):
        steps = list(train(fresh(), world.sample(128 * 3, seed=2)[0].split(128), CFG))
    assert [s.step for s in steps] == [1, 2, 3] and steps[-1].tokens == 384


def test_what_cannot_be_learned_from_raises(world):
    acts = world.sample(256, seed=2)[0]
    for words, batches in {
        "gave 0": [],
        r"\[tok, 24\]": [torch.ones(9, 23)],
        "all activations are equal": [torch.ones(9, 24)],
        "nan or infinity": [acts.where(acts < 1, torch.nan)],
    }.items():
        with pytest.raises(ValueError, match=words):
            next(train(fresh(), batches, CFG))


@pytest.mark.parametrize("d_sae", [64, 1024])  # selection goes by groups of columns where there are many
@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_activations_that_turn_into_nan_stop_the_training_and_say_so(arch, d_sae, world):
    acts = world.sample(256, seed=2)[0]
    x = sae.build(arch, d_in=24, d_sae=d_sae, k=3, seed=5)
    for poison in (acts * torch.nan, torch.cat([acts[:128], acts[128:] * torch.nan])):
        with pytest.raises(FloatingPointError, match="lower the lr"):
            list(train(x, [acts] + [poison] * 101, TrainConfig(steps=102, lr=1e-2, init_tokens=256)))
        x = sae.build(arch, d_in=24, d_sae=d_sae, k=3, seed=5)


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own():
    rows = torch.arange(10.0)[:, None]
    source = iter(Shuffled(rows, 4, seed=1))
    seen = torch.cat([next(source) for _ in range(5)]).flatten()
    assert seen[:10].sort().values.tolist() == seen[10:].sort().values.tolist() == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_an_iterable_is_cut_to_one_size_and_read_again_if_it_can_be():
    parts = [torch.arange(3.0)[:, None], torch.arange(3.0, 8)[:, None], torch.zeros(0, 1)]
    once = [b.flatten().tolist() for b in rebatched(iter(parts), 2)]
    assert once == [[0, 1], [2, 3], [4, 5], [6, 7]]
    again = rebatched(parts, 3)
    assert [next(again).flatten().tolist() for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]
    assert list(rebatched([], 3)) == []


def test_rows_are_kept_out_of_training_in_stripes():
    mask = held_out_mask(200_000)
    assert 0.045 < float(mask.double().mean()) <= 0.05
    assert int(mask.int().diff().eq(1).sum()) + int(mask[0]) == int(mask.sum()) // 256  # whole stripes, apart
    assert not held_out_mask(1000).any() and int(held_out_mask(10_000_000).sum()) == 65_536


def test_fit_trains_saves_and_logs_and_the_same_seed_gives_the_same_bits(tmp_path, world):
    acts = world.sample(8192, seed=2)[0]
    seen: list[Step] = []
    kwargs = {"width": "3x", "k": 3, "steps": 45, "batch_size": 128, "lr": 1e-2, "seed": 4}
    run = fit(acts, **kwargs, out=tmp_path / "a", on_step=seen.append, metadata={"hook_name": "resid_post.2"})
    again, other = fit(acts.numpy(), **kwargs), fit(acts, **(kwargs | {"seed": 5}))
    assert torch.equal(run.sae.W_enc, again.sae.W_enc) and not torch.equal(run.sae.W_enc, other.sae.W_enc)
    assert run.sae.d_sae == 72 and len(seen) == 45 and [row["step"] for row in run.log] == [20, 40, 45]
    assert run.log[-1]["fve"] > run.log[0]["fve"]
    assert [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()] == run.log
    saved = read_json(tmp_path / "a" / "run.json")
    assert saved["train"] == json.loads(json.dumps(run.config["train"])) and saved["last"] == run.log[-1]
    assert saved["data"]["tokens"] == 8192 and saved["data"]["sha256"] == again.config["data"]["sha256"]
    assert torch.equal(sae.load_sae(tmp_path / "a").W_dec, run.sae.W_dec)
    np.save(tmp_path / "x.npy", acts.numpy())
    measured = evaluate_saved(tmp_path / "a", tmp_path / "x.npy")
    assert measured.as_dict() == sae.evaluate(run.sae, acts).as_dict() and measured.tokens == 8192
    info = describe(tmp_path / "a")
    assert (info["d_in"], info["d_sae"], info["k"]) == (24, 72, 3) and info["run"] == saved
    assert info["metadata"] == {"hook_name": "resid_post.2"}


def test_fit_calibrates_on_rows_that_it_did_not_train_on(world):
    acts = world.sample(6000, seed=2)[0]
    run = fit(acts, width=64, k=3, steps=60, batch_size=128, lr=1e-2)
    held = held_out_mask(6000)
    assert run.config["data"]["held_out"] == int(held.sum()) == 256
    assert sae.evaluate(run.sae, acts[held]).l0 == pytest.approx(3, abs=1e-9)


def test_fit_reads_files_and_iterables(tmp_path, world):
    acts = world.sample(1280, seed=2)[0]
    np.save(tmp_path / "x.npy", acts.numpy())
    for source in (tmp_path / "x.npy", acts.split(100), iter(acts.split(100))):
        run = fit(source, width=64, k=3, tokens=640, batch_size=128, lr=1e-2)
        assert run.log[-1]["step"] == 5


def test_an_interrupt_saves_what_there_is_and_goes_on_upwards(tmp_path, world):
    def press(step: Step) -> None:
        if step.step == 25:
            raise KeyboardInterrupt

    acts = world.sample(8192, seed=2)[0]
    with pytest.raises(KeyboardInterrupt):
        fit(acts, width=64, k=3, steps=100, batch_size=128, lr=1e-2, out=tmp_path, on_step=press)
    x = sae.load_sae(tmp_path)
    assert sae.evaluate(x, acts[held_out_mask(8192)]).l0 == pytest.approx(3, abs=1e-9)
    assert read_json(tmp_path / "run.json")["last"]["step"] == 20


def test_a_failed_save_leaves_the_old_run_readable(tmp_path, world, monkeypatch):
    save_sae(fresh(), tmp_path)
    import os

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        fit(world.sample(1280, seed=2)[0], width=64, k=3, steps=3, batch_size=128, log_every=1, out=tmp_path)
    monkeypatch.undo()
    assert torch.equal(sae.load_sae(tmp_path).W_dec, fresh().W_dec)


def test_fit_refuses_before_the_first_step(tmp_path, world):
    acts = world.sample(64, seed=2)[0]
    (tmp_path / "x.npy").write_bytes(b"junk")
    cases = [
        ("not both", {"steps": 1, "tokens": 1}, acts),
        ("steps is 0", {"steps": 0}, acts),
        ("steps is 0", {"tokens": 10, "batch_size": 16}, acts),
        ("width is 'wide'", {"width": "wide"}, acts),
        ("closest: batchtopk", {"arch": "batchtopp"}, acts),
        ("k is 99", {"k": 99, "width": 64}, acts),
        ("less than one batch", {"batch_size": 100}, iter([acts])),
    ]
    for words, kwargs, source in cases:
        with pytest.raises(ValueError, match=words):
            fit(source, out=tmp_path / "never", **kwargs)
    with pytest.raises(FormatError):
        fit(tmp_path / "x.npy")
    assert not (tmp_path / "never").exists()


def test_aux_k_asks_nothing_of_the_latents_that_left_the_residual():
    residual = torch.randn(5, 4).requires_grad_()
    pre = torch.randn(5, 3).requires_grad_()
    aux_k_loss(residual, pre, torch.randn(3, 4), 2).backward()
    assert residual.grad is None and float(pre.grad.abs().max()) > 0


def test_a_gradient_along_the_decoder_rows_moves_nothing_and_leaves_no_momentum():
    x = fresh()
    before = x.dec.detach().clone()
    optimiser = Optimiser(list(x.parameters()), x.dec, CFG.resolve(24, 64))
    for parameter in x.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.dec.grad = 5 * before
    optimiser.step(5)
    assert float(optimiser.adam.state[x.dec]["exp_avg"].abs().max()) < 1e-6


def test_rows_that_are_held_out_do_not_teach(world):
    acts = world.sample(6000, seed=2)[0]
    held = held_out_mask(6000)
    mixed = acts.clone()
    mixed[held] += 1000  # a mean that nobody could miss
    run = fit(mixed, width=64, k=3, steps=44, batch_size=128, lr=1e-9)
    torch.testing.assert_close(run.sae.b_dec.detach(), acts[~held].mean(0), rtol=0.05, atol=0.05)
