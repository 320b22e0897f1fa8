"""Where a model keeps its blocks, their parts, its embedding, final norms and head: found and checked once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.model.forward import (
    FAILURES,
    Probe,
    embedding,
    eval_mode,
    is_two_streamed,
    kept_rng,
    probe_call,
    text_config,
    unmarked,
)
from interp.model.parts import Added, Part, added, final_norm, inside, plain_tail, token_embedding

BLOCK_PATHS = (
    "model.layers",
    "model.decoder.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.language_model.layers",
    "backbone.layers",
)
_SIZES = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
BLOCKS, ENCODER, DECODER = "blocks", "encoder_blocks", "decoder_blocks"


class AnatomyError(ValueError):
    """The model's parts could not be found, or are not what they were taken for."""


@dataclass(frozen=True)
class Stack:
    """One residual stream: the blocks that it runs through, and the parts that hooks attach to."""

    prefix: str  # "blocks"; "encoder_blocks" and "decoder_blocks" where a model has two streams
    path: str
    blocks: list[nn.Module]
    added: list[Added]
    final_norm: Part | None
    d_model: int


@dataclass(frozen=True)
class Anatomy:
    """The streams of a model (an encoder-decoder's decoder last), its embedding and what makes its logits."""

    stacks: list[Stack]
    embed: Part | None
    has_logits: bool
    tail: list[nn.Module] | None  # modules from the last block to the logits; None: only a whole forward gives them

    @property
    def main(self) -> Stack:
        """The stream that the logits are made of."""
        return self.stacks[-1]


def block_lists(hf: nn.Module) -> dict[str, nn.ModuleList]:
    """Return by path the ModuleLists that lie in no other, likely ones first.

    Known paths come first, then those of as many entries as the configuration has layers, then the longer ones.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path, module in hf.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{p}.") for p in lists):
            lists[path] = module
    config = text_config(hf)
    sizes = {getattr(config, name, None) for name in _SIZES}

    def unlikely(path: str) -> tuple:
        return len(lists[path]) not in sizes, path not in BLOCK_PATHS, -len(lists[path])

    return {path: lists[path] for path in sorted(lists, key=unlikely)}


def _watched(hf: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.Module]:
    """List by path the modules whose values the check looks at."""
    watched: dict[str, nn.Module] = {}
    for path, blocks in lists.items():
        for i, block in enumerate(blocks):
            watched[f"{path}.{i}"] = block
            watched.update({f"{path}.{i}.{name}": m for name, m in inside(block).items()})
        owner = path.rpartition(".")[0]
        for name, m in hf.get_submodule(owner).named_children():
            if not isinstance(m, nn.ModuleList):
                watched[f"{owner}.{name}" if owner else name] = m
    at = next(name for name, m in hf.named_modules() if m is embedding(hf))
    owner = at.rpartition(".")[0]
    beside = {f"{owner}.{name}".lstrip("."): m for name, m in hf.get_submodule(owner).named_children()}
    watched.update({name: m for name, m in beside.items() if not isinstance(m, nn.ModuleList)})
    return watched


def _fault(path: str, n: int, seen: Probe, hidden: Any, shape: tuple[int, int], sure: bool) -> str:
    """Say why the n modules at `path` are not the blocks of one residual stream; "" where they are.

    Their inputs and outputs must be the model's hidden states bit for bit (the last output aside, which those give
    after the final norm), or, for state-space models, which count from the first output, their outputs must. Without
    as many hidden states to compare with, each block must take what the one before gives, and the list be `sure`: of
    the configuration's length, or named by the user.
    """
    names = [f"{path}.{i}" for i in range(n)]
    for name in names:
        if seen.calls[name] != 1:
            return f"block {name} " + (
                f"runs {seen.calls[name]} times in a forward" if seen.calls[name] else "does not run"
            )
        for value in (seen.inputs.get(name), seen.outputs.get(name)):
            if not (isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()):
                got = f"{value.ndim}-D tensors" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                return f"{name} passes on {got}, not one stream [batch, position, width]"
            if tuple(value.shape[:2]) != shape:
                tokens = f"{shape[0]} x {shape[1]} tokens"
                return f"{name} passes on {list(value.shape)} for {tokens}, not [batch, position, width]"
    ins, outs = [seen.inputs[x] for x in names], [seen.outputs[x] for x in names]
    if hidden and len(hidden) == 2 * n + 1:  # transformers counts a bridge's block and the OPT block inside it
        hidden = hidden[::2]
    if hidden is None or len(hidden) != n + 1:
        broken = next((i for i in range(1, n) if not _same(ins[i], outs[i - 1])), None)
        if broken is not None:
            return f"the input of {names[broken]} is not the output of the block before"
        return "" if sure else f"there are no {n + 1} hidden states to check {path} against"
    if all(_same(outs[i], hidden[i]) for i in range(n)) and all(_same(ins[i + 1], outs[i]) for i in range(n - 1)):
        return ""
    for i, name in enumerate(names):
        if not _same(ins[i], hidden[i]):
            return f"the input of {name} is not hidden_states[{i}]"
        if i < n - 1 and not _same(outs[i], hidden[i + 1]):
            return f"the output of {name} is not hidden_states[{i + 1}]"
    return ""


def _same(value: Any, want: Any) -> bool:
    return isinstance(want, Tensor) and value.shape == want.shape and torch.equal(value, want.to(value.device))


def _choose(
    hf: nn.Module, lists: dict[str, nn.ModuleList], seen: Probe, hidden: Any, shape: Any, override: bool
) -> str:
    """Return the path of the first list that is the blocks of a stream; raises AnatomyError where none is."""
    config, faults = text_config(hf), []
    sizes = {getattr(config, name, None) for name in _SIZES}
    for path, blocks in lists.items():
        fault = _fault(path, len(blocks), seen, hidden, shape, override or len(blocks) in sizes)
        if not fault:
            return path
        faults.append(fault)
    label = type(hf).__name__
    if not faults:
        raise AnatomyError(f"{label} has no list of blocks: interp reads models that keep theirs in a ModuleList")
    hint = "" if override else f" (looked at: {', '.join(lists)}; blocks='a.b.c' names another list)"
    raise AnatomyError(f"{label}: {faults[0]}{hint}")


def _prefixes(hf: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, dict[str, nn.ModuleList]]:
    """Return the lists to choose from by stream."""
    if not is_two_streamed(hf):
        return {BLOCKS: lists}
    sides = {ENCODER: hf.get_encoder(), DECODER: hf.get_decoder()}  # type: ignore[operator]
    found = {}
    for prefix, side in sides.items():
        own = {id(m) for m in side.modules()}
        found[prefix] = {path: m for path, m in lists.items() if id(m) in own}
    return found


def dissect(hf: nn.Module, blocks: str | None = None) -> Anatomy:
    """Find the parts of a Hugging Face language model and check them in one 2 x 5 forward.

    Blocks: the list at path `blocks`, else the first list that passes the check of `_fault`. attn_out and mlp_out are
    kept only where resid_pre + attn_out + mlp_out is resid_post. The model is left as it was.
    Raises AnatomyError where the blocks are not found or the check fails, or weights are not there (meta device).
    """
    _need_weights(hf)
    lists = block_lists(hf)
    if blocks is not None:
        module = dict(hf.named_modules()).get(blocks)
        if not isinstance(module, nn.ModuleList):
            raise AnatomyError(f"blocks={blocks!r} is no ModuleList of {type(hf).__name__}: {', '.join(lists)}")
        lists = {blocks: module}
    seen = Probe(_watched(hf, lists))
    given = probe_call(hf)
    ids = given["input_ids"]
    with torch.no_grad(), kept_rng(ids.device), unmarked(hf), eval_mode(hf):
        try:
            out = seen.run(lambda: hf(**given, output_hidden_states=True))
        except FAILURES as error:
            raise AnatomyError(f"{type(hf).__name__} cannot run on token ids alone: {_line(error)}") from error
        stacks = []
        for prefix, own in _prefixes(hf, lists).items():
            stem = "" if prefix == BLOCKS else prefix.replace("blocks", "")
            shape = tuple(given["decoder_input_ids" if prefix == DECODER else "input_ids"].shape)
            path = _choose(hf, own, seen, getattr(out, f"{stem}hidden_states", None), shape, blocks is not None)
            stacks.append(_stack(prefix, path, own[path], seen))
        main, logits = stacks[-1], getattr(out, "logits", None)
        last = seen.outputs[f"{main.path}.{len(main.blocks) - 1}"]
        has_logits, tail = False, None
        if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == last.shape[:2]:
            has_logits, tail = True, plain_tail(hf, main.path, main.final_norm, last, logits)
    return Anatomy(stacks, token_embedding(f"{main.path}.0", seen, embedding(hf)), has_logits, tail)


def _stack(prefix: str, path: str, blocks: nn.ModuleList, seen: Probe) -> Stack:
    last = f"{path}.{len(blocks) - 1}"
    parts = [added(f"{path}.{i}", block, seen) for i, block in enumerate(blocks)]
    return Stack(prefix, path, list(blocks), parts, final_norm(path, last, seen), int(seen.outputs[last].shape[-1]))


def _need_weights(hf: nn.Module) -> None:
    """Raise AnatomyError for weights on the meta device that nothing fetches (accelerate's offloading does)."""
    for name, module in hf.named_modules():
        if hasattr(module, "_hf_hook"):
            continue
        for own, value in module.named_parameters(recurse=False):
            if value.is_meta:
                full = f"{name}.{own}" if name else own
                raise AnatomyError(
                    f"{full} of {type(hf).__name__} is on the meta device: it has a shape and no values; load weights"
                )


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
