"""Captured rows: the right tokens, the right values, whoever shared the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.acts.capture import capture_acts, capture_batch, capture_packed, pool
from interp.acts.gather import compact
from interp.acts.rows import DEFAULT_EXCLUDE, NonFiniteError
from interp.model.hooks import HookPointError
from interp.model.loading import load_model
from interp.model.tokens import pack
from sae.extras import MissingError

TEXTS = ["w5 w6 w7", "", "w8", "w9 w10 w11 w12 w13 w14", "w15 </s> w16"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, build, words):
    return load_model(build(request.param), tokenizer=words)


def one_by_one(model, rows, name, special=(0, 1, 2, 3)):
    """Slow oracle: each document alone through the Hugging Face model, rows picked with a loop."""
    layer = int(name.rpartition(".")[2])
    model.hf.eval()
    out = []
    for document, row in enumerate(rows):
        if not row:
            continue
        with torch.no_grad():
            hidden = model.hf(torch.tensor([row]), output_hidden_states=True).hidden_states[layer + 1][0]
        out += [(document, i, token, hidden[i]) for i, token in enumerate(row) if token not in special]
    return out


def test_rows_are_those_of_each_document_alone(model):
    acts = capture_acts(model, TEXTS, ["resid_post.1"], batch_size=3)
    rows = [[1, 5, 6, 7], [1], [1, 8], [1, 9, 10, 11, 12, 13, 14], [1, 15, 2, 16]]
    want = one_by_one(model, rows, "resid_post.1")
    assert acts.documents.tolist() == [d for d, _, _, _ in want]
    assert acts.positions.tolist() == [p for _, p, _, _ in want]
    assert acts.token_ids.tolist() == [t for _, _, t, _ in want]
    assert (acts["resid_post.1"] - torch.stack([v for *_, v in want])).abs().max() < 1e-5
    assert not bool(acts.is_special.any()) and acts.texts == tuple(TEXTS) and acts.n_documents == 5
    assert len(acts) == len(want) == acts["resid_post.1"].shape[0]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(4, 96), max_size=9), max_size=7), st.integers(1, 8))
def test_the_batch_does_not_matter(llama, rows, batch_size):
    acts = capture_acts(llama, rows, "resid_post.0", batch_size=batch_size)
    alone = one_by_one(llama, rows, "resid_post.0")
    assert acts.documents.tolist() == [d for d, _, _, _ in alone]
    assert acts.token_ids.tolist() == [t for _, _, t, _ in alone]
    if alone:
        assert (acts["resid_post.0"] - torch.stack([v for *_, v in alone])).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("exclude", "ids"),
    [
        (("pad", "bos", "special"), [15, 16, 5]),
        (("pad", "bos"), [15, 2, 16, 5]),
        (("pad",), [1, 15, 2, 16, 1, 5]),
        ((), [1, 15, 2, 16, 1, 5]),
    ],
)
def test_specials_are_left_out_by_id_and_pads_always(llama, exclude, ids):
    acts = capture_acts(llama, ["w15 </s> w16", "w5"], "embed", exclude=exclude)
    assert acts.token_ids.tolist() == ids
    assert acts.is_special.tolist() == [i < 4 for i in ids]
    with torch.no_grad():
        assert torch.equal(acts["hook_embed"], llama.hf.get_input_embeddings()(torch.tensor(ids)))


def test_any_spelling_asks_for_the_same_rows(llama):
    acts = capture_acts(llama, TEXTS, ["resid_post.*", "model.layers.0.mlp.act_fn"])
    assert acts.hooks == [*(f"blocks.{i}.hook_resid_post" for i in range(3)), "model.layers.0.mlp.act_fn"]
    for spelling in ("resid_post.2", "blocks.2.hook_resid_post", "blocks.2.hook_out", "resid_post.-1"):
        assert acts[spelling] is acts.values["blocks.2.hook_resid_post"]
    assert acts["model.layers.0.mlp.act_fn"].shape == (len(acts), 48)
    with pytest.raises(HookPointError, match=r"blocks\.2\.hook_resid_post"):
        acts["resid_pre.2"]
    with pytest.raises(HookPointError):
        capture_acts(llama, TEXTS, ["resid_pots.1"])


def test_documents_of_token_ids_are_taken_as_they_are(build):
    bare = load_model(build("llama"))
    for documents in ([[5, 6], [1, 7]], torch.tensor([[5, 6], [1, 7]]), (row for row in [(5, 6), (1, 7)])):
        acts = capture_acts(bare, documents, "resid_post.0")
        assert acts.token_ids.tolist() == [5, 6, 7] and acts.positions.tolist() == [0, 1, 1] and acts.texts is None
    with pytest.raises(MissingError):
        capture_acts(bare, ["w5"], "resid_post.0")
    with pytest.raises(ValueError, match=r"document 1 has token id 97; .* 0 to 96"):
        capture_acts(bare, [[5], [6, 97]], "resid_post.0")


def test_a_hugging_face_model_will_do(llama):
    assert torch.equal(
        capture_acts(llama.hf, [[5, 6, 7]], "resid_post.1").values["blocks.1.hook_resid_post"],
        capture_acts(llama, [[5, 6, 7]], "resid_post.1")["resid_post.1"],
    )


@pytest.mark.parametrize("texts", [[], [""], [[]]])
def test_nothing_gives_no_rows(llama, texts):
    acts = capture_acts(llama, texts, ["resid_post.1", "embed"])
    assert acts["resid_post.1"].shape == acts["embed"].shape == (0, 32)
    assert len(acts) == 0 and acts.n_documents == len(texts)


def test_long_documents_are_cut_only_when_asked(llama):
    long = "w5 " * 70
    with pytest.raises(ValueError, match=r"document 1 has 71 tokens, .* takes 64; cut it with max_len=64"):
        capture_acts(llama, ["w6", long], "resid_post.0")
    assert len(capture_acts(llama, ["w6", long], "resid_post.0", max_len=64)) == 1 + 63
    assert len(capture_acts(llama, ["w6", long], "resid_post.0", max_len=4)) == 1 + 3


@pytest.mark.parametrize("wrong", [{"exclude": ["eos"]}, {"exclude": "pad"}, {"batch_size": 0}, {"max_len": 0}])
def test_wrong_options_are_refused(llama, wrong):
    with pytest.raises(ValueError, match="must be"):
        capture_acts(llama, TEXTS, "resid_post.0", **wrong)


def test_capture_leaves_a_training_model_in_training_and_draws_no_random_numbers(build, words):
    hf = build("gpt2")
    hf.train()
    random = torch.get_rng_state()
    model = load_model(hf, tokenizer=words)
    first, second = (capture_acts(model, TEXTS, "resid_post.1")["resid_post.1"] for _ in range(2))
    assert torch.equal(first, second)  # dropout is off
    assert all(m.training for m in hf.modules()) and torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert not first.requires_grad and first.is_leaf
    first.requires_grad_()  # no inference tensor: probes may be trained on it
    (first**2).sum().backward()


def test_the_dtype_is_float32_unless_told_otherwise(build, words):
    model = load_model(build("llama").to(torch.bfloat16), tokenizer=words)
    assert capture_acts(model, TEXTS, "resid_post.0")["resid_post.0"].dtype == torch.float32
    own = capture_acts(model, TEXTS, "resid_post.0", dtype=None)["resid_post.0"]
    assert own.dtype == torch.bfloat16
    assert torch.equal(own.float(), capture_acts(model, TEXTS, "resid_post.0")["resid_post.0"])


def test_captured_tensors_are_not_written_into_by_the_model(words):
    """Falcon adds the attention's output into the MLP's, in place, after the hook."""
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf = FalconForCausalLM(FalconConfig(**sizes)).eval()
    got = capture_batch(load_model(hf), torch.tensor([[5, 6, 7]]), None, "*")
    total = sum(got[f"blocks.0.hook_{kind}"] for kind in ("resid_pre", "attn_out", "mlp_out"))
    assert torch.allclose(total, got["blocks.0.hook_resid_post"], atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "last", "max"])
def test_pooling_is_over_the_rows_of_each_document(llama, how):
    texts = ["w5 w6 w7", "w8", "w9 w10"]
    acts = capture_acts(llama, texts, "resid_post.1")
    for i, row in enumerate(pool(acts, "resid_post.1", how)):
        mine = acts["resid_post.1"][acts.documents == i]
        want = {"mean": mine.mean(0), "last": mine[-1], "max": mine.max(0).values}[how]
        assert torch.allclose(row, want, atol=1e-6)


def test_pooling_nothing_is_refused(llama):
    with pytest.raises(ValueError, match=r"documents \[1\] have no rows"):
        pool(capture_acts(llama, TEXTS, "resid_post.1"), "resid_post.1")
    with pytest.raises(ValueError, match="mean, last, max"):
        pool(capture_acts(llama, ["w5"], "resid_post.1"), "resid_post.1", "median")


def test_packed_windows_keep_documents_and_positions(llama, words):
    texts = ["w5 w6 w7", "w8", "w9 w10 w11 w12"]
    batches = list(pack(words, texts, 5, batch_size=2))
    whole = [a for a in capture_packed(llama, batches, ["resid_post.1"])]
    ids = torch.cat([a.token_ids for a in whole]).tolist()
    assert ids == [5, 6, 7, 8, 9, 10, 11, 12]
    assert torch.cat([a.documents for a in whole]).tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    first = batches[0].ids[:1]
    with torch.no_grad():
        llama.hf.eval()
        want = llama.hf(first, output_hidden_states=True).hidden_states[2][0]
    at = whole[0].positions[:3].tolist()
    assert (whole[0]["resid_post.1"][:3] - want[at]).abs().max() < 1e-5
    kept = next(iter(capture_packed(llama, batches, "resid_post.1", exclude=("pad",))))
    assert kept.token_ids.tolist() == batches[0].ids[batches[0].mask].tolist()
    assert bool((kept.documents[kept.token_ids == 1] == -1).all())


def test_progress_goes_to_standard_error(llama, capsys):
    capture_acts(llama, TEXTS, "resid_post.0", progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "capture" in shown.err


def test_the_first_tokens_and_the_named_ones_can_be_left_out_and_the_shares_are_told(llama):
    texts = ["w5 w6 </s> w7", "w8 w9"]  # with BOS 5 and 3 tokens
    acts = capture_acts(llama, texts, "resid_post.1", exclude=("bos", "special", "first:3"), include=[7, 9, 5])
    assert acts.token_ids.tolist() == [7] and acts.positions.tolist() == [4]
    assert acts.removed == {"bos": 2 / 8, "special": 1 / 8, "first:3": 4 / 8, "include": 0}
    whole = capture_acts(llama, texts, "resid_post.1")
    assert torch.equal(acts["resid_post.1"][0], whole["resid_post.1"][2])


@pytest.mark.parametrize(
    "include",
    [[6, 8], lambda ids: torch.isin(ids, torch.tensor([6, 8])), [[0, 0, 1, 0], [0, 1]], "cut"],
    ids=["ids", "function", "masks", "masks of cut documents"],
)
def test_a_user_names_the_rows_by_ids_by_a_function_or_by_masks(llama, include):
    texts, max_len = ["w5 w6 w7", "w8"], None
    if include == "cut":  # masks are those of whole documents
        texts, max_len, include = ["w5 w6 w7", "w8"], 3, [[0, 0, 1, 1], [0, 1]]
    if isinstance(include, list) and isinstance(include[0], list):
        include = [[bool(x) for x in mask] for mask in include]
    acts = capture_acts(llama, texts, "resid_post.1", include=include, max_len=max_len)
    assert acts.token_ids.tolist() == [6, 8] and acts.documents.tolist() == [0, 1]
    whole = capture_acts(llama, texts, "resid_post.1")
    assert (acts["resid_post.1"] - whole["resid_post.1"][[1, 3]]).abs().max() < 1e-6
    assert capture_acts(llama, texts, "embed", include=lambda ids: ids > 90).n_documents == 2


def test_outliers_at_any_hook_point_are_taken_out_and_counted(build, words):
    hf = build("llama")
    hf.get_input_embeddings().weight.data[9] *= 400  # a word whose norm is far above the median
    model = load_model(hf, tokenizer=words)
    hf.model.layers[1].register_forward_hook(lambda m, a, output: torch.nn.functional.normalize(output, dim=-1))
    texts = ["w5 w6 w9 w7", "w8 w9", "w10 w11 w12"]
    plain = capture_acts(model, texts, ["embed", "resid_post.1"])
    acts = capture_acts(model, texts, ["embed", "resid_post.1"], exclude=(*DEFAULT_EXCLUDE, "outlier"))
    stays = plain.token_ids != 9
    assert plain.token_ids.tolist().count(9) == 2 and acts.token_ids.tolist() == plain.token_ids[stays].tolist()
    assert acts.removed["outlier:10"] == pytest.approx(2 / 12) and "outlier:10" not in plain.removed
    for hook in plain.hooks:
        assert acts[hook].shape == (7, 32) and torch.equal(acts[hook], plain[hook][stays])
    for name in ("positions", "documents", "is_special"):
        assert torch.equal(getattr(acts, name), getattr(plain, name)[stays])
    high = capture_acts(model, texts, ["embed", "resid_post.1"], exclude=(*DEFAULT_EXCLUDE, "outlier:1000"))
    assert len(high) == len(plain) and high.removed["outlier:1000"] == 0


def test_rows_are_moved_up_in_steps_where_many_are_taken_out():
    generator = torch.Generator().manual_seed(5)
    for n in (0, 1, 4096, 4097, 10_000):
        values = torch.randn(n, 3, generator=generator)
        keep = torch.rand(n, generator=generator) < 0.7
        want = values[keep]
        compact(values, keep)
        assert torch.equal(values, want)


def overflowing(build, words, dtype):
    """Return a model whose word w9 has activations above what float16 holds, finite in wider types."""
    hf = build("llama").to(dtype)
    hf.get_input_embeddings().weight.data[9, 3] = 60_000.0
    hf.model.layers[0].register_forward_hook(lambda module, args, output: output + output)
    return load_model(hf, tokenizer=words)


@pytest.mark.parametrize("into", [torch.float32, None])
def test_float16_overflow_is_reported_with_its_place(build, words, into):
    model = overflowing(build, words, torch.float16)
    with pytest.raises(NonFiniteError) as error:
        capture_acts(model, ["w5 w6", "w7", "w8 w10 w9 w4 w9", "w9"], "resid_post.0", dtype=into)
    said = str(error.value)
    assert "blocks.0.hook_resid_post" in said and "document 2, position 3" in said and "bfloat16" in said
    assert not model.hf.model.layers[1]._forward_hooks  # nothing stays behind
    with pytest.raises(NonFiniteError, match="document 0, position 1"):
        capture_acts(model, ["w9", "w5 w9 w9"], "resid_post.0", dtype=into)  # the longer one is first in the batch
    assert len(capture_acts(model, ["w5 w6", "w7"], "resid_post.0", dtype=into)) == 3


def test_a_finite_value_that_the_result_cannot_hold_is_the_same_error(build, words):
    model = overflowing(build, words, torch.float32)
    assert bool(capture_acts(model, ["w9"], "resid_post.0")["resid_post.0"].isfinite().all())
    assert bool(capture_acts(model, ["w9"], "resid_post.0", dtype=torch.bfloat16)["resid_post.0"].isfinite().all())
    with pytest.raises(NonFiniteError, match=r"1 infinite of 32 values at document 1, position 1 \(float16\)"):
        capture_acts(model, ["w5", "w9"], "resid_post.0", dtype=torch.float16)


def test_nonfinite_rows_can_be_kept_and_are_named(build, words):
    model = overflowing(build, words, torch.float16)
    texts = ["w5 w6", "w9", "w8 w10 w9 w4"]
    acts = capture_acts(model, texts, ["embed", "resid_post.0"], nonfinite="keep")
    assert set(acts.nonfinite) == {"blocks.0.hook_resid_post"}
    rows = acts.nonfinite["blocks.0.hook_resid_post"]
    places = list(zip(acts.documents[rows].tolist(), acts.positions[rows].tolist(), strict=True))
    assert (1, 1) in places and (2, 3) in places and (0, 1) not in places
    assert torch.equal(rows, (~acts["resid_post.0"].isfinite().all(1)).nonzero().squeeze(1))
    assert capture_acts(model, ["w5"], "embed", nonfinite="keep").nonfinite == {}
    gone = capture_acts(model, texts, "embed", exclude=("pad", "outlier"), nonfinite="keep")
    assert 9 not in gone.token_ids.tolist()
    with pytest.raises(ValueError, match="must be one of: raise, keep"):
        capture_acts(model, texts, "embed", nonfinite="drop")


def test_large_finite_values_are_no_alarm(build, words):
    hf = build("llama")
    hf.get_input_embeddings().weight.data[9:12] = 3e38  # their sum overflows float32, none of them does
    acts = capture_acts(load_model(hf, tokenizer=words), ["w9 w10 w11"], "embed")
    assert len(acts) == 3 and bool(acts["embed"].isfinite().all())


def test_packed_batches_report_what_is_not_finite_too(build, words):
    model = overflowing(build, words, torch.float16)
    batches = list(pack(words, ["w5 w6 w7", "w8 w9"], 8, batch_size=1))
    with pytest.raises(NonFiniteError, match="document 1, position"):
        list(capture_packed(model, batches, "resid_post.0"))
    (kept,) = capture_packed(model, batches, "resid_post.0", nonfinite="keep")
    assert len(kept.nonfinite["blocks.0.hook_resid_post"]) >= 1


def test_packed_documents_that_are_masked_are_captured_as_if_alone(llama, words):
    texts = ["w5 w6 w7", "w8 w9 w10 w11", "w12"]
    found = {}
    for packing in ("masked", "joined"):
        (acts,) = capture_packed(
            llama, pack(words, texts, 20, packing=packing), "resid_post.2", exclude=("bos", "special")
        )
        assert acts.token_ids.tolist() == list(range(5, 13)) and acts.documents.tolist() == [0] * 3 + [1] * 4 + [2]
        found[packing] = acts
    alone = capture_acts(llama, ["w5 w6 w7 </s>", "w8 w9 w10 w11 </s>", "w12 </s>"], "resid_post.2")
    assert found["masked"].positions.tolist() == alone.positions.tolist() == [1, 2, 3, 1, 2, 3, 4, 1]
    assert (found["masked"]["resid_post.2"] - alone["resid_post.2"]).abs().max() < 1e-5
    assert (found["joined"]["resid_post.2"] - alone["resid_post.2"]).abs().max() > 1e-3
    (late,) = capture_packed(llama, pack(words, texts, 20, packing="masked"), "embed", exclude=("special", "first:3"))
    assert late.token_ids.tolist() == [7, 10, 11] and late.removed["first:3"] == pytest.approx(5 / 14)


def test_a_bridge_gives_the_same_rows_with_every_option(build, words):
    hf = build("llama")
    hf.get_input_embeddings().weight.data[9] *= 400
    texts = ["w5 w6 w9 w7", "w8 </s> w9", "w10 w11 w12"]
    options = {"exclude": ("bos", "special", "outlier"), "include": lambda ids: ids != 6}
    one, two = (
        capture_acts(load_model(hf, tokenizer=words, backend=backend), texts, "resid_post.1", **options)
        for backend in ("native", "transformer_lens")
    )
    assert one.token_ids.tolist() == two.token_ids.tolist() == [5, 7, 8, 10, 11, 12] and one.removed == two.removed
    assert (one["resid_post.1"] - two["resid_post.1"]).abs().max() < 1e-4
