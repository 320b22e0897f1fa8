"""Steering is exact on ten architectures: no cache, batch, beam, chunk or context changes what an operation does."""

import pytest
import torch

from interp.acts.direction import Direction, residual_norm
from interp.acts.resampling import placebo_directions
from interp.concepts.steering.conditions import when
from interp.concepts.steering.context import cached_equals_uncached, generate_ids, steer
from interp.concepts.steering.operations import EVERYWHERE, ablate, add, clamp, latents, low_rank, rotate
from interp.model.loading import load_model
from interp.model.tokens import pad_rows
from sae.archs import ARCHS
from sae.config import SAEConfig

IDS = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, **SIZE}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, **GATED}
FAMILIES = {
    "llama": GATED,
    "qwen3": {"head_dim": 8, **GATED},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": {"intermediate_size": 48, **SIZE},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, **SIZE},
    "phi": {**GATED, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **GATED},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **IDS},
}
PROMPTS = [[1, 5, 9, 33, 71, 8, 40], [1, 17, 60], [1, 90, 12, 4, 77]]
ROWS = [1.0, -0.8, 1.2]
EARLY, HOOK = "resid_post.0", "resid_post.1"
NEW = 8


def make(family):
    """Return a random model with weights large enough that its text does not repeat one token."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family]))
        for p in model.parameters():
            if p.ndim > 1:
                p.data = torch.randn_like(p) * (1.0 if p.shape[0] == 100 else 0.25)
    return model.eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    """Return one of ten tiny random models, loaded."""
    return load_model(make(request.param))


def direction(model, seed=0, hook=HOOK):
    return Direction(
        vector=placebo_directions(32, 1, seed)[0], hook=model.hook_point(hook).name, method="", scale=1.0,
        norm=residual_norm(model, hook), model=model.fingerprint,
    )  # fmt: skip


def everything(model, rows=ROWS, later="generated"):
    """Return a plan of every kind of operation, strengths one a row, on several hook points and conditions."""
    a, b, c = direction(model), direction(model, 1), direction(model, 2, EARLY)
    draw = torch.Generator().manual_seed(3)
    A, B = torch.randn(32, 2, generator=draw), torch.randn(2, 32, generator=draw)
    sae = ARCHS["topk"](SAEConfig(arch="topk", d_in=32, d_sae=64, k=4), seed=4)
    shares = [abs(s) for s in rows]
    return [
        add(c, rows),
        latents(sae, {3: 2.0, 5: 1.0}, EARLY, "set", rows, "all"),
        rotate(a, [30 * s for s in rows], b),
        ablate(b, [min(1.0, s) for s in shares], hooks=EVERYWHERE),
        clamp(a, [2 * s for s in rows], positions=later),
        low_rank(A, 0.3 * B, HOOK, strength=rows, when=when(c, 0.0)),
        add(b, rows, "all", when=when(c, 0.0, read="token")),
    ]


def write(model, prompts, new=NEW, **options):
    """Return the new tokens of each prompt, up to EOS."""
    rows = generate_ids(model, prompts, new, **options).tolist()
    return [row[: row.index(2)] if 2 in row else row for row in rows]


def logits(model, row):
    with torch.no_grad():
        return model.hf(torch.tensor([row]), use_cache=False).logits


PLANS = {"add": lambda model, rows=ROWS: [add(direction(model), rows)], "everything": everything}


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_the_tokens_are_those_of_single_prompts_without_a_cache(family, plan):
    make_plan, alone = PLANS[plan], []
    for prompt, strength in zip(PROMPTS, ROWS, strict=True):
        with steer(family.hf, make_plan(family, [strength])):
            alone += write(family, [prompt], use_cache=False)
    with steer(family.hf, make_plan(family)):
        assert write(family, PROMPTS) == alone
        assert write(family, PROMPTS, use_cache=False) == alone
        assert write(family, PROMPTS, prefill_chunk_size=3) == alone
        assert write(family, PROMPTS, cache_implementation="static") == alone
    unsteered = write(family, PROMPTS)
    assert all(a != b for a, b in zip(alone, unsteered, strict=True)), "steering that changes no token proves nothing"
    assert len({t for row in alone for t in row}) > 5


@pytest.mark.parametrize("options", [{"num_beams": 2, "num_return_sequences": 2}])
def test_beams_follow_the_strength_and_the_decision_of_their_prompt(family, options):
    with steer(family, everything(family)):
        together = write(family, PROMPTS, 4, **options)
    each = options.get("num_return_sequences", 1)
    for i, (prompt, strength) in enumerate(zip(PROMPTS, ROWS, strict=True)):
        with steer(family, everything(family, [strength])):
            assert together[each * i : each * (i + 1)] == write(family, [prompt], 4, **options)


def test_a_padded_row_has_the_logits_of_the_single_row(family):
    for side in ("left", "right"):
        batch = pad_rows(PROMPTS, side=side, special_ids=family.special_ids)
        with steer(family, everything(family, later="default")):
            together = family.logits(batch.ids, batch.mask)
        for i, (prompt, strength) in enumerate(zip(PROMPTS, ROWS, strict=True)):
            with steer(family, everything(family, [strength], "default")):
                alone = logits(family, prompt)[0]
            assert torch.allclose(together[i][batch.mask[i]], alone, atol=1e-5 * float(alone.abs().max()), rtol=0)
            assert not torch.allclose(alone, logits(family, prompt)[0], atol=1e-2)


def test_strength_zero_and_every_way_out_leave_each_bit_and_other_hooks(family):
    heard = []
    block = family.place(HOOK).module
    handle = block.register_forward_hook(lambda module, args, out: heard.append(1))
    before, count = logits(family, PROMPTS[0]), len(block._forward_hooks)
    zero = [add(direction(family), 0.0), ablate(direction(family), 0.0), rotate(direction(family), 0.0)]
    with steer(family, zero):
        assert torch.equal(logits(family, PROMPTS[0]), before)
    with steer(family, add(direction(family), [0.0, 1.0]), ablate(direction(family), [0.0, 1.0], hooks=EVERYWHERE)):
        two = family.logits(torch.tensor([PROMPTS[0]] * 2))
    twice = family.logits(torch.tensor([PROMPTS[0]] * 2))
    assert torch.equal(two[0], twice[0]) and not torch.equal(two[1], twice[1])
    with pytest.raises(ZeroDivisionError), steer(family, everything(family)):
        write(family, PROMPTS, 2)
        raise ZeroDivisionError
    heard.clear()
    assert torch.equal(logits(family, PROMPTS[0]), before)
    assert heard and len(block._forward_hooks) == count and "generate" not in vars(family.hf)
    handle.remove()


def test_contexts_compose_as_one_list_does(family):
    plan = everything(family)
    with steer(family, plan):
        together = write(family, PROMPTS)
    with steer(family, plan[0]), steer(family.hf, plan[1]), steer(family, plan[2:]):
        assert write(family, PROMPTS) == together


def test_hugging_faces_own_hooks_do_not_matter(family):
    ids = torch.tensor([PROMPTS[0]])
    with steer(family, everything(family, [1.0], "default")):
        expected = family.hf(ids).logits
        shown = family.hf(ids, output_hidden_states=True)
        assert torch.equal(shown.logits, expected)
    family.hf(ids, output_hidden_states=True)
    with steer(family, everything(family, [1.0], "default")):
        assert torch.equal(family.hf(ids).logits, expected)


def test_tiny_is_steered_alike_with_and_without_cache_alone_and_in_a_batch():
    model = load_model("tiny")
    d = Direction(
        vector=placebo_directions(model.d_model, 1, 5)[0], hook="blocks.3.hook_resid_post", method="", scale=1.0,
        norm=residual_norm(model, "resid_post.3"), model=model.fingerprint,
    )  # fmt: skip
    prompts, rows = ["The king met", "Tom went to see the movie. It was", "Once"], [0.9, 0.9, -0.9]
    plan = [add(d, rows), ablate(d, hooks="mlp_out.*")]
    assert cached_equals_uncached(model, plan, prompts, 16)
    alone = []
    for prompt, strength in zip(prompts, rows, strict=True):
        with steer(model, add(d, strength), ablate(d, hooks="mlp_out.*")):
            alone += model.generate(prompt, max_new_tokens=16)
    with steer(model, plan):
        assert model.generate(prompts, max_new_tokens=16) == alone
    assert all(a != b for a, b in zip(alone, model.generate(prompts, max_new_tokens=16), strict=True))
