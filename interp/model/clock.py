"""Which columns of the text a forward pass is working on, in plain calls and inside generate."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from interp.model.forward import parameters_of


class Clock:
    """Where the q columns of one forward pass stand in their rows; tensors are made when they are first asked for.

    `past` columns lie before this pass; `columns` [q] count the padded row from 0, with or without a cache. `mask`
    [b, q] tells real tokens from pads. `special` [b, q] is by token id (BOS, EOS, pad, ...) and all False where ids are
    unknown (inputs_embeds). `positions` [b, q] count real tokens from the first one of the row and are -1 on pads.
    `ordinary` [b, q] is mask without special, None where all are known to be so without looking. `prompt_width` is the
    padded width of the prompt given to generate, None outside of it: the first new token is predicted from column
    prompt_width - 1. `generation` numbers the calls of generate, None outside of one.
    """

    def __init__(self, past: int, shape: tuple[int, int], device: torch.device, source: "_Source"):
        self.past, self.shape, self.device = past, shape, device
        self.prompt_width, self.generation = source.prompt_width, source.generation
        self.memo: dict[Any, Any] = {}  # what several edits of a pass share
        self._source = source
        self._elsewhere: dict[torch.device, Clock] = {}

    @property
    def end(self) -> int:
        """The column after the last one of this pass; known without asking a device."""
        return self.past + self.shape[1]

    @property
    def all_real(self) -> bool:
        """Whether it is known without asking a device that no column of this pass is a pad."""
        if self.prompt_width is not None and self.past >= self.prompt_width:
            return True  # generate writes no pads that count
        return self._source.mask is None and self._source.prompt is None

    @cached_property
    def columns(self) -> Int[Tensor, " q"]:
        return torch.arange(self.past, self.end, device=self.device)

    @cached_property
    def _real(self) -> Bool[Tensor, "b t"]:
        source, (rows, q) = self._source, self.shape
        return full_mask(source.mask, source.prompt, rows, self.past, q, self.device)

    @cached_property
    def mask(self) -> Bool[Tensor, "b q"]:
        if self.all_real:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        return self._real[:, self.past :]

    @cached_property
    def special(self) -> Bool[Tensor, "b q"]:
        found = self._found_special()
        return torch.zeros(self.shape, dtype=torch.bool, device=self.device) if found is None else found

    @cached_property
    def positions(self) -> Int[Tensor, "b q"]:
        real = self._real
        return torch.where(real, real.long().cumsum(1) - 1, -1)[:, self.past :]

    @cached_property
    def ordinary(self) -> Bool[Tensor, "b q"] | None:
        found = self._found_special()
        if found is None:
            return None if self.all_real else self.mask
        return ~found if self.all_real else self.mask & ~found

    def _found_special(self) -> Tensor | None:
        ids, special = self._source.ids, self._source.special
        if ids is None or not special:
            return None
        ids = ids.to(self.device)
        # few ids and small batches: comparing with each is a third of the time of isin
        found = ids == special[0]
        for one in special[1:SHORT]:
            found = found | (ids == one)
        return found if len(special) <= SHORT else found | torch.isin(ids, self._source.rest(self.device))

    def to(self, device: torch.device | str) -> "Clock":
        """Return the clock with its tensors on `device`, the same one at every call."""
        device = torch.device(device)
        if self.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Clock(self.past, self.shape, device, self._source)
        return self._elsewhere[device]


@dataclass(kw_only=True)
class _Source:
    """What a forward was given that its clock is read from."""

    ids: Tensor | None  # None where it was given embeddings
    mask: Any
    prompt: Tensor | None  # the 2-D mask of the prompt
    prompt_width: int | None
    generation: int | None
    special: list[int]

    def rest(self, device: torch.device) -> Tensor:
        """Return the special ids beyond the first few."""
        return _ids_on(tuple(self.special[SHORT:]), device)


SHORT = 4


@lru_cache(maxsize=64)
def _ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, device=device)


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


_unedited: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose edits pause


@contextmanager
def unedited(hf: nn.Module) -> Iterator[None]:
    """Pause every edit (steering too) of a Hugging Face model: forwards inside are those of the model itself."""
    nested = hf in _unedited
    _unedited.add(hf)
    try:
        yield
    finally:
        if not nested:
            _unedited.discard(hf)


@dataclass
class _Prompt:
    """What generate was given to continue."""

    width: int | None  # None: it is what its first forward gets
    mask: Tensor | None
    number: int


_numbers = count(1)


class Watch:
    """Note what every outermost forward through `roots` works on, while attached: its shape, and its clock.

    `roots` are the nested modules whose call carries the token ids: from the causal LM down to the owner of the blocks,
    so that calling `base_model` directly works too; only the outermost call of a nest is read. Without `special_ids`
    only the shape is noted, which costs next to nothing. With `prompts=True` the model's generate is shadowed by an
    instance attribute that notes the prompt (`decoder`: the decoder's own), and restored by `detach`; so are those of
    a TransformerBridge, whose loops of their own begin with the whole prompt.
    """

    def __init__(
        self,
        hf: nn.Module,
        roots: list[nn.Module],
        special_ids: frozenset[int] | None = None,
        on_start: Callable | None = None,
        decoder: bool = False,
        bridge: Any = None,
    ):
        self.hf: Any = hf
        self.bridge = bridge
        self.roots = roots
        self.special_ids = None if special_ids is None else sorted(special_ids)
        self.on_start = on_start
        self.decoder = decoder
        self.clock: Clock | None = None
        self.shape: tuple[int, int] | None = None  # rows and columns of the pass
        self.paused = False  # whether the forward that runs is to be left unedited
        self._depth = 0
        self._prompt: _Prompt | None = None
        self._fed = 0  # columns of this generate so far: the clock of a cache that does not count
        self._handles: list[Any] = []
        self._shadows: list[tuple[Any, str, Callable, Callable | None]] = []  # owner, method, ours, one before ours

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
        if not prompts:
            return
        if hasattr(self.hf, "generate"):
            self._shadow(self.hf, "generate", self._given_prompt)
        for name in ("generate", "generate_stream"):
            if self.bridge is not None and hasattr(self.bridge, name):
                self._shadow(self.bridge, name, lambda args, kwargs: _Prompt(None, None, next(_numbers)))

    def detach(self) -> None:
        """Remove the hooks, and the shadows of generate."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for owner, name, ours, former in self._shadows:
            if owner.__dict__.get(name) is ours:
                del owner.__dict__[name]
                if former is not None:
                    owner.__dict__[name] = former
        self._shadows.clear()

    def _starter(self, names: tuple[str, ...]) -> Callable:
        def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._depth += 1
            if self._depth > 1:
                return
            quiet = self.quiet
            self.paused = quiet or self.hf in _unedited
            if quiet:
                return
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
        cache = given.get("past_key_values", given.get("cache_params"))
        past = cache_length(cache)
        if past is None:
            if self._prompt is None:
                raise TypeError(f"a {type(cache).__name__} without a length can be followed only inside generate")
            past = self._fed
        self._fed = past + q
        prompt = self._prompt
        if prompt is not None and prompt.width is None:
            prompt.width = past + q
        clock_source = _Source(
            ids=source if by_id else None,
            mask=given.get("attention_mask"),
            prompt=None if prompt is None else prompt.mask,
            prompt_width=None if prompt is None else prompt.width,
            generation=None if prompt is None else prompt.number,
            special=self.special_ids or [],
        )
        return Clock(past, (rows, q), source.device, clock_source)

    def _given_prompt(self, args: tuple, kwargs: dict) -> _Prompt:
        width, mask = _decoder_prompt(self.hf, kwargs) if self.decoder else _prompt_of(args, kwargs)
        return _Prompt(width, mask, next(_numbers))

    def _shadow(self, owner: Any, name: str, prompt: Callable[[tuple, dict], _Prompt]) -> None:
        former, method = owner.__dict__.get(name), getattr(owner, name)

        @contextmanager
        def noted(args: tuple, kwargs: dict) -> Iterator[None]:
            before, self._prompt, self._fed = self._prompt, prompt(args, kwargs), 0
            try:
                yield
            finally:
                self._prompt = before

        def ours(*args: Any, **kwargs: Any) -> Any:
            with noted(args, kwargs):
                return method(*args, **kwargs)

        def ours_in_steps(*args: Any, **kwargs: Any) -> Any:
            with noted(args, kwargs):
                yield from method(*args, **kwargs)

        shadow = ours_in_steps if name == "generate_stream" else ours
        self._shadows.append((owner, name, shadow, former))
        owner.__dict__[name] = shadow


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
