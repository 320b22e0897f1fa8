"""Text to token batches: BOS, padding, masks; and documents packed into windows of one length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.extras import MissingError

PACKINGS = ("joined", "masked", "documents")
CHUNK = 256  # documents encoded in one call of the tokenizer


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows of token ids; `mask` marks real tokens, `special` BOS and its like among them (by id)."""

    ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    special: Bool[Tensor, "b t"]


@dataclass(frozen=True)
class Packed(TokenBatch):
    """Windows of documents: which document each token is from (-1: pad, or a BOS that all share), where it stands.

    `positions` are those that the model sees (-1: pad). They count from the window's first token where documents are
    joined and attention runs across them, from each document's first one where they are `masked` from each other.
    """

    documents: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    masked: bool = False


@dataclass(frozen=True)
class Window:
    """One row of a packed batch without its pads: token ids, and the document of each (-1: a BOS that all share)."""

    ids: np.ndarray  # int32 [n]
    documents: np.ndarray  # int32 [n]


def need_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer; raises MissingError where there is none."""
    if tokenizer is None:
        raise MissingError("the model has no tokenizer; pass load_model(..., tokenizer=...) or give token ids")
    return tokenizer


def encode(tokenizer: Any, text: str, *, add_bos: bool = True) -> list[int]:
    """Return the token ids of one text, with the tokenizer's BOS in front if it has one.

    A text that already begins with BOS (a chat template's, say) gets no second one, and no other special token is
    added. A tokenizer without BOS, or with a CLS token, belongs to an encoder or to a model that needs neither: it adds
    what its own template says ([CLS] and [SEP] for BERT, </s> for T5, nothing for Qwen).
    """
    return encode_many(tokenizer, [text], add_bos=add_bos)[0]


def encode_many(tokenizer: Any, texts: Sequence[str], *, add_bos: bool = True) -> list[list[int]]:
    """Return the token ids of each text by the rule of `encode`; one call of a fast tokenizer."""
    bos = tokenizer.bos_token_id
    template = add_bos and (bos is None or getattr(tokenizer, "cls_token_id", None) is not None)
    options: dict[str, Any] = {"add_special_tokens": template, "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        rows = tokenizer(list(texts), return_attention_mask=False, **options)["input_ids"] if texts else []
    else:
        rows = [tokenizer(text, **options)["input_ids"] for text in texts]
    if not add_bos or template or bos is None:
        return [list(ids) for ids in rows]
    front = [bos]
    return [list(ids) if ids[:1] == front else front + list(ids) for ids in rows]


def special_ids_of(tokenizer: Any) -> frozenset[int]:
    """Return the ids of a tokenizer's special tokens, those too that were added without a role (chat headers, say)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def pad_id(tokenizer: Any) -> int:
    """Return the id that fills pads: the pad token, else EOS, else 0. Masks, never ids, tell pads from tokens."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def pad_rows(
    rows: Sequence[Sequence[int]], *, fill: int = 0, special_ids: Iterable[int] = (), side: str = "right"
) -> TokenBatch:
    """Return token-id rows as one batch, padded on the `side` given ("left" or "right")."""
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}; it must be 'left' or 'right'")
    width = max((len(r) for r in rows), default=0)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.tensor(list(row), dtype=torch.long)
        mask[i, at] = True
    return TokenBatch(ids, mask, special_mask(ids, special_ids) & mask)


def special_mask(ids: Int[Tensor, "*shape"], special_ids: Iterable[int]) -> Bool[Tensor, "*shape"]:
    """Return which ids are special ones."""
    return torch.isin(ids, torch.tensor(sorted(special_ids), dtype=torch.long, device=ids.device))


def tokenize(
    tokenizer: Any, texts: str | Sequence[str], *, add_bos: bool = True, max_len: int | None = None, side: str = "right"
) -> TokenBatch:
    """Return texts as one padded batch, rows cut to `max_len` tokens (BOS counted) where it is given.

    A tokenizer without BOS adds none; one without pad token pads with EOS or 0, and the mask tells. An empty text is a
    row of BOS alone, or of no token. Special tokens are told by `special_ids_of`.
    Raises MissingError without a tokenizer.
    """
    need_tokenizer(tokenizer)
    if max_len is not None and max_len < 1:
        raise ValueError(f"max_len is {max_len}; it must be at least 1")
    texts = [texts] if isinstance(texts, str) else texts
    rows = [encode(tokenizer, text, add_bos=add_bos)[:max_len] for text in texts]
    return pad_rows(rows, fill=pad_id(tokenizer), special_ids=special_ids_of(tokenizer), side=side)


def pack(
    tokenizer: Any,
    texts: Iterable[Any],
    ctx: int,
    *,
    batch_size: int = 32,
    add_bos: bool = True,
    separate: bool = True,
    packing: str = "joined",
) -> Iterator[Packed]:
    """Yield batches of `batch_size` windows (see `windows`), padded on the right to `ctx` columns."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rows = windows(tokenizer, texts, ctx, add_bos=add_bos, separate=separate, packing=packing)
    special_ids, fill = special_ids_of(tokenizer), pad_id(tokenizer)
    while taken := list(islice(rows, batch_size)):
        yield collate(taken, ctx, fill=fill, special_ids=special_ids, masked=packing == "masked")


def windows(
    tokenizer: Any,
    texts: Iterable[Any],
    ctx: int,
    *,
    add_bos: bool = True,
    separate: bool = True,
    packing: str = "joined",
) -> Iterator[Window]:
    """Yield the documents (texts, or token ids) as windows of at most `ctx` tokens, in order, nothing lost.

    "joined": each window is one BOS and then documents end to end, which see each other; only the last is shorter.
    "masked": the same, but every document, or part of one, begins with a BOS of its own and is not to see the others.
    "documents": each document has windows to itself, every one with BOS.
    With `separate` the tokenizer's EOS, if it has one, ends each document. Texts are read as they are needed.
    Raises MissingError for texts without a tokenizer, ValueError for a ctx that leaves no room beside BOS.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}; it must be one of: {', '.join(PACKINGS)}")
    bos = getattr(tokenizer, "bos_token_id", None) if add_bos else None
    if ctx < 1 + (bos is not None):
        raise ValueError(f"ctx {ctx} leaves no room for text beside BOS")
    end = getattr(tokenizer, "eos_token_id", None) if separate else None
    documents = _encoded(tokenizer, texts, bos, end, template=add_bos and packing != "joined")
    return _joined(documents, ctx, bos) if packing == "joined" else _apart(documents, ctx, bos, packing == "masked")


def collate(rows: Sequence[Window], ctx: int, *, fill: int, special_ids: Iterable[int], masked: bool = False) -> Packed:
    """Return windows as one batch of `ctx` columns, padded on the right."""
    ids = np.full((len(rows), ctx), fill, dtype=np.int64)
    documents = np.full((len(rows), ctx), -1, dtype=np.int64)
    positions = np.full((len(rows), ctx), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], documents[i, :n] = row.ids, row.documents
        positions[i, :n] = _restarting(row.documents) if masked else np.arange(n)
    mask = torch.from_numpy(positions >= 0)
    held = torch.from_numpy(ids)
    special = special_mask(held, special_ids) & mask
    return Packed(held, mask, special, torch.from_numpy(documents), torch.from_numpy(positions), masked)


def _restarting(documents: np.ndarray) -> np.ndarray:
    """Return positions that count from 0 at each change of document."""
    columns = np.arange(len(documents))
    starts = np.r_[True, documents[1:] != documents[:-1]] if len(documents) else np.zeros(0, bool)
    return columns - np.maximum.accumulate(np.where(starts, columns, 0))


def _encoded(
    tokenizer: Any, texts: Iterable[Any], bos: int | None, end: int | None, template: bool
) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield (number of the first, token ids of each) for ever larger groups of documents, BOS taken off."""
    source, first, size = iter(texts), 0, 1
    own = template and bos is None  # an encoder's template, which says itself what ends a document
    while group := list(islice(source, size)):
        if isinstance(group[0], str):
            rows = encode_many(need_tokenizer(tokenizer), group, add_bos=own)
        else:
            rows = [[int(i) for i in document] for document in group]
        rows = [row[1:] if row and row[0] == bos else row for row in rows]  # one BOS a window, and that is ours
        if end is not None and not own:
            rows = [[*row, end] for row in rows]
        yield first, rows
        first, size = first + len(group), min(2 * size, CHUNK)


def _joined(documents: Iterator[tuple[int, list[list[int]]]], ctx: int, bos: int | None) -> Iterator[Window]:
    front = np.array([] if bos is None else [bos], dtype=np.int32)
    no_document = np.full(len(front), -1, dtype=np.int32)
    room = ctx - len(front)
    ids = owners = np.zeros(0, dtype=np.int32)
    for first, rows in documents:
        counts = [len(row) for row in rows]
        ids = np.concatenate([ids, np.fromiter(chain.from_iterable(rows), np.int32, sum(counts))])
        numbers = np.arange(first, first + len(rows), dtype=np.int32)
        owners = np.concatenate([owners, np.repeat(numbers, counts)])
        whole = len(ids) // room * room
        for at in range(0, whole, room):
            part = slice(at, at + room)
            yield Window(np.concatenate([front, ids[part]]), np.concatenate([no_document, owners[part]]))
        ids, owners = ids[whole:], owners[whole:]
    if len(ids):
        yield Window(np.concatenate([front, ids]), np.concatenate([no_document, owners]))


def _apart(
    documents: Iterator[tuple[int, list[list[int]]]], ctx: int, bos: int | None, share: bool
) -> Iterator[Window]:
    """Yield windows of documents that each begin with BOS; several share a window where `share` is set."""
    front = [] if bos is None else [bos]
    ids: list[int] = []
    owners: list[int] = []
    for first, rows in documents:
        for number, row in enumerate(rows, first):
            while row:
                room = ctx - len(ids) - len(front)
                if room < 1 or (ids and not share):
                    yield _window(ids, owners)
                    ids, owners = [], []
                    continue
                piece, row = [*front, *row[:room]], row[room:]
                ids, owners = ids + piece, owners + [number] * len(piece)
    if ids:
        yield _window(ids, owners)


def _window(ids: list[int], owners: list[int]) -> Window:
    return Window(np.array(ids, dtype=np.int32), np.array(owners, dtype=np.int32))
