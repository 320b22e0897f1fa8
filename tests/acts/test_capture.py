"""Captured rows: the right tokens, the right values, whoever shared the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.acts.capture import capture_acts, capture_batch, capture_packed, pool
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
