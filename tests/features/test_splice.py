"""Splicing SAEs whose effect is known exactly into tiny models."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from interp.features.splice import SpliceError, ce_recovered, splice
from interp.model.hooks import reading
from interp.model.loading import load_model
from sae.archs import build

D, VOCAB, HOOK = 32, 40, "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    """A random model with large weights, so that its predictions are far from uniform; token 0 is BOS."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=D, n_layer=3, n_head=2, initializer_range=0.25, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return load_model(GPT2LMHeadModel(config).eval())


@pytest.fixture(scope="module")
def text(model):
    """Rows sampled from the model itself, so that any ablation predicts them worse; two rows end in pads."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(24, 1, dtype=torch.long)
    for _ in range(19):
        logits = model.logits(ids)[:, -1].clone()
        logits[:, 0] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 12:] = mask[1, 5:] = False
    return ids, mask


def identity_sae():
    """relu(x) - relu(-x): the identity, bit for bit."""
    sae = build("batchtopk", d_in=D, d_sae=2 * D, k=float(D), seed=3)
    with torch.no_grad():
        both = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.enc.copy_(both)
        sae.dec.copy_(both)
    return sae


def constant_sae(vector):
    """No latent ever fires: the reconstruction is the bias."""
    sae = build("batchtopk", d_in=D, d_sae=2 * D, k=4.0, seed=4)
    with torch.no_grad():
        sae.cut.fill_(torch.inf)
        sae.dec_bias.copy_(vector)
    return sae


def real_mean(model, ids, mask):
    rows = []
    with reading(model, [HOOK], lambda _, value: rows.append(value[mask & (ids != 0)].clone())):
        model.run(ids, mask)
    return torch.cat(rows).mean(0)


def test_an_identity_sae_leaves_the_logits(model, text):
    ids, mask = text
    clean = model.logits(ids, mask)
    with splice(model, identity_sae(), HOOK):
        spliced = model.logits(ids, mask)
    assert torch.allclose(spliced[mask], clean[mask], atol=1e-5)
    assert torch.equal(model.logits(ids, mask), clean)


def test_the_error_term_makes_any_sae_leave_the_logits_bit_for_bit(model, text):
    ids, mask = text
    clean, poor = model.logits(ids, mask), constant_sae(torch.ones(D))
    with splice(model, poor, HOOK):
        assert not torch.allclose(model.logits(ids, mask)[mask], clean[mask], atol=0.1)
    with splice(model, poor, HOOK, error=True):
        assert torch.equal(model.logits(ids, mask), clean)


def test_bos_and_pads_are_left_alone(model, text):
    ids, mask = text
    seen = {}
    with reading(model, [HOOK], lambda _, value: seen.update(clean=value.clone())):
        model.run(ids, mask)
    with (
        splice(model, constant_sae(torch.full((D,), 7.0)), HOOK),
        reading(model, [HOOK], lambda _, value: seen.update(spliced=value.clone())),
    ):
        model.run(ids, mask)
    real = mask & (ids != 0)
    assert (seen["spliced"][real] == 7).all()
    assert torch.equal(seen["spliced"][~real], seen["clean"][~real])


def test_an_edit_with_the_error_term_adds_what_it_writes_and_nothing_else(model, text):
    ids, mask = text
    sae = build("batchtopk", d_in=D, d_sae=2 * D, k=4.0, seed=5)
    seen = {}

    def raised(latents):
        return latents + torch.nn.functional.one_hot(torch.tensor(3), 2 * D) * 2.0

    with reading(model, [HOOK], lambda _, value: seen.update(clean=value.clone())):
        model.run(ids, mask)
    with (
        splice(model, sae, HOOK, error=True, edit=raised),
        reading(model, [HOOK], lambda _, value: seen.update(edited=value.clone())),
    ):
        model.run(ids, mask)
    real = mask & (ids != 0)
    added = (seen["edited"] - seen["clean"])[real]
    assert torch.allclose(added, (2 * sae.W_dec[3]).expand_as(added), atol=1e-4)


def test_a_perfect_sae_recovers_all_and_the_mean_nothing(model, text):
    ids, mask = text
    perfect = ce_recovered(model, identity_sae(), HOOK, ids, mask)
    assert perfect.recovered == pytest.approx(1, abs=1e-5)
    assert perfect.recovered_zero == pytest.approx(1, abs=1e-5)
    nothing = ce_recovered(model, constant_sae(real_mean(model, ids, mask)), HOOK, ids, mask)
    assert nothing.recovered == pytest.approx(0, abs=1e-5)
    assert nothing.ce_spliced == pytest.approx(nothing.ce_mean, abs=1e-6)
    zero = ce_recovered(model, constant_sae(torch.zeros(D)), HOOK, ids, mask)
    assert zero.recovered_zero == pytest.approx(0, abs=1e-5)


def test_the_clean_loss_is_that_of_a_plain_loop(model, text):
    ids, mask = text
    ids = ids.clone()
    ids[:, 10] = 0  # a special token amid the text is not a next token to predict
    result = ce_recovered(model, identity_sae(), "resid_post.1", ids, mask, batch_size=5)
    losses = []
    for row, real in zip(ids, mask, strict=True):
        row = row[real]
        log_p = model.hf(row[None]).logits[0].log_softmax(-1)
        losses += [-log_p[i, row[i + 1]].item() for i in range(len(row) - 1) if row[i + 1] != 0]
    assert result.ce_clean == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert result.n_tokens == len(losses) == 22 * 18 + 10 + 4
    assert result.ce_clean < result.ce_mean
    assert result.hook == HOOK


def test_the_batch_size_does_not_matter(model, text):
    ids, mask = text
    sae = build("batchtopk", d_in=D, d_sae=2 * D, k=4.0, seed=6)
    one, whole = (ce_recovered(model, sae, HOOK, ids, mask, batch_size=size).to_dict() for size in (1, 24))
    assert (one.pop("hook"), one.pop("n_tokens")) == (whole.pop("hook"), whole.pop("n_tokens"))
    assert one == pytest.approx(whole, abs=1e-4)


def test_a_ratio_without_meaning_is_refused(model, text):
    ids, mask = text
    # ablation helps where the text is what the model holds for unlikely
    unlikely = torch.cat([ids[:, :1], model.logits(ids).argmin(-1)[:, :-1].clamp_min(1)], dim=1)
    for _ in range(20):
        unlikely = torch.cat([ids[:, :1], model.logits(unlikely).argmin(-1)[:, :-1].clamp_min(1)], dim=1)
    with pytest.raises(SpliceError, match="no more than the clean"):
        ce_recovered(model, identity_sae(), HOOK, unlikely, torch.ones_like(mask))


def test_what_does_not_fit_is_refused(model, text):
    ids, mask = text
    narrow = build("batchtopk", d_in=16, d_sae=32, k=4.0, seed=0)
    with pytest.raises(SpliceError, match=r"width 16, but blocks\.1\.hook_resid_post"), splice(model, narrow, HOOK):
        pass
    with pytest.raises(SpliceError, match="no next token"):
        ce_recovered(model, identity_sae(), HOOK, ids[:, :1], mask[:, :1])
    with pytest.raises(KeyError, match="closest"):
        ce_recovered(model, identity_sae(), "resid_pst.1", ids, mask)
