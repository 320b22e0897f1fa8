"""Putting shards of activations on disk beside the computing: columns, statistics, the writing thread, the seal."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Int
from torch import Tensor

from interp.store.ledger import MANIFEST, PLAN, SETTINGS, Journal, ShardRecord, journalled, read_sealed, write_sealed
from interp.store.shards import map_shard, record_plain, write_shard
from sae.io import sweep_temporaries

STATS = "stats.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of stored values
CHUNK = 8192  # rows summed at once: sums in one fixed order, in float64
MEDIAN_ROWS = 2**26  # above this the median is that of evenly spaced rows


def acts_file(shard: int) -> str:
    """Return the name of a file of activations below the store."""
    return f"acts/{shard:08d}.safetensors"


@dataclass(frozen=True)
class Rows:
    """What one shard is made of, on the CPU: values by hook point, and one entry a row of everything else."""

    shard: int
    first: int  # its first sequence
    values: Mapping[str, Float[Tensor, "rows _"]]
    norms: Float[Tensor, "rows hooks"]
    token_ids: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    documents: Int[Tensor, " rows"]
    offsets: Int[Tensor, " sequences_and_1"]  # where each sequence's rows begin

    def columns(self, covariance: bool) -> dict[str, Tensor]:
        """Return the tensors of the shard's file."""
        sums = {f"sum/{hook}": _summed(rows) for hook, rows in self.values.items()}
        outer = {f"outer/{hook}": _squared(rows) for hook, rows in self.values.items()} if covariance else {}
        return {
            **sums,
            **outer,
            "offsets": self.offsets.to(torch.int64),
            "norms": self.norms,
            "token_ids": self.token_ids.to(torch.int32),
            "positions": self.positions.to(torch.int32),
            "documents": self.documents.to(torch.int32),
            **self.values,
        }

    def write(self, root: Path, covariance: bool) -> ShardRecord:
        """Write the shard and return its record."""
        sequences = (self.first, self.first + len(self.offsets) - 1)
        file = write_shard(root, acts_file(self.shard), self.columns(covariance), {"sequences": sequences})
        owned = self.documents[self.documents >= 0]
        documents = (int(owned.min()), int(owned.max())) if len(owned) else (-1, -1)
        return ShardRecord(
            **file.as_dict(), shard=self.shard, sequences=sequences, rows=len(self.token_ids), documents=documents
        )


def _summed(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in rows.split(CHUNK):
        total += part.sum(0, dtype=torch.float64)
    return total


def _squared(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(CHUNK):
        wide = part.double()
        total.addmm_(wide.T, wide)
    return total


@runtime_checkable
class Sink(Protocol):
    """Takes the rows of shards; `done` is to be called once their buffers may be used again."""

    def put(self, rows: Rows, done: Callable[[], None]) -> None:
        """Take a shard."""
        ...


class Writer:
    """A thread that writes shards and notes them in a journal, one waiting while one is written.

    Used as a context: leaving it finishes what was handed over. An error of the thread is raised at the next `put`, or
    on leaving. `seconds` is the time spent writing.
    """

    def __init__(self, root: Path, journal: Journal, covariance: bool):
        self.root, self.journal, self.covariance = root, journal, covariance
        self.seconds = 0.0
        self._queue: queue.Queue[tuple[Rows, Callable[[], None]] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="interp-writer", daemon=True)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, rows: Rows, done: Callable[[], None]) -> None:
        """Hand over a shard; `done` is called once its buffers may be used again."""
        self._raise()
        self._queue.put((rows, done))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (given := self._queue.get()) is not None:
            rows, done = given
            begun = time.perf_counter()
            try:
                if self._error is None:
                    self.journal.append(rows.write(self.root, self.covariance))
            except BaseException as error:  # raised by the thread that hands over
                self._error = _explained(error, self.root)
            finally:
                self.seconds += time.perf_counter() - begun
                done()


def _explained(error: BaseException, root: Path) -> BaseException:
    if not isinstance(error, OSError):
        return error
    what = f"{root} cannot be written ({error.strerror or error}); the shards finished so far are kept and readable: "
    return OSError(error.errno, f"{what}mend that and run the same command again")


def seal(root: Path) -> bool:
    """Finish a store whose shards are all there: statistics, manifest, no journals. Returns whether it is sealed."""
    with FileLock(root / ".lock-seal"):
        if not (root / MANIFEST).exists():
            if not (root / PLAN).exists():
                return False
            plan, shards = read_sealed(root / PLAN), list(journalled(root).values())
            if len(shards) < len(plan["files"]):
                return False
            settings = read_sealed(root / SETTINGS)
            write_stats(root, [h["name"] for h in settings["hooks"]], shards, settings["covariance"])
            write_sealed(root / MANIFEST, _manifest(root, plan, shards))
        for path in root.glob("journal-*.jsonl"):
            path.unlink(missing_ok=True)
        for folder in (root, root / "acts", root / "tokens", root / "tokenizer"):
            sweep_temporaries(folder)
    for path in root.glob(".lock-*"):
        with suppress(Timeout, OSError), FileLock(path, timeout=0):
            path.unlink()
    return True


def _manifest(root: Path, plan: dict[str, Any], shards: list[ShardRecord]) -> dict[str, Any]:
    others = sorted(str(p.relative_to(root)) for p in (root / "tokenizer").glob("*"))
    plain = [record_plain(root, file).as_dict() for file in (SETTINGS, PLAN, STATS, *others)]
    return {
        "settings": read_sealed(root / SETTINGS),  # a second copy: each of the two can be mended from the other
        "acts": [record.as_dict() for record in shards],
        "tokens": plan["files"],
        "plain": plain,
        "rows": sum(record.rows for record in shards),
        "sequences": plan["sequences"],
        "documents": plan["text"]["documents"],
    }


def write_stats(root: Path, hooks: list[str], shards: list[ShardRecord], covariance: bool) -> None:
    """Write mean, median and mean norm, and on request the covariance, of each hook point over all rows."""
    held = [map_shard(root / record.file, record.bytes)[0] for record in shards]
    n = sum(record.rows for record in shards)
    columns: dict[str, Tensor] = {}
    for i, hook in enumerate(hooks):
        mean = sum((s[f"sum/{hook}"] for s in held), torch.zeros(1, dtype=torch.float64)) / max(n, 1)
        columns[f"mean/{hook}"] = mean
        norms = np.concatenate([s["norms"][:, i].numpy() for s in held])
        some = norms[:: len(norms) // MEDIAN_ROWS + 1]
        median = float(np.median(some)) if n else 0.0
        average = float(norms.mean(dtype=np.float64)) if n else 0.0
        columns[f"norm/{hook}"] = torch.tensor([median, average], dtype=torch.float64)
        if covariance:
            outer = sum((s[f"outer/{hook}"] for s in held), torch.zeros(1, dtype=torch.float64))
            columns[f"covariance/{hook}"] = (outer - n * torch.outer(mean, mean)) / max(n - 1, 1)
    write_shard(root, STATS, columns, {"rows": n})
