"""A causal language model as named places in a residual stream: the Model, and every way to get one."""

import copy
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.model import packing, pretrained, tokens
from interp.model.anatomy import AnatomyError, accepts, dissect, eval_mode, finish_logits, replace_first, text_config
from interp.model.hooks import HookPoint, HookPointError, Place, StopForward, canonical_name, unknown_hook
from interp.model.places import bridge_places, module_place, native_places

NO_LIMIT = sys.maxsize  # n_ctx of a model that has no longest text (ALiBi, state space)
SAMPLE = 131_072  # values a tensor that the fingerprint looks at
_UNHASHED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map"}


class Model:
    """A Hugging Face causal language model with hook points; `hf` is the user's own object, never changed.

    On the transformer_lens backend `bridge` is the TransformerBridge, `hf` the model inside it, and every hook point
    one of the bridge's HookPoints.
    """

    def __init__(
        self, hf: Any, tokenizer: Any = None, *, name: str | None = None, bridge: Any = None, blocks: str | None = None
    ):
        self.hf, self.tokenizer, self.bridge = hf, tokenizer, bridge
        self.name = name or type(hf).__name__
        self.backend = "native" if bridge is None else "transformer_lens"
        self._anatomy = dissect(hf, blocks)
        self.blocks_path = self._anatomy.blocks_path
        self.n_layers, self.d_model = len(self._anatomy.blocks), self._anatomy.d_model
        found = native_places(hf, self._anatomy) if bridge is None else bridge_places(bridge, self.n_layers)
        self._places, self.aliases = found  # aliases: further spellings -> canonical name
        self._modules: dict[str, Place] = {}
        self._fingerprint: str | None = None
        self._packs: bool | None = None  # unknown until documents first share a row

    def __repr__(self) -> str:
        return f"Model({self.name}, {self.backend}, {self.n_layers} layers, d_model {self.d_model}, {self.dtype})"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, hence of the residual stream in most models."""
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def d_vocab(self) -> int:
        """Rows of the embedding matrix (the tokenizer may use fewer)."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @property
    def n_ctx(self) -> int:
        """The longest row in tokens; sys.maxsize where the architecture sets no limit."""
        config = text_config(self.hf)
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
            value = getattr(config, key, None)
            if isinstance(value, int) and value > 0:
                return value
        return NO_LIMIT

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of BOS, EOS, pad and their like: the tokenizer's, or without one the configuration's."""
        if self.tokenizer is not None:
            return frozenset(self.tokenizer.all_special_ids)
        config = text_config(self.hf)
        given = [getattr(config, f"{k}_token_id", None) for k in ("bos", "eos", "pad")]
        return frozenset(i for v in given for i in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(i, int))

    @property
    def bos_id(self) -> int | None:
        """Id of BOS: the tokenizer's, or without one the configuration's; None where there is none."""
        source = text_config(self.hf) if self.tokenizer is None else self.tokenizer
        found = getattr(source, "bos_token_id", None)
        return found if isinstance(found, int) else None

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that name the model's class, configuration and weights, equal on every load.

        Of each tensor it takes name, shape and up to 131,072 evenly spaced values as float32, so the dtype that exact
        values are held in does not matter, and a change of single values of a large matrix may go unseen. Computed
        afresh at each call. A TransformerBridge hashes the bridge's own tensors.
        """
        return self._fingerprint or fingerprint(self.hf)

    def hook_points(self) -> list[HookPoint]:
        """List the model's hook points in the order of the forward pass."""
        return [p.point for p in self._places.values()]

    def hook_point(self, name: str) -> HookPoint:
        """Return a hook point by any accepted spelling; raises HookPointError naming the closest."""
        return self.place(name).point

    def place(self, name: str) -> Place:
        """Return the module and side of a hook point; raises HookPointError naming the closest."""
        full = canonical_name(name, self.n_layers) or self.aliases.get(name, name)
        place = self._places.get(full) or self._modules.get(name)
        return place if place is not None else self._module_place(name)

    def _module_place(self, name: str) -> Place:
        """Return the output of the module at a raw path (or of a bridge's further HookPoint)."""
        module = dict(self.hf.named_modules()).get(name) if name else None
        if module is None and self.bridge is not None:
            module = self.bridge.hook_dict.get(name) or dict(self.bridge.named_modules()).get(name)
        if module is None:
            raise unknown_hook(self.name, name, self._places)
        for place in self._places.values():
            if place.module is module and place.side == "output":
                return place
        if module in self._anatomy.blocks:
            return self._places[f"blocks.{self._anatomy.blocks.index(module)}.hook_resid_post"]
        inside = name.removeprefix(f"{self.blocks_path}.").partition(".")[0]
        layer = int(inside) if name.startswith(f"{self.blocks_path}.") and inside.isdigit() else None
        place = module_place(self.hf, name, module, layer)
        if isinstance(place, str):
            raise HookPointError(f"{self.name}: module {name!r} cannot be a hook point: {place}")
        return self._modules.setdefault(name, place)

    def tokenize(
        self, texts: str | Sequence[str], *, add_bos: bool = True, max_len: int | None = None, side: str = "right"
    ) -> tokens.TokenBatch:
        """Return texts as one padded batch (see tokens.tokenize); raises MissingError without a tokenizer."""
        return tokens.tokenize(self.tokenizer, texts, add_bos=add_bos, max_len=max_len, side=side)

    def _call(self, module: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Any:
        """Call `module` (the whole model or its base) on padded rows, positions right for left pads too."""
        if ids.ndim != 2 or any(x is not None and x.shape != ids.shape for x in (mask, positions)):
            shapes = {
                k: tuple(v.shape)
                for k, v in {"ids": ids, "mask": mask, "positions": positions}.items()
                if v is not None
            }
            raise ValueError(f"{shapes}: ids, mask and positions must be [batch, columns], all alike")
        if ids.shape[1] > self.n_ctx:
            raise ValueError(f"{self.name} takes at most {self.n_ctx} tokens; a row has {ids.shape[1]}")
        given: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if positions is not None:
            self._check_packing()
            given["position_ids"] = packing.restarts(positions, mask).to(self.device)
        elif mask is not None and not bool(mask.all()):
            mask = mask.to(self.device)
            given["attention_mask"] = mask.long()
            # GPT-2 and GPT-Neo do not derive positions from the mask; right pads need nothing in a causal model
            if not bool(mask[:, 0].all()) and accepts(module, "position_ids"):
                given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if accepts(module, "use_cache"):
            given["use_cache"] = False
        with torch.no_grad(), eval_mode(self.hf):
            return module(**given)

    def _check_packing(self) -> None:
        """Raise AnatomyError unless documents that share a row are kept apart (found out once, by small forwards)."""
        if self._packs is None:
            self._packs = packing.keeps_apart(self.hf, self._anatomy.blocks[-1])
        if not self._packs:
            raise AnatomyError(
                f"{type(self.hf).__name__} cannot keep documents that share a row from seeing each other; "
                "give one document a row, with a mask and without positions"
            )

    def run(
        self,
        ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        positions: Int[Tensor, "b t"] | None = None,
    ) -> None:
        """Run the blocks, without the head, for the sake of hooks; an early stop by `reading` ends it quietly.

        `positions`: for rows that several documents share, which are not to see each other: counts from 0 in each, pads
        on the right alone (whatever their positions). Raises AnatomyError where the architecture cannot do that.
        """
        base = self.hf.base_model
        try:
            self._call(base if isinstance(base, nn.Module) else self.hf, ids, mask, positions)
        except StopForward:
            return

    def logits(
        self,
        ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        positions: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Return next-token logits at every column, without gradients, in evaluation mode; pads either side.

        `positions` as in `run`.
        """
        return self._call(self.hf, ids, mask, positions).logits

    def unembed(self, resid: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows v"]:
        """Return the logits that the model makes of a residual after the last block: final norm, head, scale, cap.

        Where a family's tail is not a chain of these the model itself finishes the forward from the last block.
        """
        flat = resid.to(self.device, self.dtype)
        if flat.ndim != 3:
            flat = flat.reshape(1, -1, resid.shape[-1])
        if self._anatomy.tail is None:
            out = self._finish(flat.reshape(-1, 1, resid.shape[-1]))
        else:
            for module in self._anatomy.tail:
                flat = module(flat)
            out = finish_logits(self.hf, flat)
        return out.reshape(*resid.shape[:-1], out.shape[-1])

    def _finish(self, last: Tensor) -> Tensor:
        """Run the model on dummy ids with the last block's output replaced by `last`."""
        block = self._anatomy.blocks[-1]
        handle = block.register_forward_hook(lambda module, args, output: replace_first(output, last), prepend=True)
        try:
            with eval_mode(self.hf):
                return self.hf(input_ids=torch.zeros(last.shape[:2], dtype=torch.long, device=self.device)).logits
        finally:
            handle.remove()

    def embed_matrix(self) -> Float[Tensor, "v d"]:
        """Return the token embeddings as the stream gets them (scaled where the family scales them: Gemma)."""
        embed = self.hf.get_input_embeddings()
        with torch.no_grad():
            return embed(torch.arange(self.d_vocab, device=self.device))

    def unembed_matrix(self) -> Float[Tensor, "v d"]:
        """Return the head's weight, one row a token."""
        head = self.hf.get_output_embeddings()
        if head is None:
            raise AnatomyError(f"{self.name} has no output embedding")
        return head.weight.detach()

    def generate(self, texts: str | Sequence[str], max_new_tokens: int = 20, **options: Any) -> list[str]:
        """Return the new text for each prompt (each return sequence), greedy unless `options` say otherwise.

        `options` go to Hugging Face's generate. Prompts are padded on the left, BOS in front.
        Raises MissingError without a tokenizer, ValueError for a prompt of no token or too long a one.
        """
        batch = self.tokenize(texts, side="left")
        if batch.ids.numel() == 0 or not bool(batch.mask.any(1).all()):
            raise ValueError("a prompt has no token, and the tokenizer no BOS to start from; give some text")
        width = batch.ids.shape[1]
        if width + max_new_tokens > self.n_ctx:
            raise ValueError(f"{width} prompt and {max_new_tokens} new tokens exceed the {self.n_ctx} of {self.name}")
        given = {"do_sample": False, "pad_token_id": tokens.pad_id(self.tokenizer), "max_new_tokens": max_new_tokens}
        ids, mask = batch.ids.to(self.device), batch.mask.long().to(self.device)
        with eval_mode(self.hf):
            out = self.hf.generate(input_ids=ids, attention_mask=mask, **(given | options))
        rows = getattr(out, "sequences", out)[:, width:]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def fingerprint(hf: nn.Module) -> str:
    """Return the digest behind Model.fingerprint."""
    config: dict[str, Any] = hf.config.to_dict()  # type: ignore[union-attr, operator]
    kept = {k: v for k, v in config.items() if k not in _UNHASHED}
    digest = hashlib.sha256(f"{type(hf).__name__} {json.dumps(kept, sort_keys=True, default=str)}".encode())
    for name, value in sorted(hf.state_dict().items()):
        flat = value.detach().reshape(-1)
        step = max(1, math.ceil(flat.numel() / SAMPLE))
        while step > 1 and math.gcd(step, value.shape[-1]) > 1:  # else some columns would never be looked at
            step += 1
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(flat[::step].to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_model(
    source: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "auto",
    backend: str = "native",
    tokenizer: Any = None,
    blocks: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Return a Model from "tiny" (bundled), a local folder, a hub id, a Hugging Face model or a TransformerBridge.

    `dtype`: the checkpoint's own unless given ("tiny": float32). `device` "auto": the GPU if there is one. An object in
    memory stays as and where it is. `backend` "transformer_lens" runs a TransformerBridge of the model (of a deep copy
    of one in memory). `blocks`: the path of the block list where it is not found by itself.
    Raises MissingError where model or tokenizer is not there, AnatomyError where the blocks are not found or do not
    carry the model's hidden states, ValueError for an unknown backend, or a dtype or device that an object in memory
    does not have.
    """
    if backend not in ("native", "transformer_lens"):
        raise ValueError(f"backend is {backend!r}; it must be 'native' or 'transformer_lens'")
    if isinstance(source, Model):
        return source
    if isinstance(source, (str, os.PathLike)):
        hf, name = pretrained.load(os.fspath(source), dtype, device, trust_remote_code)
        tokenizer = pretrained.load_tokenizer(name if tokenizer is None else tokenizer, trust_remote_code)
        label = "tiny" if os.fspath(source) == "tiny" else Path(name).name if Path(name).is_dir() else name
        if backend == "transformer_lens":
            return _bridged(hf, tokenizer, label)
        return Model(hf, tokenizer, name=label, blocks=blocks)
    if hasattr(source, "original_model") and hasattr(source, "hook_dict"):
        pretrained.check_placement(source.original_model, dtype, device)
        tokenizer = source.tokenizer if tokenizer is None else tokenizer
        return Model(source.original_model, tokenizer, name=type(source.original_model).__name__, bridge=source)
    if not isinstance(source, nn.Module):
        raise TypeError(f"source is a {type(source).__name__}; give 'tiny', a folder, a hub id or a model")
    pretrained.check_placement(source, dtype, device)
    label = Path(getattr(source, "name_or_path", "") or type(source).__name__).name
    if backend == "native":
        return Model(source, tokenizer, name=label, blocks=blocks)
    return _bridged(copy.deepcopy(source), tokenizer, label)


def _bridged(hf: nn.Module, tokenizer: Any, label: str) -> Model:
    """Return the Model on a TransformerBridge of `hf`, which is ours to change."""
    digest = fingerprint(hf)  # before the bridge renames the weights: both backends name a model alike
    bridge = pretrained.make_bridge(hf, tokenizer, label)
    model = Model(bridge.original_model, tokenizer, name=label, bridge=bridge)
    model._fingerprint = digest
    return model


def as_model(model: Any) -> Model:
    """Return a Model for what may be one already, a Hugging Face model or a TransformerBridge."""
    return model if isinstance(model, Model) else load_model(model)
