"""Tiny random models of many families, and a tiny tokenizer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, **PLAIN}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32, **GATED}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS}
NO_DROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "gpt2": {**GPT, **NO_DROP},
    "gpt_neox": {"intermediate_size": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0, **PLAIN},
    "llama": GATED,
    "qwen3": {"head_dim": 8, **GATED},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "mistral": GATED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, **PLAIN},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0, **IDS},
    "phi": {**GATED, "num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "olmo2": GATED,
    "cohere": {"logit_scale": 0.3, **GATED},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0, **GATED},
    "gptj": {"rotary_dim": 8, **GPT, **NO_DROP},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **IDS},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, **IDS},
}


def make(family: str, **changes):
    """Return a random model of a family in evaluation mode; the same weights at every call."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**CONFIGS[family], **changes}))
        for p in model.parameters():  # initial norms are 1 and biases 0: a wrong one would go unseen
            p.data += 0.05 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="session")
def build():
    """Return the maker of tiny random models: build("llama")."""
    torch.set_num_threads(1)
    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Return a folder with a word-level tokenizer: <pad> 0, <s> 1, </s> 2, <unk> 3, then w4 ... w96."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 97)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


@pytest.fixture()
def words(tokenizer_folder):
    """Return a fresh copy of the word-level tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)
