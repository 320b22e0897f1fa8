"""Small forwards that look at a model: what its modules take and give, with everything left as it was."""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

# what a forward raises for arguments that its family does not take
FAILURES = (RuntimeError, IndexError, ValueError, TypeError, KeyError, AttributeError, AssertionError)

_parameters: weakref.WeakKeyDictionary[Any, Mapping[str, Any]] = weakref.WeakKeyDictionary()


def text_config(hf: nn.Module) -> Any:
    """Return the configuration of the text model (the inner one of a composite model)."""
    config: Any = hf.config
    if not hasattr(config, "get_text_config"):
        return config
    # an encoder-decoder of two configurations has no single one; its decoder's names the vocabulary
    return (
        config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False)
        else config.get_text_config()
    )


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
    training: list[nn.Module] = []
    left: list[nn.Module | None] = [model]
    while left:  # several times as fast as model.modules(), and this runs at every forward
        m = left.pop()
        if m is None:
            continue
        held = m.__dict__
        if held["training"]:
            m.training = False
            training.append(m)
        if held["_modules"]:
            left += held["_modules"].values()
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


def parameters_of(forward: Callable) -> Mapping[str, Any]:
    """Return the parameters that a forward names, remembered for each function."""
    key = getattr(forward, "__func__", forward)
    found = _parameters.get(key)
    if found is None:
        found = _parameters[key] = inspect.signature(forward).parameters
    return found


def accepts(module: nn.Module, name: str) -> bool:
    """Whether the forward of `module` names the parameter `name`; a bare wrapper's is that of what it holds."""
    inner: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    named = parameters_of(inner.forward)
    bare = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in named.values())
    if bare and len(children := list(inner.children())) == 1:  # BigBird-Pegasus hides its decoder so
        return accepts(children[0], name)
    return name in named


def no_cache(module: nn.Module) -> dict[str, bool]:
    """Return the argument that keeps a forward from filling a cache, where there is one."""
    return {"use_cache": False} if accepts(module, "use_cache") else {}


def embedding(hf: nn.Module) -> Any:
    """Return the module that embeds token ids."""
    return hf.get_input_embeddings()  # type: ignore[operator]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Probe:
    """Record inputs and outputs of chosen modules in one small forward, and how often each runs."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.calls: Counter[str] = Counter()

    def run(self, call: Any) -> Any:
        """Return what `call()` does, recording on the way."""
        handles = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(name)))
            return call()
        finally:
            for h in handles:
                h.remove()

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # copied: some families add to these tensors in place afterwards (Falcon)
            self.inputs[name] = _copy(block_input(args, kwargs))
            self.calls[name] += 1

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
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
    embed = embedding(hf)
    n = int(getattr(text_config(hf), "vocab_size", 0) or embed.weight.shape[0])
    ids = torch.randint(0, n, (2, 5), generator=torch.Generator().manual_seed(0))
    return ids.to(token_device(hf))


def is_two_streamed(hf: nn.Module) -> bool:
    """Whether the model is an encoder and a decoder, each with ids of its own."""
    config: Any = hf.config
    return bool(getattr(config, "is_encoder_decoder", False)) and accepts(hf, "decoder_input_ids")


def probe_call(hf: nn.Module) -> dict[str, Any]:
    """Return the arguments of a small forward: 2 x 5 tokens, and 2 x 4 for a decoder beside an encoder."""
    ids = probe_ids(hf)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, 1:]} if is_two_streamed(hf) else {}), **no_cache(hf)}


def token_device(hf: nn.Module) -> torch.device:
    """Return where token ids go: the embedding's device, or the one that accelerate fetches offloaded weights to."""
    embed = embedding(hf)
    hook = getattr(embed, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(embed.parameters()).device
