"""The pass over the text against a slow twin, and what is shown of a latent against the model itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from interp.acts.capture import capture_acts
from interp.features.examples import (
    ExamplesError,
    LatentScan,
    logit_effects,
    scan_acts,
    token_strings,
    top_examples,
)
from interp.model.loading import load_model
from sae.archs import build

D, LATENTS = 16, 24


def small_sae(seed=0):
    """A random SAE of which a few latents fire often, some rarely, and one never; exact on data of whole numbers."""
    sae = build("batchtopk", d_in=D, d_sae=LATENTS, k=4.0, seed=seed)
    with torch.no_grad():
        sae.enc.copy_(torch.randint(-2, 3, sae.enc.shape, generator=torch.Generator().manual_seed(seed + 1)))
        sae.cut.copy_(torch.linspace(0, 30, LATENTS))
        sae.cut[5] = torch.inf
    return sae


def slow_table(sae, x, windows, k):
    """One latent at a time: sort its firing tokens, keep the first of each window."""
    latents = sae.encode(x).detach().numpy()
    rows, values = np.full((LATENTS, k), -1), np.zeros((LATENTS, k))
    for latent in range(LATENTS):
        used, kept = set(), []
        for row in sorted(range(len(x)), key=lambda row: (-latents[row, latent], row)):
            if latents[row, latent] > 0 and windows[row] not in used and len(kept) < k:
                used.add(windows[row])
                kept.append(row)
        rows[latent, : len(kept)] = kept
        values[latent, : len(kept)] = latents[kept, latent]
    return rows, values, (latents != 0).mean(0), (latents**2).mean(0)


@given(st.integers(0, 10_000), st.integers(1, 6), st.lists(st.integers(0, 30), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_scan_equals_its_slow_twin_however_the_stream_is_cut(seed, k, cuts):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.integers(-3, 4, (90, D)), dtype=torch.float32)  # equal values are common, and exactly equal
    windows = np.sort(rng.integers(0, 20, 90))
    sae = small_sae(seed)
    scan, start = LatentScan(sae, k), 0
    for size in [*cuts, 90]:
        scan.add(x[start : start + size], torch.tensor(windows[start : start + size]))
        start += size
    table = scan.value()
    rows, values, density, energy = slow_table(sae, x, windows, k)
    assert np.array_equal(table.top_rows.numpy(), rows)
    assert np.array_equal(table.top_values.numpy(), values)
    assert np.array_equal(table.max.numpy(), values[:, 0])
    assert np.allclose(table.density.numpy(), density)
    assert np.allclose(table.energy.numpy(), energy, rtol=1e-5)  # decoder rows have length 1
    assert table.n_tokens == 90
    assert table.density[5] == 0 and table.dead >= 1 / LATENTS


def word_tokenizer():
    words = ["<s>", *(f"▁{w}" for w in "abcdefghij"), "x"]
    raw = Tokenizer(models.BPE({w: i for i, w in enumerate(["▁", *words, *"abcdefghij"])}, []))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def tiny(family="gpt2"):
    tokenizer = word_tokenizer()
    torch.manual_seed(1)
    n = len(tokenizer)
    if family == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=n, n_positions=64, n_embd=D, n_layer=2, n_head=2))
    elif family == "llama":
        sizes = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        hf = LlamaForCausalLM(LlamaConfig(vocab_size=n, max_position_embeddings=64, **sizes))
    else:
        sizes = {"hidden_size": D, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        hf = OPTForCausalLM(
            OPTConfig(
                vocab_size=n, max_position_embeddings=64, do_layer_norm_before=False, word_embed_proj_dim=D, **sizes
            )
        )
    for name, p in hf.named_parameters():
        if "norm" in name or "ln_f" in name:  # gains and biases that are not the initial ones and zeros
            torch.nn.init.normal_(p, 1.0, 0.5)
    return load_model(hf.eval(), tokenizer=tokenizer)


def captured(model, n=12, seed=2):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(list("abcdefghij"), rng.integers(3, 14))) for _ in range(n)]
    acts = capture_acts(model, texts, ["resid_post.0"])
    return acts


def spread_sae(acts, hook="resid_post.0"):
    """An SAE in the middle of the activations, so that its latents differ between tokens."""
    x = acts[hook]
    sae = build("batchtopk", d_in=D, d_sae=LATENTS, k=4.0, seed=7)
    with torch.no_grad():
        sae.dec_bias.copy_(x.mean(0))
        sae.cut.fill_(float(x.std()) * 0.5)
    return sae


def test_a_context_shows_the_tokens_and_activations_around_its_peak():
    model = tiny()
    acts = captured(model)
    sae = spread_sae(acts)
    latents = sae.encode(acts["resid_post.0"]).detach()
    shown = top_examples(model, sae, acts, "resid_post.0", n_latents=6, n_examples=3, context=4, window=6)
    assert len(shown) == 6
    for example in shown:
        column = latents[:, example.latent]
        assert example.max == pytest.approx(float(column.max()), abs=1e-5)
        assert example.density == pytest.approx(float((column > 0).float().mean()))
        assert example.contexts[0].value == pytest.approx(example.max, abs=1e-5)
        assert [c.value for c in example.contexts] == sorted((c.value for c in example.contexts), reverse=True)
        windows = [(c.document, c.position // 6) for c in example.contexts]
        assert len(set(windows)) == len(windows)
        for c in example.contexts:
            mine = (acts.documents == c.document).nonzero()[:, 0]
            peak = int((acts.positions[mine] == c.position).nonzero())
            near = mine[max(0, peak - 4) : peak + 5]
            assert c.tokens == tuple(token_strings(model.tokenizer, acts.token_ids[near].tolist()))
            assert c.activations == pytest.approx(column[near].tolist(), abs=1e-5)
            assert c.peak == min(peak, 4)


def test_at_most_one_context_comes_from_a_window():
    model = tiny()
    acts = captured(model)
    sae = spread_sae(acts)
    whole = scan_acts(sae, acts, "resid_post.0", k=20, window=64)  # longer than any document
    documents = acts.documents[whole.top_rows.clamp_min(0)]
    for latent in range(LATENTS):
        mine = documents[latent][whole.top_rows[latent] >= 0].tolist()
        assert len(set(mine)) == len(mine)
    each = scan_acts(sae, acts, "resid_post.0", k=20, window=1)  # every token for itself
    assert (each.top_rows >= 0).sum() > (whole.top_rows >= 0).sum()
    cut = scan_acts(sae, acts, "resid_post.0", k=20, batch_size=5)
    assert torch.equal(cut.top_rows, whole.top_rows)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_logit_effects_are_the_unembedding_behind_the_norms_gain(family):
    model = tiny(family)
    r = torch.randn(5, D, generator=torch.Generator().manual_seed(3))
    head = model.unembed_matrix()
    if family == "gpt2":
        norm = model.hf.transformer.ln_f
        expected = ((r - r.mean(1, keepdim=True)) * norm.weight) @ head.T
    elif family == "llama":
        expected = (r * model.hf.model.norm.weight) @ head.T
    else:  # this OPT has no final norm
        expected = r @ head.T
    assert torch.allclose(logit_effects(model, r), expected, rtol=1e-3, atol=1e-4)


def test_a_planted_direction_promotes_its_token_beyond_random_directions():
    model = tiny("llama")
    acts = captured(model)
    sae = spread_sae(acts)
    target = 4
    with torch.no_grad():
        sae.dec[2] = torch.nn.functional.normalize(model.unembed_matrix()[target] * model.hf.model.norm.weight, dim=0)
    [example] = top_examples(model, sae, acts, "resid_post.0", latents=[2], n_logits=3)
    assert example.top_logits[0][0] == token_strings(model.tokenizer, [target])[0]
    assert example.top_logits[0][1] > example.logit_null > 0
    assert example.bottom_logits[0][1] < example.bottom_logits[1][1] < 0
    assert example.to_dict()["latent"] == 2


def test_the_strongest_latents_fire_and_are_no_denser_than_asked():
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(8)) * 2
    table = LatentScan(small_sae(), 2).add(x, torch.arange(500)).value()
    for by in ("energy", "max", "density"):
        order = table.strongest(LATENTS, by=by)
        assert 5 not in order
        assert torch.equal(getattr(table, by)[order].sort(descending=True).values, getattr(table, by)[order])
    assert all(table.density[latent] <= 0.2 for latent in table.strongest(LATENTS, max_density=0.2))
    with pytest.raises(ExamplesError, match="not 'size'"):
        table.strongest(1, by="size")


def test_tokens_are_shown_as_the_text_they_add():
    tokenizer = word_tokenizer()
    assert token_strings(tokenizer, [2, 12]) == [" a", "x"]


def test_what_cannot_be_shown_is_refused():
    model = tiny()
    acts = captured(model)
    sae = spread_sae(acts)
    with pytest.raises(ExamplesError, match="latents 0 to 23, not 24"):
        top_examples(model, sae, acts, "resid_post.0", latents=[24])
    with pytest.raises(ExamplesError, match="at least one example"):
        LatentScan(sae, 0)
    with pytest.raises(ExamplesError, match="no rows were given"):
        LatentScan(sae).value()
    with pytest.raises(ExamplesError, match="ascending order"):
        LatentScan(sae).add(torch.zeros(2, D), torch.tensor([1, 0]))
