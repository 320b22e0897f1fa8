"""Words read off models: the vocabulary's whole words, and residuals that equal a plain forward's."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp.model.hooks import HookPointError
from interp.model.loading import load_model
from interp.space.words import WordsError, layer_spaces, whole_words, word_space

WORDS = ["king", "queen", "café", "cat"]


def byte_level_tokenizer():
    """Characters and four whole words, byte-level as GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", *alphabet])}
    merges = []
    for word in ["Ġking", "Ġqueen", "ĠcafÃ©", "Ġ12"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def sentencepiece_tokenizer():
    """The same in the style of Llama's."""
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "▁", *"abcdefghijklmnopqrstuvwxyzé .,12"])}
    merges = []
    for word in ["▁king", "▁queen", "▁café", "▁12"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def gpt2():
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=3, n_head=2)
    return load_model(GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)


def llama():
    tokenizer = sentencepiece_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    return load_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_whole_words_are_the_marked_pieces_of_letters_alone(make):
    tokenizer = make()
    words = whole_words(tokenizer)
    assert {"king", "queen", "café"} <= set(words)
    assert "12" not in words and "" not in words
    lead = "" if make is sentencepiece_tokenizer else " "
    for word in ("king", "café"):
        assert tokenizer(lead + word, add_special_tokens=False)["input_ids"] == [words[word]]
    assert list(words.values()) == sorted(words.values())


def test_a_vocabulary_without_markers_is_refused():
    raw = Tokenizer(models.WordLevel({"king": 0, "queen": 1}, unk_token="king"))
    with pytest.raises(WordsError, match="none of the 2 pieces begins with a leading-space marker"):
        whole_words(PreTrainedTokenizerFast(tokenizer_object=raw))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_word_is_the_residual_at_its_last_piece_of_a_plain_forward(make):
    model = make()
    lead = " " if make is gpt2 else ""
    spaces = layer_spaces(model, WORDS, ["embed", "resid_post.*"], batch_size=3)
    assert list(spaces) == ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    for word in WORDS:
        ids = [0, *model.tokenizer(lead + word, add_special_tokens=False)["input_ids"]]
        out = model.hf(torch.tensor([ids]), output_hidden_states=True)
        for layer in range(2):  # the last hidden state is after the final norm
            expected = out.hidden_states[layer + 1][0, -1]
            assert torch.allclose(spaces[f"blocks.{layer}.hook_resid_post"][word], expected, atol=1e-5)
        assert torch.equal(spaces["hook_embed"][word], model.hf.get_input_embeddings().weight[ids[-1]])


def test_templates_are_averaged_and_cut_after_the_word():
    model = llama()
    both = word_space(model, WORDS, "resid_post.1", ["{} is here", "the cat, {} sat"])
    one = word_space(model, WORDS, "resid_post.1", ["{}"])
    other = word_space(model, WORDS, "resid_post.1", ["the cat, {}"])
    assert torch.allclose(both.vectors, (one.vectors + other.vectors) / 2, atol=1e-6)
    assert not torch.allclose(one.vectors, other.vectors, atol=1e-2)  # the context does speak


def test_the_batch_size_does_not_matter():
    model = gpt2()
    one, four = (word_space(model, WORDS, "resid_post.2", batch_size=size) for size in (1, 4))
    assert torch.allclose(one.vectors, four.vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "templates", "says"),
    [
        (["a"], ["no place"], "'no place' does not"),
        (["a"], "{}", "a list of at least one text"),
        (["a", "a"], ["{}"], "'a' is there twice"),
        (["a", " "], ["{}"], "none of them blank"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_model_runs(words, templates, says):
    with pytest.raises(WordsError, match=says):
        word_space(gpt2(), words, "embed", templates)


def test_an_unknown_hook_point_names_the_closest():
    with pytest.raises(HookPointError, match="closest"):
        word_space(gpt2(), ["a"], "resid_pst.1")


@pytest.mark.shared
def test_a_real_model_reads_its_own_words(shared_data):
    model = load_model(str(shared_data / "models" / "stories260K"))
    words = whole_words(model.tokenizer)
    assert {"mom", "was", "The"} <= set(words)
    space = word_space(model, ["she", "he", "was", "tree"], "embed")
    for word in ("she", "was"):
        assert torch.equal(space[word], model.embed_matrix()[words[word]])
