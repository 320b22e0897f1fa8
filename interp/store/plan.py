"""The text of a store as windows of tokens on disk, cut ahead of the model for every writer."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from jaxtyping import Bool
from torch import Tensor

from interp.model.tokens import Packed, Window
from interp.store.ledger import PLAN, StoreError, read_sealed, write_sealed
from interp.store.shards import map_shard, write_shard
from sae.io import FormatError

POLL = 0.05  # seconds between two looks at what another writer has published


def token_file(shard: int) -> str:
    """Return the name of a file of windows below the store."""
    return f"tokens/{shard:08d}.safetensors"


@dataclass(frozen=True)
class Cut:
    """How text becomes windows: the maker of windows from documents, batches and shards of them, and where to stop."""

    windows: Callable[[Iterable[Any]], Iterator[Window]]
    collate: Callable[[list[Window]], Packed]
    keep: Callable[[Packed], Bool[Tensor, "b t"]]  # which tokens become rows, as far as ids and positions tell
    batch_size: int
    batches_per_shard: int
    tokens: int | None  # rows to stop after

    @property
    def per_shard(self) -> int:
        """Windows a shard."""
        return self.batch_size * self.batches_per_shard

    def shards(self, documents: Iterable[Any]) -> Iterator[tuple[list[Window], int]]:
        """Yield the windows of one shard after the other, and how many of their tokens become rows.

        The last window is cut behind the token that completes `tokens`.
        """
        left = self.tokens
        source = self.windows(documents)
        shard: list[Window] = []
        rows = 0
        while left is None or left > 0:
            batch = list(islice(source, self.batch_size))
            if not batch:
                break
            kept = self.keep(self.collate(batch))
            if left is not None:
                batch, kept = _ended(batch, kept, left)
                left -= int(kept.sum())
            rows += int(kept.sum())
            shard += batch
            if len(shard) == self.per_shard:
                yield shard, rows
                shard, rows = [], 0
        if shard:
            yield shard, rows


def _ended(batch: list[Window], kept: Tensor, left: int) -> tuple[list[Window], Tensor]:
    """Return a batch and its kept tokens up to the `left`-th of these."""
    flat = kept.flatten().long().cumsum(0)
    if int(flat[-1]) <= left:
        return batch, kept
    at = int((flat < left).sum())  # the token that completes the number
    row, column = divmod(at, kept.shape[1])
    last = Window(batch[row].ids[: column + 1], batch[row].documents[: column + 1])
    kept = kept[: row + 1].clone()
    kept[row, column + 1 :] = False
    return [*batch[:row], last], kept


class Text:
    """Documents passing by: how many, and a checksum of what they say."""

    def __init__(self, documents: Iterable[Any]):
        self._documents, self._digest, self.read = documents, xxhash.xxh3_128(), 0

    def __iter__(self) -> Iterator[Any]:
        for document in self._documents:
            self.note(document)
            yield document

    def note(self, document: Any) -> None:
        """Count one document."""
        text = isinstance(document, str)
        data = document.encode("utf-8", "surrogatepass") if text else np.asarray(document, np.int64).tobytes()
        self._digest.update((b"t" if text else b"i") + len(data).to_bytes(8, "little") + data)
        self.read += 1

    @property
    def checksum(self) -> str:
        """xxh3 (128 bits) over kind, length and content of each document."""
        return self._digest.hexdigest()


class Plan:
    """The windows of a store, by shard. One writer makes them, in a thread of its own; all read them.

    Used as a context: leaving it stops the thread. `seconds` is what tokenising and packing took here.
    """

    def __init__(self, root: Path, cut: Cut, documents: Iterable[Any]):
        self.root, self.cut, self.documents = root, cut, documents
        self.seconds = 0.0
        self._lock = FileLock(root / ".lock-plan", timeout=0)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._known: dict[str, Any] | None = None
        self._published = 0  # shards that our own thread has made

    def __enter__(self) -> "Plan":
        if (self.root / PLAN).exists():
            self.check_text()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._lock.is_locked:
            self._lock.release()

    @property
    def whole(self) -> dict[str, Any] | None:
        """What the finished plan says of itself (sequences, rows, text, files), None while it is being made."""
        if self._known is None and (self.root / PLAN).exists():
            self._known = read_sealed(self.root / PLAN)
        return self._known

    def check_text(self) -> None:
        """Raise StoreError where the documents are not those that the finished plan was made of."""
        plan = self.whole
        if plan is None:
            return
        text = Text(islice(self.documents, plan["text"]["documents"]))
        for _ in text:
            pass
        if text.checksum != plan["text"]["xxh3_128"]:
            raise StoreError(
                f"{self.root} was made from another text ({plan['text']['documents']:,} documents with checksum "
                f"{plan['text']['xxh3_128'][:12]}, given {text.read:,} with {text.checksum[:12]}); give another --out"
            )

    def shard(self, number: int) -> list[Window] | None:
        """Return the windows of a shard, waiting until they are there; None past the end of the text."""
        while True:
            self._work()
            plan = self.whole
            if plan is not None and number >= len(plan["files"]):
                return None
            # files of an earlier attempt count only once our own thread has found them equal to the text given
            ours = plan is None and self._thread is not None
            if number < self._published if ours else (self.root / token_file(number)).exists():
                return read_windows(self.root, number)
            time.sleep(POLL)

    def _work(self) -> None:
        """See to it that somebody makes the plan: raise what stopped our own thread, or begin one."""
        if self._error is not None:
            raise self._error
        if self._thread is not None or self.whole is not None:
            return
        try:
            self._lock.acquire()
        except Timeout:
            return  # another writer is at it
        self._thread = threading.Thread(target=self._make, name="interp-plan", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        try:
            text, rows, sequences = Text(self.documents), 0, 0
            files: list[dict[str, Any]] = []
            shards = self.cut.shards(text)
            while not self._stop.is_set():
                begun = time.perf_counter()
                windows, kept = next(shards, (None, 0))
                self.seconds += time.perf_counter() - begun
                if windows is None:
                    self._finish(text, rows, sequences, files)
                    return
                files.append(publish(self.root, len(files), sequences, windows))
                self._published = len(files)
                rows, sequences = rows + kept, sequences + len(windows)
        except BaseException as error:  # the writer's own thread raises it
            self._error = error

    def _finish(self, text: Text, rows: int, sequences: int, files: list[dict[str, Any]]) -> None:
        if not rows:
            raise ValueError("the text gives no rows: it is empty, or everything in it is excluded")
        found = {"documents": text.read, "xxh3_128": text.checksum}
        write_sealed(self.root / PLAN, {"text": found, "rows": rows, "sequences": sequences, "files": files})


def publish(root: Path, shard: int, first: int, windows: list[Window]) -> dict[str, Any]:
    """Write the windows of a shard, or find them there already; raises StoreError where others are there."""
    counts = np.array([len(w.ids) for w in windows], dtype=np.int64)
    columns = {
        "offsets": torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
        "ids": torch.from_numpy(np.concatenate([w.ids for w in windows])),
        "documents": torch.from_numpy(np.concatenate([w.documents for w in windows])),
    }
    try:
        held, _ = map_shard(root / token_file(shard))
    except (FileNotFoundError, FormatError):
        held = None
    if held is not None and not all(torch.equal(held.get(n, torch.empty(0)), c) for n, c in columns.items()):
        raise StoreError(f"{root} was begun with another text: sequences {first:,} and on differ; give another --out")
    return write_shard(root, token_file(shard), columns, {"first": first}).as_dict()


def read_windows(root: Path, shard: int) -> list[Window]:
    """Return the windows of one shard as they lie on disk."""
    held, _ = map_shard(root / token_file(shard))
    try:
        ids, documents, offsets = held["ids"].numpy(), held["documents"].numpy(), held["offsets"].tolist()
    except KeyError as error:
        raise FormatError(f"{root / token_file(shard)} has no {error}") from error
    return [Window(ids[a:b].copy(), documents[a:b].copy()) for a, b in pairwise(offsets)]
