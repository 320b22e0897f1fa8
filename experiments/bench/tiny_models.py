"""Tiny random models of every causal type in transformers: one table of small sizes by the names of configuration keys.

Only keys that a family's own configuration declares are set, sub-configurations alike, so that what it derives from
them (layer types, head widths) it derives itself.
"""

import re
from typing import Any

import torch
from torch import nn

VOCAB, WIDTH, HEADS, LAYERS, INNER = 128, 32, 4, 3, 48
SIZES: list[tuple[str, Any]] = [  # the first pattern that fits the whole key decides
    (r"vocab_size|n_words", VOCAB),
    (r"pad_token_id|pad_index", 0),
    (r"bos_token_id|decoder_start_token_id|bos_index", 1),
    (r"eos_token_id|sep_token_id|eos_index", 2),
    (r"(image|video|audio|vision|boi|eoi|boa|eoa|unk|mask|img).*(token_id|token_index|_id)", 120),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|model_dim|dim|word_embed_proj_dim|dim_model", WIDTH),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_blocks|num_decoder_layers", LAYERS),
    (r"num_encoder_layers", LAYERS),
    (r"(num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads)", HEADS),
    (r"num_(encoder|decoder)_attention_heads|swa_num_attention_heads", HEADS),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|swa_num_key_value_heads)", 2),
    (r"head_dim|attention_head_dim|global_head_dim|d_kv|swa_head_dim|v_head_dim|kv_channels|dim_head", 8),
    (r"intermediate_size|ffn_dim|n_inner|.*_ffn_dim|d_ff|ffn_hidden_size|inner_dim|dim_ff|block_ff_dim", INNER),
    (r"moe_intermediate_size|shared_expert_intermediate_size|.*intermediate_size.*|dff|feed_forward_size", INNER),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_target_positions", 64),
    (r"max_source_positions", 64),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_local_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_top_?k|num_selected_experts|top_k_experts|n_activated_experts|moe_topk", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group|moe_n_group", 1),
    (r"first_k_dense_replace|moe_layer_start_index", 1),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"qk_nope_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", 4),
    (r"qk_head_dim", 12),
    (r"index_n_heads|index_topk", 4),
    (r"sliding_window|sliding_window_size|attention_window_size|window_size|local_attention", 32),
    (r"state_size|ssm_state_size|mamba_d_state|mamba_state_dim", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"mamba_num_heads|n_mamba_heads|mamba_n_heads", 8),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"lru_width|attention_hidden_size|attention_hidden_dim|hidden_size_per_layer_input|mamba_d_ssm", WIDTH),
    (r"vocab_size_per_layer_input", VOCAB),
    (r"linear_num_(key|value)_heads", 4),
    (r"linear_(key|value)_head_dim", 8),
    (r"query_pre_attn_scalar", 8),
    (r".*(dropout|drop|pdrop|layerdrop|dropout_rate).*", 0.0),
    (r"image_size", 16),
    (r"patch_size", 8),
]

_MLA = {"num_key_value_heads": HEADS}  # latent attention has as many key heads as query heads
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 100,
}
_SHARED = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4}
CHANGES: dict[str, dict[str, Any]] = {  # what the table of sizes does not get right by itself
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v32", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "dots3_note_text"), _MLA),
    **dict.fromkeys(("axk1", "deepseek_v3", "longcat_flash", "youtu"), _MLA | {"head_dim": 4}),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _HYBRID),
    **{t: {"text_config.layer_types": _HYBRID["layer_types"]} for t in ("qwen3_5", "qwen3_5_moe")},
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _HYBRID | _MLA),
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "cohere_compass_text": _SLIDING,
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.kv_n_heads": 2},
    "dots3_note": {"text_config.num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "local", "local"],
    },
    "qwen4_exp": {f"text_config.{key}": value for key, value in (_HYBRID | _INDEXED).items()},
    "qwen4_exp_text": _HYBRID | _INDEXED,
    "xlstm": {"num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": _SHARED | {"attention_hidden_size": 2 * WIDTH},
    "zamba2": _SHARED | {"attention_hidden_size": 2 * WIDTH},
    "zaya": {"num_experts_per_tok": 1},
}


def _fit(key: str, default: Any) -> Any:
    """Return the small value for a key, or None where it keeps its default."""
    if isinstance(default, bool) or not (default is None or isinstance(default, (int, float, list))):
        return None
    for pattern, value in SIZES:
        if re.fullmatch(pattern, key):
            if default is None and key.endswith(("_id", "_index", "head_dim", "lora_rank")):
                return None
            if "drop" in key:
                return 0.0 if isinstance(default, float) else 0
            return None if isinstance(default, float) else value
    return None


def small(config: Any, depth: int = 0) -> dict[str, Any]:
    """Return the arguments that make a configuration of `config`'s class small, its sub-configurations too."""
    given: dict[str, Any] = {}
    renamed = getattr(type(config), "attribute_map", {})
    subs = getattr(type(config), "sub_configs", {})
    for key, default in vars(config).items():
        if key.startswith("_"):
            continue
        if key in subs or hasattr(default, "to_dict"):
            if hasattr(default, "to_dict"):
                inner = small(default, depth + 1)
                given[key] = {"model_type": default.model_type, **inner} if default.model_type else inner
            continue
        value = _fit(key, default)
        if value is not None:
            given[key] = value
    for name, key in renamed.items():  # a key may be known by its usual name only
        value = _fit(name, getattr(config, key, None)) if key in vars(config) and key not in given else None
        if value is not None:
            given[key] = value
    return given


def make_config(model_type: str, changes: dict[str, Any] | None = None) -> Any:
    """Return a small configuration of a type, with changes: {"key": v} or {"text_config.key": v}; ... removes a key."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    given = small(kind())
    for path, value in (changes or {}).items():
        *into, key = path.split(".")
        target = given
        for name in into:
            target = target.setdefault(name, {})
        if value is ...:
            target.pop(key, None)
        else:
            target[key] = value
    return kind(**given)


def make_model(model_type: str, class_name: str, changes: dict[str, Any] | None = None, limit: int = 40_000_000) -> Any:
    """Return a random model in evaluation mode, norms and biases moved off 1 and 0.

    Raises MemoryError for one of more than `limit` weights.
    """
    import transformers

    config = make_config(model_type, changes)
    kind = getattr(transformers, class_name)
    if not isinstance(config, kind.config_class):  # a composite's type stands for its language model
        config = next((c for c in vars(config).values() if isinstance(c, kind.config_class)), config)
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    if count > limit:
        raise MemoryError(f"{count:,} weights")
    torch.manual_seed(11)
    model: nn.Module = kind(config)
    for p in model.parameters():
        if p.is_floating_point():
            p.data += 0.05 * torch.randn_like(p)
    return model.eval()
