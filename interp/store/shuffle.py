"""Batches of rows from many shards: a true shuffle over all of them, in bounded memory, that resumes at a number.

The order is a keyed permutation that is computed and never stored, so that any position can be reached at once. The
rows of a batch are gathered straight from the (memory-mapped) shards by one torch call: no shuffle buffer, no copy
between. What the process holds are the batches read ahead and a short piece of the order.
"""

import ctypes
import hashlib
import math
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt32, UInt64
from torch import Tensor

__all__ = ["Batches", "permute"]

ROUNDS, SMALL_ROUNDS, SMALL = 8, 24, 4096  # statistics see 4 rounds at any n, 6 at none from SMALL on, 8 at n = 6
PIECE = 1 << 16  # positions of the order computed at once: numpy's cost a call is gone, and 0.5 MB is held
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}  # NumPy has no bfloat16
ORDER = 64 * PIECE  # bytes that a piece takes while it is computed
MADV_RANDOM, MADV_WILLNEED = 1, 3  # the numbers of Linux

Shard = Tensor | np.ndarray


def permute(index: UInt64[np.ndarray, " i"], n: int, key: tuple[int, ...]) -> UInt64[np.ndarray, " i"]:
    """Return where a keyed permutation of 0..n-1 sends each index: a bijection, the same on every machine.

    An alternating Feistel network on Z_a x Z_b with a, b about sqrt(n) (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains", method 3) that walks on from the at most sqrt(n) points outside; no generator of NumPy
    or torch is involved. `key`: any integers, such as (seed, epoch).
    Raises ValueError unless 1 <= n <= 2**62 and every index is below n.
    """
    if not 1 <= n <= 2**62:
        raise ValueError(f"n is {n}; a permutation is of 1 to 2**62 rows")
    index = np.ascontiguousarray(index, dtype=np.uint64)
    if len(index) and int(index.max()) >= n:
        raise ValueError(f"index {int(index.max())} is outside a permutation of {n} rows")
    keys = _round_keys(key, SMALL_ROUNDS if n < SMALL else ROUNDS)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    out = np.empty_like(index)
    for i in range(0, len(index), 8192):  # what one chunk needs stays in the cache
        out[i : i + 8192] = _network(index[i : i + 8192], a, b, keys)
    while len(outside := np.flatnonzero(out >= n)):
        out[outside] = _network(out[outside], a, b, keys)
    return out


class Batches:
    """An endless or finite iterable of batches of rows from shards, resumable at any row.

    `shards`: for one hook point a list of 2-D arrays or CPU tensors [tok, d], best memory-mapped; batches are then
    tensors [batch, d]. For several, {name: list}, all with as many rows in all; batches are then {name: [batch, d]} of
    the same rows. A batch is the caller's own memory, in the shards' dtype unless `dtype` is given.

    With `shuffle` every epoch is a fresh permutation of all rows, a pure function of (seed, epoch, rows in all), and
    batches run over the seam of two epochs; without, rows come in order. `epochs` None never ends; after the last of a
    number of epochs a rest smaller than a batch is left out, or yielded with `drop_last` False.

    A thread reads up to `prefetch` batches ahead (0: none), as many as fit into `buffer_mb` MB with the two that the
    caller handles. Batches that the caller keeps come on top. Mapped pages of the shards are the system's, which takes
    them back when it needs memory: to unmap them ourselves would only make every later touch fault again.
    `sparse_reads`: True asks the system for single rows and not for their surroundings, which is right when the shards
    do not fit in memory and slows the first epoch when they do; None decides by the machine's memory.

    Raises ValueError for sizes that make no sense and for shards that differ in width or dtype.
    """

    def __init__(
        self,
        shards: Sequence[Shard] | Mapping[str, Sequence[Shard]],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
        dtype: torch.dtype | None = None,
        buffer_mb: int | float = 256,
        prefetch: int = 2,
        sparse_reads: bool | None = None,
    ) -> None:
        self._single = not isinstance(shards, Mapping)
        named = shards if isinstance(shards, Mapping) else {"": shards}
        if not named:
            raise ValueError("there is no hook point to read: shards is an empty mapping")
        self._tables = {name: _Table(name, list(parts)) for name, parts in named.items()}
        counts = {name: table.n_rows for name, table in self._tables.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"hook points read together need the same rows; given: {counts} rows")
        self.n_rows = next(iter(counts.values()))
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.epochs, self.drop_last, self.dtype = epochs, drop_last, dtype
        _check_sizes(self.n_rows, batch_size, epochs, prefetch)
        one = batch_size * sum(t.d * _itemsize(t.dtype, dtype) for t in self._tables.values())
        if one > buffer_mb * 1e6:
            raise ValueError(f"buffer_mb is {buffer_mb:g}, and one batch takes {one / 1e6:.1f} MB: a larger buffer_mb")
        # beside those read ahead there are the one handed out and, for a moment, the one before it
        self.prefetch = max(0, min(prefetch, int((buffer_mb * 1e6 - ORDER) // one) - 2))
        if sparse_reads is None:
            sparse_reads = sum(t.n_bytes for t in self._tables.values()) > _memory()
        self.sparse_reads = sparse_reads
        if sparse_reads:
            for table in self._tables.values():
                table.expect_random()
        self._position = 0
        self._idle: dict[int, deque[np.ndarray]] = {}
        self._piece: tuple[tuple[int, int], dict[str, Tensor]] = ((-1, -1), {})

    def __len__(self) -> int:
        """Return how many batches all epochs have; raises TypeError where they never end."""
        if self.epochs is None:
            raise TypeError("batches without a number of epochs have no length")
        rows = self.n_rows * self.epochs
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def state(self) -> dict[str, int | bool]:
        """Return what `restore` needs to go on behind the last batch handed out, whatever was read ahead."""
        return {"rows": self._position, "seed": self.seed, "shuffle": self.shuffle, "n_rows": self.n_rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state in no time; the batch size may be another one.

        Raises ValueError for a state of another order: other rows, another seed, shuffled or not.
        """
        for name, own in self.state().items():
            if name not in state:
                raise ValueError(f"the state has no {name!r}; it holds: {', '.join(map(repr, state)) or 'nothing'}")
            if name != "rows" and state[name] != own:
                raise ValueError(f"the state has {name} {state[name]}, these batches {own}: another order of rows")
        if not isinstance(state["rows"], int) or state["rows"] < 0:
            raise ValueError(f"the state has rows {state['rows']!r}; it must be a count")
        self._position = state["rows"]

    def __iter__(self) -> Iterator[Any]:
        """Yield batches from the current position on; a second iteration goes on where the first was left."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if self.prefetch else None
        ahead: deque[tuple[int, Future[Any]]] = deque()
        try:
            while count := self._count(start := self._position):
                batch = self._read(start, count) if pool is None else self._read_ahead(pool, ahead)
                self._position = start + count
                yield batch
                del batch  # else it would live on beside the next one
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, pool: ThreadPoolExecutor, ahead: deque[tuple[int, Future[Any]]]) -> Any:
        """Return the batch at the position, with `prefetch` more on the way behind it."""
        if ahead and ahead[0][0] != self._position:  # restored meanwhile
            for _, future in ahead:
                future.cancel()
            ahead.clear()
        while len(ahead) <= self.prefetch:
            start = self._position + len(ahead) * self.batch_size
            if not (count := self._count(start)):
                break
            ahead.append((start, pool.submit(self._read, start, count)))
        return ahead.popleft()[1].result()

    def _count(self, start: int) -> int:
        """Return how many rows the batch at a position has; 0 at the end."""
        if self.epochs is None:
            return self.batch_size
        left = max(0, self.n_rows * self.epochs - start)
        return 0 if left < self.batch_size and self.drop_last else min(left, self.batch_size)

    def _read(self, start: int, count: int) -> Any:
        out = {name: self._lend(count, t.d, t.dtype) for name, t in self._tables.items()}
        done = 0
        while done < count:
            epoch, row = divmod(start + done, self.n_rows)
            block, skip = divmod(row, PIECE)
            offsets, n = self._offsets(epoch, block), min(count - done, PIECE - skip, self.n_rows - row)
            for name, table in self._tables.items():
                table.gather(offsets[name][skip : skip + n], out[name][done : done + n], self.sparse_reads)
            done += n
        if self.dtype is not None:
            out = {name: self._lend(count, x.shape[1], self.dtype).copy_(x) for name, x in out.items()}
        return out[""] if self._single else out

    def _lend(self, count: int, d: int, dtype: torch.dtype) -> Shaped[Tensor, "{count} {d}"]:
        """Return memory for rows, taken back when the last tensor on it is gone.

        malloc instead leaves holes (20 batches of memory for 4 held), and fresh pages for every batch above 32 MB.
        """
        size = self.batch_size * d * dtype.itemsize
        idle = self._idle.setdefault(size, deque(maxlen=self.prefetch + 2))
        try:
            memory = idle.pop()
        except IndexError:
            memory = np.empty(size, dtype=np.uint8)
        lent = memory.view()  # an object of its own, which torch keeps for as long as the storage
        weakref.finalize(lent, idle.append, memory).atexit = False
        return torch.from_numpy(lent)[: count * d * dtype.itemsize].view(dtype).view(count, d)

    def _offsets(self, epoch: int, block: int) -> dict[str, Int64[Tensor, " i"]]:
        """Return where the rows of a piece of an epoch's order lie, for each hook point; the last piece is kept."""
        held, offsets = self._piece
        if held != (epoch, block):
            rows = np.arange(block * PIECE, min((block + 1) * PIECE, self.n_rows), dtype=np.uint64)
            if self.shuffle:
                rows = permute(rows, self.n_rows, (self.seed, epoch))
            offsets = {name: table.offsets(rows) for name, table in self._tables.items()}
            self._piece = ((epoch, block), offsets)
        return offsets


class _Table:
    """Shards of one hook point as a single table, wherever in memory they lie."""

    def __init__(self, name: str, shards: list[Shard]) -> None:
        label = f" of {name}" if name else ""
        if not shards:
            raise ValueError(f"there are no shards{label}; batches need at least one")
        found = [_locate(s, f"shard {i}{label}") for i, s in enumerate(shards)]
        self.d, self.dtype = found[0].d, found[0].dtype
        for i, t in enumerate(found):
            if (t.d, t.dtype) != (self.d, self.dtype):
                raise ValueError(f"shard {i}{label} is [tok, {t.d}] {t.dtype}, shard 0 [tok, {self.d}] {self.dtype}")
        self._shards = shards  # keeps what the addresses point to
        kept = [t for t in found if t.n_rows]
        counts = np.array([t.n_rows for t in kept], dtype=np.int64)
        self.n_rows, self._row_bytes = int(counts.sum()), self.d * self.dtype.itemsize
        self.n_bytes = self.n_rows * self._row_bytes
        if not kept:
            return
        addresses = np.array([t.address for t in kept], dtype=np.int64)
        self._places = list(zip(addresses.tolist(), (counts * self._row_bytes).tolist(), strict=True))
        word = math.gcd(8, self._row_bytes, *addresses.tolist())
        self._base, self._word = int(addresses.min()), word
        self._firsts = np.concatenate([[0], counts.cumsum()])
        self._shifts = (addresses - self._base - self._firsts[:-1] * self._row_bytes) // word
        # One view that begins at every word between the first and the last shard, so that a single index_select (its
        # inner loop is a memcpy a row, in torch's threads) reaches all shards. Only offsets of rows are ever read.
        reach = int((addresses + counts * self._row_bytes).max()) - self._base
        memory = torch.frombuffer((ctypes.c_char * reach).from_address(self._base), dtype=WORDS[word])
        width = self._row_bytes // word
        self._view = memory.as_strided((len(memory) - width + 1, width), (1, 1))

    def offsets(self, rows: UInt64[np.ndarray, " i"]) -> Int64[Tensor, " i"]:
        """Return where rows begin, in words from the base."""
        at = rows.astype(np.int64)
        shard = np.searchsorted(self._firsts, at, side="right") - 1
        return torch.from_numpy(self._shifts[shard] + at * (self._row_bytes // self._word))

    def gather(self, offsets: Int64[Tensor, " i"], out: Shaped[Tensor, "i d"], sparse: bool) -> None:
        """Copy rows to `out`."""
        if sparse:
            self._request(offsets)
        torch.index_select(self._view, 0, offsets, out=out.view(self._view.dtype))

    def expect_random(self) -> None:
        """Tell the system not to read the surroundings of what is touched."""
        for address, size in self._places:
            _advise(address, size, MADV_RANDOM)

    def _request(self, offsets: Int64[Tensor, " i"]) -> None:
        """Ask for all rows at once, so that the disk serves them side by side and not one page fault at a time."""
        for offset in offsets.tolist():
            _advise(self._base + offset * self._word, self._row_bytes, MADV_WILLNEED)


class _Rows(NamedTuple):
    """Where one shard lies."""

    address: int
    n_rows: int
    d: int
    dtype: torch.dtype


def _locate(shard: Shard, label: str) -> _Rows:
    """Return address and shape of a shard without touching its data (torch would warn of a read-only map)."""
    if isinstance(shard, np.ndarray):
        dtype = DTYPES.get(shard.dtype.name) if shard.dtype.isnative else None
        contiguous, address, kind = shard.flags.c_contiguous, int(shard.ctypes.data), str(shard.dtype)
    else:
        dtype, kind = (shard.dtype if shard.device.type == "cpu" else None), f"{shard.dtype} on {shard.device}"
        contiguous, address = shard.is_contiguous(), shard.data_ptr()
    if shard.ndim != 2 or shard.shape[1] < 1 or not contiguous:
        raise ValueError(f"{label} has shape {tuple(shard.shape)}; a shard is [tok, d], its rows one behind the other")
    if dtype is None or not dtype.is_floating_point:
        raise ValueError(f"{label} is {kind}; a shard holds floating-point numbers of this machine, in its memory")
    return _Rows(address, int(shard.shape[0]), int(shard.shape[1]), dtype)


def _check_sizes(n_rows: int, batch_size: int, epochs: int | None, prefetch: int) -> None:
    if n_rows < 1:
        raise ValueError("the shards have no rows; a batch needs some")
    if batch_size < 1 or (epochs is not None and epochs < 1) or prefetch < 0:
        raise ValueError(
            f"batch_size is {batch_size}, epochs {epochs}, prefetch {prefetch}; they must be at least 1, 1 or None, 0"
        )


def _itemsize(dtype: torch.dtype, wanted: torch.dtype | None) -> int:
    """Return the bytes of a value while its batch is made: as read, and as converted beside it."""
    return dtype.itemsize + (wanted.itemsize if wanted not in (None, dtype) else 0)


def _round_keys(key: tuple[int, ...], rounds: int) -> list[list[np.uint32]]:
    """Return two words for each round, any change of the key changing all."""
    text = ",".join(str(int(k)) for k in key)
    words = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * rounds), dtype="<u4")
    return [[np.uint32(w) for w in pair] for pair in words.reshape(rounds, 2)]


def _network(x: UInt64[np.ndarray, " i"], a: int, b: int, keys: list[list[np.uint32]]) -> UInt64[np.ndarray, " i"]:
    """Return the image of points of Z_a x Z_b: each round adds a function of one half to the other half."""
    high = x // np.uint64(b)
    low = (x - high * np.uint64(b)).astype(np.uint32)
    halves, sizes = [high.astype(np.uint32), low], (a, b)
    for i, pair in enumerate(keys):
        side = i % 2
        size, moved = np.uint32(sizes[side]), halves[side]
        moved += _hashed(halves[1 - side], pair, sizes[side])
        halves[side] = np.minimum(
            moved, moved - size
        )  # modulo: the difference wraps round where nothing is to be taken
    return halves[0].astype(np.uint64) * np.uint64(b) + halves[1]


def _hashed(x: UInt32[np.ndarray, " i"], pair: list[np.uint32], size: int) -> UInt32[np.ndarray, " i"]:
    """Return keyed numbers below `size`: the finaliser of MurmurHash3, a key before and one within."""
    h = x ^ pair[0]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
        h += pair[1]
    h ^= h >> np.uint32(16)
    return ((h.astype(np.uint64) * np.uint64(size)) >> np.uint64(32)).astype(np.uint32)


def _memory() -> int:
    """Return the bytes of memory of this machine, or as good as endless where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


@cache
def _madvise() -> Callable[..., int] | None:
    """Return the system's madvise, or None where there is none: such a system reads as it always does."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call


def _advise(address: int, size: int, advice: int) -> None:
    """Give the kernel advice on the pages of a range of memory; it is free to refuse."""
    if (call := _madvise()) is not None:
        page = address & -mmap.PAGESIZE
        call(page, address + size - page, advice)
