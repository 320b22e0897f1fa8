"""Labelled data: texts or chats with labels, groups, spans and pairs, from files, lists and contrast pairs."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Shaped

from interp.acts.documents import is_chat
from interp.concepts.labelled.records import Table, read_table

__all__ = ["Examples", "contrast_pairs", "make_examples", "read_examples", "read_pairs"]

Text: TypeAlias = str | Sequence[Mapping[str, Any]]  # a text, or a chat of {"role", "content"} messages
Span: TypeAlias = tuple[int, int]  # characters, end not included
TokenLabels: TypeAlias = Sequence[Any]  # of (start, end, label) in characters, or of one label a token
BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
CHAT_ROLES = ("user", "assistant")
GROUP_BY = ("pair", "template")


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Texts or chats, each with a label and a group; rows that belong together share a group in every split.

    A span is where the concept sits, in characters of the text (of a chat: of its last message). `token_labels`, where
    they are given, label tokens instead of texts: characters with a label each, tokens outside all of them having the
    label `outside` (None: they are no rows), or one label a token of the text, specials not counted. The label of such
    a text is whether it holds a 1.
    """

    texts: tuple[Text, ...]
    labels: Shaped[np.ndarray, " n"]  # 0 and 1 (int64), or float64 targets
    groups: list
    spans: tuple[Span | None, ...] | None = None
    pairs: list | None = None
    token_labels: tuple[TokenLabels, ...] | None = None
    outside: int | None = 0
    place: Callable[[int], str] = "example {}".format  # how an error names an example

    def __len__(self) -> int:
        return len(self.texts)

    def __post_init__(self) -> None:
        for name in ("labels", "groups", "spans", "pairs", "token_labels"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.texts):
                raise ValueError(f"{len(given)} {name} were given for {len(self.texts)} texts")
        if not self.texts:
            raise ValueError("there is no example")
        for i, text in enumerate(self.texts):
            _check_text(text, self.place(i))
        for i, span in enumerate(self.spans or ()):
            if span is not None:
                check_span(span, _spanned(self.texts[i]), self.place(i))

    @property
    def is_target(self) -> bool:
        """Whether the labels are continuous targets, not classes."""
        return self.labels.dtype.kind == "f"


def make_examples(
    texts: Sequence[Text],
    labels: Any,
    groups: Sequence | np.ndarray | None = None,
    *,
    spans: Sequence[Span | None] | None = None,
    pairs: Sequence | np.ndarray | None = None,
    positive: Any = None,
    target: bool = False,
    place: Callable[[int], str] = "example {}".format,
) -> Examples:
    """Return texts or chats with labels as Examples.

    Labels are 0 and 1, false and true, or names of which `positive` is 1 and every other 0; with `target` numbers.
    Without groups the members of a pair, else equal texts, form one group each.
    Raises ValueError, naming the example, for an empty text, a label that is none of these, one class only, a span
    outside its text, and a text (with its span) that stands there with both labels.
    """
    listed = labels.tolist() if isinstance(labels, np.ndarray) or hasattr(labels, "tolist") else list(labels)
    if len(listed) != len(texts):
        raise ValueError(f"{len(listed)} labels were given for {len(texts)} texts")
    found = _targets(listed, place) if target else _classes(listed, positive, place)
    frozen = tuple(text if isinstance(text, str) else tuple(text) for text in texts)
    held = tuple(None if s is None else (int(s[0]), int(s[1])) for s in spans) if spans is not None else None
    keys = [repr((text, held and held[i])) for i, text in enumerate(frozen)]
    if not target:
        _check_contradictions(frozen, keys, found, place)
    own = [repr(text) for text in frozen] if pairs is None else list(pairs)
    return Examples(
        texts=frozen,
        labels=found,
        groups=numbered(own) if groups is None else list(groups),
        spans=held,
        pairs=None if pairs is None else list(pairs),
        place=place,
    )


def read_examples(
    path: str | Path,
    *,
    text: str | None = None,
    label: str = "label",
    group: str | None = None,
    pair: str | None = None,
    start: str | None = None,
    end: str | None = None,
    positive: Any = None,
    target: bool = False,
) -> Examples:
    """Return the labelled texts of a .csv, .tsv, .jsonl, .json or .parquet file, one a row, none left out.

    Columns are named by the options: text ("text", or "messages" for chats, where the file has no such column) and
    label; group, pair and the characters start and end of a span are read where they are there or asked for. Labels
    as in `make_examples`.
    Raises ValueError with file and row as make_examples does, for a column that is not there (with the nearest name),
    a cell that is empty, text that is not UTF-8; MissingError for no such file.
    """
    table = read_table(path)
    name = text or ("messages" if "text" not in table.columns and "messages" in table.columns else "text")
    return make_examples(
        [_text_of(value, table.place(i)) for i, value in enumerate(table.column(name))],
        table.column(label),
        table.optional(group, "group"),
        spans=_spans(table, start, end),
        pairs=table.optional(pair, "pair"),
        positive=positive,
        target=target,
        place=table.place,
    )


def contrast_pairs(
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    template: str | Sequence[str] = "{}",
    chat: str | None = None,
    prompts: str | Sequence[str] | None = None,
    system: str | None = None,
    groups: Sequence | np.ndarray | None = None,
    group_by: str = "pair",
    place: Callable[[int], str] = "pair {}".format,
) -> Examples:
    """Return pairs of texts as Examples: positive and negative member one after the other, labels 1 and 0.

    Each member goes into the place of "{}" in the template, or in each of several. With `chat` the outcome is a chat
    that the tokenizer's template will read: "user" makes it the user's message, "assistant" the answer to a prompt
    (`prompts`: one, or one a pair); `system` goes in front. `pairs` numbers pairs in a template each; groups are those
    given, one a pair of the input, unless `group_by` is "template".
    Raises ValueError, naming the pair, for an empty or an equal member, numbers that differ, a template without
    exactly one "{}".
    """
    templates = [template] if isinstance(template, str) else list(template)
    _check_pairs(positive, negative, templates, place)
    if group_by not in GROUP_BY or chat not in (None, *CHAT_ROLES):
        raise ValueError(
            f"group_by is {group_by!r}, one of {', '.join(GROUP_BY)}; chat is {chat!r}, one of None, user, assistant"
        )
    if (chat == "assistant") != (prompts is not None) or (system is not None and chat is None):
        raise ValueError('prompts belong to chat="assistant", which needs them, and system to a chat')
    asked = [prompts] * len(positive) if isinstance(prompts, str) else list(prompts or [""] * len(positive))
    names = list(range(len(positive))) if groups is None else list(groups)
    if len(asked) != len(positive) or len(names) != len(positive):
        raise ValueError(f"{len(asked)} prompts and {len(names)} groups for {len(positive)} pairs; give one a pair")
    texts: list[Text] = []
    found: list[Any] = []
    origin: list[int] = []
    for number, form in enumerate(templates):
        for i, members in enumerate(zip(positive, negative, strict=True)):
            filled = [form.replace("{}", member) for member in members]
            texts += filled if chat is None else [_messages(t, chat, asked[i], system) for t in filled]
            found += [number if group_by == "template" else names[i]] * 2
            origin += [i, i]
    labels = np.tile(np.array([1, 0], dtype=np.int64), len(texts) // 2)
    pairs = np.repeat(np.arange(len(texts) // 2), 2).tolist()
    return Examples(texts=tuple(texts), labels=labels, groups=found, pairs=pairs, place=lambda k: place(origin[k]))


def read_pairs(
    path: str | Path,
    *,
    positive: str = "positive",
    negative: str = "negative",
    group: str | None = None,
    prompt: str | None = None,
    **options: Any,
) -> Examples:
    """Return the contrast pairs of a file (kinds as in `read_examples`), one a row, as `contrast_pairs` makes them.

    `prompt` names the column of prompts for chat="assistant". Raises as contrast_pairs, with file and row, and for a
    column that is not there.
    """
    table = read_table(path)
    members = [[as_string(v, table.place(i)) for i, v in enumerate(table.column(n))] for n in (positive, negative)]
    if prompt is not None:
        options["prompts"] = [as_string(v, table.place(i)) for i, v in enumerate(table.column(prompt))]
    groups = table.optional(group, "group")
    return contrast_pairs(members[0], members[1], groups=groups, place=table.place, **options)


def numbered(keys: Sequence) -> list[int]:
    """Return 0, 1, ... for each distinct key, in the order of their first appearance."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


def check_span(span: Span, text: str, place: str) -> None:
    """Raise ValueError for a span that does not lie in the text, or holds nothing but blanks."""
    start, end = span
    if not 0 <= start < end <= len(text):
        raise ValueError(f"{place}: the span {start} to {end} does not lie in its text of {len(text)} characters")
    if not text[start:end].strip():
        raise ValueError(f"{place}: the span {start} to {end} holds nothing but blanks")


def _spanned(text: Text) -> str:
    """Return what a span counts in: the text, or the content of a chat's last message."""
    return text if isinstance(text, str) else str(text[-1].get("content", ""))


def _check_text(text: Text, place: str) -> None:
    if not isinstance(text, str) and not is_chat(text):
        raise ValueError(f"{place} is a {type(text).__name__}; it must be a text or a list of messages with role")
    for part in [text] if isinstance(text, str) else [str(m.get("content", "")) for m in text]:
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{place} holds half a surrogate pair at character {error.start}") from error
    if not _spanned(text).strip():
        raise ValueError(f"{place} has an empty text")


def _text_of(value: Any, place: str) -> Text:
    if isinstance(value, str) or is_chat(value):
        return value
    raise ValueError(f"{place}: {str(value)[:60]!r} is neither a text nor a list of messages with role and content")


def as_string(value: Any, place: str) -> str:
    """Return a value as it is if it is text. Raises ValueError, naming the place, for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {str(value)[:60]!r} is a {type(value).__name__}; it must be text")
    return value


def _targets(listed: list, place: Callable[[int], str]) -> np.ndarray:
    found = np.empty(len(listed))
    for i, value in enumerate(listed):
        try:
            found[i] = float(value)
        except (TypeError, ValueError):
            found[i] = math.nan
        if not math.isfinite(found[i]):
            raise ValueError(f"{place(i)}: the target {value!r} is no finite number")
    return found


def _classes(listed: list, positive: Any, place: Callable[[int], str]) -> np.ndarray:
    """Return labels as 0 and 1."""
    for i, value in enumerate(listed):
        if value is None or value != value:
            raise ValueError(f"{place(i)} has no label")
    names = [str(value).strip() for value in listed]
    distinct = sorted(set(names))
    if positive is not None:
        wanted = str(positive).strip()
        if wanted not in distinct:
            close = difflib.get_close_matches(wanted, distinct, n=1, cutoff=0.4)
            hint = f"; closest: {close[0]!r}" if close else ""
            raise ValueError(f"no label is positive={positive!r}{hint}; there are: {', '.join(distinct[:8])}")
        found = np.array([int(name == wanted) for name in names], dtype=np.int64)
    elif all(name.lower() in BINARY for name in distinct):
        found = np.array([BINARY[name.lower()] for name in names], dtype=np.int64)
    else:
        odd = next(i for i, name in enumerate(names) if name.lower() not in BINARY)
        raise ValueError(
            f"the labels are {len(distinct)} names ({', '.join(distinct[:8])}; {place(odd)} has {listed[odd]!r}): say "
            "which is 1 with positive=, all others are then 0; for numbers to be predicted give target=True"
        )
    if found.min() == found.max():
        raise ValueError(f"both classes are needed, but all {len(found)} labels of {place(0)} onwards are {names[0]!r}")
    return found


def _check_contradictions(
    texts: Sequence[Text], keys: list[str], labels: np.ndarray, place: Callable[[int], str]
) -> None:
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        j = first.setdefault(key, i)
        if labels[i] != labels[j]:
            raise ValueError(
                f"{place(i)} and {place(j)} are one text with both labels: {_spanned(texts[i])[:60]!r}; "
                "leave one of them out"
            )


def _spans(table: Table, start: str | None, end: str | None) -> list[Span | None] | None:
    """Return the span of each row, None for a row where both cells are empty."""
    names = [start or "start", end or "end"]
    asked = start is not None or end is not None
    if not asked and not all(name in table.columns for name in names):
        return None
    for name in names:
        if name not in table.columns:
            table.column(name)  # raises, naming the nearest
    found: list[Span | None] = []
    for i, record in enumerate(table.records):
        cells = [record.get(name) for name in names]
        if all(cell is None for cell in cells):
            found.append(None)
            continue
        numbers = [_whole(cell) for cell in cells]
        if numbers[0] is None or numbers[1] is None:
            raise ValueError(f"{table.place(i)}: {names[0]} and {names[1]} are {cells}; they must be whole numbers")
        found.append((numbers[0], numbers[1]))
    return found


def _whole(value: Any) -> int | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _check_pairs(
    positive: Sequence[str], negative: Sequence[str], templates: list[str], place: Callable[[int], str]
) -> None:
    if len(positive) != len(negative) or not len(positive) or not templates:
        raise ValueError(f"{len(positive)} positive and {len(negative)} negative texts are no pairs; give as many each")
    for form in templates:
        if form.count("{}") != 1:
            raise ValueError(f'the template {form!r} must hold "{{}}" exactly once: there the member of a pair goes')
    for i, (one, other) in enumerate(zip(positive, negative, strict=True)):
        if not one.strip() or not other.strip():
            raise ValueError(f"{place(i)} has an empty text")
        if one == other:
            raise ValueError(f"{place(i)}: both members of the pair are {one[:60]!r}")


def _messages(text: str, role: str, prompt: str, system: str | None) -> list[dict[str, str]]:
    front = [] if system is None else [{"role": "system", "content": system}]
    asked = [{"role": "user", "content": prompt}] if role == "assistant" else []
    return [*front, *asked, {"role": role, "content": text}]
