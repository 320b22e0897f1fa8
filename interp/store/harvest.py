"""Model x text x hook points -> a store on disk: resumable, by one process or many, the same bytes every time."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from filelock import FileLock, Timeout

from interp.acts.rows import SAE_EXCLUDE
from interp.model.loading import as_model
from interp.model.sources import read_source
from interp.model.tokens import Window
from interp.store.compute import Harvester, measured
from interp.store.job import Job, describe, differences, save_tokenizer, who_am_i
from interp.store.ledger import MANIFEST, SETTINGS, Journal, StoreError, journalled, read_sealed, write_sealed
from interp.store.plan import Cut, Plan
from interp.store.reader import ActivationStore, open_store
from interp.store.writer import Sink, Writer, seal
from sae.io import sweep_temporaries, write_json

DEFAULTS: dict[str, Any] = {
    "tokens": None, "dtype": None, "ctx": None, "batch_size": 32, "packing": None, "exclude": SAE_EXCLUDE,
    "add_bos": True, "separate": True, "shard_mb": 64, "covariance": False,
}  # fmt: skip


def harvest_acts(
    model: Any,
    source: str | Iterable[Any],
    hooks: str | Iterable[str],
    *,
    out: str | os.PathLike,
    tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    ctx: int | None = None,
    batch_size: int = 32,
    packing: str | None = None,
    exclude: Sequence[str] = SAE_EXCLUDE,
    add_bos: bool = True,
    separate: bool = True,
    field: str = "text",
    shard_mb: float | int = 64,
    covariance: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> ActivationStore:
    """Store the activations of a text at hook points in the folder `out`, and return the store.

    `model` and `hooks` as for capture_acts, `source` as for read_source. The text is cut into windows of `ctx` tokens
    (default: n_ctx, at most 512) by `packing` (see tokens.windows; default "joined", "documents" for encoders), and
    read in batches of `batch_size` windows. Rows are the tokens that `exclude` leaves (default: no pads, BOS, other
    specials, nor rows whose norm is above 10 times the median of their batch: attention sinks); the harvest ends when
    `tokens` of them have been read, outliers counted, or with the text. `dtype` is that of the store: "float32",
    "float16" or "bfloat16", the model's own unless given. `covariance` adds each hook point's to the statistics.

    The same call goes on with what was interrupted, at any moment, and ends with the same bytes as if it had not been
    (same machine, versions and threads). Under torchrun, accelerate or SLURM, or with `rank` and `world_size`, each
    process takes every world_size-th shard; who finishes last seals the store. A batch that does not fit into memory
    is tried once more and never made smaller: sizes belong to what makes a store reproducible.

    Raises StoreError where `out` holds a store of another model, text or setting, or is in use; HookPointError,
    MissingError, ValueError for what cannot be read; NonFiniteError for inf or nan; OSError where the disk is full.
    """
    model = as_model(model)
    given = {"tokens": tokens, "dtype": dtype, "ctx": ctx, "batch_size": batch_size, "packing": packing}
    job = describe(
        model, hooks, exclude=exclude, add_bos=add_bos, separate=separate, shard_mb=shard_mb, covariance=covariance,
        **given,
    )  # fmt: skip
    documents = read_source(source, field=field)
    me, world, _ = who_am_i(rank, world_size)
    root = Path(out)
    _fits(root, job)
    with writing(root, me, world):
        begin(root, job.settings, model.tokenizer)
        log = {
            "model": str(getattr(model.hf, "name_or_path", "") or model.name),
            "source": source if isinstance(source, str) else type(source).__name__,
            "field": field,
        }
        told = say or (lambda text: None)
        fill(
            root, job.settings, job.cut, documents, Harvester(job), log, rank=me, world=world, progress=progress,
            say=told,
        )  # fmt: skip
    return open_store(root)


def estimate(
    model: Any,
    source: str | Iterable[Any],
    hooks: str | Iterable[str],
    *,
    field: str = "text",
    batches: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Return what harvest_acts with the same options would give, writing nothing: rows, bytes, seconds.

    The text is tokenised as far as it would be read; the time is that of `batches` measured batches, the median, after
    one that is not counted.
    """
    job = describe(as_model(model), hooks, **{**DEFAULTS, **options})
    begun = time.perf_counter()
    rows = sequences = shards = 0
    first: list[Window] = []
    for windows, kept in job.cut.shards(read_source(source, field=field)):
        first = first or windows[: job.cut.batch_size]
        rows, sequences, shards = rows + kept, sequences + len(windows), shards + 1
    tokenisation = time.perf_counter() - begun
    if not rows:
        raise ValueError("the text gives no rows: it is empty, or everything in it is excluded")
    seconds = measured(job, first, batches)
    count = -(-sequences // job.cut.batch_size)
    return {
        "rows": rows,
        "sequences": sequences,
        "shards": shards,
        "bytes": rows * job.row_bytes + 4 * 2 * sequences * job.settings["ctx"],
        "seconds": round(seconds * count + tokenisation, 2),
        "seconds_tokenisation": round(tokenisation, 2),
        "rows_per_second": round(rows / (seconds * count + tokenisation)),
    }


@contextmanager
def writing(root: Path, rank: int, world: int) -> Iterator[None]:
    """Hold the lock of one writer of a store; raises StoreError where another holds it, or other ranks write."""
    _check_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    mine = FileLock(root / f".lock-{rank}-of-{world}", timeout=0)
    try:
        mine.acquire()
    except Timeout:
        raise StoreError(f"{root} is being written by another process (rank {rank} of {world}); wait for it") from None
    try:
        for path in root.glob(".lock-*-of-*"):
            if not path.name.endswith(f"-of-{world}"):
                _refuse_held(root, path)
        for folder in (root, root / "acts", root / "tokens", root / "tokenizer"):
            sweep_temporaries(folder)
        yield
    finally:
        mine.release()
        mine_path = Path(mine.lock_file)
        if (root / MANIFEST).exists():
            mine_path.unlink(missing_ok=True)


def _refuse_held(root: Path, path: Path) -> None:
    other = FileLock(path, timeout=0)
    try:
        other.acquire()
    except Timeout:
        raise StoreError(f"{root} is being written by other processes ({path.name[6:]}); wait for them") from None
    other.release()


def _check_folder(root: Path) -> None:
    """Raise StoreError where `root` holds something that is not a store."""
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file; give the folder of a store")
    if not root.exists() or (root / SETTINGS).exists():
        return
    known = {"acts", "tokens", "tokenizer"}
    strange = [p.name for p in root.iterdir() if p.name not in known and not p.name.startswith((".lock", ".tmp-"))]
    if strange:
        raise StoreError(f"{root} holds {strange[0]!r} and no store; give a new or empty folder")


def begin(root: Path, settings: dict[str, Any], tokenizer: Any) -> None:
    """Write the settings of a new store, or compare them with those of the one that is there."""
    if (root / SETTINGS).exists():
        there = read_sealed(root / SETTINGS)
        found = differences(there, settings)
        if found:
            raise StoreError(f"{root} is another store: {'; '.join(found[:4])}; give another --out, or its settings")
        return
    for name in ("acts", "tokens", "tokenizer"):
        (root / name).mkdir(exist_ok=True)
    if tokenizer is not None:
        save_tokenizer(tokenizer, root / "tokenizer")
    write_sealed(root / SETTINGS, settings)


def _fits(root: Path, job: Job) -> None:
    """Raise OSError where what is left to write plainly exceeds the free space."""
    if job.settings["tokens"] is None or (root / MANIFEST).exists():
        return
    done = sum(p.stat().st_size for p in (root / "acts").glob("*.safetensors")) if root.exists() else 0
    need = job.settings["tokens"] * job.row_bytes - done
    near = next(p for p in (root, *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(near).free
    if need > free:
        message = f"{root} needs about {need / 1e9:,.1f} GB more and {free / 1e9:,.1f} GB are free; lower --tokens"
        raise OSError(errno.ENOSPC, message)


@runtime_checkable
class Filler(Protocol):
    """Computes the rows of a shard of windows and hands them to the writer; returns how many."""

    def shard(self, number: int, windows: list[Window], writer: Sink, update: Callable[[int], Any], /) -> int:
        """Make one shard; `update` is told of rows as they are made."""
        ...


def fill(
    root: Path, settings: dict[str, Any], cut: Cut, documents: Iterable[Any], filler: Filler, log: dict[str, Any], *,
    rank: int = 0, world: int = 1, progress: bool = False, say: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """Make the shards of one rank that are not there yet, and seal the store if it was the last."""
    begun = time.perf_counter()
    journal = Journal(root, rank, world)
    noted = root / ("run.json" if world == 1 else f"rank-{rank}.run.json")
    with Plan(root, cut, documents) as plan:
        if (root / MANIFEST).exists():
            say(f"{root} is complete already")
            seal(root)
            return
        journal.begin()
        write_json(noted, log)  # a repair reads here what to load again, even if we do not get to the end
        done, rows, number = journalled(root), 0, rank
        with _bar(cut.tokens, world, progress) as bar, Writer(root, journal, settings["covariance"]) as writer:
            while (windows := plan.shard(number)) is not None:
                record = done.get(number)
                if record is None or not (root / record.file).exists():
                    rows += filler.shard(number, windows, writer, bar.update)
                else:
                    bar.update(record.rows)
                number += world
        made = plan.whole["rows"] if plan.whole is not None else 0
    seconds = time.perf_counter() - begun
    log = {
        **log,
        "rank": rank,
        "world_size": world,
        "seconds": seconds,
        "rows": rows,
        "rows_per_second": rows / seconds,
    }
    log |= {"seconds_writing": writer.seconds, "seconds_tokenisation": plan.seconds}
    sealed = seal(root)
    write_json(noted, log)
    if cut.tokens is not None and made < cut.tokens:
        say(f"the text gives {made:,} rows, fewer than the {cut.tokens:,} asked for")
    if not sealed:
        say(f"rank {rank} of {world} is done; {root} is complete when the others are")


def _bar(total: int | None, world: int, progress: bool) -> Any:
    if not progress:
        return _Silent()
    from tqdm import tqdm

    return tqdm(total=None if total is None else total // world, desc="harvest", unit="tok", unit_scale=True)


class _Silent(nullcontext):
    """A progress bar that shows nothing."""

    def __enter__(self) -> "_Silent":
        return self

    def update(self, count: int) -> None:
        """Take a count and forget it."""
