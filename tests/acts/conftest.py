"""Tiny random models and a word-level tokenizer for the tests of capture."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, **PLAIN}
WINDOW = {"head_dim": 8, "sliding_window": 6, **GATED}  # shorter than the texts of the tests
FAMILIES = {
    "llama": GATED,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS},
    "mistral": WINDOW,
    "gemma2": {"query_pre_attn_scalar": 8, **WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 8, **WINDOW},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, **PLAIN},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, **IDS},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, **IDS},
}


@pytest.fixture(scope="session")
def build():
    """Return the maker of tiny random models, build("llama"); they are in training mode, as a user might leave them."""

    def make(family: str, **changes):
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(17)
            return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})).train()

    torch.set_num_threads(1)
    return make


def word_level(**names):
    """Return a word-level tokenizer: <pad> 0, <s> 1, </s> 2, <unk> 3, then w4 ... w96."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 97)}}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    every = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **every)


@pytest.fixture()
def make_words():
    """Return the maker of word-level tokenizers; names of special tokens may be changed: pad_token="</s>"."""
    return word_level


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Return the word-level tokenizer as loaded from a folder, where a bridge reads it again; not to be changed."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("words")
    word_level().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def llama(build, words):
    """Return a Model of a tiny random Llama with the word-level tokenizer."""
    from interp.model.loading import load_model

    return load_model(build("llama"), tokenizer=words)
