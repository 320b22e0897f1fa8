"""Activations of a model on text as they are computed: shuffled batches for training, with no disk between."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.acts.rows import SAE_EXCLUDE
from interp.model.hooks import canonical_name, unknown_hook
from interp.model.loading import as_model
from interp.model.sources import read_source
from interp.store.ahead import Ahead, apart, can_copy
from interp.store.chunks import Loaded, Place, Producer, Stopped, read_already, shuffled
from interp.store.job import Job, describe, differences

__all__ = ["ActivationStream", "StreamBatches", "stream_acts"]

BUFFER_ROWS = 65_536
MIX_TOKENS = 1 << 20


def stream_acts(
    model: Any,
    dataset: str | Iterable[Any],
    hooks: str | Iterable[str],
    *,
    ctx: int | None = None,
    batch_size: int = 32,
    packing: str | None = None,
    exclude: Sequence[str] = SAE_EXCLUDE,
    dtype: torch.dtype | str | None = None,
    add_bos: bool = True,
    separate: bool = True,
    field: str = "text",
    buffer_rows: int = BUFFER_ROWS,
    mix_tokens: int = MIX_TOKENS,
    buffer_mb: float | int | None = None,
    prefetch: bool | None = None,
    progress: bool = False,
) -> "ActivationStream":
    """Return the activations of a text at hook points as a source of batches, computed when they are read.

    Text, windows, exclusions and values are those of `harvest_acts` with the same options: an epoch that is not
    shuffled is the store, bit for bit. Shuffling is in two steps, since text is clustered and tokens are cheap to hold:
    the windows of each `mix_tokens` tokens of text are shuffled, then computed in chunks of up to `buffer_rows` rows
    (and a batch), whose rows are shuffled. At most two chunks are in memory: the one that is read, and the one that is
    computed meanwhile in a thread. `buffer_mb` instead tells the memory of both together.

    `prefetch`: the thread runs a copy of the model's modules that shares its weights, so that the model can be used,
    and hooked, beside it. None: yes, but for a TransformerBridge and a dispatched or quantised model, which cannot be
    copied so. A data set that computes its documents does so in the thread.
    `progress` shows the rows handed out.

    Raises what `harvest_acts` raises for options and text, and ValueError for a prefetch that cannot be.
    """
    model = as_model(model)
    job = describe(
        model, hooks, tokens=None, dtype=dtype, ctx=ctx, batch_size=batch_size, packing=packing, exclude=exclude,
        add_bos=add_bos, separate=separate, shard_mb=1, covariance=False,
    )  # fmt: skip
    if buffer_mb is not None:
        width = sum(model.hook_point(hook).d for hook in job.hooks) * job.dtype.itemsize
        slots = job.settings["ctx"] * batch_size
        buffer_rows = int(buffer_mb * 1e6 / 2 / width) - 2 * slots  # a chunk's buffer is up to two batches larger
        if buffer_rows < 1:
            need = 6 * slots * width / 1e6
            raise ValueError(f"buffer_mb is {buffer_mb:g}; batches of {slots:,} tokens want about {need:,.0f} or more")
    if buffer_rows < 1 or mix_tokens < 1:
        raise ValueError(f"buffer_rows is {buffer_rows}, mix_tokens {mix_tokens}; both must be at least 1")
    if prefetch and not can_copy(model):
        raise ValueError(f"{model.name} ({model.backend}) cannot be copied for a thread; give prefetch=False, or None")
    if isinstance(dataset, str):
        read_source(dataset, field=field)  # what is not there is to be told now
    elif isinstance(dataset, Tensor | np.ndarray) or not isinstance(dataset, Iterable):
        raise TypeError(f"dataset is a {type(dataset).__name__}; give a source by name, or an iterable of documents")
    ahead = can_copy(model) if prefetch is None else prefetch
    # whole batches, so that those of an epoch in text order are a harvest's
    windows = batch_size * max(1, round(mix_tokens / job.settings["ctx"] / batch_size))
    return ActivationStream(
        job, dataset, field=field, buffer_rows=buffer_rows, mix_windows=windows, prefetch=ahead, progress=progress
    )


class ActivationStream:
    """A source of activations that computes them: `stream.batches(4096, "resid_post.2")`, as of a store.

    Each call of `batches` reads the text from its beginning; that of an iterator can be read once.
    """

    def __init__(
        self, job: Job, dataset: str | Iterable[Any], *, field: str, buffer_rows: int, mix_windows: int, prefetch: bool,
        progress: bool,
    ):  # fmt: skip
        self.job, self.dataset, self.field = job, dataset, field
        self.buffer_rows, self.mix_windows, self.prefetch, self.progress = buffer_rows, mix_windows, prefetch, progress
        self.once = not isinstance(dataset, str) and iter(dataset) is dataset
        self._taken = False

    def __repr__(self) -> str:
        return f"ActivationStream({self.job.model.name}, {self._source()}, {', '.join(self.hooks)}, {self.dtype})"

    @property
    def hooks(self) -> list[str]:
        """Canonical names of the hook points."""
        return list(self.job.hooks)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.job.dtype

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name model, tokenizer and all settings, but not the text."""
        return hashlib.sha256(json.dumps(self.same(), sort_keys=True).encode()).hexdigest()[:16]

    def same(self) -> dict[str, Any]:
        """Return the settings that rows and their order depend on."""
        names = ("tokenizer", "hooks", "dtype", "ctx", "batch_size", "packing", "add_bos", "separate", "exclude")
        settings = self.job.settings
        hooks = [hook["name"] for hook in settings["hooks"]]
        model = {name: settings["model"][name] for name in ("class", "fingerprint", "dtype")}
        sizes = {"buffer_rows": self.buffer_rows, "mix_windows": self.mix_windows}
        return {**{n: settings[n] for n in names}, "hooks": hooks, "model": model, **sizes}

    def describe(self) -> dict[str, Any]:
        """Return what the stream is, JSON-able: model, text, settings, fingerprint."""
        names = ("tokenizer", "dtype", "ctx", "batch_size", "packing", "add_bos", "separate", "exclude", "machine")
        return {
            "kind": "stream",
            "fingerprint": self.fingerprint,
            "model": self.job.settings["model"],
            "dataset": self._source(),
            "field": self.field,
            "hooks": {hook["name"]: {"d": hook["d"]} for hook in self.job.settings["hooks"]},
            **{name: self.job.settings[name] for name in names},
            "buffer_rows": self.buffer_rows,
            "mix_windows": self.mix_windows,
            "prefetch": self.prefetch,
        }

    def _source(self) -> str:
        return self.dataset if isinstance(self.dataset, str) else type(self.dataset).__name__

    def name(self, hook: str) -> str:
        """Return the canonical name of a hook point of the stream; raises HookPointError naming the closest."""
        full = hook if hook in self.hooks else self.job.model.aliases.get(hook, hook)
        full = canonical_name(full, self.job.model.n_layers) or full
        if full not in self.hooks:
            raise unknown_hook("the stream", hook, self.hooks)
        return full

    def documents(self) -> Iterator[Any]:
        """Return the documents from the first on; raises ValueError where they were read and cannot be read again."""
        if isinstance(self.dataset, str):
            return read_source(self.dataset, field=self.field)
        if self.once and self._taken:
            raise read_already()
        self._taken = True
        return iter(self.dataset)

    def batches(
        self,
        batch_size: int,
        hook: str | Sequence[str] | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        dtype: torch.dtype | None = None,
        drop_last: bool = True,
    ) -> "StreamBatches":
        """Return batches of rows, resumable: [batch, d] of the one `hook`, or {name: [batch, d]} of several.

        A batch is the caller's own memory, on the CPU, in the stream's dtype unless `dtype` is given. `epochs` None
        never ends, where the text can be read again. After the last epoch a rest smaller than a batch is left out
        unless `drop_last` is False.
        Raises ValueError where the hook point must be named, for sizes that make no sense, and for several epochs of an
        iterator.
        """
        if hook is None and len(self.hooks) > 1:
            raise ValueError(f"the stream has several hook points; name one with hook=: {', '.join(self.hooks)}")
        if batch_size < 1 or (epochs is not None and epochs < 1):
            raise ValueError(f"batch_size is {batch_size}, epochs {epochs}; they must be at least 1, and 1 or None")
        if self.once and epochs is not None and epochs > 1:
            raise ValueError(f"{epochs} epochs of an iterator, which can be read once; give something like a list")
        single = hook is None or isinstance(hook, str)
        names = [self.name(h) for h in ([hook] if isinstance(hook, str) else hook or self.hooks)]
        return StreamBatches(
            self, batch_size, names, single=single, shuffle=shuffle, seed=seed, epochs=1 if self.once else epochs,
            dtype=dtype or self.dtype, drop_last=drop_last,
        )  # fmt: skip


class StreamBatches:
    """Batches of a stream. Iterating again goes on where it was left; `state` and `restore` do so in another process.

    Windows of block b of an epoch are computed in the order `permute(.., (seed, epoch, b, 0))`, and rows of its chunk c
    come in the order `permute(.., (seed, epoch, b, 1 + c))`; batches run over the seams of chunks, blocks and epochs.
    `rows` tells how many were handed out.
    """

    def __init__(
        self, stream: ActivationStream, batch_size: int, names: list[str], *, single: bool, shuffle: bool, seed: int,
        epochs: int | None, dtype: torch.dtype, drop_last: bool,
    ) -> None:  # fmt: skip
        self.stream, self.batch_size, self.names = stream, batch_size, names
        self.shuffle, self.seed, self.dtype, self.drop_last = shuffle, seed, dtype, drop_last
        self.rows = 0
        self._at: tuple[Place | None, int] = (None, 0)  # chunk and row behind the last batch handed out
        self._single = single
        self._producer = Producer(
            stream.job, stream.documents, stream.mix_windows, stream.buffer_rows, seed=seed if shuffle else None,
            epochs=epochs, once=stream.once,
        )  # fmt: skip
        self._ahead: Ahead | None = None
        self._loaded: Loaded | None = None
        self._order = torch.zeros(0, dtype=torch.long)
        self._row = 0  # of the chunk that is loaded, or is to be loaded next
        self._filled, self._parts = 0, dict[str, Tensor]()  # a batch that is not full yet

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to go on behind the last batch handed out, whatever was computed ahead."""
        place, row = self._at
        at = None if place is None else {**asdict(place), "row": row}
        same = self.stream.same()
        return {"rows": self.rows, "seed": self.seed, "shuffle": self.shuffle, "at": at, "stream": same}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state: text in front of its chunk is read for its checksum and not tokenised.

        The batch size may be another one. The chunk is computed, once more, at the next batch.
        Raises ValueError for a state of another stream, another order, or another text.
        """
        place, row = self._checked(state)
        if self._ahead is not None:
            self._ahead.halt()
            self._ahead.join()
        if not self._holds(place):
            if place is None:
                self._producer.begin()
            else:
                self._producer.seek(place)
            for held in (self._loaded, self._ahead.loaded if self._ahead is not None else None):
                if held is not None:
                    held.release()
            self._loaded = self._ahead = None
        self._filled, self._parts = 0, {}
        self.rows, self._at, self._row = int(state["rows"]), (place, row), row

    def _holds(self, place: Place | None) -> bool:
        """Whether the chunk that is loaded begins at a place (None: at the beginning)."""
        if self._loaded is None:
            return False
        held = self._loaded.chunk.place
        return held == place or (place is None and (held.epoch, held.block, held.chunk) == (0, 0, 0))

    def _checked(self, state: Mapping[str, Any]) -> tuple[Place | None, int]:
        own = self.state()
        for name in own:
            if name not in state:
                raise ValueError(f"the state has no {name!r}; it holds: {', '.join(map(repr, state)) or 'nothing'}")
        for name in ("seed", "shuffle"):
            if state[name] != own[name]:
                raise ValueError(
                    f"the state has {name} {state[name]}, these batches {own[name]}: another order of rows"
                )
        found = differences(state["stream"], own["stream"])
        if found:
            raise ValueError(f"the state is of another stream: {'; '.join(found[:4])}")
        if state["at"] is None:
            return None, 0
        at = dict(state["at"])
        try:
            row = int(at.pop("row"))
            return Place(**at), row
        except (KeyError, TypeError) as error:
            raise ValueError(f"the state's place is not one of a stream: {state['at']}") from error

    def __iter__(self) -> Iterator[Any]:
        """Yield batches from the current position on."""
        if self.stream.prefetch:
            self._producer.computer.use(apart(self.stream.job))
        bar = _bar(self.rows) if self.stream.progress else None
        try:
            while (batch := self._next()) is not None:
                if bar is not None:
                    bar.update(self.rows - bar.n)
                yield batch
                del batch  # else it would live on beside the next one
        finally:
            self._halt()
            if bar is not None:
                bar.close()

    def _next(self) -> Any:
        """Return the next batch, None at the end. What was gathered of one is kept where an error stops it."""
        if not self._parts:
            job = self.stream.job
            widths = {name: job.model.hook_point(name).d for name in self.names}
            self._parts = {n: torch.empty(self.batch_size, d, dtype=self.dtype) for n, d in widths.items()}
        last = self._at
        while self._filled < self.batch_size:
            loaded = self._loaded or self._load()
            if loaded is None:
                break
            last = self._take(loaded)
        if not self._filled or (self.drop_last and self._filled < self.batch_size):
            return None
        parts = {name: part[: self._filled] for name, part in self._parts.items()}
        self.rows, self._at = self.rows + self._filled, last
        self._filled, self._parts = 0, {}
        return parts[self.names[0]] if self._single else parts

    def _take(self, loaded: Loaded) -> tuple[Place, int]:
        """Put rows of the chunk into the batch, as many as it wants; return the place behind them."""
        if self._row > len(self._order):
            raise ValueError(
                f"the state is at row {self._row:,} of a chunk of {len(self._order):,}: of another machine?"
            )
        picks = self._order[self._row : self._row + self.batch_size - self._filled]
        for name, part in self._parts.items():
            target = part[self._filled : self._filled + len(picks)]
            if self.dtype == self.stream.dtype:
                torch.index_select(loaded.values[name], 0, picks, out=target)
            else:
                target.copy_(loaded.values[name].index_select(0, picks))
        self._filled += len(picks)
        self._row += len(picks)
        place = (loaded.chunk.place, self._row)
        if self._row == len(self._order):
            loaded.release()
            self._loaded, self._row = None, 0
        return place

    def _load(self) -> Loaded | None:
        """Load the next chunk, and have the one behind it made meanwhile."""
        loaded = self._awaited() if self.stream.prefetch else self._producer.load(lambda: False)
        if loaded is None:
            return None
        if self.stream.prefetch:
            self._ahead = Ahead(self._producer)
        place, kept = loaded.chunk.place, loaded.kept
        key = (self.seed, place.epoch, place.block, 1 + place.chunk)
        self._order = kept[shuffled(len(kept), key)] if self.shuffle else kept
        self._loaded = loaded
        return loaded

    def _awaited(self) -> Loaded | None:
        """Return what the thread makes, starting it, or starting it again where it was stopped; raises its error."""
        while True:
            ahead = self._ahead = self._ahead or Ahead(self._producer)
            ahead.join()
            self._ahead = None
            if ahead.error is None:
                return ahead.loaded
            if not isinstance(ahead.error, Stopped):
                raise ahead.error

    def _halt(self) -> None:
        """Stop the thread; a chunk that it has finished is kept, one that it has begun will be begun again."""
        if self._ahead is not None:
            self._ahead.halt()


def _bar(done: int) -> Any:
    from tqdm import tqdm

    return tqdm(initial=done, desc="stream", unit="tok", unit_scale=True)
