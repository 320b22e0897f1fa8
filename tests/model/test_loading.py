"""Every way to get a model, what is said where there is none, and what names it."""

import inspect
import json

import pytest
import torch

from interp.model.hooks import reading
from interp.model.loading import NO_LIMIT, Model, as_model, load_model, untrained
from interp.model.pretrained import TINY
from sae.extras import MissingError

IDS = torch.randint(4, 97, (2, 6), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(build, tokenizer_folder, tmp_path_factory):
    """Return a folder with a float16 Llama and its tokenizer."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("saved") / "small-llama"
    build("llama").to(torch.float16).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(path)
    return path


def test_a_folder_loads_in_the_checkpoints_own_dtype_unless_told_otherwise(folder, build):
    own, wide = load_model(folder, device="cpu"), load_model(str(folder), dtype="float32", device="cpu")
    assert (own.dtype, wide.dtype, own.name) == (torch.float16, torch.float32, "small-llama")
    assert own.tokenizer.bos_token_id == 1 and not own.hf.training
    want = build("llama")
    for parameter in want.parameters():  # not .half(): that would round the rotary frequencies too
        parameter.data = parameter.data.half().float()
    with torch.no_grad():
        assert torch.equal(wide.logits(IDS), want(IDS).logits)


def test_a_folder_loads_through_a_bridge(folder):
    native = load_model(folder, dtype=torch.float32, device="cpu")
    bridged = load_model(folder, dtype=torch.float32, device="cpu", backend="transformer_lens")
    assert bridged.dtype == torch.float32 and bridged.name == "small-llama"
    assert (native.logits(IDS) - bridged.logits(IDS)).abs().max() < 1e-5
    assert native.generate("w5 w6", max_new_tokens=3) == bridged.generate("w5 w6", max_new_tokens=3)
    assert native.fingerprint == bridged.fingerprint


def test_sizes_are_those_of_the_configuration(folder):
    model = load_model(folder, device="cpu")
    assert (model.n_layers, model.d_model, model.d_vocab, model.n_ctx) == (3, 32, 97, 64)
    assert model.embed_matrix().shape == model.unembed_matrix().shape == (97, 32)
    assert [p.name for p in model.hook_points()][:3] == [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_attn_out",
    ]


def test_a_model_without_a_longest_text_says_no_limit(build):
    assert load_model(build("bloom")).n_ctx == NO_LIMIT


def test_embeddings_of_a_scaling_family_are_those_the_stream_gets(build):
    hf = build("gemma2")
    with torch.no_grad():
        want = hf(IDS, output_hidden_states=True).hidden_states[0]
    assert torch.equal(load_model(hf).embed_matrix()[IDS], want)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
        ("some-org/no-such-model", "hf download some-org/no-such-model"),
        ("no-such-model", "hf download no-such-model"),
    ],
)
def test_a_missing_model_names_the_mending_command(source, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match=said):
        load_model(source)


def test_folders_that_hold_no_whole_model_are_missing(folder, tmp_path):
    with pytest.raises(MissingError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(MissingError, match="cannot be loaded"):
        load_model(tmp_path)


def test_a_folder_without_tokenizer_works_on_ids_and_says_what_is_missing_for_text(build, tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert model.tokenizer is None and model.logits(IDS).shape == (2, 6, 97)
    for call in (lambda: model.tokenize("w5"), lambda: model.generate(["w5"])):
        with pytest.raises(MissingError, match="tokenizer="):
            call()


def test_a_tokenizer_may_be_an_object_or_a_folder(build, words, tokenizer_folder, tmp_path):
    build("llama").save_pretrained(tmp_path)
    for tokenizer in (words, tokenizer_folder, str(tokenizer_folder)):
        assert load_model(tmp_path, device="cpu", tokenizer=tokenizer).tokenize("w5 w6").ids.tolist() == [[1, 5, 6]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "jax"}, "'native' or 'transformer_lens'"),
        ({"dtype": "float"}, None),
        ({"dtype": "int8"}, "floating point"),
        ({"dtype": torch.bfloat16}, "never changed"),
        ({"device": "meta"}, "never moved"),
    ],
)
def test_wrong_options_are_refused(build, options, said):
    if said is None:  # torch.float is float32: what the model has
        assert load_model(build("llama"), **options).dtype == torch.float32
        return
    with pytest.raises(ValueError, match=said):
        load_model(build("llama"), **options)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TypeError, match="folder"):
        load_model(3)


def test_as_model_takes_what_is_at_hand(build):
    hf = build("llama")
    model = as_model(hf)
    assert isinstance(model, Model) and model.hf is hf and as_model(model) is model


def test_the_fingerprint_is_of_the_weights_not_of_the_load(folder, build):
    first, second = load_model(folder, device="cpu"), load_model(folder, device="cpu", dtype=torch.float32)
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 16
    hf = build("llama")
    model = load_model(hf)
    before = model.fingerprint
    assert before == load_model(build("llama")).fingerprint != first.fingerprint  # float16 rounded them
    for parameter in hf.parameters():
        parameter.data[..., 0] += 0.5
        assert model.fingerprint != before
        parameter.data[..., 0] -= 0.5
    assert load_model(build("mistral")).fingerprint != before


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "opt", "bloom"])
def test_a_saved_model_has_the_fingerprint_of_the_one_in_memory(build, tmp_path, family):
    hf = build(family)
    hf.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").fingerprint == load_model(hf).fingerprint


def test_the_fingerprint_sees_every_column_of_a_large_matrix(build):
    hf = build("llama", vocab_size=6000, hidden_size=48)
    model = load_model(hf)
    before = model.fingerprint
    weight = hf.model.embed_tokens.weight
    for column in range(48):
        kept = weight.data[:, column].clone()
        weight.data[:, column] += 1.0
        assert model.fingerprint != before, column
        weight.data[:, column] = kept
    assert model.fingerprint == before


def test_unembedding_goes_through_the_model_where_its_tail_is_no_chain(build):
    hf = build("gpt2")
    forward = hf.forward

    def shifted(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits.roll(1, -1)
        return out

    shifted.__signature__ = inspect.signature(forward)
    hf.forward = shifted
    model = load_model(hf)
    assert model._anatomy.tail is None
    kept = {}
    with reading(model, "resid_post.-1", lambda name, value: kept.update(x=value.clone()), stop=False):
        logits = model.logits(IDS)
    with torch.no_grad():
        assert torch.allclose(model.unembed(kept["x"]), logits, atol=1e-6)
        assert model.unembed(kept["x"][0, 0]).shape == (97,)


def test_generation_returns_only_the_new_text_of_every_row(build, words):
    model = load_model(build("llama"), tokenizer=words)
    texts = ["w5 w6", "w7 w8 w9 w10"]
    together = model.generate(texts, max_new_tokens=4)
    assert together == [model.generate(t, max_new_tokens=4)[0] for t in texts]
    ids = torch.tensor([[1, 5, 6]])
    for _ in range(4):
        ids = torch.cat([ids, model.logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert together[0] == words.decode(ids[0, 3:], skip_special_tokens=True)
    assert len(model.generate(texts, max_new_tokens=2, num_beams=2, num_return_sequences=2)) == 4


def test_generation_without_a_pad_token_pads_with_eos(build, words):
    want = load_model(build("llama"), tokenizer=words).generate(["w5 w6", "w7 w8 w9 w10"], max_new_tokens=4)
    words.pad_token = None
    model = load_model(build("llama"), tokenizer=words)
    assert model.generate(["w5 w6", "w7 w8 w9 w10"], max_new_tokens=4) == want


def test_prompts_that_cannot_be_continued_are_refused(build, words):
    model = load_model(build("llama"), tokenizer=words)
    assert len(model.generate("", max_new_tokens=2)) == 1  # from BOS
    with pytest.raises(ValueError, match="exceed the 64"):
        model.generate("w5 " * 62, max_new_tokens=4)
    with pytest.raises(ValueError, match="at most 64"):
        model.logits(torch.zeros(1, 65, dtype=torch.long))
    words.bos_token = None
    with pytest.raises(ValueError, match="no token"):
        load_model(build("llama"), tokenizer=words).generate(["w5", ""])


@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the bundled model is not there yet")
def test_the_bundled_model_loads_in_float32_and_speaks():
    model = load_model("tiny", device="cpu")
    assert (model.name, model.dtype) == ("tiny", torch.float32)
    assert json.loads((TINY / "config.json").read_text())["num_hidden_layers"] == model.n_layers
    assert model.generate("Once upon a time", max_new_tokens=8)[0].strip()


def test_an_untrained_copy_has_the_shapes_of_the_model_and_other_weights_by_its_seed():
    tiny = load_model("tiny")
    before = torch.get_rng_state()
    first, again, other = untrained(tiny, 3), untrained(tiny, 3), untrained("tiny", 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len({m.fingerprint for m in (tiny, first, other)}) == 3
    assert [tuple(p.shape) for p in first.hf.parameters()] == [tuple(p.shape) for p in tiny.hf.parameters()]
    assert first.tokenizer is tiny.tokenizer and not first.hf.training
