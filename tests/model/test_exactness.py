"""The values at hook points are the model's own, bit for bit, in every family and on both backends."""

import copy

import pytest
import torch

from interp.model.hooks import reading
from interp.model.loading import load_model

FAMILIES = ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3_text", "mistral", "opt", "bloom", "phi"]
MORE = ["olmo2", "cohere", "granite", "gptj", "falcon"]
IDS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(3))


def read_all(model, ids, mask=None):
    got = {}
    names = [p.name for p in model.hook_points()]
    with reading(model, names, lambda name, value: got.__setitem__(name, value.clone()), stop=False):
        logits = model.logits(ids, mask)
    return got, logits


@pytest.mark.parametrize("family", FAMILIES + MORE)
def test_captured_residuals_are_the_models_own_hidden_states_bit_for_bit(build, family):
    hf = build(family)
    # GPT-J with a cache lays its keys out otherwise and rounds otherwise (6e-8); the ten agree with or without
    options = {} if family in FAMILIES else {"use_cache": False}
    with torch.no_grad():
        want = hf(IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True, **options)
    model = load_model(build(family))
    got, logits = read_all(model, IDS)
    for i in range(model.n_layers):
        assert torch.equal(got[f"blocks.{i}.hook_resid_pre"], want.hidden_states[i])
        if i < model.n_layers - 1:
            assert torch.equal(got[f"blocks.{i}.hook_resid_post"], want.hidden_states[i + 1])
    assert torch.equal(logits, want.logits)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE, "mamba"])
def test_last_residual_through_norm_and_head_is_the_logits_bit_for_bit(build, family):
    model = load_model(build(family))
    got, logits = read_all(model, IDS)
    last = got[f"blocks.{model.n_layers - 1}.hook_resid_post"]
    with torch.no_grad():
        assert torch.equal(model.unembed(last), logits)
        assert torch.allclose(model.unembed(last[0, 3]), logits[0, 3], atol=1e-5)
    assert torch.equal(got["ln_final.hook_out"] @ model.unembed_matrix().T, got["ln_final.hook_out"] @ head(model).T)


def head(model):
    return model.hf.get_output_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_outputs_are_what_the_stream_gains(build, family):
    model = load_model(build(family))
    got, _ = read_all(model, IDS)
    for i in range(model.n_layers):
        pre, attn, mlp, post = (got[f"blocks.{i}.hook_{k}"] for k in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        assert torch.allclose(pre + attn + mlp, post, atol=1e-5)
        parallel = family in ("gpt_neox", "phi")
        assert (f"blocks.{i}.hook_resid_mid" in got) == (not parallel)
        if not parallel:
            assert torch.allclose(got[f"blocks.{i}.hook_resid_mid"], pre + attn, atol=1e-5)


def test_parts_that_do_not_sum_to_the_stream_are_not_listed(build):
    kinds = {p.kind for p in load_model(build("granite")).hook_points()}  # a multiplier stands between
    assert kinds == {"embed", "resid_pre", "resid_post", "final_norm"}


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere"])
def test_left_padded_rows_equal_single_prompts(build, family):
    model = load_model(build(family))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    got, logits = read_all(model, IDS, mask)
    alone, alone_logits = read_all(model, IDS[:1, 4:])
    assert (logits[0, 4:] - alone_logits[0]).abs().max() < 1e-5
    for name, value in alone.items():
        assert (got[name].reshape(2, 9, -1)[0, 4:] - value.reshape(1, 5, -1)[0]).abs().max() < 1e-5, name


def test_plain_left_padding_without_positions_is_wrong_for_gpt2(build):
    hf = build("gpt2")
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        naive = hf(IDS[:1], attention_mask=mask).logits[:, 4:]
        alone = hf(IDS[:1, 4:]).logits
    assert (naive - alone).abs().max() > 1e-2  # else the test above shows nothing


@pytest.mark.parametrize("family", [*FAMILIES, "olmo2", "cohere"])
def test_the_same_name_is_the_same_tensor_through_a_bridge(build, family):
    hf = build(family)
    native, bridged = load_model(hf), load_model(hf, backend="transformer_lens")
    got, logits = read_all(native, IDS)
    through, bridge_logits = read_all(bridged, IDS)
    assert bridged.backend == "transformer_lens" and list(got) == list(through)
    for name, value in got.items():
        assert (through[name].reshape(value.shape) - value).abs().max() < 1e-5, name
    assert (logits - bridge_logits).abs().max() < 1e-5
    assert native.fingerprint == bridged.fingerprint


def test_a_bridge_of_the_users_is_taken_as_it_is(build, words):
    from transformer_lens.model_bridge import TransformerBridge

    hf = copy.deepcopy(build("llama"))
    hf.config.architectures = [type(hf).__name__]
    bridge = TransformerBridge.boot_transformers("x", hf_model=hf, tokenizer=words, dtype=torch.float32, device="cpu")
    model = load_model(bridge)
    assert model.bridge is bridge and model.hf is bridge.original_model
    _, cache = bridge.run_with_cache(IDS, names_filter="blocks.1.hook_resid_post", prepend_bos=False)
    got, _ = read_all(model, IDS)
    assert torch.equal(got["blocks.1.hook_resid_post"], cache["blocks.1.hook_resid_post"])
    assert model.hook_point("blocks.1.attn.hook_out").name == "blocks.1.hook_attn_out"
    left = torch.ones(2, 9, dtype=torch.bool)
    left[0, :4] = False
    assert (model.logits(IDS, left)[0, 4:] - model.logits(IDS[:1, 4:])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["native", "transformer_lens"])
def test_the_users_model_is_never_changed(build, backend, words):
    hf = build("gpt2")
    config, keys, random = hf.config.to_dict(), list(hf.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        before = hf(IDS).logits
    hf.transformer.h[1].train()  # a mixed mode, to be kept as it is
    modes = [m.training for m in hf.modules()]
    attributes = [set(vars(m)) for m in hf.modules()]
    model = load_model(hf, backend=backend, tokenizer=words)
    read_all(model, IDS)
    model.generate(["w5 w6"], max_new_tokens=2)
    assert [m.training for m in hf.modules()] == modes
    assert [set(vars(m)) for m in hf.modules()] == attributes
    assert hooks_on(hf) == 0
    assert torch.equal(torch.get_rng_state(), random)
    hf.eval()
    assert list(hf.state_dict()) == keys and hf.config.to_dict() == config
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, before)


def hooks_on(hf):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def test_bfloat16_models_are_exact_too(build):
    hf = build("llama").to(torch.bfloat16)
    model = load_model(hf)
    got, logits = read_all(model, IDS)
    with torch.no_grad():
        want = hf(IDS, output_hidden_states=True)
    assert torch.equal(got["blocks.1.hook_resid_post"], want.hidden_states[2])
    assert got["blocks.1.hook_attn_out"].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model.unembed(got["blocks.2.hook_resid_post"]), logits)
