"""The Model: a language model as named places in a residual stream, and the calls that run it."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.model import packing, padding, tokens
from interp.model.anatomy import BLOCKS, DECODER, ENCODER, AnatomyError, Stack, dissect
from interp.model.fingerprint import fingerprint, offloaded
from interp.model.forward import (
    embedding,
    eval_mode,
    kept_rng,
    no_cache,
    probe_ids,
    replace_first,
    text_config,
    token_device,
)
from interp.model.hooks import HookPoint, Place, StopForward, canonical_name, reading, unknown_hook
from interp.model.parts import finish_logits, through
from interp.model.places import Bridged, Native, module_place

NO_LIMIT = sys.maxsize  # n_ctx of a model that has no longest text (ALiBi, state space)


class Model:
    """A Hugging Face language model with hook points; `hf` is the user's own object, never changed.

    On the transformer_lens backend `bridge` is the TransformerBridge, `hf` the model inside it, and every hook point
    one of the bridge's HookPoints.
    """

    def __init__(
        self, hf: Any, tokenizer: Any = None, *, name: str | None = None, bridge: Any = None, blocks: str | None = None
    ):
        self.hf, self.tokenizer, self.bridge = hf, tokenizer, bridge
        self.name = name or type(hf).__name__
        self._anatomy = dissect(hf, blocks)
        self._stacks: dict[str, Stack] = {stack.prefix: stack for stack in self._anatomy.stacks}
        self.blocks_path = self._anatomy.main.path
        self.n_layers, self.d_model = len(self._anatomy.main.blocks), self._anatomy.main.d_model
        self._source = Native(hf, self._anatomy) if bridge is None else Bridged(bridge, self._anatomy)
        self.backend = self._source.name
        self._places, self.aliases = self._source.places()  # aliases: further spellings -> canonical name
        self._spelled: dict[str, Place] = {}  # every spelling asked for so far
        self._roots: dict[str, list[nn.Module]] = {}
        self._fingerprint: str | None = None
        self._causal: bool | None = None  # unknown until asked
        self._packs: bool | None = None  # unknown until documents first share a row
        self._offsets: dict[tuple[str, str], int | None] = {}  # of positions in padded rows, by stack and side
        self._wanted: list[str] = []  # stacks that the contexts now open look at
        self.offloaded = any(getattr(m, "_hf_hook", None) is not None for m in hf.modules())

    def __repr__(self) -> str:
        return f"Model({self.name}, {self.backend}, {self.n_layers} layers, d_model {self.d_model}, {self.dtype})"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return token_device(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, hence of the residual stream in most models."""
        return embedding(self.hf).weight.dtype

    @property
    def d_vocab(self) -> int:
        """Rows of the embedding matrix (the tokenizer may use fewer)."""
        return int(embedding(self.hf).weight.shape[0])

    @cached_property
    def n_ctx(self) -> int:
        """The longest row in tokens; sys.maxsize where the architecture sets no limit."""
        config = text_config(self.hf)
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
            value = getattr(config, key, None)
            if isinstance(value, int) and value > 0:
                return value - self._skipped_positions()
        return NO_LIMIT

    def _skipped_positions(self) -> int:
        """Return how many rows of the position table no token gets (RoBERTa counts from behind its pad id)."""
        for name, module in self.hf.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return 0 if module.padding_idx is None else module.padding_idx + 1
        return 0

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of BOS, EOS, pad and their like: the tokenizer's, or without one the configuration's."""
        if self.tokenizer is not None:
            return tokens.special_ids_of(self.tokenizer)
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
        """List the model's hook points, each with its shape and meaning, in the order of the forward pass."""
        return [p.point for p in self._places.values()]

    def hook_point(self, name: str) -> HookPoint:
        """Return a hook point by any accepted spelling; raises HookPointError naming the closest."""
        return self.place(name).point

    def place(self, name: str) -> Place:
        """Return the module and side of a hook point; raises HookPointError naming the closest."""
        if name in self._spelled:
            return self._spelled[name]
        sizes = {prefix: len(stack.blocks) for prefix, stack in self._stacks.items()}
        place = self._places.get(canonical_name(name, sizes) or self.aliases.get(name, name))
        if place is None:
            module = self._source.find(name) if name else None
            if module is None:
                raise unknown_hook(self.name, name, self._places)
            place = module_place(self, name, module, self._places)
        return self._spelled.setdefault(name, place)

    def blocks_of(self, prefix: str) -> list[nn.Module]:
        """Return the blocks of a stack ("blocks"; "encoder_blocks" and "decoder_blocks" where there are two)."""
        return self._stacks[prefix].blocks

    def stacks(self) -> dict[str, str]:
        """Return the module path of the blocks of each stack, by prefix."""
        return {prefix: stack.path for prefix, stack in self._stacks.items()}

    def roots(self, prefix: str) -> list[nn.Module]:
        """Return the nested modules that are called with the token ids of a stack, outermost first."""
        if prefix not in self._roots:
            parts = self._stacks[prefix].path.split(".")[:-1]
            nested = [self.hf, *(self.hf.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))]
            self._roots[prefix] = nested if prefix == BLOCKS else nested[-1:]
        return self._roots[prefix]

    @contextmanager
    def wanting(self, stacks: Iterable[str]) -> Iterator[None]:
        """Note which stacks an open context looks at: `run` leaves the decoder out where none does."""
        before = list(self._wanted)
        self._wanted.extend(stacks)
        try:
            yield
        finally:
            self._wanted = before

    def tokenize(
        self, texts: str | Sequence[str], *, add_bos: bool = True, max_len: int | None = None, side: str = "right"
    ) -> tokens.TokenBatch:
        """Return texts as one padded batch (see tokens.tokenize); raises MissingError without a tokenizer."""
        return tokens.tokenize(self.tokenizer, texts, add_bos=add_bos, max_len=max_len, side=side)

    def run(
        self,
        ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        positions: Int[Tensor, "b t"] | None = None,
        decoder_ids: Int[Tensor, "b u"] | None = None,
        decoder_mask: Bool[Tensor, "b u"] | None = None,
    ) -> None:
        """Run the blocks, without the head, for the sake of hooks; an early stop by `reading` ends it quietly.

        `positions`: for rows that several documents share, which are not to see each other: counts from 0 in each, pads
        on the right alone (whatever their positions). Of an encoder-decoder the encoder alone runs unless `decoder_ids`
        are given. Raises AnatomyError where the architecture cannot keep documents apart or heed these pads, ValueError
        where a hook in the decoder has no decoder_ids.
        """
        base = self.hf.base_model
        whole = base if isinstance(base, nn.Module) else self.hf
        try:
            if ENCODER not in self._stacks:
                _refuse_decoder(self, decoder_ids)
                self._call(whole, BLOCKS, self._given(ids, mask, positions, whole, BLOCKS))
            elif decoder_ids is None:
                if DECODER in self._wanted:
                    raise ValueError(f"a hook point lies in the decoder of {self.name}: give decoder_ids= to run it")
                encoder = self.hf.get_encoder()
                self._call(encoder, ENCODER, self._given(ids, mask, positions, encoder, ENCODER))
            else:
                self._call(whole, DECODER, self._pair(ids, mask, positions, decoder_ids, decoder_mask))
        except StopForward:
            return

    def logits(
        self,
        ids: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        positions: Int[Tensor, "b t"] | None = None,
        decoder_ids: Int[Tensor, "b u"] | None = None,
        decoder_mask: Bool[Tensor, "b u"] | None = None,
    ) -> Float[Tensor, "b _ v"]:
        """Return the head's logits at every column, without gradients, in evaluation mode; pads either side.

        They are of the next token in a causal model or a decoder, of the token itself in an encoder with a head.
        Parameters as in `run`. Raises AnatomyError for a model without such a head.
        """
        self._need_head()
        if ENCODER not in self._stacks:
            _refuse_decoder(self, decoder_ids)
            return self._call(self.hf, BLOCKS, self._given(ids, mask, positions, self.hf, BLOCKS)).logits
        if decoder_ids is None:
            raise ValueError(f"the logits of {self.name} are its decoder's: give decoder_ids=")
        return self._call(self.hf, DECODER, self._pair(ids, mask, positions, decoder_ids, decoder_mask)).logits

    def _given(self, ids: Tensor, mask: Any, positions: Any, module: nn.Module, stack: str) -> dict[str, Any]:
        """Return the arguments for padded rows, positions right for left pads too."""
        if ids.ndim != 2 or any(x is not None and x.shape != ids.shape for x in (mask, positions)):
            shapes = {"ids": ids, "mask": mask, "positions": positions}
            got = {k: tuple(v.shape) for k, v in shapes.items() if v is not None}
            raise ValueError(f"ids, mask and positions must be [batch, columns], all alike; they are {got}")
        if ids.shape[1] > self.n_ctx:
            raise ValueError(f"{self.name} takes at most {self.n_ctx} tokens; a row has {ids.shape[1]}")
        given: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if positions is not None:
            self._check_packing(stack)
            given["position_ids"] = packing.restarts(positions, mask).to(self.device)
        elif mask is not None and not bool(mask.all()):
            side = "right" if bool(mask[:, 0].all()) else "left"
            offset = self._offset(module, stack, side)
            mask = mask.to(self.device)
            given["attention_mask"] = mask.long()
            if offset is not None:
                given["position_ids"] = padding.positions_of(mask, offset)
        return given

    def _pair(self, ids: Tensor, mask: Any, positions: Any, decoder_ids: Tensor, decoder_mask: Any) -> dict[str, Any]:
        """Return the arguments for an encoder and a decoder."""
        given = self._given(ids, mask, positions, self.hf.get_encoder(), ENCODER)
        if decoder_mask is not None and not bool(decoder_mask[:, 0].all()):
            raise ValueError("decoder_mask has a pad before a token; pad decoder_ids on the right alone")
        given["decoder_input_ids"] = decoder_ids.to(self.device)
        if decoder_mask is not None:
            given["decoder_attention_mask"] = decoder_mask.long().to(self.device)
        return given

    def _call(self, module: nn.Module, stack: str, given: dict[str, Any]) -> Any:
        with torch.no_grad(), eval_mode(self.hf):
            return module(**given, **no_cache(module))

    def _offset(self, module: nn.Module, stack: str, side: str) -> int | None:
        """Return from where positions in padded rows count (None: they are not given), found out once a side."""
        if (stack, side) not in self._offsets:
            called = self.hf if stack == BLOCKS else module
            self._offsets[stack, side] = padding.find_offset(
                self.hf,
                lambda given: called(**given, **no_cache(called)),
                self._stacks[stack].blocks[-1],
                side,
                padding.takes_positions(called, module),
            )
        return self._offsets[stack, side]

    @property
    def is_causal(self) -> bool:
        """Whether values depend on what stands before a token alone; found out once, by two small forwards.

        Of an encoder-decoder its encoder is asked.
        """
        if self._causal is None:
            self._causal = self._looks_back_only()
        return self._causal

    def _looks_back_only(self) -> bool:
        ids = probe_ids(self.hf)[:1]
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1) if int(ids[0, 0]) != int(ids[0, -1]) else ids.flip(1)
        stack = ENCODER if ENCODER in self._stacks else BLOCKS
        found: list[Tensor] = []
        hook = f"{stack}.{len(self._stacks[stack].blocks) - 1}.hook_resid_post"
        with kept_rng(ids.device), reading(self, hook, lambda name, value: found.append(value.clone())):
            self.run(ids)
            self.run(other)
        before, after = (values[:, :-1].float() for values in found)
        # experts that take tokens in groups round differently, by far less than a token that is seen
        return bool((before - after).abs().max() <= 1e-4 * before.abs().max())

    def _pads_left(self) -> bool:
        """Whether rows padded on the left are right with the positions that Hugging Face's generate gives."""
        module, stack = (self.hf.get_encoder(), ENCODER) if ENCODER in self._stacks else (self.hf, BLOCKS)
        try:
            return self._offset(module, stack, "left") in (0, None)
        except AnatomyError:
            return False

    def _check_packing(self, stack: str) -> None:
        """Raise AnatomyError unless documents that share a row are kept apart (found out once, by small forwards)."""
        if self._packs is None:
            self._packs = stack == BLOCKS and packing.keeps_apart(self.hf, self._anatomy.main.blocks[-1])
        if not self._packs:
            raise AnatomyError(
                f"{type(self.hf).__name__} cannot keep documents that share a row from seeing each other; "
                "give one document a row, with a mask and without positions"
            )

    def _need_head(self) -> None:
        if not self._anatomy.has_logits:
            raise AnatomyError(
                f"{self.name} ({type(self.hf).__name__}) has no language-model head: it gives activations, no logits"
            )

    def unembed(self, resid: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows v"]:
        """Return the logits that the model makes of a residual after the last block: final norm, head, scale, cap.

        Where a family's tail is not a chain of these the model itself finishes the forward from the last block.
        Raises AnatomyError for a model without a head.
        """
        self._need_head()
        flat = resid.to(self.device, self.dtype)
        if flat.ndim != 3:
            flat = flat.reshape(1, -1, resid.shape[-1])
        if self._anatomy.tail is None:
            out = self._finish(flat.reshape(-1, 1, resid.shape[-1]))
        else:
            out = finish_logits(self.hf, through(self._anatomy.tail, flat))
        return out.reshape(*resid.shape[:-1], out.shape[-1])

    def _finish(self, last: Tensor) -> Tensor:
        """Run the model on dummy ids with the last block's output replaced by `last`."""
        block = self._anatomy.main.blocks[-1]
        handle = block.register_forward_hook(lambda module, args, output: replace_first(output, last), prepend=True)
        ids = torch.zeros(last.shape[:2], dtype=torch.long, device=self.device)
        given = {"input_ids": ids} | ({"decoder_input_ids": ids} if DECODER in self._stacks else {})
        try:
            with eval_mode(self.hf):
                return self.hf(**given).logits
        finally:
            handle.remove()

    def embed_matrix(self) -> Float[Tensor, "v d"]:
        """Return the token embeddings as the stream gets them (scaled where the family scales them: Gemma)."""
        with torch.no_grad():
            return embedding(self.hf)(torch.arange(self.d_vocab, device=self.device))

    def unembed_matrix(self) -> Float[Tensor, "v d"]:
        """Return the head's weight, one row a token."""
        head = self.hf.get_output_embeddings()
        if head is None:
            raise AnatomyError(f"{self.name} has no output embedding")
        weight = head.weight
        if weight.is_meta:
            return offloaded(self.hf, next(n for n, m in self.hf.named_modules() if m is head) + ".weight")
        return weight.detach()

    def generate(self, texts: str | Sequence[str], max_new_tokens: int = 20, **options: Any) -> list[str]:
        """Return the new text for each prompt (each return sequence), greedy unless `options` say otherwise.

        `options` go to Hugging Face's generate. Prompts are padded on the left, BOS in front; where the architecture
        cannot be padded so, each runs alone.
        Raises MissingError without a tokenizer, ValueError for a prompt of no token or too long a one.
        """
        self._need_head()
        batch = self.tokenize(texts, side="left")
        if batch.ids.numel() == 0 or not bool(batch.mask.any(1).all()):
            raise ValueError("a prompt has no token, and the tokenizer no BOS to start from; give some text")
        width = batch.ids.shape[1]
        if width + max_new_tokens > self.n_ctx:
            raise ValueError(f"{width} prompt and {max_new_tokens} new tokens exceed the {self.n_ctx} of {self.name}")
        if not bool(batch.mask.all()) and not self._pads_left():
            return [new for text in texts for new in self.generate(text, max_new_tokens, **options)]
        given = {"do_sample": False, "pad_token_id": tokens.pad_id(self.tokenizer), "max_new_tokens": max_new_tokens}
        ids, mask = batch.ids.to(self.device), batch.mask.long().to(self.device)
        with eval_mode(self.hf):
            out = self.hf.generate(input_ids=ids, attention_mask=mask, **(given | options))
        rows = getattr(out, "sequences", out)
        return self.tokenizer.batch_decode(
            rows if DECODER in self._stacks else rows[:, width:], skip_special_tokens=True
        )


def _refuse_decoder(model: Model, decoder_ids: Tensor | None) -> None:
    if decoder_ids is not None:
        raise ValueError(f"{model.name} has no decoder beside an encoder; decoder_ids cannot be used")
