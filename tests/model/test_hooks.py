"""Names of hook points; reading and editing contexts and what they leave behind."""

import pytest
import torch
from torch import nn

from interp.model.anatomy import AnatomyError
from interp.model.hooks import HookPoint, HookPointError, canonical_name, editing, expand, reading
from interp.model.loading import load_model

IDS = torch.randint(4, 97, (2, 6), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def llama(build):
    return load_model(build("llama"))


def read(model, names, **options):
    got = {}
    with reading(model, names, lambda name, value: got.__setitem__(name, value.clone()), **options):
        model.run(IDS)
    return got


def hooks_on(hf):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


@pytest.mark.parametrize(
    "spelling",
    [
        "resid_post.1",
        "blocks.1.hook_resid_post",
        "blocks.1.hook_out",
        "blocks.1.resid_post",
        "resid_post.-2",
        "model.layers.1",
    ],
)
def test_every_spelling_is_the_same_hook_point(llama, spelling):
    assert llama.hook_point(spelling) == HookPoint("blocks.1.hook_resid_post", "resid_post", 1, 32)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("embed", "hook_embed"),
        ("embed.hook_out", "hook_embed"),
        ("model.embed_tokens", "hook_embed"),
        ("final_norm", "ln_final.hook_out"),
        ("model.norm", "ln_final.hook_out"),
        ("blocks.0.hook_in", "blocks.0.hook_resid_pre"),
        ("blocks.0.attn.hook_out", "blocks.0.hook_attn_out"),
        ("blocks.0.mlp.hook_out", "blocks.0.hook_mlp_out"),
        ("blocks.0.ln2.hook_in", "blocks.0.hook_resid_mid"),
        ("model.layers.0.mlp", "blocks.0.hook_mlp_out"),
    ],
)
def test_bridge_names_and_module_paths_are_accepted(llama, spelling, name):
    assert llama.hook_point(spelling).name == name


def test_a_post_norm_family_keeps_the_added_tensor_apart_from_the_module_output(build):
    model = load_model(build("gemma2"))
    assert model.hook_point("blocks.0.ln1_post.hook_out").name == "blocks.0.hook_attn_out"
    raw = model.hook_point("model.layers.0.self_attn")
    assert (raw.kind, raw.layer, raw.d) == ("module", 0, 32)
    got = read(model, ["attn_out.0", raw.name])
    assert not torch.allclose(got["blocks.0.hook_attn_out"], got[raw.name])
    with pytest.raises(HookPointError):  # in the bridge this is the tensor before the post-norm
        model.hook_point("blocks.0.attn.hook_out")


def test_inner_modules_are_hook_points_by_their_path(llama):
    point = llama.hook_point("model.layers.1.mlp.gate_proj")
    assert point == HookPoint("model.layers.1.mlp.gate_proj", "module", 1, 48)
    with pytest.raises(HookPointError, match=r"\(2, 5\).*batch|no tensor|not \[batch"):
        llama.hook_point("model.rotary_emb")


@pytest.mark.parametrize(
    ("wrong", "close"),
    [
        ("blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"),
        ("resid_pst.1", "blocks.1.hook_resid_post"),
        ("resid_post.3", "blocks.0.hook_resid_post"),
        ("hook_embd", "hook_embed"),
    ],
)
def test_an_unknown_name_names_the_closest(llama, wrong, close):
    with pytest.raises(HookPointError, match="has no hook point") as caught:
        llama.hook_point(wrong)
    assert close in str(caught.value) and wrong in str(caught.value)
    assert not str(caught.value).startswith(("'", '"')) and isinstance(caught.value, KeyError)


def test_resid_mid_of_a_parallel_block_does_not_exist(build):
    with pytest.raises(HookPointError):
        load_model(build("gpt_neox")).hook_point("resid_mid.0")


def test_globs_expand_in_the_order_of_the_forward_and_once(llama):
    assert expand(llama, "resid_post.*") == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    assert expand(llama, ["resid_pre.1", "blocks.1.*", "blocks.1.hook_in"])[0] == "blocks.1.hook_resid_pre"
    assert len(expand(llama, ["*", "resid_post.*"])) == len(llama.hook_points())
    with pytest.raises(HookPointError):
        expand(llama, "resid_pos.*")


def test_canonical_name_needs_no_model():
    assert canonical_name("resid_post.6") == "blocks.6.hook_resid_post"
    assert canonical_name("resid_post.-1", 12) == "blocks.11.hook_resid_post"
    assert canonical_name("model.layers.6") is None


def test_the_forward_stops_after_the_last_wanted_block(build):
    hf = build("gpt2")
    model, ran = load_model(hf), []
    for i, block in enumerate(hf.transformer.h):
        block.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
    read(model, ["resid_post.0", "resid_pre.1"])
    assert ran == [0, 1]  # block 1 was entered, and stopped at its input
    ran.clear()
    read(model, ["resid_pre.0"], stop=False)
    assert ran == [0, 1, 2]


def test_reading_works_for_many_forwards_and_for_direct_calls_of_the_model(llama):
    seen = []
    with reading(llama, "resid_post.0", lambda name, value: seen.append(value.shape)):
        for _ in range(3):
            assert llama.run(IDS) is None
    with reading(llama, "resid_post.0", lambda name, value: seen.append(value.shape)):
        llama.hf(IDS)
        raise AssertionError("the forward should have ended the context")
    assert seen == [(2, 6, 32)] * 4


def test_an_inner_stop_does_not_end_an_outer_reading(llama):
    outer = []
    with reading(llama, "resid_post.2", lambda name, value: outer.append(name)):
        with reading(llama, "resid_post.0", lambda name, value: None):
            llama.run(IDS)
        assert outer == []
        llama.run(IDS)
    assert outer == ["blocks.2.hook_resid_post"]


@pytest.mark.parametrize("where", ["reading", "editing", "body"])
def test_no_hook_is_left_after_an_exception(build, where):
    hf = build("gpt2")
    mine = hf.transformer.h[0].register_forward_hook(lambda *a: None)
    model, before = load_model(hf), hooks_on(hf)

    def fail(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        if where == "reading":
            with reading(model, "*", fail):
                model.run(IDS)
        elif where == "editing":
            with editing(model, {"resid_mid.0": fail, "resid_post.1": fail}):
                hf.generate(IDS, max_new_tokens=2, do_sample=False)
        else:
            with editing(model, {"resid_post.1": lambda v, c: v}), reading(model, "*", lambda n, v: None):
                raise ZeroDivisionError
    assert hooks_on(hf) == before == 1 and "generate" not in vars(hf)
    assert mine.id in hf.transformer.h[0]._forward_hooks


def test_an_unknown_hook_among_the_edits_leaves_nothing_behind(build):
    hf = build("llama")
    model = load_model(hf)
    edits = {"resid_post.0": lambda v, c: v, "nowhere": lambda v, c: v}
    with pytest.raises(HookPointError), editing(model, edits):
        pass
    assert hooks_on(hf) == 0 and "generate" not in vars(hf)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "gemma2", "falcon", "gpt_neox", "mamba"])
def test_an_edit_that_changes_nothing_leaves_logits_bit_identical(build, family):
    model = load_model(build(family))
    before = model.logits(IDS)
    for point in model.hook_points():
        with editing(model, {point.name: lambda value, clock: value + 0.0 * value}):
            assert torch.equal(model.logits(IDS), before), point.name
        noise = torch.randn(1, 1, point.d, generator=torch.Generator().manual_seed(1))
        with editing(model, {point.name: lambda value, clock, noise=noise: value + noise}):
            assert not torch.allclose(model.logits(IDS), before), point.name
    assert torch.equal(model.logits(IDS), before)


@pytest.mark.parametrize("backend", ["native", "transformer_lens"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "gemma3_text", "gpt_neox"])
def test_adding_a_vector_adds_exactly_it_to_everything_after(build, family, backend):
    model = load_model(build(family), backend=backend)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
        name = f"blocks.2.hook_{kind}"
        if all(p.name != name for p in model.hook_points()):
            continue
        clean = read(model, [name, "resid_post.2"], stop=False)
        with editing(model, {name: lambda value, clock: value + vector}):
            steered = read(model, [name, "resid_post.2"], stop=False)
        assert torch.allclose(steered[name], clean[name] + vector, atol=1e-6), name
        if kind in ("mlp_out", "resid_post"):
            moved = steered["blocks.2.hook_resid_post"] - clean["blocks.2.hook_resid_post"]
            assert torch.allclose(moved, vector.expand_as(moved), atol=1e-5), name
        else:
            assert not torch.allclose(steered["blocks.2.hook_resid_post"], clean["blocks.2.hook_resid_post"])


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gemma2"])
def test_editing_resid_mid_equals_editing_attn_out(build, family):
    model = load_model(build(family))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    results = []
    for name in ("resid_mid.1", "attn_out.1"):
        with editing(model, {name: lambda value, clock: value + vector}):
            results.append(model.logits(IDS))
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert not torch.allclose(results[0], model.logits(IDS), atol=1e-3)


def test_nested_edits_apply_outermost_first_and_readers_inside_see_them(llama):
    clean = read(llama, "resid_post.1")["blocks.1.hook_resid_post"]
    with (
        editing(llama, {"resid_post.1": [lambda v, c: v + 1, lambda v, c: v * 2]}),
        editing(llama, {"model.layers.1": lambda v, c: v * v}),
    ):
        inside = read(llama, "resid_post.1")["blocks.1.hook_resid_post"]
    assert torch.allclose(inside, ((clean + 1) * 2) ** 2)
    assert torch.equal(read(llama, "resid_post.1")["blocks.1.hook_resid_post"], clean)


@pytest.mark.parametrize(("bad", "said"), [(lambda v, c: v[:, :1], r"\(2, 1, 32\)"), (lambda v, c: None, "NoneType")])
def test_an_edit_of_another_shape_is_refused(llama, bad, said):
    with pytest.raises(ValueError, match=said), editing(llama, {"resid_post.1": bad}):
        llama.logits(IDS)


def test_edits_keep_the_blocks_dtype(build):
    model = load_model(build("llama").to(torch.bfloat16))
    with editing(model, {"resid_post.1": lambda v, c: v.float() + 1}):
        assert model.logits(IDS).dtype == torch.bfloat16


def test_a_block_called_alone_has_no_clock_and_says_so(llama):
    with pytest.raises(RuntimeError, match="call the model"), editing(llama, {"model.norm": lambda v, c: v + 1}):
        llama.hf.model.norm(torch.zeros(1, 2, 32))


def test_the_self_check_refuses_blocks_that_do_not_carry_the_hidden_states(build):
    hf = build("llama")
    hf.decoys = nn.ModuleList(nn.Identity() for _ in range(3))
    hf.norms = nn.ModuleList(layer.input_layernorm for layer in hf.model.layers)
    with pytest.raises(AnatomyError, match=r"decoys\.0 does not run"):
        load_model(hf, blocks="decoys")
    with pytest.raises(AnatomyError, match=r"output of norms\.0 is not hidden_states\[1\]"):
        load_model(hf, blocks="norms")
    with pytest.raises(AnatomyError, match=r"no ModuleList.*model\.layers"):
        load_model(hf, blocks="model.layer")
    assert hooks_on(hf) == 0


def test_user_given_blocks_are_used(build):
    model = load_model(build("llama"), blocks="model.layers")
    assert model.blocks_path == "model.layers" and model.n_layers == 3
