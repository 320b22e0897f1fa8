"""Text to token batches: BOS, padding, masks, packing; and the sources of text."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.extras import MissingError

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows of token ids; `mask` marks real tokens, `special` BOS and its like among them (by id)."""

    ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    special: Bool[Tensor, "b t"]


@dataclass(frozen=True)
class Packed(TokenBatch):
    """Full windows of joined documents: which document each token is from (-1: BOS or pad), and where it stands.

    `positions` count from 0 at the window's first token (-1: pad): that is what the model sees, since attention runs
    across the documents of a window.
    """

    documents: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]


def need_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer; raises MissingError where there is none."""
    if tokenizer is None:
        raise MissingError("the model has no tokenizer; pass load_model(..., tokenizer=...) or give token ids")
    return tokenizer


def encode(tokenizer: Any, text: str, *, add_bos: bool = True) -> list[int]:
    """Return the token ids of one text, with the tokenizer's BOS in front if it has one.

    A text that already begins with BOS (a chat template's, say) gets no second one. No other special token is added.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return [bos, *ids] if add_bos and bos is not None and ids[:1] != [bos] else ids


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
    row of BOS alone, or of no token. Special tokens are told by `tokenizer.all_special_ids`.
    Raises MissingError without a tokenizer.
    """
    need_tokenizer(tokenizer)
    if max_len is not None and max_len < 1:
        raise ValueError(f"max_len is {max_len}; it must be at least 1")
    texts = [texts] if isinstance(texts, str) else texts
    rows = [encode(tokenizer, text, add_bos=add_bos)[:max_len] for text in texts]
    return pad_rows(rows, fill=pad_id(tokenizer), special_ids=tokenizer.all_special_ids, side=side)


def pack(
    tokenizer: Any, texts: Iterable[str], ctx: int, *, batch_size: int = 32, add_bos: bool = True, separate: bool = True
) -> Iterator[Packed]:
    """Yield batches of windows of `ctx` tokens, each one BOS and then joined documents.

    For unlabelled text: nothing is lost and nothing padded but the end of the last window. With `separate` the
    tokenizer's EOS, if it has one, ends each document. The texts are read as they are needed.
    Raises ValueError for a ctx that leaves no room beside BOS.
    """
    need_tokenizer(tokenizer)
    bos = tokenizer.bos_token_id if add_bos else None
    room = ctx - (bos is not None)
    if room < 1 or batch_size < 1:
        raise ValueError(f"ctx {ctx} and batch_size {batch_size} leave no room for text")
    rows: list[list[tuple[int, int]]] = []
    for row in _windows(tokenizer, texts, room, separate):
        rows.append(row)
        if len(rows) == batch_size:
            yield _packed(rows, ctx, bos, tokenizer)
            rows = []
    if rows:
        yield _packed(rows, ctx, bos, tokenizer)


def _windows(tokenizer: Any, texts: Iterable[str], room: int, separate: bool) -> Iterator[list[tuple[int, int]]]:
    """Yield lists of `room` (token id, document) pairs; the last may be shorter."""
    end = tokenizer.eos_token_id if separate else None
    waiting: list[tuple[int, int]] = []
    for document, text in enumerate(texts):
        ids = encode(tokenizer, text, add_bos=False)
        if ids and ids[0] == tokenizer.bos_token_id:  # one BOS a window, and that is ours
            ids = ids[1:]
        waiting += [(i, document) for i in [*ids, *([] if end is None else [end])]]
        while len(waiting) >= room:
            yield waiting[:room]
            waiting = waiting[room:]
    if waiting:
        yield waiting


def _packed(rows: list[list[tuple[int, int]]], ctx: int, bos: int | None, tokenizer: Any) -> Packed:
    front = [] if bos is None else [(bos, -1)]
    full = [front + row for row in rows]
    batch = pad_rows([[i for i, _ in r] for r in full], fill=pad_id(tokenizer), special_ids=tokenizer.all_special_ids)
    missing = ctx - batch.ids.shape[1]
    if missing:  # a lone short window: keep the width that was asked for
        fill = torch.full((len(rows), missing), pad_id(tokenizer), dtype=torch.long)
        none = torch.zeros(len(rows), missing, dtype=torch.bool)
        batch = TokenBatch(*(torch.cat(p, 1) for p in ((batch.ids, fill), (batch.mask, none), (batch.special, none))))
    documents = torch.full_like(batch.ids, -1)
    for i, row in enumerate(full):
        documents[i, : len(row)] = torch.tensor([d for _, d in row])
    positions = torch.where(batch.mask, torch.arange(ctx).expand_as(batch.ids), -1)
    return Packed(batch.ids, batch.mask, batch.special, documents, positions)


def read_source(source: str | Iterable[str], *, field: str = "text") -> Iterator[str]:
    """Yield the documents of "text:FILE", "jsonl:FILE", or of any iterable of texts.

    A text file holds documents between lines of `<|endoftext|>`, or, where there are none, between blank lines; it is
    read as it is needed. A jsonl file holds one object a line, its text under `field`.
    Raises, at the call, MissingError where the file is not there and ValueError for an empty one or an unknown kind;
    ValueError while reading for a line that is not such an object, with its number.
    """
    if not isinstance(source, str):
        return iter(source)
    kind, _, name = source.partition(":")
    readers = {"text": _text_documents, "jsonl": lambda path: _jsonl_documents(path, field)}
    if kind not in readers or not name:
        raise ValueError(f"source {source!r} is of no known kind; use {' or '.join(f'{k}:FILE' for k in readers)}")
    path = Path(name).expanduser()
    if not path.is_file():
        raise MissingError(f"there is no file {name}")
    documents = readers[kind](path)
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{name} holds no text")
    return _chain(first, documents)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _text_documents(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="strict") as file:
        marked = any(line.strip() == END_OF_TEXT for line in file)
        file.seek(0)
        lines: list[str] = []
        for line in file:
            ends = line.strip() == END_OF_TEXT if marked else not line.strip()
            if not ends:
                lines.append(line)
            elif "".join(lines).strip():
                yield "".join(lines).strip("\n")
                lines = []
        if "".join(lines).strip():
            yield "".join(lines).strip("\n")


def _jsonl_documents(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is no JSON: {error.msg}") from error
            if not (isinstance(record, dict) and isinstance(record.get(field), str)):
                held = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{path} line {number} has no text under {field!r}; it holds {held}")
            if re.search(r"\S", record[field]):
                yield record[field]
