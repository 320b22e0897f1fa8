"""What a page is made of: frozen values that hold plain text, numbers and figures, and know nothing of HTML."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interp.report.drawing import NULL
from interp.report.text import Estimate, Scalar, show

__all__ = [
    "Block",
    "Column",
    "Contexts",
    "Estimate",
    "Example",
    "Fact",
    "Figure",
    "Page",
    "PageError",
    "Reply",
    "Section",
    "SideBySide",
    "Table",
    "Text",
]


class PageError(ValueError):
    """A page's parts do not fit together: a ragged table, an anchor used twice, tokens without values."""


@dataclass(frozen=True)
class Text:
    """Paragraphs (split at blank lines; `backticks` set code). kind: "plain", "note" (set apart) or "code"."""

    text: str
    kind: str = "plain"

    def __post_init__(self):
        if self.kind not in ("plain", "note", "code"):
            raise PageError(f"a Text is 'plain', 'note' or 'code', not {self.kind!r}")


@dataclass(frozen=True)
class Fact:
    """A key figure: its name, its value (text, number or Estimate), its null in words, what it means in one line."""

    name: str
    value: Any
    null: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Column:
    """A table's column. `null` marks the values a measurement takes where there is nothing to find: set in grey.

    decimals: fixed number of decimals; None chooses them from the values.
    """

    name: str
    null: bool = False
    decimals: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns (names or Column). A cell is text, a number, an Estimate, or None (a dash).

    Numbers are right-aligned and rounded alike down a column; the first column heads its row.
    Raises PageError where a row's length is not the number of columns.
    """

    columns: Sequence[str | Column]
    rows: Sequence[Sequence[Any]]
    caption: str

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise PageError(f"row {i} of {self.caption!r} has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Figure:
    """A plotly figure with its caption; its title, if any, becomes a heading.

    The numbers stand beside it in `table`; None takes them from the figure itself (see `figure_table`).
    """

    figure: Any
    caption: str
    table: Table | None = None
    title: str | None = None


@dataclass(frozen=True)
class Example:
    """A text as tokens, with one activation a token (nothing is shown for those that are not positive)."""

    tokens: Sequence[str]
    activations: Sequence[Any] | np.ndarray
    note: str = ""

    def __post_init__(self):
        if len(self.tokens) != len(self.activations):
            raise PageError(f"{len(self.tokens)} tokens have {len(self.activations)} activations; one each is needed")
        if not all(math.isfinite(v) for v in self.activations):
            raise PageError("an activation is nan or infinite")


@dataclass(frozen=True)
class Contexts:
    """The texts on which a latent fires, each token highlighted by its activation.

    facts: short figures beside the title (density, maximum); raises and lowers: (token, logit effect) pairs.
    """

    title: str
    examples: Sequence[Example]
    lead: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    raises: Sequence[tuple[str, Scalar]] = ()
    lowers: Sequence[tuple[str, Scalar]] = ()


@dataclass(frozen=True)
class Reply:
    """A text with a short note under it (its score)."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Texts for the same prompts in columns: each row is (prompt, a text or Reply for every column).

    Raises PageError where a row does not have one text a column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns) + 1:
                raise PageError(f"row {i} has {len(row) - 1} texts for the columns {list(self.columns)}")


Block = Text | Table | Figure | Contexts | SideBySide


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, lead text, blocks. The anchor (for links) is made from the title if not given."""

    title: str
    blocks: Sequence[Block] = ()
    lead: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Page:
    """A report: title and lead, key figures first, sections, and how it was made (`about`, the last section).

    kicker: a short line above the title (model and hook point). language: a BCP 47 tag.
    """

    title: str
    sections: Sequence[Section]
    lead: str = ""
    facts: Sequence[Fact] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    kicker: str = ""
    language: str = "en"


def figure_table(figure: Any, caption: str, *, max_rows: int = 60) -> Table:
    """Return the numbers that a plotly figure draws as a table, thinned evenly (and saying so) above `max_rows`.

    Series over the same positions become columns, others rows; error bars become intervals.
    Raises PageError for traces other than lines, markers and bars: only their maker can lay out their numbers.
    """
    traces = list(figure.data)
    odd = [t.type for t in traces if t.type not in ("scatter", "bar") or t.x is None or t.y is None]
    if odd or not traces:
        raise PageError(f"{caption}: a figure with {', '.join(odd) or 'no trace'} needs a table of its own; give one")
    rows_axis = figure.layout.yaxis.ticktext
    by_row = rows_axis is not None or any(getattr(t, "orientation", None) == "h" for t in traces)
    x_name, y_name = words(figure.layout.xaxis.title.text) or "x", words(figure.layout.yaxis.title.text) or "y"
    keys = [_keys(t.y if by_row else t.x, rows_axis if by_row else None) for t in traces]
    series = list(zip(traces, keys, [_values(t, "x" if by_row else "y") for t in traces], strict=True))
    shared = all(k == keys[0] for k in keys) and len(set(keys[0])) == len(keys[0])
    if shared:
        only = (x_name if by_row else y_name) if len(traces) == 1 else None
        columns = _merge_bands([(Column(only or words(t.name), null=_is_null(t)), v) for t, _, v in series])
        head: list[str | Column] = ["" if by_row else x_name, *(column for column, _ in columns)]
        rows = [[key, *(v[i] for _, v in columns)] for i, key in enumerate(keys[0])]
    elif by_row:
        head = ["", x_name]
        rows = [list(pair) for _, k, v in series for pair in zip(k, v, strict=True)]
    else:
        head = ["series", x_name, y_name]
        rows = [[words(t.name), *pair] for t, k, v in series for pair in zip(k, v, strict=True)]
        texts = [words(text) for t in traces if not isinstance(t.text, str) for text in t.text or ()]
        if len(texts) == len(rows):
            head.append("text")
            rows = [[*row, text] for row, text in zip(rows, texts, strict=True)]
    if len(rows) > max_rows:
        step = -(-len(rows) // max_rows)
        caption += f" (one in {step} of {show(len(rows))} rows)"
        rows = rows[::step]
    return Table(head, rows, caption)


def _merge_bands(columns: list[tuple[Column, list[Any]]]) -> list[tuple[Column, list[Any]]]:
    """Return the columns with each pair "name, low" and "name" as one column of intervals."""
    merged: list[tuple[Column, list[Any]]] = []
    for column, values in columns:
        if merged and merged[-1][0].name == f"{column.name}, low":
            low = merged.pop()[1]
            values = [f"[{show(a, 3)}, {show(b, 3)}]" for a, b in zip(low, values, strict=True)]
        merged.append((column, values))
    return merged


def _is_null(trace: Any) -> bool:
    """Return whether the trace is drawn in the grey of nulls."""
    line = getattr(trace, "line", None)  # bars have none
    return trace.marker.color == NULL if line is None or line.color is None else line.color == NULL


def _keys(positions: Any, ticktext: Any) -> list[Any]:
    if ticktext is not None:
        return [words(ticktext[round(float(p))]) for p in positions]
    return [words(p) if isinstance(p, str) else float(p) if p % 1 else int(p) for p in positions]


def _values(trace: Any, axis: str) -> list[Any]:
    values = [float(v) for v in np.asarray(getattr(trace, axis), dtype=float)]
    error = getattr(trace, f"error_{axis}", None)
    if error is None or error.array is None:
        return [int(v) for v in values] if all(v == int(v) for v in values) else values
    down = error.array if error.arrayminus is None else error.arrayminus
    return [Estimate(v, float(v - low), float(v + up)) for v, low, up in zip(values, down, error.array, strict=True)]


def words(text: Any) -> str:
    """Return what plotly's own small HTML reads as: line breaks as spaces, entities resolved."""
    return html.unescape(str(text or "").replace("<br>", " "))
