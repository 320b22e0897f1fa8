"""Tiny random models whose greedy text is varied, and directions on them."""

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
IDS = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}
GATED = {"intermediate_size": 64, "num_key_value_heads": 2, **SIZE}
FAMILIES = {
    "llama": GATED,
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS},
    "qwen3": {"head_dim": 8, **GATED},
    "gpt_neox": {"intermediate_size": 64, **SIZE},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, **GATED},
}


def make(family, seed=0, **changes):
    """Return a random model in evaluation mode with weights large enough that its text does not repeat one token."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**FAMILIES[family], **changes}))
        for p in model.parameters():
            if p.ndim > 1:
                p.data = torch.randn_like(p) * (1.0 if p.shape[0] == IDS["vocab_size"] else 0.25)
    return model.eval()


@pytest.fixture(scope="session")
def build():
    """Return the maker of tiny random models: build("llama", seed=0)."""
    return make


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def model(request):
    """Return a tiny random model of each family, loaded."""
    from interp.model.loading import load_model

    return load_model(make(request.param))


@pytest.fixture(scope="session")
def llama():
    """Return one tiny random Llama, loaded."""
    from interp.model.loading import load_model

    return load_model(make("llama"))


@pytest.fixture(scope="session")
def tokenizer():
    """Return a word-level tokenizer: <pad> <s> </s> <unk>, then "good0".."good9", "bad0".."bad9" and other words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"good{i}" for i in range(10)), *(f"bad{i}" for i in range(10))]
    names += [f"w{i}" for i in range(100 - len(names))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
