"""Texts whose tokens are labelled, by characters, words or tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from interp.concepts.labelled.examples import Examples, TokenLabels, as_string, check_span, numbered
from interp.concepts.labelled.records import read_table

__all__ = ["from_words", "read_token_labels", "token_labelled"]


def token_labelled(
    texts: Sequence[str],
    token_labels: Sequence[TokenLabels],
    groups: Sequence | np.ndarray | None = None,
    *,
    outside: int | None = 0,
    place: Callable[[int], str] = "example {}".format,
) -> Examples:
    """Return texts whose tokens are labelled: by (start, end, label) in characters, or by one label a token.

    Tokens that no span touches have the label `outside`; None makes them no rows. The tokens of a text share its group
    (equal texts one, unless groups are given). Raises ValueError, naming the example, for labels other than 0 and 1 and
    spans outside the text.
    """
    if len(texts) != len(token_labels):
        raise ValueError(f"{len(token_labels)} token_labels were given for {len(texts)} texts")
    if outside not in (None, 0, 1):
        raise ValueError(f"outside is {outside!r}; it is 0, 1 or None")
    held = [_token_labels(texts[i], entry, place(i)) for i, entry in enumerate(token_labels)]
    values = [[e[2] if isinstance(e, tuple) else e for e in entry] for entry in held]
    return Examples(
        texts=tuple(texts),
        labels=np.array([int(1 in found) for found in values], dtype=np.int64),
        groups=numbered([repr(t) for t in texts]) if groups is None else list(groups),
        token_labels=tuple(held),
        outside=outside,
        place=place,
    )


def from_words(
    words: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]],
    groups: Sequence | np.ndarray | None = None,
    *,
    place: Callable[[int], str] = "example {}".format,
) -> Examples:
    """Return sentences given as words with a label each: joined by spaces, a label for every token of its word."""
    texts, spans = [], []
    for i, (sentence, marks) in enumerate(zip(words, labels, strict=True)):
        if len(sentence) != len(marks):
            raise ValueError(f"{place(i)} has {len(marks)} labels for {len(sentence)} words")
        ends = np.cumsum([len(word) + 1 for word in sentence]) - 1
        texts.append(" ".join(sentence))
        spans.append([(int(e) - len(w), int(e), int(m)) for w, e, m in zip(sentence, ends, marks, strict=True)])
    return token_labelled(texts, spans, groups, outside=None, place=place)


def read_token_labels(
    path: str | Path,
    *,
    text: str = "text",
    spans: str = "spans",
    words: str | None = None,
    labels: str = "labels",
    group: str | None = None,
    outside: int | None = 0,
) -> Examples:
    """Return token-labelled texts of a .jsonl, .json or .parquet file.

    Each row has a text and a list of [start, end, label], or, with `words`, lists of words and of their labels.
    Raises ValueError, with file and row, as token_labelled and from_words do.
    """
    table = read_table(path)
    groups = table.optional(group, "group")
    for name in (words, labels) if words is not None else (spans,):
        for i, value in enumerate(table.column(name)):
            if not isinstance(value, list):
                raise ValueError(f"{table.place(i)}: {name!r} is {value!r}; it must be a list")
    if words is not None:
        sentences = [[as_string(w, table.place(i)) for w in row] for i, row in enumerate(table.column(words))]
        return from_words(sentences, table.column(labels), groups, place=table.place)
    texts = [as_string(value, table.place(i)) for i, value in enumerate(table.column(text))]
    return token_labelled(texts, table.column(spans), groups, outside=outside, place=table.place)


def _token_labels(text: str, entry: TokenLabels, place: str) -> list:
    """Return the labels of one text, checked: a list of tuples, or of ints."""
    held: list = [tuple(e) if isinstance(e, Sequence) else e for e in entry]
    if len({isinstance(e, tuple) for e in held}) > 1:
        raise ValueError(f"{place}: token labels are a list of (start, end, label), or one label a token")
    for e in held:
        if isinstance(e, tuple) and (len(e) != 3 or not all(type(x) is int for x in e)):
            raise ValueError(f"{place}: {e} is no (start, end, label) in whole numbers")
        if isinstance(e, tuple):
            check_span((e[0], e[1]), text, place)
        if (e[2] if isinstance(e, tuple) else e) not in (0, 1):
            raise ValueError(f"{place}: the token label {e} is neither 0 nor 1")
    return held
