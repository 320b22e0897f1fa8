"""Which columns of the text a forward pass is working on, in plain calls and inside generate."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from interp.model.forward import parameters_of


@dataclass(frozen=True)
class Clock:
    """Where the q columns of one forward pass stand in their rows.

    Columns count the padded row from 0, with or without a cache; positions count real tokens from the first one of
    the row and are -1 on pads. `special` is by token id (BOS, EOS, pad, ...) and all False where ids are unknown
    (inputs_embeds). An edit that must leave pads alone selects with `mask`; BOS and its like with `~special`.
    `prompt_width` is the padded width of the prompt given to generate, None outside of it (and in a
    TransformerBridge's own generate loop): the first new token is predicted from column prompt_width - 1.
    """

    past: int
    columns: Int[Tensor, " q"]
    mask: Bool[Tensor, "b q"]
    special: Bool[Tensor, "b q"]
    positions: Int[Tensor, "b q"]
    prompt_width: int | None = None

    def to(self, device: torch.device | str) -> "Clock":
        """Return the clock with its tensors on `device`."""
        if self.columns.device == torch.device(device):
            return self
        moved = {name: getattr(self, name).to(device) for name in ("columns", "mask", "special", "positions")}
        return replace(self, **moved)


def cache_length(cache: Any) -> int | None:
    """Return how many columns a cache holds: 0 without one, None for one that does not count (state-space models)."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def _square_mask(mask: Tensor, past: int, q: int) -> Tensor:
    """Return which columns are real by a 4-D mask: those that attend to themselves, or are attended to."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    allowed = allowed[:, 0]
    own = torch.stack([allowed[:, j, past + j] for j in range(q)], dim=1)
    return torch.cat([allowed[:, -1, :past], own], dim=1)


def full_mask(mask: Any, prompt: Tensor | None, rows: int, past: int, q: int, device: torch.device) -> Tensor:
    """Return which of the columns 0 .. past + q - 1 are real, [rows, past + q].

    From the 2-D mask of the call; else the 2-D mask given to generate (a static cache shows a 4-D mask only), rows
    repeated for beams and returned sequences; else the 4-D mask; else all are real.
    """
    if isinstance(mask, dict):  # one mask a kind of attention layer (Gemma-2, Gemma-3)
        mask = mask.get("full_attention", next(iter(mask.values())))
    width = past + q
    ones = torch.ones(rows, width, dtype=torch.bool, device=device)
    flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else prompt
    if isinstance(flat, Tensor):
        flat = flat.to(device).bool()
        flat = flat.repeat_interleave(rows // flat.shape[0], dim=0)
        if flat is not prompt and flat.shape[1] == q < width and isinstance(mask, Tensor) and mask.ndim == 2:
            return torch.cat([ones[:, :past], flat], dim=1)
        return torch.cat([flat, ones], dim=1)[:, :width]  # columns after the prompt are new tokens: real
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] >= width:
        square = _square_mask(mask.to(device), past, q)
        return square.repeat_interleave(rows // square.shape[0], dim=0)
    return ones


_quiet: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose forward is a probe of our own


@contextmanager
def quiet(hf: nn.Module) -> Iterator[None]:
    """Keep `reading` and `editing` from seeing the forwards inside the context (small ones that look at the model)."""
    nested = hf in _quiet
    _quiet.add(hf)
    try:
        yield
    finally:
        if not nested:
            _quiet.discard(hf)


class Watch:
    """Note what every outermost forward through `roots` works on, while attached: its shape, and its clock.

    `roots` are the nested modules whose call carries the token ids: from the causal LM down to the owner of the blocks,
    so that calling `base_model` directly works too; only the outermost call of a nest is read. Without `special_ids`
    only the shape is noted, which costs next to nothing. With `prompts=True` the model's generate is shadowed by an
    instance attribute that notes the prompt (`decoder`: the decoder's own), and restored by `detach`.
    """

    def __init__(
        self,
        hf: nn.Module,
        roots: list[nn.Module],
        special_ids: frozenset[int] | None = None,
        on_start: Callable | None = None,
        decoder: bool = False,
    ):
        self.hf: Any = hf
        self.roots = roots
        self.special_ids = None if special_ids is None else sorted(special_ids)
        self.on_start = on_start
        self.decoder = decoder
        self.clock: Clock | None = None
        self.shape: tuple[int, int] | None = None  # rows and columns of the pass
        self._depth = 0
        self._prompt: tuple[int, Tensor | None] | None = None
        self._fed = 0  # columns of this generate so far: the clock of a cache that does not count
        self._handles: list[Any] = []
        self._shadow: Callable | None = None
        self._former: Callable | None = None

    @property
    def quiet(self) -> bool:
        """Whether the forward that runs is none of the user's."""
        return self.hf in _quiet

    def attach(self, prompts: bool = True) -> None:
        """Register the hooks (and shadow generate)."""
        for root in self.roots:
            names = tuple(parameters_of(root.forward))
            self._handles.append(root.register_forward_pre_hook(self._starter(names), with_kwargs=True))
            self._handles.append(root.register_forward_hook(self._end, always_call=True))
        if prompts and hasattr(self.hf, "generate"):
            self._shadow_generate()

    def detach(self) -> None:
        """Remove the hooks, and the shadow of generate."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._shadow is not None and self.hf.__dict__.get("generate") is self._shadow:
            del self.hf.__dict__["generate"]
            if self._former is not None:
                self.hf.__dict__["generate"] = self._former
        self._shadow = None

    def _starter(self, names: tuple[str, ...]) -> Callable:
        def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._depth += 1
            if self._depth == 1 and not self.quiet:
                given = dict(zip(names, args, strict=False)) | kwargs
                ids = given.get("input_ids", args[0] if args and "inputs_embeds" not in given else None)
                source = ids if ids is not None else given.get("inputs_embeds")
                if not isinstance(source, Tensor):
                    raise TypeError("a forward pass inside reading or editing needs input_ids or inputs_embeds")
                self.shape = (int(source.shape[0]), int(source.shape[1]))
                if self.special_ids is not None:
                    self.clock = self._read(given, source, ids is not None)
                if self.on_start is not None:
                    self.on_start()

        return start

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._depth -= 1

    def _read(self, given: dict[str, Any], source: Tensor, by_id: bool) -> Clock:
        rows, q = int(source.shape[0]), int(source.shape[1])
        mask = given.get("attention_mask")
        cache = given.get("past_key_values", given.get("cache_params"))
        past = cache_length(cache)
        if past is None:
            if self._prompt is None:
                raise TypeError(f"a {type(cache).__name__} without a length can be followed only inside generate")
            past = self._fed
        self._fed = past + q
        width, prompt = self._prompt or (None, None)
        real = full_mask(mask, prompt, rows, past, q, source.device)
        positions = torch.where(real, real.long().cumsum(1) - 1, -1)
        special = torch.zeros(rows, q, dtype=torch.bool, device=source.device)
        if by_id and self.special_ids:
            special = torch.isin(source, torch.tensor(self.special_ids, device=source.device))
        columns = past + torch.arange(q, device=source.device)
        return Clock(past, columns, real[:, past:], special, positions[:, past:], width)

    def _shadow_generate(self) -> None:
        self._former = self.hf.__dict__.get("generate")
        generate = self.hf.generate

        def shadow(*args: Any, **kwargs: Any) -> Any:
            prompt = _decoder_prompt(self.hf, kwargs) if self.decoder else _prompt_of(args, kwargs)
            before, self._prompt, self._fed = self._prompt, prompt, 0
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt = before

        self._shadow = shadow
        self.hf.__dict__["generate"] = shadow


def _prompt_of(args: tuple, kwargs: dict) -> tuple[int, Tensor | None]:
    """Return padded width and 2-D mask of the prompt that generate is given."""
    given = [args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    source = next((x for x in given if isinstance(x, Tensor) and x.shape[1] > 0), None)
    mask = kwargs.get("attention_mask")
    width = 1 if source is None else int(source.shape[1])  # without any input generate starts from one BOS
    return width, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _decoder_prompt(hf: Any, kwargs: dict) -> tuple[int, Tensor | None]:
    """Return width and mask of what generate starts an encoder-decoder's decoder from: its start token, or more."""
    ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    if not isinstance(ids, Tensor):
        return 1, None
    start = getattr(hf.generation_config, "decoder_start_token_id", None)
    added = 0 if start is None or bool((ids[:, 0] == start).all()) else 1  # generate puts it in front
    mask = torch.nn.functional.pad(mask, (added, 0), value=1) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return int(ids.shape[1]) + added, mask
