import json

import pytest
import torch

from interp.acts.direction import DirectionError, direction_from, residual_norm
from interp.concepts.steering import baked as baked_module
from interp.concepts.steering import writers
from interp.concepts.steering.baked import BakingError
from interp.concepts.steering.baking import ablate_weights, add_bias, bake
from interp.concepts.steering.context import steer
from interp.concepts.steering.operations import EVERYWHERE, ablate, add, clamp
from interp.model.hooks import editing, reading
from interp.model.loading import load_model

IDS = torch.randint(3, 100, (3, 11), generator=torch.Generator().manual_seed(8))
SIZE = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MORE = {  # beyond the families of the fixtures: parallel blocks, scaled streams, experts, a normed embedding
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, **SIZE},
    "phi": {**SIZE, "num_key_value_heads": 4},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, **SIZE},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **SIZE},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, **SIZE},
    "mamba": {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3},
    "bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, **SIZE},
}
POST_NORM = ("gemma2", "gemma3_text", "bloom")


def rough(hf, seed=11):
    """Give norms and biases values of their own: a forgotten one would go unseen at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for p in hf.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return hf.eval()


def made(build, family, **changes):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if family not in MORE:
        return load_model(rough(build(family, **changes)))
    with torch.random.fork_rng():
        torch.manual_seed(23)
        return load_model(rough(AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(MORE[family] | changes)))))


def some_direction(model, seed=5, hook="resid_post.1"):
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return direction_from(vector, hook=hook, model=model, method="by hand")


def real(figure):
    """Return a figure that has to be there."""
    assert figure is not None
    return figure


def logits(hf, ids=IDS):
    with torch.no_grad():
        return hf(ids).logits


def component(model, r, ids=IDS):
    """Return the largest share of a stream along r, over every hook point of it."""
    shares = []
    hooks = [p.name for p in model.hook_points() if p.kind.startswith("resid") or p.kind in ("attn_out", "mlp_out")]

    def note(name, value):
        shares.append(float(((value @ r).abs() / value.norm(dim=-1)).max()))

    with reading(model, hooks, note):
        model.run(ids)
    return max(shares)


def by_hand(model, r):
    """Return edits that ablate r in all that blocks read and write (Arditi et al.), written out."""
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    hooks = [p.name for p in model.hook_points() if p.kind in kinds]
    return {hook: lambda value, clock: value - (value @ r)[..., None] * r for hook in hooks}


@pytest.mark.parametrize(
    ("family", "tie"),
    [
        ("llama", False), ("llama", True), ("qwen3", True), ("gpt2", False), ("gpt2", True), ("gpt_neox", False),
        ("opt", True), ("phi", False), ("mixtral", False), ("gpt_oss", True),
    ],
)  # fmt: skip
def test_ablated_weights_equal_hooks_after_a_reload(build, tmp_path, family, tie):
    model = made(build, family, tie_word_embeddings=tie)
    d = some_direction(model)
    before = logits(model.hf)
    with editing(model, by_hand(model, d.vector)):
        hooked = logits(model.hf)
    found = ablate_weights(model, d)
    found.save(tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    scale = float(hooked.abs().max())
    assert float((hooked - before).abs().max()) > 1e-2 * scale
    torch.testing.assert_close(logits(again.hf), hooked, rtol=0, atol=1e-5 * scale)
    assert component(model, d.vector) > 1e-2 and component(again, d.vector) < 1e-5
    assert torch.equal(logits(model.hf), before)
    assert found.plain_difference == found.difference < 1e-5 and real(found.component) < 1e-5
    assert type(again.hf) is type(model.hf) and again.hf.config.tie_word_embeddings is False


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "bloom", "granite", "mamba"])
def test_streams_behind_norms_multipliers_and_state_spaces_lose_the_direction_too(build, tmp_path, family):
    model = made(build, family)
    d = some_direction(model)
    found = ablate_weights(model, d)
    again = load_model(str(found.save(tmp_path / "out")))
    assert component(model, d.vector) > 1e-2 and component(again, d.vector) < 1e-5
    assert found.difference < 1e-5
    behind_norms = family in POST_NORM
    assert (real(found.plain_difference) > 1e-3) == behind_norms and any(
        "gain" in n for n in found.notes
    ) == behind_norms


def test_gemma_equals_hooks_that_ablate_the_gained_direction_before_each_norm(build):
    model = made(build, "gemma2")
    r = some_direction(model).vector
    edits = {"resid_pre.0": lambda value, clock: value - (value @ r)[..., None] * r}
    for i, block in enumerate(model.hf.model.layers):
        for inner, norm in (("self_attn", block.post_attention_layernorm), ("mlp", block.post_feedforward_layernorm)):
            g = (1 + norm.weight.detach()) * r
            g = g / g.norm()
            edits[f"model.layers.{i}.{inner}"] = lambda value, clock, g=g: value - (value @ g)[..., None] * g
    with editing(model, edits):
        hooked = logits(model.hf)
    found = ablate_weights(model, some_direction(model))
    torch.testing.assert_close(logits(found.hf), hooked, rtol=0, atol=1e-5 * float(hooked.abs().max()))
    with editing(model, by_hand(model, r)):
        after_the_norm = logits(model.hf)
    gap = float((logits(found.hf) - after_the_norm).abs().max() / after_the_norm.abs().max())
    assert gap > 1e-3 and 0.2 * gap < real(found.plain_difference) < 5 * gap


def test_gpt2_needs_its_position_embeddings_and_biases(build):
    model = made(build, "gpt2")
    found = ablate_weights(model, some_direction(model))
    assert {"transformer.wpe.weight", "transformer.wte.weight", "transformer.h.2.mlp.c_proj.bias"} <= set(found.edited)
    assert len(found.edited) == 2 + 3 * 4
    r = some_direction(model).vector
    for name in ("transformer.wpe.weight", "transformer.h.1.attn.c_proj.bias"):
        dict(found.hf.named_parameters())[name].data.copy_(dict(model.hf.named_parameters())[name].data)
        assert component(load_model(found.hf), r) > 1e-3


def test_several_directions_are_removed_as_a_subspace(build):
    model = made(build, "qwen3")
    many = [some_direction(model, seed) for seed in (1, 2, 3)]
    found = ablate_weights(model, [*many, many[0]])
    baked = load_model(found.hf)
    assert max(component(baked, d.vector) for d in many) < 1e-5
    assert component(baked, some_direction(model, 9).vector) > 1e-2


@pytest.mark.parametrize("name", ["down_proj", "o_proj", "embed_tokens"])
def test_a_forgotten_writer_is_an_error_not_a_folder(build, monkeypatch, name):
    model = made(build, "llama")
    real = writers.find_writers
    monkeypatch.setattr(
        "interp.concepts.steering.baking.find_writers", lambda *a, **k: [w for w in real(*a, **k) if name not in w.name]
    )
    with pytest.raises(BakingError, match="still points along"):
        ablate_weights(model, some_direction(model))


def test_a_parameter_changed_in_excess_is_an_error_not_a_folder(build, monkeypatch):
    model = made(build, "llama")
    real = writers.find_writers

    def too_many(*a, **k):
        found = real(*a, **k)
        return [*found, writers.Writer("model.layers.1.mlp.up_proj.weight", 1, found[0].site)]

    monkeypatch.setattr("interp.concepts.steering.baking.find_writers", too_many)
    with pytest.raises(BakingError, match="does more than write"):
        ablate_weights(model, some_direction(model))


def test_finding_writers_leaves_every_bit_as_it_was(build):
    model = made(build, "mixtral")
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    state = torch.get_rng_state()
    found = writers.find_writers(model, writers.find_sites(model))
    assert len(found) == 7 and {w.axis for w in found if "experts" in w.name} == {1}
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_expert_that_no_token_reaches_is_a_writer_like_the_others():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 6) for _ in range(3))

        def forward(self, x):
            return x + self.experts[0](torch.ones(*x.shape[:-1], 8))

    module, x = Experts(), torch.randn(2, 5, 6)
    site = writers.Site("h", "", "output")
    found = writers._tested(dict(module.named_parameters()), 6, module, [site], lambda: module(x))
    assert sorted(found) == sorted((f"experts.{i}.{kind}", 0, 0) for i in range(3) for kind in ("weight", "bias"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_ablated_to_its_own_precision(build, dtype):
    model = load_model(made(build, "llama").hf.to(dtype))
    d = some_direction(model)
    found = ablate_weights(model, d)
    assert found.hf.dtype == dtype and 0 < real(found.component) < 8 * torch.finfo(dtype).eps
    assert component(load_model(found.hf), d.vector.to(dtype)) < 0.02 < 0.1 < component(model, d.vector.to(dtype)) * 2


@pytest.mark.parametrize(
    ("family", "hook", "written"),
    [
        ("gpt2", "resid_post.1", "transformer.h.1.mlp.c_proj.bias"),
        ("gpt2", "attn_out.2", "transformer.h.2.attn.c_proj.bias"),
        ("gpt_neox", "mlp_out.0", "gpt_neox.layers.0.mlp.dense_4h_to_h.bias"),
        ("opt", "resid_post.2", "model.decoder.layers.2.fc2.bias"),
        ("llama", "resid_post.1", "model.layers.1.mlp.down_proj.bias"),
        ("llama", "attn_out.1", "model.layers.1.self_attn.o_proj.bias"),
        ("qwen3", "attn_out.0", "model.layers.0.self_attn.o_proj.bias"),
    ],
)
def test_a_bias_adds_what_a_hook_adds_after_a_reload(build, tmp_path, family, hook, written):
    model = made(build, family)
    d = some_direction(model, hook=hook)
    before = logits(model.hf)
    with editing(model, {hook: lambda value, clock: value + 0.7 * residual_norm(model, hook) * d.vector}):
        hooked = logits(model.hf)
    found = add_bias(model, d, 0.7)
    again = load_model(str(found.save(tmp_path / "out")))
    scale = float(hooked.abs().max())
    assert found.edited == (written,) and found.difference < 1e-5
    assert float((hooked - before).abs().max()) > 1e-3 * scale
    torch.testing.assert_close(logits(again.hf), hooked, rtol=0, atol=1e-5 * scale)
    assert torch.equal(logits(model.hf), before)


@pytest.mark.parametrize(
    ("family", "hook", "why"),
    [
        ("qwen3", "resid_post.1", "no bias"),
        ("mixtral", "attn_out.1", "no bias"),
        ("gemma2", "attn_out.1", "before a norm"),
        ("llama", "resid_pre.1", "resid_post, mlp_out, attn_out"),
        ("llama", "embed", "resid_post, mlp_out, attn_out"),
    ],
)
def test_an_addition_without_a_bias_is_refused_with_the_reason(build, family, hook, why):
    model = made(build, family)
    with pytest.raises(BakingError, match=why):
        add_bias(model, some_direction(model, hook=hook), 1.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_baked_plan_writes_the_text_of_the_steered_model(build, tmp_path, family):
    model = made(build, family)
    plan = [ablate(some_direction(model, 1), positions="all", hooks=EVERYWHERE)]
    if family != "qwen3":
        plan.append(add(some_direction(model, 2), 1.5, positions="all"))
    ids = IDS[:, :5]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0, 1, 2]}
    plain = model.hf.generate(ids, **options)
    with steer(model, plan):
        steered = model.hf.generate(ids, **options)
    found = bake(model, plan, out=tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    assert torch.equal(again.hf.generate(ids, **options), steered) and not torch.equal(steered, plain)
    assert found.difference < 1e-5 and real(found.component) < 1e-5
    record = json.loads((tmp_path / "out" / baked_module.RECORD).read_text())
    assert record["source"] == model.fingerprint and record["edited"] == list(found.edited)
    assert [o["operation"] for o in record["operations"]] == [op.kind for op in plan]


def test_an_ablation_behind_norms_is_baked_only_as_an_approximation(build, tmp_path):
    model = made(build, "gemma2")
    operation = ablate(some_direction(model), positions="all", hooks=EVERYWHERE)
    with pytest.raises(BakingError, match="approximate=True"):
        bake(model, operation, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = bake(model, operation, out=tmp_path / "out", approximate=True)
    assert real(found.component) < 1e-5 and real(found.plain_difference) > 1e-3
    assert component(load_model(str(tmp_path / "out")), some_direction(model).vector) < 1e-5


def test_what_weights_cannot_do_is_refused_with_the_reason(build):
    model = made(build, "llama")
    d = some_direction(model)
    whole = {"positions": "all", "hooks": EVERYWHERE}
    refused = [
        (clamp(d, 1.0, positions="all"), "nothing else"),
        (add(d, 1.0), "every position"),
        (add(d, [1.0, 2.0], positions="all"), "one a row"),
        (add([d, d], 1.0, positions="all"), "one direction a row"),
        (add(d, 1.0, positions="all", keep_norm=True), "not linear"),
        (ablate(d, positions="all"), "EVERYWHERE"),
        (ablate(d, 0.5, **whole), "strength is 0.5"),
        (ablate(d, side="positive", **whole), "one-sided"),
        (ablate(d, positions="generated", hooks=EVERYWHERE), "every position"),
        (ablate(d, positions="all", hooks=("resid_pre.*", "attn_out.*")), "mlp_out is left out"),
    ]
    for operation, why in refused:
        with pytest.raises(BakingError, match=why):
            bake(model, operation)
    with pytest.raises(ValueError, match="empty"):
        bake(model)
    with pytest.raises(ValueError, match="no direction"):
        ablate_weights(model, [])


def test_another_models_direction_is_refused_unless_forced(build):
    model, other = made(build, "llama"), load_model(build("llama", seed=3))
    d = some_direction(other)
    with pytest.raises(DirectionError, match="force=True"):
        ablate_weights(model, d)
    with pytest.raises(DirectionError, match="force=True"):
        bake(model, ablate(d, positions="all", hooks=EVERYWHERE))
    assert component(load_model(ablate_weights(model, d, force=True).hf), d.vector) < 1e-5


def test_a_full_folder_is_left_alone_and_a_failed_save_leaves_nothing(build, tmp_path, monkeypatch):
    model = made(build, "llama")
    found = ablate_weights(model, some_direction(model))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="new folder"):
        found.save(tmp_path / "full")
    real = baked_module.load_model

    def wrong(*args, **options):
        again = real(*args, **options)
        again.hf.lm_head.weight.data += 1
        return again

    monkeypatch.setattr(baked_module, "load_model", wrong)
    with pytest.raises(BakingError, match="does not come back"):
        found.save(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_models_that_cannot_be_baked_say_why(build):
    from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    small: dict = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    t5 = load_model(T5ForConditionalGeneration(T5Config(**small)).eval())
    d = some_direction(t5, hook="encoder.resid_post.1")
    with pytest.raises(BakingError, match="encoder-decoder"):
        ablate_weights(t5, d)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    bert = load_model(rough(BertLMHeadModel(config)))
    with pytest.raises(BakingError, match="norm of the whole stream"):
        ablate_weights(bert, some_direction(bert))
    quantised = made(build, "llama")
    quantised.hf.is_quantized = True
    with pytest.raises(BakingError, match="quantised"):
        ablate_weights(quantised, some_direction(quantised))


def test_the_bundled_model_is_baked_with_its_tokenizer(tmp_path):
    model = load_model("tiny")
    d = some_direction(model, hook="resid_post.3")
    bake(model, ablate(d, positions="all", hooks=EVERYWHERE), out=tmp_path / "steered")
    again = load_model(str(tmp_path / "steered"))
    assert component(again, d.vector) < 1e-5 < 1e-2 < component(model, d.vector)
    assert again.generate("Once upon a time", 8) != [""] and again.fingerprint != model.fingerprint
