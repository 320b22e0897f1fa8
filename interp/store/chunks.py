"""What a stream is made of: a text as chunks of windows that can be sought again, and the rows a model makes of one."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from interp.acts.rows import outlying
from interp.model import tokens as tok
from interp.model.loading import Model
from interp.model.tokens import Window
from interp.store.compute import Harvester
from interp.store.job import Job
from interp.store.plan import Text
from interp.store.shuffle import permute
from interp.store.writer import Rows

WHOLE = 1 << 40  # more tokens than a document has


class Stopped(Exception):
    """Somebody asked for the work to end; what was planned is kept."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a text a chunk lies, and what tells the text from another."""

    epoch: int
    block: int
    chunk: int
    """Of the block, from 0."""
    document: int
    """The document of the block's first token."""
    token: int
    """How many tokens of that document stand in earlier blocks."""
    before: str
    """Checksum of the documents in front of that one."""
    windows: str
    """Checksum of the block's own tokens."""


@dataclass(frozen=True)
class Chunk:
    """Windows that are computed together, and whose rows are shuffled together."""

    place: Place
    windows: list[Window]
    rows: int  # before outliers are left out


@dataclass(frozen=True)
class Block:
    """Windows that follow each other in the text; `place` is that of its first chunk."""

    place: Place
    windows: list[Window]

    def chunks(self, job: Job, limit: int, seed: int | None) -> list[Chunk]:
        """Return the block as chunks of about equally many rows, `limit` and a batch at most.

        With a seed, windows are in the order of a permutation: a chunk holds windows from all over the block.
        """
        size, cut, place = job.cut.batch_size, job.cut, self.place
        order = range(len(self.windows))
        if seed is not None:
            order = shuffled(len(self.windows), (seed, place.epoch, place.block, 0)).tolist()
        batches = [[self.windows[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
        counts = [int(cut.keep(cut.collate(batch)).sum()) for batch in batches]
        share = sum(counts) / max(1, math.ceil(sum(counts) / limit))
        found: list[Chunk] = []
        windows: list[Window] = []
        rows = 0
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            windows, rows = windows + batch, rows + count
            if rows >= share > 0 or i == len(batches) - 1:
                found.append(Chunk(replace(place, chunk=len(found)), windows, rows))
                windows, rows = [], 0
        return found


def shuffled(n: int, key: tuple[int, ...]) -> Int[Tensor, " n"]:
    """Return the numbers below n in the order that belongs to a key."""
    if not n:
        return torch.zeros(0, dtype=torch.long)
    return torch.from_numpy(permute(np.arange(n, dtype=np.uint64), n, key).astype(np.int64))


class Passage:
    """One reading of a text, block after block, from its beginning or from a place in it.

    Windows are those of a harvest, whatever the blocks and wherever the reading began: to begin at a place, documents
    in front of it are read for their checksum and not tokenised, and of its first document the tokens that stand in
    earlier blocks are taken off.
    """

    def __init__(self, job: Job, documents: Iterator[Any], windows: int, epoch: int, at: Place | None = None):
        self.job, self.size, self.epoch = job, windows, epoch
        self.cut = 0 if at is None else at.block  # blocks that lie behind
        self._base = 0 if at is None else at.document  # the number of the first document that is tokenised here
        self._ended = (-1, 0) if at is None else (at.document, at.token)  # last document so far, tokens seen of it
        self._text = Text(())
        self._before: dict[int, str] = {}  # checksum of what stands in front of each document that may begin a block
        self._source = job.cut.windows(self._told(documents, at))
        self._windows: list[Window] = []  # of the block that is being cut

    def next(self, stopped: Callable[[], bool]) -> Block | None:
        """Return the next block, shorter at the end of the text; None past it.

        Raises Stopped where `stopped()` says so; the next call goes on with what was read.
        """
        while len(self._windows) < self.size:
            if stopped():
                raise Stopped
            some = list(islice(self._source, min(self.job.cut.batch_size, self.size - len(self._windows))))
            if not some:
                break
            self._windows += some
        if not self._windows:
            return None
        windows, self._windows = [self._numbered(window) for window in self._windows], []
        return Block(self._place(windows), windows)

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
        """Return the place of a block, and remember where it ends."""
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
            epoch=self.epoch, block=self.cut - 1, chunk=0, document=first, token=token, before=before,
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
    """Loads one chunk after the other, epoch after epoch; `seek` goes to any of them.

    `windows` is how many a block has, `limit` how many rows a chunk; without a seed everything is in text order.
    """

    def __init__(
        self, job: Job, begin: Callable[[], Iterator[Any]], windows: int, limit: int, *, seed: int | None,
        epochs: int | None, once: bool,
    ):  # fmt: skip
        self.job, self.windows, self.limit, self.seed = job, windows, limit, seed
        self.epochs, self.once, self._begin = epochs, once, begin
        self.computer = Computer(job, limit)
        self._passage: Passage | None = None
        self._recent: list[Block] = []  # the one that is computed, and the one before it
        self._coming: list[Block] = []  # read already, and left again by going back
        self._chunks: list[Chunk] = []  # of the block, not computed yet, the next one last
        self._rows = 0  # of this epoch
        self._lost = False  # an iterator was read beyond what was wanted

    def load(self, stopped: Callable[[], bool]) -> Loaded | None:
        """Return the next chunk's rows, None at the end. What stops it loses nothing: the next call begins there."""
        while not self._chunks:
            block = self._next(stopped)
            if block is None:
                return None
            self._enter(block)
        loaded = self.computer.rows(self._chunks[-1], stopped)
        self._chunks.pop()
        return loaded

    def _enter(self, block: Block) -> None:
        chunks = block.chunks(self.job, self.limit, self.seed)
        self._recent, self._chunks = [*self._recent[-1:], block], chunks[::-1]
        self._rows += sum(chunk.rows for chunk in chunks)

    def _next(self, stopped: Callable[[], bool]) -> Block | None:
        """Return the next block, None at the end. Raises ValueError for a text that gives no rows."""
        if self._lost:
            raise read_already()
        if self._coming:
            return self._coming.pop(0)
        if self._passage is None:
            self._passage = Passage(self.job, self._begin(), self.windows, 0)
        while (block := self._passage.next(stopped)) is None:
            if not self._rows:
                raise ValueError("the text gives no rows: it is empty, or everything in it is excluded")
            epoch = self._passage.epoch + 1
            if epoch == self.epochs:
                return None
            self._passage, self._rows = Passage(self.job, self._begin(), self.windows, epoch), 0
        return block

    def begin(self) -> None:
        """Go to the beginning of the text. Raises ValueError where it was left, and cannot be read again."""
        places = [block.place for block in self._recent]
        first = next((place for place in places if (place.epoch, place.block) == (0, 0)), None)
        if first is not None:
            self._enter(self._back(first))
        elif not self.once:
            self._passage, self._recent, self._coming, self._chunks = None, [], [], []
        elif places:
            raise read_already()

    def seek(self, at: Place) -> None:
        """Make the chunk at a place the next one; an iterator is read on to it, other texts are begun there.

        Raises ValueError where the text is another than the place was in, or lies behind and cannot be read again.
        """
        first = replace(at, chunk=0)
        if any(block.place == first for block in self._recent):
            block = self._back(first)
        else:
            block = self._forwards(first) if self.once and self._passage is not None else self._anew(first)
        self._enter(block)
        if not 0 <= at.chunk < len(self._chunks):
            raise ValueError(f"the state is at chunk {at.chunk} of a block of {len(self._chunks)}: it was changed")
        del self._chunks[len(self._chunks) - at.chunk :]

    def _back(self, at: Place) -> Block:
        """Return one of the recent blocks, those after it being the next ones again."""
        number = [block.place for block in self._recent].index(at)
        block = self._recent[number]
        self._coming = self._recent[number + 1 :] + self._coming
        self._recent = self._recent[:number]
        return block

    def _anew(self, at: Place) -> Block:
        passage = Passage(self.job, self._begin(), self.windows, at.epoch, at)
        block = passage.next(lambda: False)
        if block is None or block.place != at:
            raise another_text(f"its tokens from document {at.document:,} on differ")
        self._passage, self._recent, self._coming = passage, [], []
        self._rows = at.block  # earlier blocks had some
        return block

    def _forwards(self, at: Place) -> Block:
        """Return a later block of an iterator, which is lost for everything else where it is not found."""
        assert self._passage is not None
        ready = self._coming[0].place.block if self._coming else self._passage.cut
        if ready > at.block:
            raise read_already()
        block = None
        while ready <= at.block and (block := self._next(lambda: False)) is not None:
            ready += 1
        if block is None or block.place != at:
            self._lost = True
            raise another_text(f"its tokens from document {at.document:,} on differ")
        return block
