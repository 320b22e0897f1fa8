"""Splicing SAEs whose effect is known exactly into tiny models."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from interp.features import splice as splicing
from interp.features.splice import SpliceError, SpliceTally, ce_recovered, splice, stream_moments
from interp.model.hooks import reading
from interp.model.loading import load_model
from interp.model.tokens import TokenBatch
from sae.archs import build
from sae.stats import Moments

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


def sample_sae():
    return build("batchtopk", d_in=D, d_sae=2 * D, k=4.0, seed=6)


def test_the_divergence_is_that_of_a_plain_loop(model, text):
    ids, mask = text
    sae = sample_sae()
    result = ce_recovered(model, sae, HOOK, ids, mask, batch_size=5)
    clean = model.logits(ids, mask).double().log_softmax(-1)
    with splice(model, sae, HOOK):
        spliced = model.logits(ids, mask).double().log_softmax(-1)
    total, n = 0.0, 0
    for row in range(len(ids)):
        for at in range(ids.shape[1] - 1):
            if mask[row, at + 1]:
                p, q = clean[row, at], spliced[row, at]
                total += sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
                n += 1
    assert n == result.n_tokens
    assert result.kl_spliced == pytest.approx(total / n, rel=1e-5)
    assert 0 < result.kl_spliced < result.kl_zero
    assert result.kl_score == pytest.approx(1 - result.kl_spliced / result.kl_mean)
    assert result.to_dict()["kl_score_zero"] == pytest.approx(1 - result.kl_spliced / result.kl_zero)


def test_a_perfect_sae_diverges_by_nothing_and_the_mean_by_its_null(model, text):
    ids, mask = text
    perfect = ce_recovered(model, identity_sae(), HOOK, ids, mask)
    assert perfect.kl_spliced == pytest.approx(0, abs=1e-6)
    assert perfect.kl_score == pytest.approx(1, abs=1e-6)
    nothing = ce_recovered(model, constant_sae(real_mean(model, ids, mask)), HOOK, ids, mask)
    assert nothing.kl_score == pytest.approx(0, abs=1e-5)
    assert nothing.kl_spliced == pytest.approx(nothing.kl_mean, abs=1e-5)
    assert nothing.kl_mean > 0.05


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 23), min_size=1, max_size=4, unique=True).map(sorted))
def test_how_the_text_is_cut_does_not_matter(model, text, cuts):
    ids, mask = text
    edges = [0, *cuts, len(ids)]
    batches = [(ids[a:b], mask[a:b]) for a, b in pairwise(edges)]
    whole = ce_recovered(model, sample_sae(), HOOK, ids, mask, batch_size=24).to_dict()
    listed = ce_recovered(model, sample_sae(), HOOK, batches, batch_size=7).to_dict()
    assert (listed.pop("hook"), listed.pop("n_tokens")) == (whole["hook"], whole["n_tokens"])
    assert listed == pytest.approx({k: whole[k] for k in listed}, abs=2e-6)


def test_two_halves_merge_to_the_whole(model, text):
    ids, mask = text
    sae = sample_sae()
    halves = [(ids[:10], mask[:10]), (ids[10:], mask[10:])]
    parts = [stream_moments(model, HOOK, [half]) for half in halves]
    mean = Moments().merge(parts[0]).merge(parts[1]).value().mean
    assert torch.allclose(mean.float(), real_mean(model, ids, mask), atol=1e-6)
    first, second = (SpliceTally(model, sae, HOOK, mean).add(*half) for half in halves)
    alone = second.value()
    merged, whole = first.merge(second).value(), ce_recovered(model, sae, HOOK, ids, mask)
    assert merged.n_tokens == whole.n_tokens
    expected = whole.to_dict()
    assert {k: v for k, v in merged.to_dict().items() if k != "hook"} == pytest.approx(
        {k: v for k, v in expected.items() if k != "hook"}, abs=2e-6
    )
    assert alone.ce_clean != pytest.approx(whole.ce_clean, abs=1e-4)
    with pytest.raises(SpliceError, match="unless hook and mean agree"):
        first.merge(SpliceTally(model, sae, HOOK, parts[0].value().mean))


def test_no_more_logits_are_held_than_the_limit(model, text, monkeypatch):
    ids, mask = text
    whole = ce_recovered(model, sample_sae(), HOOK, ids, mask, batch_size=24)
    rows, calls = [], model.logits

    def watched(part, *args):
        rows.append(len(part))
        return calls(part, *args)

    monkeypatch.setattr(model, "logits", watched)
    monkeypatch.setattr(splicing, "CHUNK", VOCAB * 20)  # four rows of twenty tokens, one token's latents
    cut = ce_recovered(model, sample_sae(), HOOK, ids, mask, batch_size=24)
    assert set(rows) == {4}
    assert len(rows) == 4 * 6
    assert cut.kl_spliced == pytest.approx(whole.kl_spliced, abs=2e-6)


def test_a_token_that_the_clean_model_rules_out_adds_nothing_to_the_divergence():
    clean, changed = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[1.0, 0.0, -torch.inf]])
    ce, kl = splicing._losses(clean, changed, torch.tensor([0]))
    p = 1 / (1 + math.exp(-1))
    assert float(kl) == pytest.approx(-math.log(2) - 0.5 * (math.log(p) + math.log(1 - p)), abs=1e-6)
    assert float(ce) == pytest.approx(-math.log(p), abs=1e-6)


def test_batches_of_the_tokenizer_are_taken(model, text):
    ids, mask = text
    batch = TokenBatch(ids, mask, mask & (ids == 0))
    assert ce_recovered(model, sample_sae(), HOOK, [batch]) == ce_recovered(model, sample_sae(), HOOK, ids, mask)
    with pytest.raises(SpliceError, match="leave mask out"):
        ce_recovered(model, sample_sae(), HOOK, [batch], mask)


def test_what_is_no_autoencoder_or_no_causal_model_is_refused(model, text):
    ids, mask = text
    transcoder = build("batchtopk", d_in=D, d_out=D, d_sae=2 * D, k=4.0, seed=0)
    with pytest.raises(SpliceError, match="a transcoder"), splice(model, transcoder, HOOK):
        pass
    torch.manual_seed(5)
    sizes = {"hidden_size": D, "intermediate_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    masked = load_model(BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes)).eval())
    with pytest.raises(SpliceError, match="does not predict next tokens"):
        ce_recovered(masked, sample_sae(), "resid_post.0", ids, mask)
