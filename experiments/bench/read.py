"""Shuffled reading of a store against a raw sequential read of the same bytes, page cache warm.

python experiments/bench/read.py                     # synthetic shards of 64 MiB, 5 GB, in a temporary folder
python experiments/bench/read.py --store DIR         # a harvested store
python experiments/bench/read.py --cold              # as well: the first seconds from the disk
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from timing import child, interleaved, machine, peak, ratio, report, reset_peak, resident

from interp.store.shards import map_shard
from interp.store.shuffle import Batches, permute

SHARD = 64 << 20
ROWS = {2048: "1024 x float16", 1536: "768 x float16", 1024: "512 x float16", 384: "192 x float16"}


def make(folder: Path, n_shards: int) -> None:
    """Write shards of random bytes as safetensors files with one tensor, to be viewed as rows of any width."""
    block = np.random.default_rng(0).integers(0, 2**16, SHARD // 2, dtype=np.uint16)
    for i in range(n_shards):
        save_file({"rows": (block ^ np.uint16(i)).view(np.float16)}, folder / f"{i:05d}.safetensors")


def mapped(folder: Path, row_bytes: int) -> list[torch.Tensor]:
    """Return the shards as [tok, d] float16, mapped."""
    d, found = row_bytes // 2, []
    for path in sorted(folder.glob("*.safetensors")):
        flat = map_shard(path)[0]["rows"]
        found.append(flat[: len(flat) // d * d].view(-1, d))
    return found


def sequential(files: list[Path], n_bytes: int) -> None:
    """Read files from the first on into one 64 MiB buffer, and again from the first, until n_bytes are read."""
    buffer = memoryview(sequential.buffer)
    while n_bytes > 0:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while n_bytes > 0 and (got := file.readinto(buffer[: min(len(buffer), n_bytes)])):
                    n_bytes -= got


sequential.buffer = bytearray(SHARD)


def take(batches: Iterator[torch.Tensor], n_bytes: int) -> None:
    while n_bytes > 0:
        n_bytes -= next(batches).nbytes


def measure(shards: list[torch.Tensor], files: list[Path], gb: float, repeats: int, batch: int) -> dict[str, Any]:
    """Return GB/s and ratios for one width of row."""
    n_bytes = int(gb * 1e9)
    n, row_bytes = sum(map(len, shards)), shards[0].shape[1] * shards[0].element_size()
    readers = {f"prefetch {p}": iter(Batches(shards, batch, seed=1, prefetch=p)) for p in (0, 2)}
    index = np.arange(n_bytes // row_bytes, dtype=np.uint64) % np.uint64(n)
    times = interleaved(
        {
            "raw": lambda: sequential(files, n_bytes),
            "order alone": lambda: permute(index, n, (1, 0)),
            **{name: (lambda reader=reader: take(reader, n_bytes)) for name, reader in readers.items()},
        },
        repeats,
        warmup=2,  # two passes of 4 GB over 5 GB map every page
    )
    row: dict[str, Any] = {"row bytes": row_bytes, "raw GB/s": gb / times["raw"]["wall"]}
    for name in readers:
        row[f"{name}: GB/s"] = gb / times[name]["wall"]
        row[f"{name}: of raw"] = 1 / ratio(times, name, "raw")
    row["order: share"] = ratio(times, "order alone", "prefetch 0", "cpus")
    for reader in readers.values():
        reader.close()
    return row


def memory(folder: Path, row_bytes: int, batch: int, buffer_mb: float) -> dict[str, float]:
    """Return MB that reading adds: anonymous (what the process holds), and mapped pages of the page cache."""
    torch.set_num_threads(2)
    shards = mapped(folder, row_bytes)
    warm = torch.randn(64, 64)
    torch.index_select(warm, 0, torch.arange(64))  # torch's own thread and code
    before, before_all, highest = resident("Anonymous"), resident("Rss"), 0.0
    reset_peak()
    batches = iter(Batches(shards, batch, seed=1, buffer_mb=buffer_mb, prefetch=1000))
    for i in range(400):
        next(batches)
        if i % 10 == 0:
            highest = max(highest, resident("Anonymous"))
    return {"anonymous": highest - before, "all": peak() - before_all, "batch": batch * row_bytes / 1e6}


def cold(folder: Path, row_bytes: int, sparse: bool, seconds: float) -> dict[str, float]:
    """Return rows a second in the first seconds with none of the files in the page cache."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    batches = iter(Batches(mapped(folder, row_bytes), 4096, seed=1, sparse_reads=sparse))
    begun, rows = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        rows += len(next(batches))
    return {"rows": rows / (time.perf_counter() - begun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=80, help="of 64 MiB each")
    parser.add_argument("--gb", type=float, default=4.0, help="read per repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--buffer-mb", type=float, default=64.0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "VALUE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, folder, value = args.child
        found = (
            memory(Path(folder), 1536, args.batch, float(value))
            if kind == "memory"
            else cold(Path(folder), 1536, value == "sparse", 5.0)
        )
        print(json.dumps(found))
        return
    torch.set_num_threads(2)
    about = machine()
    if args.store:
        from interp.store.reader import open_store

        store = open_store(args.store)
        shards = store[store.hooks[0]].shards()
        files = [store.path / record.file for record in store.shards]
        rows = [measure(shards, files, args.gb, args.repeats, args.batch)]
        report("read_store", rows, machine=about, store=repr(store))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.shards)
        files = sorted(folder.glob("*.safetensors"))
        rows = [measure(mapped(folder, b), files, args.gb, args.repeats, args.batch) for b in ROWS]
        more: dict[str, Any] = {"memory_mb": child(["--child", "memory", name, str(args.buffer_mb)])}
        if args.cold:
            kinds = ("sparse", "surroundings")
            more["cold_rows_per_s"] = {k: child(["--child", "cold", name, k])["rows"] for k in kinds}
        report("read", rows, machine=about, gb=args.gb, repeats=args.repeats, batch=args.batch, **more)
        print(json.dumps(more, indent=1))


if __name__ == "__main__":
    main()
