"""What a user gives to be read (texts, chats, token ids) as documents, and those as rows that a model takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.model import tokens
from interp.model.loading import Model

LONG = ("error", "cut", "windows")
CHUNK = 256  # texts encoded in one call of the tokenizer


@dataclass(frozen=True)
class Documents:
    """Token ids of documents end to end; `texts` is None where some were given as ids."""

    ids: Int[Tensor, " n"]
    counts: Int[Tensor, " documents"]
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def starts(self) -> Int[Tensor, " documents"]:
        """Where each document begins in `ids`."""
        return self.counts.cumsum(0) - self.counts

    @property
    def positions(self) -> Int[Tensor, " n"]:
        """The place of each token in its document, from 0."""
        return torch.arange(len(self.ids)) - self.starts.repeat_interleave(self.counts)

    @property
    def numbers(self) -> Int[Tensor, " n"]:
        """The document of each token."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def rows(self) -> list[Tensor]:
        """Return the ids of each document, views."""
        return list(self.ids.split(self.counts.tolist()))


def is_chat(document: Any) -> bool:
    """Whether a document is a list of messages with role and content."""
    listed = isinstance(document, Sequence) and not isinstance(document, str) and len(document) > 0
    return listed and all(isinstance(message, Mapping) and "role" in message for message in document)


def read_documents(model: Model, given: Any, *, add_bos: bool = True, add_generation_prompt: bool = False) -> Documents:
    """Return documents as token ids: of texts (BOS in front), chats (by the tokenizer's template), ids as they are.

    One text or one chat is a document of its own. A chat is tokenized once, by its template alone, which says itself
    whether it begins with BOS. Raises MissingError for text without a tokenizer, ValueError for ids that the model
    does not have and for a chat without a template.
    """
    listed = [given] if isinstance(given, str) or is_chat(given) else list(given)
    rows: list[Tensor | None] = [None] * len(listed)
    texts: list[str | None] = [None] * len(listed)
    templated = [False] * len(listed)
    for i, document in enumerate(listed):
        if isinstance(document, str):
            texts[i] = document
        elif is_chat(document):
            texts[i], templated[i] = _rendered(model, i, document, add_generation_prompt), True
        else:
            rows[i] = _ids(i, document)
    for chat in (False, True):
        chosen = [(i, text) for i, text in enumerate(texts) if text is not None and templated[i] is chat]
        for at in range(0, len(chosen), CHUNK):
            part = chosen[at : at + CHUNK]
            tokenizer = tokens.need_tokenizer(model.tokenizer)
            found = tokens.encode_many(tokenizer, [text for _, text in part], add_bos=add_bos and not chat)
            for (i, _), ids in zip(part, found, strict=True):
                rows[i] = torch.from_numpy(np.array(ids, dtype=np.int64))
    held = [row for row in rows if row is not None]
    counts = torch.tensor([len(row) for row in held], dtype=torch.long)
    flat = torch.cat(held) if held else torch.zeros(0, dtype=torch.long)
    known = tuple(text for text in texts if text is not None)
    documents = Documents(flat, counts, known if known and len(known) == len(listed) else None)
    _check_ids(model, documents)
    return documents


def read_targets(model: Model, targets: Any, n: int, *, add_bos: bool = True) -> Documents:
    """Return what a decoder is fed for `n` texts: of a text its tokens behind the decoder's start token, ids as given.

    Raises ValueError for another number of targets, MissingError as read_documents does.
    """
    listed = [targets] if isinstance(targets, str) else list(targets)
    if len(listed) != n:
        raise ValueError(f"{len(listed)} targets for {n} texts; give one target a text")
    found = read_documents(model, listed, add_bos=add_bos)
    start = getattr(model.hf.config, "decoder_start_token_id", None)
    rows = found.rows()
    for i, target in enumerate(listed):
        if isinstance(target, str) and start is not None and rows[i][:1].tolist() != [start]:
            rows[i] = torch.cat([torch.tensor([start]), rows[i]])
    counts = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return Documents(torch.cat(rows) if rows else found.ids, counts, found.texts)


def _rendered(model: Model, number: int, chat: Sequence[Mapping], add_generation_prompt: bool) -> str:
    tokenizer = tokens.need_tokenizer(model.tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"document {number} is a chat, and the tokenizer of {model.name} has no chat template; "
            "set tokenizer.chat_template, or give text"
        )
    return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=add_generation_prompt)


def _ids(number: int, document: Any) -> Int[Tensor, " t"]:
    found = torch.as_tensor(document if isinstance(document, (Tensor, np.ndarray)) else list(document))
    if found.ndim != 1 or (len(found) and (found.is_floating_point() or found.dtype == torch.bool)):
        got = f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
        raise ValueError(f"document {number} is {got}; it must be a text, a chat, or one row of token ids")
    return found.to("cpu", torch.long)


def _check_ids(model: Model, documents: Documents) -> None:
    if not len(documents.ids):
        return
    low, high = (int(x) for x in documents.ids.aminmax())
    if low >= 0 and high < model.d_vocab:
        return
    bad = low if low < 0 else high
    number = int(documents.numbers[int((documents.ids == bad).nonzero()[0])])
    hint = "; give the embeddings of added tokens room with resize_token_embeddings" if bad > 0 else ""
    raise ValueError(f"document {number} has token id {bad}; {model.name} has ids 0 to {model.d_vocab - 1}{hint}")


def check_length(model: Model, documents: Documents, limit: int) -> Documents:
    """Return the documents; raises ValueError for a document of more than `limit` tokens."""
    over = (documents.counts > limit).nonzero()
    if len(over):
        number = int(over[0])
        raise ValueError(
            f"document {number} has {int(documents.counts[number])} tokens, {model.name} takes {limit}; "
            f'cut it with max_len={limit}, or read it by long="windows"'
        )
    return documents


def trim(documents: Documents, limit: int) -> tuple[Documents, Bool[Tensor, " n"]]:
    """Return the first `limit` tokens of each document, and which tokens those are."""
    kept = documents.positions < limit
    return Documents(documents.ids[kept], documents.counts.clamp(max=limit), documents.texts), kept


@dataclass(frozen=True)
class Batch:
    """Padded rows for the model, and what of them is kept: `where` in the flattened batch, `at` in the result."""

    ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    numbers: Int[Tensor, " b"]  # the document of each row
    where: Int[Tensor, " kept"]
    at: Int[Tensor, " kept"]


class Pieces:
    """Documents as rows of at most `limit` tokens: whole ones, and windows of longer ones.

    A long document has one window from its first token, and then one every `stride` tokens that ends there and is as
    long as possible, with the document's BOS (or CLS: `front_id`) in front if it has one. Each token is read in the
    first window that holds it, which is the one that shows the model most of the text before it.
    """

    def __init__(
        self, documents: Documents, keep: Bool[Tensor, " n"], limit: int, stride: int | None, front_id: int | None
    ):
        self._ids, self._keep = documents.ids, keep
        self._row = keep.long().cumsum(0) - 1  # the row that each kept token becomes
        starts, counts = documents.starts, documents.counts
        firsts = documents.ids[starts.clamp(max=max(0, len(documents.ids) - 1))] if len(documents.ids) else starts
        # start and length in the flat ids, id of column 0, columns that give no rows, number of the document
        found: list[tuple[int, int, int, int, int]] = []
        for i, (start, count, first) in enumerate(zip(starts.tolist(), counts.tolist(), firsts.tolist(), strict=True)):
            if count:
                found.append((start, min(count, limit), first, 0, i))
            if count > limit:
                found += [(*window, i) for window in self._windows(start, count, limit, stride, front_id)]
        table = torch.tensor(found, dtype=torch.long).reshape(-1, 5)
        before = torch.cat([torch.zeros(1, dtype=torch.long), keep.long().cumsum(0)])
        gives = before[table[:, 0] + table[:, 1]] > before[table[:, 0] + table[:, 3]]
        table = table[gives]
        self._table = table[table[:, 1].argsort(descending=True, stable=True)]

    def _windows(
        self, start: int, count: int, limit: int, stride: int | None, front_id: int | None
    ) -> Iterator[tuple[int, int, int, int]]:
        first = int(self._ids[start])
        front = int(first == front_id)
        room = limit - front
        step = max(1, limit // 2) if stride is None else stride
        if not 1 <= step <= room:
            raise ValueError(f"stride is {step}; windows of {limit} tokens (BOS counted) need one of 1 to {room}")
        end = limit
        while end < count:
            new_end = min(count, end + step)
            at = start + new_end - room - front
            yield at, limit, first if front else int(self._ids[at]), start + end - at
            end = new_end

    def batches(self, size: int) -> list[Tensor]:
        """Return which pieces share a batch, longest first."""
        return list(torch.arange(len(self._table)).split(size)) if len(self._table) else []

    def batch(self, members: Int[Tensor, " b"]) -> Batch:
        """Return one batch, padded on the right."""
        start, length, first, silent, numbers = self._table[members].T[:, :, None]
        columns = torch.arange(int(length.max()))
        mask = columns < length
        source = (start + columns).clamp_(max=len(self._ids) - 1)
        ids = self._ids[source] * mask
        ids[:, :1] = first
        where = (mask & (columns >= silent) & self._keep[source]).flatten().nonzero().squeeze(1)
        return Batch(ids, mask, numbers.squeeze(1), where, self._row[source.flatten()[where]])
