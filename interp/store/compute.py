"""The model's side of a harvest: shards of windows in, rows out, into buffers that are used again and again."""

import queue
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from interp.acts.rows import nonfinite, outlying, row_norms
from interp.model.hooks import reading
from interp.model.tokens import Packed, Window
from interp.store.job import Job
from interp.store.writer import Rows, Sink

BUFFERS = 2  # one filled by the model while the other is written


class Harvester:
    """Runs the model over one shard of windows after another.

    What a batch holds depends on the sequences' numbers alone.
    """

    def __init__(self, job: Job):
        self.job = job
        self._free: queue.SimpleQueue[dict[str, Tensor]] = queue.SimpleQueue()
        self._made = 0

    def shard(self, number: int, windows: list[Window], writer: Sink, update: Callable[[int], Any]) -> int:
        """Compute the rows of a shard and hand them to the writer; returns how many. `update` is told of each batch."""
        size = self.job.cut.batch_size
        buffers = self._buffers()
        batch = _Batches(self.job, buffers)
        with reading(self.job.model, self.job.hooks, batch.note):
            for at in range(0, len(windows), size):
                update(batch.run(self.job.cut.collate(windows[at : at + size])))
        rows = batch.rows(number)
        writer.put(rows, lambda: self._free.put(buffers))
        return len(rows.token_ids)

    def _buffers(self) -> dict[str, Tensor]:
        """Return room for the largest shard at every hook point, waiting for the writer where all is in use."""
        if self._made == BUFFERS:
            return self._free.get()
        self._made += 1
        job, pinned = self.job, self.job.model.device.type == "cuda"
        most = job.cut.per_shard * job.settings["ctx"]
        if job.settings["tokens"] is not None:
            most = min(most, job.settings["tokens"])
        shapes = {hook: (most, job.model.hook_point(hook).d) for hook in job.hooks}
        return {hook: torch.empty(shape, dtype=job.dtype, pin_memory=pinned) for hook, shape in shapes.items()}


def measured(job: Job, windows: list[Window], repeats: int) -> float:
    """Return the median seconds of one batch, after one that is not counted."""
    width = len(windows) * job.settings["ctx"]
    room = {hook: torch.empty(width, job.model.hook_point(hook).d, dtype=job.dtype) for hook in job.hooks}
    times = []
    for _ in range(repeats + 1):
        batch, begun = _Batches(job, room), time.perf_counter()
        with reading(job.model, job.hooks, batch.note):
            batch.run(job.cut.collate(windows))
        batch.rows(0)
        times.append(time.perf_counter() - begun)
    return median(times[1:])


class _Batches:
    """The batches of one shard on their way into its buffers."""

    def __init__(self, job: Job, buffers: dict[str, Tensor]):
        self.job, self.buffers = job, buffers
        self.at = 0
        self._where: Tensor = torch.zeros(0, dtype=torch.long)  # the kept tokens of the batch, flattened
        self._batch_norms: dict[str, Tensor] = {}
        self._norms: list[Tensor] = []
        self._outliers: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._documents: list[Tensor] = []
        self._counts: list[Tensor] = []

    def run(self, batch: Packed) -> int:
        """Run the model over a batch; returns how many of its tokens are kept."""
        keep = self.job.cut.keep(batch)
        self._where = keep.flatten().nonzero().squeeze(1)
        self._counts.append(keep.sum(1))
        count = len(self._where)
        if not count:
            return 0
        self._forward(batch)
        norms = torch.stack([self._batch_norms[hook] for hook in self.job.hooks], 1)
        self._norms.append(norms)
        if self.job.exclude.outlier is not None:
            self._outliers.append(outlying(norms.T, self.job.exclude.outlier))
        self._ids.append(batch.ids[keep])
        self._positions.append(batch.positions[keep])
        self._documents.append(batch.documents[keep])
        self.at += count
        return count

    def note(self, hook: str, value: Tensor) -> None:
        """Take the kept rows of a hook point's value [b, t, d] into the buffer."""
        flat = value.reshape(-1, value.shape[-1])
        target = self.buffers[hook][self.at : self.at + len(self._where)]
        if flat.device.type == "cpu" and flat.dtype == target.dtype:
            torch.index_select(flat, 0, self._where, out=target)
            stored = target
        else:
            stored = flat.index_select(0, self._where.to(flat.device)).to(target.dtype)
            target.copy_(stored, non_blocking=True)
        self._batch_norms[hook] = row_norms(stored).to(self.job.model.device)

    def _forward(self, batch: Packed) -> None:
        """Run the model; a batch that does not fit in memory is tried once more, the same, with the caches emptied."""
        positions = batch.positions if batch.masked else None
        for attempt in (1, 2):
            try:
                return self.job.model.run(batch.ids, batch.mask, positions=positions)
            except (RuntimeError, MemoryError) as error:
                if "memory" not in str(error) and not isinstance(error, MemoryError):
                    raise
                if attempt == 2:
                    shape = f"{self.job.settings['batch_size']} x {self.job.settings['ctx']}"
                    raise MemoryError(
                        f"a batch of {shape} tokens does not fit in memory; take a smaller --batch-size or --ctx and "
                        "another --out: sizes belong to what makes a store reproducible"
                    ) from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def rows(self, shard: int) -> Rows:
        """Return what is to be written, outliers left out; raises NonFiniteError for inf or nan."""
        empty = [torch.zeros(0, dtype=torch.long)]
        ids, positions, documents = (torch.cat(x or empty) for x in (self._ids, self._positions, self._documents))
        norms = torch.cat([n.to("cpu") for n in self._norms] or [torch.zeros(0, len(self.job.hooks))])
        values = {hook: buffer[: self.at] for hook, buffer in self.buffers.items()}
        self._check(values, norms, positions, documents)
        counts = torch.cat(self._counts)
        dropped = torch.cat([o.to("cpu") for o in self._outliers] or [torch.zeros(len(ids), dtype=torch.bool)])
        if bool(dropped.any()):
            kept = ~dropped
            sequence = torch.arange(len(counts)).repeat_interleave(counts)[kept]
            counts = torch.bincount(sequence, minlength=len(counts))
            ids, positions, documents, norms = (x[kept] for x in (ids, positions, documents, norms))
            values = {hook: rows[kept] for hook, rows in values.items()}
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        first = shard * self.job.cut.per_shard
        return Rows(shard, first, values, norms, ids, positions, documents, offsets)

    def _check(self, values: dict[str, Tensor], norms: Tensor, positions: Tensor, documents: Tensor) -> None:
        """Raise NonFiniteError for the first row with inf or nan, by its norm."""
        for i, hook in enumerate(self.job.hooks):
            for row in (~torch.isfinite(norms[:, i])).nonzero().squeeze(1).tolist():
                if bool(torch.isfinite(values[hook][row]).all()):  # finite, and its square overflows
                    norms[row, i] = values[hook][row].double().norm().clamp(max=torch.finfo(torch.float32).max)
                    continue
                raise nonfinite(hook, int(documents[row]), int(positions[row]), values[hook][row])
