"""Sources of activation batches: arrays, stores, iterables; each a feed that says where it is and can go back there."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from sae.extras import MissingError
from sae.io import FormatError, load_tensors

__all__ = [
    "Counted",
    "Feed",
    "Lookahead",
    "Opened",
    "Shuffled",
    "Store",
    "count",
    "held_out_mask",
    "load_array",
    "open_source",
    "rebatched",
]


def load_array(source: "Tensor | np.ndarray | str | Path") -> Shaped[Tensor, "tok *d_in"]:
    """Return activations [tok, d_in] or [tok, n_sites, d] from a tensor, an array, or a file that holds one of them.

    Files are .npy, or .safetensors with a single such tensor.

    Raises MissingError for an absent file, FormatError for a file that is something else, ValueError for rows that are
    not there or not finite.
    """
    if isinstance(source, str | Path):
        rows = _load_file(Path(source))
    else:
        rows = torch.from_numpy(source) if isinstance(source, np.ndarray) else source
    if rows.ndim not in (2, 3) or 0 in rows.shape:
        raise ValueError(f"activations are rows [tok, d_in]; given: shape {tuple(rows.shape)}")
    if not rows.is_floating_point():
        raise ValueError(f"activations are floating-point numbers; given: {rows.dtype}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the activations hold nan or infinity; drop those rows first")
    return rows.detach()


def held_out_mask(n_rows: int, *, share: float = 0.05, stripe: int = 256) -> Bool[Tensor, " tok"]:
    """Return which rows are kept out of training: stripes of neighbouring rows, spread evenly, at most 65,536 rows.

    Neighbours mostly belong to one document, so that stripes hold what training has not seen; single rows would not.
    """
    count = max(1, min(65_536, int(n_rows * share)) // stripe)
    mask = torch.zeros(n_rows, dtype=torch.bool)
    if n_rows >= stripe / share:
        for begin in torch.linspace(0, n_rows - stripe, count).long().tolist():
            mask[begin : begin + stripe] = True
    return mask


@runtime_checkable
class Feed(Protocol):
    """Batches that can say where they are, in JSON, and go on from there."""

    def __iter__(self) -> Iterator[Any]:
        """Yield batches from the current position on."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the position behind the last batch handed out."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        ...


@runtime_checkable
class Store(Protocol):
    """A source of rows at named hook points: activations on disk, or a model that makes them."""

    @property
    def hooks(self) -> list[str]:
        """Canonical names of the hook points."""
        ...

    def name(self, hook: str) -> str:
        """Return the canonical name of a hook point. Raises LookupError or ValueError for one that it has not."""
        ...

    def batches(self, batch_size: int, hook: Any = None, *, seed: int = 0) -> Feed:
        """Return batches [batch, d] of one hook point, or {name: [batch, d]} of several."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what the source is, JSON-able."""
        ...


class Shuffled:
    """Batches of an array without end: each epoch a fresh order of all rows, running over the seam of two epochs.

    The order of an epoch follows from (seed, epoch) alone, so that a position is a number of rows.
    """

    def __init__(self, rows: Shaped[Tensor, "tok d_in"], batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._position = 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def state(self) -> dict[str, Any]:
        """Return the rows handed out."""
        return {"rows": self._position, "seed": self.seed, "n_rows": len(self.rows)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position. Raises ValueError for that of another order."""
        if (state.get("seed"), state.get("n_rows")) != (self.seed, len(self.rows)):
            raise ValueError(f"the position is of other rows or another seed: {dict(state)}, here {self.state()}")
        self._position = int(state["rows"])

    def __iter__(self) -> Iterator[Shaped[Tensor, "batch d_in"]]:
        while True:
            picks, wanted = [], self.batch_size
            while wanted:
                epoch, row = divmod(self._position + self.batch_size - wanted, len(self.rows))
                picks.append(self._epoch(epoch)[row : row + wanted])
                wanted -= len(picks[-1])
            self._position += self.batch_size
            yield self.rows[torch.cat(picks).to(self.rows.device)]

    def _epoch(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            # not the stream that draws the weights
            generator = torch.Generator().manual_seed((self.seed + 0x5AE) * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator))
        return self._order[1]


class Counted:
    """Any iterable as a feed: its position is a number of batches, and to go there is to read up to it again."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self._count = iter(batches), 0

    def state(self) -> dict[str, Any]:
        """Return the batches handed out."""
        return {"batches": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position, by reading up to it. Raises ValueError for one that lies behind, or past the end."""
        if state["batches"] < self._count:
            raise ValueError("an iterable is read forwards only; give the source afresh")
        while self._count < state["batches"]:
            if next(self._batches, None) is None:
                raise ValueError(f"the source ended after {self._count} batches, and was at {state['batches']} before")
            self._count += 1

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._count += 1
            yield batch


class Lookahead:
    """A feed whose next batches can be looked at before they are handed out."""

    def __init__(self, feed: Feed) -> None:
        self._feed, self._at = feed, feed.state()
        self._held: deque[tuple[Any, dict[str, Any]]] = deque()
        self._rest = iter(feed)

    def peek(self, tokens: int) -> list[Any]:
        """Return the next batches, as many as hold that many tokens, fewer where the feed ends; they stay to come."""
        while sum(count(batch) for batch, _ in self._held) < tokens:
            batch = next(self._rest, None)
            if batch is None:
                break
            self._held.append((batch, self._feed.state()))
        return [batch for batch, _ in self._held]

    def state(self) -> dict[str, Any]:
        """Return the position behind the last batch handed out."""
        return self._at

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        states = [at for _, at in self._held]
        if dict(state) in states:
            for _ in range(states.index(dict(state)) + 1):
                self._held.popleft()
        else:
            self._held.clear()
            self._feed.restore(state)
            self._rest = iter(self._feed)
        self._at = dict(state)

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self._held:
                batch, self._at = self._held.popleft()
            else:
                batch = next(self._rest, None)
                if batch is None:
                    return
                self._at = self._feed.state()
            yield batch


def count(batch: Any) -> int:
    """Return the tokens of a batch: a tensor, a pair of them, or tensors by hook point."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)


def rebatched(batches: Iterable[Any], batch_size: int) -> Iterator[Any]:
    """Yield the rows of an iterable, in order, in batches of one size; a rest at the end stays out.

    Batches are [tok, d] or [tok, n_sites, d], or pairs of input and target. An iterable that can be read again (a list,
    a loader; not a generator) is, as often as asked for.
    """
    held: list[list[Tensor]] = []  # for each part of a batch (one, or input and target) what is not handed out yet
    count = 0
    while True:
        seen = 0
        for batch in batches:
            parts: list[Tensor] = list(batch) if isinstance(batch, tuple | list) else [batch]
            if any(part.ndim not in (2, 3) or len(part) != len(parts[0]) for part in parts):
                shapes = " and ".join(str(tuple(part.shape)) for part in parts)
                raise ValueError(f"a batch is [tok, d_in], or a pair of equally many rows; given: shape {shapes}")
            held = [[*old, new] for old, new in zip(held or [[]] * len(parts), parts, strict=True)]
            count, seen = count + len(parts[0]), seen + len(parts[0])
            if count >= batch_size:
                whole = [torch.cat(rows) for rows in held]
                for start in range(0, count - batch_size + 1, batch_size):
                    cut = [rows[start : start + batch_size] for rows in whole]
                    yield tuple(cut) if len(cut) > 1 else cut[0]
                count %= batch_size
                held = [[rows[len(rows) - count :]] for rows in whole]
        if seen == 0 or iter(batches) is batches:
            return


def _load_file(path: Path) -> Tensor:
    if path.suffix == ".safetensors":
        tables = [t for t in load_tensors(path)[0].values() if t.ndim in (2, 3)]
        if len(tables) != 1:
            raise FormatError(f"{path} holds {len(tables)} tables; a source of activations holds exactly one")
        return tables[0]
    if path.suffix != ".npy":
        raise ValueError(f"{path} is neither .npy nor .safetensors: other files are not read as activations")
    if not path.is_file():
        raise MissingError(f"there is no file {path}")
    try:
        array: Any = np.load(path, allow_pickle=False, mmap_mode="r")
        return torch.from_numpy(np.array(array))
    except (ValueError, TypeError, EOFError, OSError, SyntaxError, MemoryError) as error:
        raise FormatError(f"{path} is not a sound .npy file: {error}") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A source, ready to be read."""

    feed: Lookahead
    held_out: Tensor | None
    """Rows of an array that are kept out of the feed."""
    facts: dict[str, Any]
    """What makes two sources the same, as far as it can be known."""
    metadata: dict[str, Any]
    """What an SAE should remember of where it belongs."""
    names: dict[str, str] = field(default_factory=dict)
    """Canonical names of the hook points, by how they were asked for."""


def open_source(
    source: Any, batch_size: int, seed: int, hooks: Sequence[str], device: str | torch.device | None
) -> Opened:
    """Return the feed of a source: an array or file, a store, or an iterable.

    Raises ValueError, MissingError or FormatError for what cannot be read.
    """
    if isinstance(source, Tensor | np.ndarray | str | Path):
        if hooks:
            raise ValueError(f"an array has no hook points; leave hook out ({', '.join(hooks)} given)")
        return _open_array(load_array(source), batch_size, seed, device)
    if isinstance(source, Store):
        names = list(dict.fromkeys(hooks))
        feed = source.batches(batch_size, names or None, seed=seed)
        canonical = {name: source.name(name) for name in names}
        about = source.describe()
        facts = {name: about[name] for name in ("fingerprint", "model", "rows", "dataset") if name in about}
        model = about.get("model")
        named = {"model_name": model["name"]} if isinstance(model, Mapping) and "name" in model else {}
        if not names:
            named["hook_name"] = source.hooks[0]
        return Opened(
            feed=Lookahead(_Renamed(feed, names)), held_out=None, facts=facts, metadata=named, names=canonical
        )
    if hooks:
        raise ValueError(f"only a store has hook points; leave hook out ({', '.join(hooks)} given)")
    feed = source if isinstance(source, Feed) else Counted(rebatched(source, batch_size))
    return Opened(feed=Lookahead(feed), held_out=None, facts={}, metadata={})


def _open_array(rows: Tensor, batch_size: int, seed: int, device: str | torch.device | None) -> Opened:
    held = held_out_mask(len(rows))
    digest = hashlib.sha256(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
    facts = {
        "tokens": len(rows),
        "held_out": int(held.sum()),
        "dtype": str(rows.dtype).removeprefix("torch."),
        "sha256": digest,
    }
    rows, held = rows.to(device=device), held.to(rows.device if device is None else device)
    feed = Shuffled(rows[~held], batch_size, seed)
    kept = rows[held] if bool(held.any()) else None
    return Opened(feed=Lookahead(feed), held_out=kept, facts=facts, metadata={})


class _Renamed:
    """A store's batches under the names that they were asked for by, whatever the store calls them."""

    def __init__(self, feed: Feed, names: list[str]) -> None:
        self._feed, self._names = feed, names

    def state(self) -> dict[str, Any]:
        return self._feed.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._feed.restore(state)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._feed:
            if isinstance(batch, Mapping):
                yield dict(zip(self._names, batch.values(), strict=True))
            else:
                yield batch
