"""What is taken for a stream of blocks and what is refused; what the hook points say of themselves."""

import pytest
import torch
import transformers
from torch import nn

from interp.model.anatomy import AnatomyError
from interp.model.forward import eval_mode
from interp.model.hooks import reading
from interp.model.loading import load_model

IDS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(3))
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
XLNET = {"vocab_size": 97, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48}
XLM = {"vocab_size": 97, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64}


def random(kind, config, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


@pytest.mark.parametrize(
    ("kind", "config", "sizes", "said"),
    [
        ("AlbertModel", "AlbertConfig", SMALL, "runs 3 times"),
        ("XLNetLMHeadModel", "XLNetConfig", XLNET, r"not \[batch, position, width\]"),
        ("XLMWithLMHeadModel", "XLMConfig", XLM, "is not hidden_states"),
    ],
)
def test_what_is_no_single_stream_of_blocks_is_refused(kind, config, sizes, said):
    with pytest.raises(AnatomyError, match=said):
        load_model(random(kind, config, **sizes))


def test_blocks_that_return_lists_are_captured_and_edited():
    hf = random("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", vocab_size=97, n_embd=32, n_layer=3, n_head=4)
    with torch.no_grad():
        want = hf(IDS, output_hidden_states=True).hidden_states
    model, got = load_model(hf), {}
    with reading(model, "resid_post.*", lambda name, value: got.__setitem__(name, value.clone())):
        model.run(IDS)
    assert all(torch.equal(got[f"blocks.{i}.hook_resid_post"], want[i + 1]) for i in range(3))


def test_a_list_of_the_right_length_that_carries_no_stream_is_passed_over(build):
    hf = build("llama")
    hf.model.extras = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))  # never run
    assert load_model(hf).blocks_path == "model.layers"
    with pytest.raises(AnatomyError, match="does not run"):
        load_model(hf, blocks="model.extras")


def test_a_list_that_runs_but_whose_blocks_are_not_chained_is_refused_without_hidden_states(build):
    hf = build("mamba")
    assert load_model(hf).blocks_path == "backbone.layers"
    forward = hf.backbone.layers[1].forward
    hf.backbone.layers[1].forward = lambda hidden_states, **options: forward(hidden_states * 1.5, **options)
    assert load_model(hf).n_layers == 3  # what a block does inside is its own affair
    hf.backbone.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    with pytest.raises(AnatomyError, match="hidden_states"):
        load_model(hf)


@pytest.mark.parametrize(
    ("family", "hook", "said"),
    [
        ("llama", "resid_post.1", "resid_pre + attn_out + mlp_out"),
        ("granite", "resid_post.1", "0.5 times the outputs of self_attn and mlp"),
        ("gpt_neox", "mlp_out.1", "no module takes the stream between"),
        ("gemma2", "attn_out.1", "the output of post_attention_layernorm"),
        ("bloom", "attn_out.1", "the output of self_attention.dense"),
        ("bloom", "embed", "word_embeddings_layernorm"),
        ("mamba", "resid_post.1", "not listed"),
    ],
)
def test_hook_points_say_what_they_are(build, family, hook, said):
    point = load_model(build(family)).hook_point(hook)
    assert said in point.meaning and point.shape == "[batch, pos, 32]"


def test_every_hook_point_has_a_meaning_on_both_backends(build):
    for backend in ("native", "transformer_lens"):
        points = load_model(build("gpt2"), backend=backend).hook_points()
        assert len(points) == 17 and all(p.meaning for p in points)


def test_a_multiplier_between_is_found_by_arithmetic(build):
    assert "0.25 times" in load_model(build("granite", residual_multiplier=0.25)).hook_point("resid_post.0").meaning


def test_roberta_as_a_decoder_counts_positions_from_behind_its_pad():
    sizes = {**SMALL, "max_position_embeddings": 64, "is_decoder": True, "pad_token_id": 1}
    hf = random("RobertaForCausalLM", "RobertaConfig", **sizes)
    model, mask = load_model(hf), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    alone = model.logits(IDS[:1, 4:])
    assert (model.logits(IDS, mask)[0, 4:] - alone[0]).abs().max() < 1e-5
    assert model.n_ctx == 62 and model.logits(torch.full((1, 62), 5)).shape == (1, 62, 97)
    with pytest.raises(ValueError, match="at most 62"):
        model.logits(torch.full((1, 63), 5))
    naive = hf(IDS, attention_mask=mask.long(), position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0)).logits
    assert (naive[0, 4:] - alone[0]).abs().max() > 1e-2  # what GPT-2's positions would give


def test_evaluation_mode_reaches_every_module_and_gives_each_its_own_back(build):
    hf = build("gpt2")
    hf.transformer.h[1].attn.train()
    hf.lm_head.train()
    before = {name: m.training for name, m in hf.named_modules()}
    with eval_mode(hf):
        assert not any(m.training for m in hf.modules())
    assert {name: m.training for name, m in hf.named_modules()} == before and any(before.values())
