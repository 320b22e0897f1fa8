"""Hidden states that vLLM extracted, one safetensors file a request, taken into a store."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.model.tokens import Packed, Window, collate, pad_id, special_ids_of
from interp.store.harvest import begin, fill, writing
from interp.store.job import tokenizer_fingerprint
from interp.store.plan import Cut
from interp.store.reader import ActivationStore, open_store
from interp.store.shards import map_shard
from interp.store.writer import DTYPES, Rows, Sink
from sae.extras import MissingError
from sae.io import FormatError


def store_vllm(
    folder: str | os.PathLike,
    hooks: Sequence[str],
    *,
    out: str | os.PathLike,
    model: str,
    tokenizer: Any = None,
    dtype: str | None = None,
    shard_mb: float | int = 64,
    say: Callable[[str], None] | None = None,
) -> ActivationStore:
    """Take vLLM's extracted hidden states into a store, and return it.

    Each `*.safetensors` in `folder`, by name, is one request and becomes one document: `hidden_states`
    [tokens, layers, hidden] and `token_ids` [tokens]. `hooks` names the hook point of each layer on that axis, `model`
    the model that ran. Rows of the tokenizer's special tokens are left out. Interrupted, the same call goes on.
    Raises MissingError for a folder without such files, FormatError for a file of another kind, StoreError as
    harvest_acts does.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise MissingError(f"there is no .safetensors file in {folder}")
    first = _request(files[0], len(hooks))
    stored = dtype or str(first[0].dtype).removeprefix("torch.")
    if stored not in DTYPES:
        raise ValueError(f"dtype is {stored!r}; a store holds one of: {', '.join(DTYPES)}")
    d = int(first[0].shape[2])
    mean = max(1, sum(len(_request(f, len(hooks))[1]) for f in files[:32]) // len(files[:32]))
    per_shard = max(1, round(shard_mb * 2**20 / (d * len(hooks) * DTYPES[stored].itemsize * mean)))
    settings = {
        "format": 1,
        "model": {"name": model, "class": None, "fingerprint": None, "backend": "vllm", "dtype": stored},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "machine": {},
        "hooks": [{"name": name, "kind": "vllm", "layer": i, "d": d} for i, name in enumerate(hooks)],
        "dtype": stored,
        "tokens": None,
        "ctx": None,
        "batch_size": 1,
        "batches_per_shard": per_shard,
        "packing": "documents",
        "exclude": ["pad", "special"],
        "covariance": False,
    }
    requests = _Requests(files, list(hooks), tokenizer, DTYPES[stored], per_shard)
    root = Path(out)
    with writing(root, 0, 1):
        begin(root, settings, tokenizer)
        log = {"model": model, "source": f"vllm:{folder}", "field": ""}
        fill(root, settings, requests.cut(), requests.ids(), requests, log, say=say or (lambda text: None))
    return open_store(root)


def _request(path: Path, layers: int) -> tuple[Tensor, Tensor]:
    """Return hidden states [tokens, layers, hidden] and token ids of one file, mapped."""
    held, _ = map_shard(path)
    states, ids = held.get("hidden_states"), held.get("token_ids")
    if states is None or ids is None:
        raise FormatError(f"{path} holds {sorted(held)}; a request has hidden_states and token_ids")
    if states.ndim != 3 or states.shape[1] != layers or ids.shape != states.shape[:1]:
        raise FormatError(
            f"{path}: hidden_states {tuple(states.shape)} and token_ids {tuple(ids.shape)}; "
            f"wanted [tokens, {layers} layers, hidden] and [tokens]"
        )
    return states, ids


class _Requests:
    """The files as text, and as the maker of rows."""

    def __init__(self, files: list[Path], hooks: list[str], tokenizer: Any, dtype: torch.dtype, per_shard: int):
        self.files, self.hooks, self.dtype, self.per_shard = files, hooks, dtype, per_shard
        self.special = [] if tokenizer is None else sorted(special_ids_of(tokenizer))
        self.fill = pad_id(tokenizer)

    def ids(self) -> Iterator[list[int]]:
        """Yield the token ids of each request."""
        for path in self.files:
            yield _request(path, len(self.hooks))[1].tolist()

    def cut(self) -> Cut:
        """Return how requests become windows: one each."""
        return Cut(self._windows, self._collate, self._keep, 1, self.per_shard, None)

    def _windows(self, documents: Iterable[Sequence[int]]) -> Iterator[Window]:
        for number, ids in enumerate(documents):
            if not len(ids):
                continue
            yield Window(np.array(ids, dtype=np.int32), np.full(len(ids), number, dtype=np.int32))

    def _collate(self, rows: list[Window]) -> Packed:
        width = max(len(row.ids) for row in rows)
        return collate(rows, width, fill=self.fill, special_ids=self.special)

    def _keep(self, batch: Packed) -> Tensor:
        return batch.mask & ~batch.special

    def shard(self, number: int, windows: list[Window], writer: Sink, update: Callable[[int], Any], /) -> int:
        """Read the rows of a shard and hand them to the writer; returns how many."""
        kept = [~torch.isin(torch.from_numpy(w.ids), torch.tensor(self.special, dtype=torch.int32)) for w in windows]
        states: list[Tensor] = []
        for window, keep in zip(windows, kept, strict=True):
            found, ids = _request(self.files[int(window.documents[0])], len(self.hooks))
            if not torch.equal(ids.to(torch.int32), torch.from_numpy(window.ids)):
                raise FormatError(f"{self.files[int(window.documents[0])]} changed while it was read")
            states.append(found[keep].to(self.dtype))
            update(int(keep.sum()))
        together = torch.cat(states)
        if not bool(torch.isfinite(together).all()):
            raise FormatError(f"requests {number * self.per_shard} and on: hidden states hold nan or infinity")
        values = {hook: together[:, i].contiguous() for i, hook in enumerate(self.hooks)}
        norms = torch.stack([v.float().norm(dim=1) for v in values.values()], 1)
        ids, documents = (
            torch.cat([torch.from_numpy(getattr(w, part))[k] for w, k in zip(windows, kept, strict=True)])
            for part in ("ids", "documents")
        )
        positions = torch.cat([k.nonzero().squeeze(1) for k in kept])
        counts = torch.tensor([0, *(int(k.sum()) for k in kept)])
        first = number * self.per_shard
        writer.put(Rows(number, first, values, norms, ids, positions, documents, counts.cumsum(0)), lambda: None)
        return len(ids)
