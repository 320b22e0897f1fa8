"""A store of activations on disk, read where it lies: rows by hook point, by document, by sequence, in batches."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model.hooks import canonical_name, unknown_hook
from interp.store.ledger import MANIFEST, PLAN, SETTINGS, ShardRecord, StoreError, journalled, read_sealed
from interp.store.plan import read_windows
from interp.store.shards import map_shard
from interp.store.shuffle import Batches
from interp.store.writer import DTYPES, STATS
from sae.extras import MissingError


@dataclass(frozen=True)
class HookStats:
    """What a store knows of one hook point over all rows; the covariance only where it was asked for (n - 1)."""

    rows: int
    mean: Float[Tensor, " d"]  # float64
    median_norm: float
    mean_norm: float
    covariance: Float[Tensor, "d d"] | None


@dataclass(frozen=True)
class TextWindow:
    """One window of text as the model read it, and which rows of the store come from it.

    `token_ids` and `documents` (-1: a BOS that several documents share) have an entry a token, `rows` of them became
    rows. `text` is None where the store has no tokenizer.
    """

    index: int
    rows: range
    token_ids: Int[Tensor, " t"]
    documents: Int[Tensor, " t"]
    text: str | None


class Column:
    """One column of a store over all shards: values of a hook point [rows, d], or a number a row.

    `column[i]`, `column[a:b]` and `column[rows]` (a list, array or tensor of row numbers) give tensors. A slice within
    one shard is a view of the file, mapped: nothing is copied, and writing into it never reaches the file.
    """

    def __init__(self, store: "ActivationStore", name: str, part: int | None = None):
        self._store, self._name, self._part = store, name, part

    def __len__(self) -> int:
        return len(self._store)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and width for a hook point."""
        return (len(self), *self._shard(0).shape[1:]) if self._store.shards else (0,)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self._shard(0).dtype

    def _shard(self, number: int) -> Tensor:
        found = self._store.shard(number)[self._name]
        return found if self._part is None else found[:, self._part]

    def shards(self) -> list[Tensor]:
        """Return the column shard by shard, mapped."""
        return [self._shard(i) for i in range(len(self._store.shards))]

    def __getitem__(self, key: int | slice | range | Sequence[int] | np.ndarray | Tensor) -> Tensor:
        n = len(self)
        if isinstance(key, int):
            if not -n <= key < n:
                raise IndexError(f"row {key} of {n:,}")
            return self._rows(torch.tensor([key % n]))[0]
        if isinstance(key, range):
            key = slice(key.start, key.stop, key.step) if key.step > 0 and key.start >= 0 else list(key)
        if isinstance(key, slice):
            start, stop, step = key.indices(n)
            if step > 0:
                return self._between(start, stop)[::step]
            key = list(range(start, stop, step))
        rows = torch.as_tensor(key, dtype=torch.long if isinstance(key, list) and not key else None)
        if rows.dtype == torch.bool:
            if len(rows) != n:
                raise IndexError(f"a mask of {len(rows):,} for {n:,} rows")
            rows = rows.nonzero().squeeze(1)
        if rows.numel() and not (-n <= int(rows.min()) and int(rows.max()) < n):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {n:,}")
        return self._rows(rows.long() % max(n, 1))

    def _between(self, start: int, stop: int) -> Tensor:
        firsts = self._store.firsts
        first, last = (int(np.searchsorted(firsts, at, side="right")) - 1 for at in (start, max(start, stop - 1)))
        parts = [
            self._shard(i)[max(0, start - firsts[i]) : max(0, stop - firsts[i])]
            for i in range(min(first, len(firsts) - 2), min(last, len(firsts) - 2) + 1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, rows: Int[Tensor, " n"]) -> Tensor:
        out = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        owner = np.searchsorted(self._store.firsts, rows.numpy(), side="right") - 1
        for i in np.unique(owner).tolist():
            mine = torch.from_numpy(owner == i)
            out[mine] = self._shard(i)[rows[mine] - int(self._store.firsts[i])]
        return out


class ActivationStore:
    """Activations on disk: `store["resid_post.2"]` are the rows of a hook point, `store.batches(4096)` shuffled rows.

    `token_ids`, `positions`, `documents` and `norms(hook)` have one entry a row. An unfinished store gives the rows of
    its finished shards. Nothing is read before it is asked for, and shards are mapped, not loaded.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not (self.path / SETTINGS).is_file():
            raise MissingError(f"{self.path} holds no store (no {SETTINGS}); `interp harvest` makes one")
        self.settings: dict[str, Any] = read_sealed(self.path / SETTINGS)
        self.complete = (self.path / MANIFEST).exists()
        self._manifest: dict[str, Any] = read_sealed(self.path / MANIFEST) if self.complete else {}
        found = [ShardRecord.read(r) for r in self._manifest["acts"]] if self.complete else None
        self.shards = list(journalled(self.path).values()) if found is None else found
        self.firsts = np.concatenate([[0], np.cumsum([r.rows for r in self.shards], dtype=np.int64)]).astype(np.int64)
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self.token_ids, self.positions, self.documents = (
            Column(self, name) for name in ("token_ids", "positions", "documents")
        )

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return f"ActivationStore({self.path}, {len(self):,} rows, {', '.join(self.hooks)}, {self.dtype}{state})"

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def hooks(self) -> list[str]:
        """Canonical names of the hook points."""
        return [h["name"] for h in self.settings["hooks"]]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored values."""
        return DTYPES[self.settings["dtype"]]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name settings and content; raises StoreError for an unfinished store."""
        if not self.complete:
            raise StoreError(f"{self.path} is unfinished: run the harvest again, then it has a fingerprint")
        return hashlib.sha256(json.dumps(self._manifest, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def n_sequences(self) -> int:
        """Windows that the rows come from."""
        return sum(b - a for a, b in (r.sequences for r in self.shards))

    @property
    def n_documents(self) -> int:
        """One more than the highest document that a row is from."""
        return max((r.documents[1] for r in self.shards), default=-1) + 1

    def name(self, hook: str) -> str:
        """Return the canonical name of a hook point of the store; raises HookPointError naming the closest."""
        layers = self.settings["model"].get("n_layers")
        full = hook if hook in self.hooks else canonical_name(hook, layers)
        if full not in self.hooks:
            raise unknown_hook(f"the store {self.path}", hook, self.hooks)
        return full

    def __getitem__(self, hook: str) -> Column:
        return Column(self, self.name(hook))

    def norms(self, hook: str) -> Column:
        """Return the Euclidean norm of each row at a hook point (float32)."""
        return Column(self, "norms", self.hooks.index(self.name(hook)))

    def shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of one shard, mapped; raises StoreError where the file is missing or damaged."""
        if number not in self._mapped:
            record = self.shards[number]
            try:
                self._mapped[number] = map_shard(self.path / record.file, record.bytes)[0]
            except (ValueError, FileNotFoundError) as error:
                raise StoreError(f"{error}; mend it with: interp verify {self.path} --repair") from error
        return self._mapped[number]

    def stats(self, hook: str) -> HookStats:
        """Return mean, norms and, where asked for, covariance; raises StoreError for an unfinished store."""
        name = self.name(hook)
        if not self.complete:
            raise StoreError(f"{self.path} is unfinished: its statistics come with the last shard")
        held, _ = map_shard(self.path / STATS)
        median, mean = held[f"norm/{name}"].tolist()
        return HookStats(len(self), held[f"mean/{name}"], median, mean, held.get(f"covariance/{name}"))

    def where(self, document: int) -> Int[Tensor, " rows"]:
        """Return the numbers of the rows that come from a document (counted as in the source)."""
        found = []
        for i, record in enumerate(self.shards):
            if record.documents[0] <= document <= record.documents[1]:
                found.append((self.shard(i)["documents"] == document).nonzero().squeeze(1) + int(self.firsts[i]))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)

    def batches(
        self,
        batch_size: int,
        hook: str | Sequence[str] | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        dtype: torch.dtype | None = None,
        buffer_mb: float | int = 256,
        **options: Any,
    ) -> Batches:
        """Return batches of rows: a true shuffle over the whole store in bounded memory, resumable at a row number.

        [batch, d] of the one `hook` (the store's only one unless given), or {name: [batch, d]} of several. See Batches
        for `state`, `restore` and the other options. Raises ValueError where the hook point must be named.
        """
        if hook is None and len(self.hooks) > 1:
            raise ValueError(f"{self.path} holds several hook points; name one with hook=: {', '.join(self.hooks)}")
        if not len(self):
            raise StoreError(f"{self.path} has no finished rows yet; run the harvest again")
        names = [self.name(h) for h in ([hook] if isinstance(hook, str) else hook or self.hooks)]
        tables = {name: self[name].shards() for name in names}
        shards: Any = tables if hook is not None and not isinstance(hook, str) else tables[names[0]]
        given = {"shuffle": shuffle, "seed": seed, "epochs": epochs, "dtype": dtype, "buffer_mb": float(buffer_mb)}
        return Batches(shards, batch_size, **given, **options)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that made the tokens, from the store's own copy; None where it has none."""
        folder = self.path / "tokenizer"
        if not any(folder.glob("*")):
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    def sequences(self, text: bool = True) -> Iterator[TextWindow]:
        """Yield the windows of the store in order, each with its tokens, its text and its rows."""
        tokenizer = self.tokenizer if text else None
        for i, record in enumerate(self.shards):
            offsets = (self.shard(i)["offsets"] + int(self.firsts[i])).tolist()
            windows = read_windows(self.path, record.shard)
            for j, (window, a, b) in enumerate(zip(windows, offsets[:-1], offsets[1:], strict=True)):
                words = tokenizer.decode(window.ids.tolist()) if tokenizer is not None else None
                ids, documents = torch.from_numpy(window.ids), torch.from_numpy(window.documents)
                yield TextWindow(record.sequences[0] + j, range(a, b), ids, documents, words)

    def describe(self) -> dict[str, Any]:
        """Return what the store is, for people: what `interp info` prints."""
        settings = self.settings
        plan = read_sealed(self.path / PLAN) if (self.path / PLAN).exists() else None
        found: dict[str, Any] = {
            "complete": self.complete,
            "shards": len(self.shards),
            "shards_planned": None if plan is None else len(plan["files"]),
            "rows": len(self),
            "outliers_removed": plan["rows"] - len(self) if plan is not None and self.complete else None,
            "sequences": self.n_sequences,
            "documents": self.n_documents,
            "bytes": sum(r.bytes for r in self.shards),
            "hooks": {h["name"]: {"d": h["d"]} for h in settings["hooks"]},
            **{k: settings[k] for k in ("dtype", "model", "ctx", "batch_size", "packing", "exclude", "machine")},
        }
        if self.complete:
            found["fingerprint"] = self.fingerprint
            for hook in self.hooks:
                stats = self.stats(hook)
                found["hooks"][hook] |= {"median_norm": stats.median_norm, "mean_norm": stats.mean_norm}
        return found


def open_store(path: str | os.PathLike) -> ActivationStore:
    """Return the store in a folder; raises MissingError where there is none, StoreError where it is damaged."""
    return ActivationStore(path)
