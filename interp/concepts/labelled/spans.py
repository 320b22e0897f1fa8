"""Characters and tokens: which tokens of a text overlap a span, and what token labels say of each."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.acts.documents import Documents
from interp.concepts.labelled.examples import Examples, Span
from interp.model import tokens
from interp.model.loading import Model

__all__ = ["Offsets", "span_mask", "token_marks"]

CHUNK = 256  # texts in one call of the tokenizer
MARKER = "\u2042spanned\u2042"  # stands for a chat's last message while its place in the template is looked for


class Offsets:
    """The characters of each token of examples, found out when first asked for."""

    def __init__(self, model: Model, examples: Examples, given: Documents, add_bos: bool, add_generation_prompt: bool):
        self._model, self._examples, self._given = model, examples, given
        self._add_bos, self._prompt = add_bos, add_generation_prompt

    @cached_property
    def table(self) -> Int[Tensor, "n 2"]:
        """Start and end of each token in its text (of a chat: as rendered); both 0 for tokens put in front.

        Raises ValueError for a tokenizer that does not tell (a slow one).
        """
        tokenizer = tokens.need_tokenizer(self._model.tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell which characters its tokens are of; spans need a fast "
                "tokenizer (use_fast=True)"
            )
        rendered = self._given.texts or ()
        found: list[Tensor] = [torch.zeros(0, 2, dtype=torch.long)] * len(rendered)
        for chat in (False, True):
            chosen = [i for i, text in enumerate(self._examples.texts) if isinstance(text, str) is not chat]
            for at in range(0, len(chosen), CHUNK):
                part = chosen[at : at + CHUNK]
                for i, row in zip(part, self._offsets(tokenizer, [rendered[i] for i in part], chat), strict=True):
                    found[i] = row
        held = self._given.rows()
        return torch.cat([self._aligned(i, row, held[i]) for i, row in enumerate(found)])

    def _offsets(self, tokenizer: Any, texts: list[str], chat: bool) -> list[Tensor]:
        """Return (id, start, end) of each token by the rule of tokens.encode_many."""
        bos = tokenizer.bos_token_id
        template = self._add_bos and not chat and (bos is None or getattr(tokenizer, "cls_token_id", None) is not None)
        read = tokenizer(texts, add_special_tokens=template, return_offsets_mapping=True, verbose=False)
        found = []
        for ids, pairs in zip(read["input_ids"], read["offset_mapping"], strict=True):
            rows = [(i, *pair) for i, pair in zip(ids, pairs, strict=True)]
            if self._add_bos and not chat and not template and bos is not None and ids[:1] != [bos]:
                rows = [(bos, 0, 0), *rows]
            found.append(torch.tensor(rows, dtype=torch.long).reshape(-1, 3))
        return found

    def _aligned(self, i: int, row: Int[Tensor, "t 3"], ids: Int[Tensor, " u"]) -> Int[Tensor, "u 2"]:
        if not torch.equal(row[: len(ids), 0], ids):  # the document may be cut, never anything else
            raise RuntimeError(f"the tokens of {self._examples.place(i)} and their characters do not agree")
        return row[: len(ids), 1:]

    def shift(self, i: int) -> int:
        """Return where the text that spans count in begins in what was tokenized: 0 but for chats."""
        text = self._examples.texts[i]
        return 0 if isinstance(text, str) else self._shift_in_chat(i, text)

    def _shift_in_chat(self, i: int, chat: Sequence[Mapping[str, Any]]) -> int:
        *before, last = list(chat)
        content = str(last["content"])
        marked = [*before, {**last, "content": MARKER}]
        template = self._model.tokenizer.apply_chat_template
        start = template(marked, tokenize=False, add_generation_prompt=self._prompt).find(MARKER)
        rendered = (self._given.texts or ())[i]
        if start >= 0 and rendered.startswith(content, start):
            return start
        if start >= 0 and rendered.startswith(content.strip(), start):  # this template strips what it is given
            return start - (len(content) - len(content.lstrip()))
        raise ValueError(f"{self._examples.place(i)}: the chat template does not show the last message as it is")


def overlapping(offsets: Int[Tensor, "t 2"], text: str, span: Span, shift: int = 0) -> Bool[Tensor, " t"]:
    """Return which tokens share a character with a span, blanks at the ends of the span not counted.

    A byte-level token holds the blank in front of its word: without the trim "the " would touch the word after it.
    """
    start, end = span
    held = text[start:end]
    start, end = start + len(held) - len(held.lstrip()) + shift, end - len(held) + len(held.rstrip()) + shift
    return (offsets[:, 0] < end) & (offsets[:, 1] > start)


def span_mask(examples: Examples, given: Documents, offsets: Offsets, keep: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return which tokens overlap the span of their text. Raises ValueError where none does, naming the example."""
    parts = []
    for i, (table, kept) in enumerate(_rows(given, offsets.table, keep)):
        span = (examples.spans or ())[i]
        assert span is not None  # checked with the positions
        parts.append(_found(examples, i, table, kept, span, offsets.shift(i)))
    return torch.cat(parts)


def _found(
    examples: Examples, i: int, table: Tensor, kept: Bool[Tensor, " t"], span: Span, shift: int
) -> Bool[Tensor, " t"]:
    whole = examples.texts[i]
    text = whole if isinstance(whole, str) else str(whole[-1]["content"])
    found = overlapping(table, text, span, shift) & kept
    if not bool(found.any()):
        raise ValueError(
            f"{examples.place(i)}: no token overlaps the span {span[0]} to {span[1]} ({text[slice(*span)][:40]!r}) of "
            f"the {int(kept.sum())} tokens that count"
        )
    return found


def _rows(given: Documents, table: Tensor, keep: Bool[Tensor, " n"]) -> list[tuple[Tensor, Tensor]]:
    counts = given.counts.tolist()
    return list(zip(table.split(counts), keep.split(counts), strict=True))


def token_marks(examples: Examples, given: Documents, offsets: Offsets, real: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the label of each token: 0, 1, or -1 for one that has none.

    `real` marks the tokens that are no special ones. Raises ValueError, naming the example, for a token under spans of
    both labels, a span that no token overlaps, a number of labels that is not that of the tokens.
    """
    marks = torch.full((len(real),), -1, dtype=torch.long)
    starts, counts, each = given.starts.tolist(), given.counts.tolist(), real.split(given.counts.tolist())
    for i, entry in enumerate(examples.token_labels or ()):
        part = marks[starts[i] : starts[i] + counts[i]]  # a view
        if any(not isinstance(e, tuple) for e in entry):
            if len(entry) != int(each[i].sum()):
                raise ValueError(
                    f"{examples.place(i)} has {len(entry)} token labels for {int(each[i].sum())} tokens, special ones "
                    "not counted"
                )
            part[each[i]] = torch.tensor([e for e in entry if isinstance(e, int)])
            continue
        table = offsets.table[starts[i] : starts[i] + counts[i]]
        _mark_spans(examples, i, [e for e in entry if isinstance(e, tuple)], part, table, each[i])
    return marks


def _mark_spans(
    examples: Examples, i: int, spans: list[tuple[int, int, int]], part: Tensor, table: Tensor, real: Tensor
) -> None:
    """Write the labels of one text's tokens into `part`."""
    for start, end, label in spans:
        found = _found(examples, i, table, real, (start, end), 0)
        if bool((part[found] == 1 - label).any()):
            raise ValueError(f"{examples.place(i)}: a token lies in spans of both labels, near {start} to {end}")
        part[found] = label
    if examples.outside is not None:
        part[real & (part < 0)] = examples.outside
