"""Where a model family keeps its embedding, blocks, attention, MLP, final norm and head, found and checked once."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

BLOCK_PATHS = (
    "model.layers",
    "model.decoder.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.language_model.layers",
    "backbone.layers",
)
# Their hidden_states follow another convention (value before or after the mixer), so the self-check cannot hold.
STATE_SPACE = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})
# In order of trial: a post-norm is what is added to the stream where it exists; the inner linear where the module adds
# the residual itself (Bloom). Every choice is verified by resid_pre + attn_out + mlp_out == resid_post.
ATTN_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "temporal_block")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "feedforward", "fc2")
ATTN_ADDED = ("post_self_attn_layernorm", "post_attention_layernorm", *ATTN_NAMES, "self_attention.dense")
MLP_ADDED = ("post_mlp_layernorm", "post_feedforward_layernorm", *MLP_NAMES, "mlp.dense_4h_to_h")


class AnatomyError(ValueError):
    """The model's parts could not be found, or are not what they were taken for."""


@dataclass(frozen=True)
class Part:
    """One side of a module: its first input or its (first) output is a tensor in the residual stream."""

    module: nn.Module
    side: str  # "input" | "output"
    path: str


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model that hooks attach to."""

    blocks: list[nn.Module]
    blocks_path: str
    embed: Part
    attn: list[Part | None]  # the tensor added to the stream; None where it could not be established
    mlp: list[Part | None]
    mid: list[Part | None]
    final_norm: Part | None
    tail: list[nn.Module] | None  # modules from the last block to the logits; None: only a whole forward gives them
    d_model: int


def text_config(hf: nn.Module) -> Any:
    """Return the configuration of the text model (the inner one of a composite model)."""
    config: Any = hf.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def first_tensor(value: Any) -> Any:
    """Return the hidden state in a module's output: the value itself or the first entry of a tuple or list."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


def replace_first(value: Any, new: Tensor) -> Any:
    """Return `value` with its hidden state replaced, type and tail kept."""
    if isinstance(value, tuple):
        return (new, *value[1:])
    return [new, *value[1:]] if isinstance(value, list) else new


def block_input(args: tuple, kwargs: dict) -> Any:
    """Return the hidden state that a module is called with: the first positional, else `hidden_states`."""
    return args[0] if args else kwargs.get("hidden_states")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every submodule to evaluation, and restore each one's own mode."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


_HOOK_DICTS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Take back hooks and attributes that a forward leaves on the modules.

    transformers installs lasting hooks at the first call with output_hidden_states.
    """
    before = [(m, set(vars(m)), {k: set(getattr(m, k)) for k in _HOOK_DICTS}) for m in model.modules()]
    try:
        yield
    finally:
        for module, names, hooks in before:
            for name in set(vars(module)) - names:
                delattr(module, name)
            for key, ids in hooks.items():
                held = getattr(module, key)
                for added in set(held) - ids:
                    del held[added]


@contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """Leave the random state of the CPU and of `device` as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def accepts(module: nn.Module, name: str) -> bool:
    """Whether the forward of `module` names the parameter `name`."""
    inner: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    return name in inspect.signature(inner.forward).parameters


def find_blocks(hf: nn.Module, override: str | None = None) -> tuple[str, nn.ModuleList]:
    """Return path and list of the transformer blocks.

    By `override`, else by the table of known paths, else the first ModuleList of as many entries as the
    configuration has layers. Raises AnatomyError where none fits.
    """
    n = getattr(text_config(hf), "num_hidden_layers", None)
    lists = {path: m for path, m in hf.named_modules() if isinstance(m, nn.ModuleList)}
    if override is not None:
        if override not in lists:
            raise AnatomyError(f"blocks={override!r} is no ModuleList of {type(hf).__name__}: {', '.join(lists)}")
        return override, lists[override]
    for path in (*BLOCK_PATHS, *lists):
        if path in lists and len(lists[path]) == n:
            return path, lists[path]
    raise AnatomyError(
        f"found no list of {n} blocks in {type(hf).__name__}; name it with blocks='a.b.c', one of: {', '.join(lists)}"
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Probe:
    """Record inputs and outputs of chosen modules in one small forward."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules, self.inputs, self.outputs = modules, {}, {}

    def run(self, call: Any) -> Any:
        handles = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(self._keep(name), with_kwargs=True))
            return call()
        finally:
            for h in handles:
                h.remove()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            # copied: some families add to these tensors in place afterwards (Falcon)
            self.inputs[name] = _copy(block_input(args, kwargs))
            self.outputs[name] = _copy(first_tensor(output))

        return hook


def sums_to(target: Tensor, *parts: Tensor) -> bool:
    """Whether `target` is the sum of `parts` up to rounding, judged element by element."""
    if any(not isinstance(p, Tensor) or p.numel() != target.numel() for p in parts):
        return False
    eps = max(torch.finfo(p.dtype).eps for p in (target, *parts))
    wide = [p.reshape(target.shape).to(target.device, torch.float32) for p in parts]
    bound = sum(p.abs() for p in wide) + target.float().abs()
    return bool(((sum(wide) - target.float()).abs() <= 4 * eps * bound).all())


def probe_ids(hf: nn.Module) -> Int[Tensor, "2 5"]:
    """Return a fixed 2 x 5 batch of pseudo-random token ids on the embedding's device."""
    embed: Any = hf.get_input_embeddings()  # type: ignore[operator]
    n = int(getattr(text_config(hf), "vocab_size", 0) or embed.weight.shape[0])
    ids = torch.randint(0, n, (2, 5), generator=torch.Generator().manual_seed(0))
    return ids.to(next(embed.parameters()).device)


def _candidates(block: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    found = dict(block.named_modules())
    return [(n, found[n]) for n in names if n in found]


def _watched(hf: nn.Module, path: str, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """List by path the modules whose values the self-check looks at."""
    watched: dict[str, nn.Module] = {}
    for i, block in enumerate(blocks):
        watched[f"{path}.{i}"] = block
        named = [*block.named_children(), *_candidates(block, (*ATTN_ADDED, *MLP_ADDED))]
        watched.update({f"{path}.{i}.{name}": m for name, m in named})
    owner = path.rpartition(".")[0]
    for name, m in hf.get_submodule(owner).named_children():
        if not isinstance(m, nn.ModuleList):
            watched[f"{owner}.{name}" if owner else name] = m
    embed: Any = hf.get_input_embeddings()  # type: ignore[operator]
    if all(m is not embed for m in watched.values()):
        watched[next(name for name, m in hf.named_modules() if m is embed)] = embed
    return watched


def _check_blocks(hf: nn.Module, path: str, n: int, seen: Probe, hidden: Any) -> None:
    """Raise AnatomyError where the blocks' values are not the model's own hidden states (but the last)."""
    missing = [i for i in range(n) if f"{path}.{i}" not in seen.outputs]
    if missing:
        raise AnatomyError(f"{type(hf).__name__}: block {path}.{missing[0]} does not run; name the blocks with blocks=")
    stream = seen.outputs[f"{path}.0"]
    if not (isinstance(stream, Tensor) and stream.ndim == 3):
        got = f"{stream.ndim}-D tensors" if isinstance(stream, Tensor) else f"a {type(stream).__name__}"
        raise AnatomyError(f"{type(hf).__name__}: {path}.0 passes on {got}, not one stream [batch, position, width]")
    if getattr(text_config(hf), "model_type", "") in STATE_SPACE:
        return
    if hidden and len(hidden) == 2 * n + 1:  # transformers counts a bridge's block and the OPT block inside it
        hidden = hidden[::2]
    if hidden is None or len(hidden) != n + 1:
        raise AnatomyError(f"{type(hf).__name__} returns no {n + 1} hidden_states to check {path} against")
    for i in range(n):
        pairs = [(seen.inputs[f"{path}.{i}"], hidden[i], f"input of {path}.{i}", i)]
        if i < n - 1:  # the last hidden state is after the final norm
            pairs.append((seen.outputs[f"{path}.{i}"], hidden[i + 1], f"output of {path}.{i}", i + 1))
        for value, want, what, at in pairs:
            if not (isinstance(value, Tensor) and value.shape == want.shape and torch.equal(value, want)):
                raise AnatomyError(
                    f"{type(hf).__name__}: the {what} is not hidden_states[{at}]; name the blocks with blocks='a.b.c'"
                )


def _added_parts(path: str, block: nn.Module, seen: Probe) -> tuple[Part | None, Part | None, Part | None]:
    """Return attn_out, mlp_out and resid_mid of one block as far as the sums establish them."""
    pre, post = seen.inputs[path], seen.outputs[path]
    pairs = product(_candidates(block, ATTN_ADDED), _candidates(block, MLP_ADDED))
    for (a_name, a), (m_name, m) in pairs:
        a_out, m_out = seen.outputs.get(f"{path}.{a_name}"), seen.outputs.get(f"{path}.{m_name}")
        if a_out is None or m_out is None or not sums_to(post, pre, a_out, m_out):
            continue
        attn, mlp = Part(a, "output", f"{path}.{a_name}"), Part(m, "output", f"{path}.{m_name}")
        for name, child in block.named_children():
            value = seen.inputs.get(f"{path}.{name}")
            if isinstance(value, Tensor) and value.shape[-1] == pre.shape[-1] and sums_to(value, pre, a_out):
                return attn, mlp, Part(child, "input", f"{path}.{name}")
        return attn, mlp, None
    return None, None, None


def _final_norm(path: str, last: str, seen: Probe) -> Part | None:
    """Return the norm beside the blocks that is fed with the last block's output."""
    out = seen.outputs[last]
    for name, module in seen.modules.items():
        label = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        value = seen.inputs.get(name)
        if name.startswith(f"{path}.") or not ("norm" in label or "ln" in label):
            continue
        if isinstance(value, Tensor) and value.shape == out.shape and torch.equal(value, out):
            return Part(module, "output", name)
    return None


def _embedding(path: str, seen: Probe, embed: nn.Module) -> Part:
    """Return the token embedding as the stream takes it: after a norm of its own where there is one (Bloom)."""
    owner = path.rpartition(".")[0]
    name = next(n for n, m in seen.modules.items() if m is embed)
    normed = f"{owner}.word_embeddings_layernorm".lstrip(".")
    if normed in seen.outputs:
        return Part(seen.modules[normed], "output", normed)
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


def _tail(hf: nn.Module, path: str, norm: Part | None, last: Tensor, logits: Tensor) -> list[nn.Module] | None:
    """Return the modules that make the logits out of the last block, or None if that does not reproduce them."""
    head: Any = hf.get_output_embeddings()  # type: ignore[operator]
    project = getattr(hf.get_submodule(path.rpartition(".")[0]), "project_out", None)
    if head is None:
        return None
    tail = [m for m in (norm.module if norm else None, project, head) if m is not None]
    x = last
    try:
        for module in tail:
            weight = next(module.parameters(), x)  # OLMo's norm has none
            x = module(x.to(weight.device))
        x = finish_logits(hf, x)
    except (RuntimeError, TypeError):  # shapes or call do not fit: this family's tail is not a plain chain
        return None
    eps = torch.finfo(logits.dtype).eps
    fits = x.shape == logits.shape and bool((x - logits).abs().max() <= 8 * eps * logits.abs().max())
    return tail if fits else None


def dissect(hf: nn.Module, blocks: str | None = None) -> Anatomy:
    """Find the parts of a Hugging Face causal language model and check them in one 2 x 5 forward.

    Block inputs and outputs must equal the model's own hidden_states bit for bit (the last output aside, which they
    give after the final norm; state-space models aside). attn_out and mlp_out are kept only where
    resid_pre + attn_out + mlp_out is resid_post. The model is left as it was.
    Raises AnatomyError where the blocks are not found or the check fails.
    """
    path, modules = find_blocks(hf, blocks)
    seen = Probe(_watched(hf, path, modules))
    ids = probe_ids(hf)
    embed: Any = hf.get_input_embeddings()  # type: ignore[operator]
    options = {"use_cache": False} if accepts(hf, "use_cache") else {}
    with torch.no_grad(), kept_rng(ids.device), unmarked(hf), eval_mode(hf):
        out = seen.run(lambda: hf(input_ids=ids, output_hidden_states=True, **options))
        n = len(modules)
        _check_blocks(hf, path, n, seen, getattr(out, "hidden_states", None))
        last = f"{path}.{n - 1}"
        norm = _final_norm(path, last, seen)
        tail = _tail(hf, path, norm, seen.outputs[last], out.logits)
    parts = [_added_parts(f"{path}.{i}", block, seen) for i, block in enumerate(modules)]
    return Anatomy(
        blocks=list(modules),
        blocks_path=path,
        embed=_embedding(path, seen, embed),
        attn=[p[0] for p in parts],
        mlp=[p[1] for p in parts],
        mid=[p[2] for p in parts],
        final_norm=norm,
        tail=tail,
        d_model=int(seen.outputs[last].shape[-1]),
    )
