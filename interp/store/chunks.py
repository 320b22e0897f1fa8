"""What a stream is made of: a text as chunks of windows that can be sought again, and the rows a model makes of one."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from interp.acts.rows import outlying
from interp.model import tokens as tok
from interp.model.anatomy import AnatomyError
from interp.model.forward import kept_rng
from interp.model.loading import Model
from interp.model.tokens import Window
from interp.store.compute import Harvester
from interp.store.job import Job
from interp.store.plan import Text
from interp.store.writer import Rows

WHOLE = 1 << 40  # more tokens than a document has


class Stopped(Exception):
    """Somebody asked for the work to end; what was planned is kept."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a text a chunk begins, and what tells the text from another."""

    epoch: int
    chunk: int
    document: int
    """The document of its first token."""
    token: int
    """How many tokens of that document stand in earlier chunks."""
    before: str
    """Checksum of the documents in front of that one."""
    windows: str
    """Checksum of the chunk's own tokens."""


@dataclass(frozen=True)
class Chunk:
    """Windows that are computed, and shuffled, together."""

    place: Place
    windows: list[Window]
    rows: int  # before outliers are left out


class Passage:
    """One reading of a text, chunk after chunk, from its beginning or from a place in it.

    Windows are those of a harvest, whatever the chunks and wherever the reading began: to begin at a place, documents
    in front of it are read for their checksum and not tokenised, and of its first document the tokens that stand in
    earlier chunks are taken off.
    """

    def __init__(self, job: Job, documents: Iterator[Any], limit: int, epoch: int, at: Place | None = None):
        self.job, self.limit, self.epoch = job, limit, epoch
        self.cut = 0 if at is None else at.chunk  # chunks that lie behind
        self._base = 0 if at is None else at.document  # the number of the first document that is tokenised here
        self._ended = (-1, 0) if at is None else (at.document, at.token)  # last document so far, tokens seen of it
        self._text = Text(())
        self._before: dict[int, str] = {}  # checksum of what stands in front of each document that may begin a chunk
        self._source = job.cut.windows(self._told(documents, at))
        self._windows: list[Window] = []  # of the chunk that is being cut
        self._kept = 0

    def next(self, stopped: Callable[[], bool]) -> Chunk | None:
        """Return the next chunk: windows for at least `limit` rows, fewer at the end of the text; None past it.

        Raises Stopped where `stopped()` says so; the next call goes on with what was read.
        """
        cut = self.job.cut
        while self._kept < self.limit:
            if stopped():
                raise Stopped
            batch = list(islice(self._source, cut.batch_size))
            if not batch:
                break
            self._windows += batch
            self._kept += int(cut.keep(cut.collate(batch)).sum())
        if not self._windows:
            return None
        windows, rows = [self._numbered(window) for window in self._windows], self._kept
        self._windows, self._kept = [], 0
        return Chunk(self._place(windows), windows, rows)

    def _told(self, documents: Iterator[Any], at: Place | None) -> Iterator[Any]:
        """Yield the documents from a place on, noting what passes by."""
        if at is not None:
            for document in islice(documents, at.document):
                self._text.note(document)
            if self._text.read < at.document or self._text.checksum != at.before:
                raise another_text(f"the first {at.document:,} documents differ")
            first = next(documents, None)
            if first is None:
                raise another_text(f"it ends after {at.document:,} documents")
            self._note(first)
            yield self._rest(first, at.token) if at.token else first
        for document in documents:
            self._note(document)
            yield document

    def _note(self, document: Any) -> None:
        self._before[self._text.read] = self._text.checksum
        self._text.note(document)

    def _rest(self, document: Any, skip: int) -> list[int]:
        """Return a document without its first tokens, as ids that are cut like the whole."""
        settings, tokenizer = self.job.settings, self.job.model.tokenizer
        options = {"add_bos": settings["add_bos"], "packing": settings["packing"], "separate": False}
        window = next(tok.windows(tokenizer, [document], WHOLE, **options), None)
        if window is None:
            raise another_text("a document has no tokens any more")
        ids, front = window.ids.tolist(), int(self._fronted)
        return ids[:front] + ids[front + skip :]

    @property
    def _fronted(self) -> bool:
        """Whether BOS is put in front of text."""
        bos = getattr(self.job.model.tokenizer, "bos_token_id", None)
        return bool(self.job.settings["add_bos"]) and bos is not None

    def _numbered(self, window: Window) -> Window:
        if not self._base:
            return window
        documents = window.documents
        return Window(window.ids, np.where(documents < 0, documents, documents + self._base).astype(np.int32))

    def _place(self, windows: list[Window]) -> Place:
        """Return the place of a chunk, and remember where it ends."""
        digest = xxhash.xxh3_64()
        for window in windows:
            digest.update(len(window.ids).to_bytes(8, "little") + window.ids.tobytes())
        owners = np.concatenate([window.documents for window in windows])
        first, last = int(owners[owners >= 0][0]), int(owners[-1])
        token = self._ended[1] if self._ended[0] == first else 0
        count = int((owners == last).sum())
        if self._fronted and self.job.settings["packing"] != "joined":
            count -= sum(
                bool((window.documents == last).any()) for window in windows
            )  # each piece has a BOS of its own
        self._ended = (last, count + (token if last == first else 0))
        before = self._before[first]
        self._before = {number: value for number, value in self._before.items() if number >= last}
        self.cut += 1
        return Place(
            epoch=self.epoch, chunk=self.cut - 1, document=first, token=token, before=before,
            windows=digest.hexdigest(),
        )  # fmt: skip


def another_text(how: str) -> ValueError:
    """Return the error for a state that is of another text."""
    return ValueError(f"the state is of another text than the one given: {how}; give the text that it was made with")


def read_already() -> ValueError:
    """Return the error for a text that would have to be read again."""
    return ValueError("the text is an iterator, which is read once and forwards; give it afresh, or a list of it")


@dataclass(frozen=True)
class Loaded:
    """The rows of a chunk: values as computed, which of them count, and whom to tell that they are used up."""

    chunk: Chunk
    values: dict[str, Float[Tensor, "computed _"]]
    kept: Int[Tensor, " rows"]
    release: Callable[[], Any]


class _Taken:
    """A sink that holds what it was given."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.done: Callable[[], Any] = lambda: None

    def put(self, rows: Rows, done: Callable[[], Any]) -> None:
        self.rows, self.done = rows, done


class Computer:
    """Makes the rows of chunks, the same as those of a harvest, in two buffers that are used in turn."""

    def __init__(self, job: Job, limit: int):
        self.outlier = job.exclude.outlier
        slots = job.settings["ctx"] * job.cut.batch_size
        # room for all rows of a chunk; outliers are left out here, by number, where a harvest copies the others
        cut = replace(job.cut, batches_per_shard=math.ceil(limit / slots) + 1)
        self.job = replace(job, exclude=replace(job.exclude, outlier=None), cut=cut)
        self._harvester = Harvester(self.job)
        self._stream: Any = None

    def use(self, model: Model) -> None:
        """Compute by this model from now on, on the GPU beside what the caller does there."""
        self._harvester.job = replace(self.job, model=model)  # its buffers stay
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))

    def rows(self, chunk: Chunk, stopped: Callable[[], bool]) -> Loaded:
        """Return the rows of a chunk. Raises Stopped, between two batches, where `stopped()` says so."""
        taken = _Taken()

        def update(_: int) -> None:
            if stopped():
                raise Stopped

        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._harvester.shard(chunk.place.chunk, chunk.windows, taken, update)
        except BaseException:
            self._harvester = Harvester(self._harvester.job)  # the buffer of the chunk is lost
            raise
        assert taken.rows is not None
        return Loaded(chunk, dict(taken.rows.values), self._kept(taken.rows), taken.done)

    def _kept(self, rows: Rows) -> Int[Tensor, " kept"]:
        """Return the numbers of the rows that are no outliers, each batch judged by its own median as in a harvest."""
        if self.outlier is None:
            return torch.arange(len(rows.token_ids))
        windows = len(rows.offsets) - 1
        ends = [*range(self.job.cut.batch_size, windows, self.job.cut.batch_size), windows]
        counts = rows.offsets[torch.tensor(ends)].diff(prepend=torch.zeros(1, dtype=torch.long))
        out = [outlying(norms.T, self.outlier) for norms in rows.norms.split(counts.tolist())]
        return (~torch.cat(out)).nonzero().squeeze(1)


class Producer:
    """Loads one chunk after the other, epoch after epoch; `seek` goes to any of them."""

    def __init__(self, job: Job, begin: Callable[[], Iterator[Any]], limit: int, epochs: int | None):
        self.job, self.limit, self.epochs, self._begin = job, limit, epochs, begin
        self.computer = Computer(job, limit)
        self._passage: Passage | None = None
        self._todo: Chunk | None = None  # cut, and not computed yet
        self._rows = 0  # of this epoch

    def load(self, stopped: Callable[[], bool]) -> Loaded | None:
        """Return the next chunk's rows, None at the end. What stops it loses nothing: the next call begins there."""
        chunk = self.next(stopped)
        if chunk is None:
            return None
        self._todo = chunk
        loaded = self.computer.rows(chunk, stopped)
        self._todo = None
        return loaded

    def next(self, stopped: Callable[[], bool]) -> Chunk | None:
        """Return the next chunk's windows, None at the end. Raises ValueError for a text that gives no rows."""
        if self._todo is not None:
            chunk, self._todo = self._todo, None
            return chunk
        if self._passage is None:
            self._passage = Passage(self.job, self._begin(), self.limit, 0)
        while (chunk := self._passage.next(stopped)) is None:
            if not self._rows:
                raise ValueError("the text gives no rows: it is empty, or everything in it is excluded")
            epoch = self._passage.epoch + 1
            if epoch == self.epochs:
                return None
            self._passage, self._rows = Passage(self.job, self._begin(), self.limit, epoch), 0
        self._rows += chunk.rows
        return chunk

    def back(self, loaded: Loaded) -> None:
        """Take a chunk back: it is the next one to be loaded."""
        loaded.release()
        self._todo = loaded.chunk

    def begin(self, forwards: bool) -> None:
        """Go to the beginning of the text. Raises ValueError where it was left, and cannot be read again."""
        if not forwards:
            self._passage = self._todo = None
        elif self._passage is not None and (self._todo is None or self._todo.place.chunk):
            raise read_already()

    def seek(self, at: Place, forwards: bool) -> None:
        """Make the chunk at a place the next one; `forwards`: by reading on, where the text cannot be read again.

        Raises ValueError where the text is another than the place was in, or the place lies behind.
        """
        going = forwards and self._passage is not None
        if not going:
            self._todo, self._rows = None, 1  # an earlier chunk had some
            self._passage = Passage(self.job, self._begin(), self.limit, at.epoch, at)
        chunk = self.next(lambda: False)
        while going and chunk is not None and chunk.place.chunk < at.chunk:
            chunk = self.next(lambda: False)
        if chunk is None or chunk.place != at:
            last = self._passage.cut if chunk is None and self._passage is not None else at.chunk
            if going and (last > at.chunk or (chunk is not None and chunk.place.chunk > at.chunk)):
                raise read_already()
            raise another_text(f"its tokens from document {at.document:,} on differ")
        self._todo = chunk


def can_copy(model: Model) -> bool:
    """Whether `apart` can copy a model: not a TransformerBridge, and neither dispatched nor quantised."""
    quantised = getattr(model.hf, "hf_quantizer", None) or getattr(model.hf, "quantization_method", None)
    return model.backend == "native" and not model.offloaded and quantised is None


def apart(job: Job) -> Model:
    """Return the job's model once more, its modules copied and every weight shared, for a thread of its own.

    Hook points are hooks on modules, and evaluation mode is a flag on them: two threads that run one model would read
    each other's values. Foreign hooks on the model go on working in the copy. Raises ValueError where a context of ours
    is open on it, which the copy would keep for ever.
    """
    model, hf = job.model, job.model.hf
    memo: dict[int, Any] = {id(t): t for t in chain(hf.parameters(), hf.buffers())}
    for module in hf.modules():
        for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
            if str(getattr(hook, "__module__", "")).startswith("interp."):
                raise ValueError(
                    f"a context that reads or edits {model.name} is open, which a stream read ahead in the background "
                    "cannot follow; begin to read outside of it, or give prefetch=False"
                )
            memo[id(hook)] = hook
    with kept_rng(model.device):
        own = Model(copy.deepcopy(hf, memo), model.tokenizer, name=model.name, blocks=model.blocks_path)
        _settle(own, job)
    return own


def _settle(model: Model, job: Job) -> None:
    """Run padded rows once: what a Model finds out then, random state put aside, is not to be found in the thread."""
    rows = [Window(np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)) for n in (2, 1)]
    batch = job.cut.collate(rows)
    with suppress(AnatomyError):  # raised again should such rows come
        model.run(batch.ids, batch.mask, positions=batch.positions if batch.masked else None)
