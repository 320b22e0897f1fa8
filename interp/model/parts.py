"""What a block adds to the stream, what stands between the last block and the logits: established by sums, or not."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.model.forward import Probe, sums_to, text_config

# In order of trial: a post-norm is what is added to the stream where it exists; the inner linear where the module adds
# the residual itself (Bloom, T5). Every choice is verified by resid_pre + attn_out + mlp_out == resid_post.
ATTN_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "temporal_block", "mixer", "mamba")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "feedforward", "fc2")
ATTN_ADDED = (
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    *ATTN_NAMES,
    "self_attention.dense",
    "layer.0.SelfAttention",
)
CROSS_ADDED = ("encoder_attn", "layer.1.EncDecAttention")
MLP_ADDED = (
    "post_mlp_layernorm",
    "post_feedforward_layernorm",
    *MLP_NAMES,
    "mlp.dense_4h_to_h",
    "layer.1.DenseReluDense",
    "layer.2.DenseReluDense",
)


@dataclass(frozen=True)
class Part:
    """One side of a module: its first input or its (first) output is a tensor in the residual stream."""

    module: nn.Module
    side: str  # "input" | "output"
    path: str


@dataclass(frozen=True)
class Added:
    """What one block adds to the stream, as far as sums establish it; `note` says what the block does instead."""

    parts: dict[str, Part] = field(default_factory=dict)  # of attn_out, resid_mid, cross_attn_out, mlp_out
    note: str = ""


def candidates(block: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """Return the submodules of a block that bear one of the names, in the order of the names."""
    found = dict(block.named_modules())
    return [(n, found[n]) for n in names if n in found]


def inside(block: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules of a block whose values `added` looks at."""
    watched = dict(block.named_children())
    watched.update(candidates(block, (*ATTN_ADDED, *CROSS_ADDED, *MLP_ADDED)))
    watched.update({n: m for n, m in block.named_modules() if n and is_norm(n, m)})
    return watched


def is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module is a norm by its name or its class's."""
    label = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return "norm" in label or "ln" in label


def added(path: str, block: nn.Module, seen: Probe) -> Added:
    """Return what one block adds to the stream: every listed tensor is one of a sum that is the block's output."""
    pre, post = seen.inputs[path], seen.outputs[path]
    attn, cross, mlp = (
        [(n, m, seen.outputs[f"{path}.{n}"]) for n, m in candidates(block, names) if f"{path}.{n}" in seen.outputs]
        for names in (ATTN_ADDED, CROSS_ADDED, MLP_ADDED)
    )
    pairs = [(a, m) for a, m in product(attn, mlp) if isinstance(a[2], Tensor) and isinstance(m[2], Tensor)]
    for (a_name, a, a_out), (m_name, m, m_out) in pairs:
        for c_name, c, c_out in [*cross, ("", None, None)]:
            terms = [pre, a_out, m_out] if c is None else [pre, a_out, c_out, m_out]
            if not sums_to(post, *terms):
                continue
            parts = {"attn_out": Part(a, "output", f"{path}.{a_name}")}
            mid = _mid(path, block, seen, [pre, a_out]) if c is None else None  # between three parts there is no middle
            if c is not None:
                parts["cross_attn_out"] = Part(c, "output", f"{path}.{c_name}")
            if mid is not None:
                parts["resid_mid"] = mid
            return Added(parts | {"mlp_out": Part(m, "output", f"{path}.{m_name}")})
    return Added(note=_instead(path, pre, post, pairs, block, seen))


def _mid(path: str, block: nn.Module, seen: Probe, terms: list[Tensor]) -> Part | None:
    """Return the submodule that takes the stream between attention and MLP."""
    for name, child in block.named_modules():
        value = seen.inputs.get(f"{path}.{name}") if name else None
        if isinstance(value, Tensor) and value.shape[-1] == terms[0].shape[-1] and sums_to(value, *terms):
            return Part(child, "input", f"{path}.{name}")
    return None


def _instead(path: str, pre: Tensor, post: Tensor, pairs: list, block: nn.Module, seen: Probe) -> str:
    """Say how a block makes its output where it is not the sum of its input and what attention and MLP give."""
    for (a_name, _, a_out), (m_name, _, m_out) in pairs:
        if a_out.numel() != pre.numel() or m_out.numel() != pre.numel():
            continue
        both = (a_out.reshape(pre.shape) + m_out.reshape(pre.shape)).float()
        gain = (post.float() - pre.float()).to(both.device)
        factor = float((gain * both).sum() / (both * both).sum().clamp(min=1e-30))
        if sums_to(post, pre, factor * a_out, factor * m_out):
            return f"the block adds {factor:.4g} times the outputs of {a_name} and {m_name}"
    for name, module in block.named_modules():
        value = seen.outputs.get(f"{path}.{name}")
        if not (name and is_norm(name, module) and isinstance(value, Tensor) and value.shape == post.shape):
            continue
        if torch.equal(value, post):
            return f"the block ends in a norm of the whole stream, {name}"
    if not pairs:
        return "no attention and MLP known by name were seen to run side by side in the block"
    return "attention and MLP outputs, as their modules give them, do not sum to what the block adds"


def final_norm(path: str, last: str, seen: Probe) -> Part | None:
    """Return the norm beside the blocks that is fed with the last block's output."""
    out = seen.outputs[last]
    for name, module in seen.modules.items():
        value = seen.inputs.get(name)
        if name.startswith(f"{path}.") or not is_norm(name, module):
            continue
        if isinstance(value, Tensor) and value.shape == out.shape and torch.equal(value, out):
            return Part(module, "output", name)
    return None


def token_embedding(first: str, seen: Probe, embed: nn.Module) -> Part | None:
    """Return the token embedding as the stream takes it: after a norm of its own where there is one (Bloom, BERT).

    Such a norm gives what the block `first` takes. None for an embedding that runs for an encoder and a decoder, or
    gives no single tensor: it is no single place.
    """
    name = next(n for n, m in seen.modules.items() if m is embed)
    if seen.calls[name] != 1 or not isinstance(seen.outputs.get(name), Tensor):
        return None
    start = seen.inputs[first]
    for normed, module in seen.modules.items():
        value = seen.outputs.get(normed)
        if normed.startswith(first.rpartition(".")[0] + ".") or not is_norm(normed, module):
            continue
        if isinstance(value, Tensor) and value.shape == start.shape and torch.equal(value, start):
            return Part(module, "output", normed)
    return Part(embed, "output", name)


def finish_logits(hf: nn.Module, logits: Float[Tensor, "*rows v"]) -> Float[Tensor, "*rows v"]:
    """Apply the family's scale and soft cap to the head's output (Cohere, Granite, Falcon-H1, Gemma-2)."""
    config = text_config(hf)
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)):
            logits = logits * factor
    if isinstance(getattr(config, "logits_scaling", None), (int, float)):
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def through(modules: list[nn.Module], x: Tensor) -> Tensor:
    """Return what a chain of modules makes of x, each on its own device."""
    for module in modules:
        weight = next(module.parameters(), x)  # OLMo's norm has none
        x = module(x if weight.is_meta else x.to(weight.device))  # offloaded weights fetch their input themselves
    return x


def plain_tail(hf: nn.Module, path: str, norm: Part | None, last: Tensor, logits: Tensor) -> list[nn.Module] | None:
    """Return the modules that make the logits out of the last block, or None if that does not reproduce them."""
    head: Any = hf.get_output_embeddings()  # type: ignore[operator]
    project = getattr(hf.get_submodule(path.rpartition(".")[0]), "project_out", None)
    if head is None:
        return None
    tail = [m for m in (norm.module if norm else None, project, head) if m is not None]
    try:
        x = finish_logits(hf, through(tail, last))
    except (RuntimeError, TypeError):  # shapes or call do not fit: this family's tail is not a plain chain
        return None
    eps = torch.finfo(logits.dtype).eps
    fits = x.shape == logits.shape and bool((x.to(logits.device) - logits).abs().max() <= 8 * eps * logits.abs().max())
    return tail if fits else None
