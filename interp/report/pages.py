"""A report as one self-contained HTML file: no network, a strict content policy, every text escaped.

    page = Page(
        title="What tiny knows", lead="One paragraph.", kicker="tiny, blocks.3.hook_resid_post",
        facts=[Fact("Probe AUROC", Estimate(0.983, 0.97, 0.99), "0.50 with shuffled labels", "Reads sentiment.")],
        sections=[
            Section("Probe", lead="What was asked, and how.", blocks=[
                Figure(figures.probe_controls(0.983, (0.97, 0.99), shuffled), "Dots: one shuffle of labels each."),
                Table(["layer", "AUROC", Column("shuffled", null=True)], rows, "AUROC by layer"),
            ]),
            Section("Latents", [Contexts("Latent 417", [Example(tokens, activations)], facts={"density": "0.8 %"})]),
            Section("Steering", [SideBySide(["unsteered", "steered"], [(prompt, before, after)])]),
        ],
        about={"model": "tiny", "seed": 0, "torch": "2.13.0"},
    )
    write_report(page, "report.html")

The policy allows the page's own scripts and style by their hashes and nothing else; there is no 'unsafe-inline'.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Any

from interp.report import blocks as b
from interp.report.blocks import (
    Column,
    Contexts,
    Example,
    Fact,
    Figure,
    Page,
    PageError,
    Reply,
    Section,
    SideBySide,
    Table,
    Text,
)
from interp.report.drawing import DARK
from interp.report.text import Estimate, Scalar, clean, decimals_for, glyphs, show

__all__ = [
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
    "alpha",
    "render_page",
    "write_page",
    "write_report",
]

EMERALD = (52, 211, 153)
DARK_PAGE = (15, 19, 24)
# plotly.js fills an empty style element through the CSSOM; only its (empty) text is subject to the policy
EMPTY_STYLE = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"


def write_report(result: Any, path: str | os.PathLike) -> Path:
    """Write a report of a result (a Page, or anything whose `page()` returns one) and return its path.

    Raises TypeError where the result offers no page.
    """
    page = result if isinstance(result, Page) else getattr(result, "page", None)
    page = page() if callable(page) else page
    if not isinstance(page, Page):
        raise TypeError(f"{type(result).__name__} offers no page: give a Page, or an object whose page() returns one")
    return write_page(page, path)


def write_page(page: Page, path: str | os.PathLike) -> Path:
    """Write the page as one HTML file, atomically, and return its path."""
    from sae.io import atomic_write

    atomic_write(path, render_page(page).encode("utf-8"))
    return Path(path)


def render_page(page: Page) -> str:
    """Return the page as HTML: the same bytes for the same page.

    Raises PageError where parts do not fit, ValueError where a number is nan.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("interp.report", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        # every text passes here, whichever block it came from; only what the template calls safe is ours
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters |= {"show": show, "spans": _spans, "paragraphs": _paragraphs}
    sections, figures = _sections(page)
    scripts = [_plotly(), _asset("page.js")] if figures else [_asset("page.js")]
    style = _asset("page.css") + _level_rules() + _height_rules(figures)
    return environment.get_template("page.html.j2").render(
        page=page,
        about={name: show(value) for name, value in page.about.items()},
        sections=sections,
        figures=[_json(figure["json"]) for figure in figures],
        palette=_json(DARK),
        # plotly.js adds the style of its map library, which no policy of ours lets in, unless its id is taken
        taken_ids=re.findall(r'getElementById\("([0-9a-f]{64})"\)', _plotly()) if figures else [],
        policy=_policy(scripts, style),
        style=style,
        scripts=scripts,
    )


def alpha(value: Scalar, maximum: Scalar) -> float:
    """Return the opacity of a token's highlight: 0.05 + 0.95 log10(1 + 9 value / maximum), 0 where it is inactive."""
    if value <= 0:
        return 0.0
    return 0.05 + 0.95 * math.log10(1 + 9 * min(1.0, value / maximum))


def _policy(scripts: Sequence[str], style: str) -> str:
    # blob: is the picture that plotly's "download as png" draws from the figure; neither it nor data: is the network
    allowed = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)} {EMPTY_STYLE}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@lru_cache
def _asset(name: str) -> str:
    # read with universal newlines: the browser hashes "\n", whatever the checkout has
    return resources.files("interp.report").joinpath("assets", name).read_text(encoding="utf-8")


@lru_cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")


def _json(value: Any) -> str:
    """Return JSON that can stand inside a script element: ASCII, no < that could close it."""
    text = json.dumps(_cleaned(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _sections(page: Page) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the sections as the template reads them, figures and tables numbered, and the figures alone."""
    sections, figures, anchors, tables = [], [], {"main", "key-figures", "about"}, 0
    for section in page.sections:
        anchor = section.anchor or re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")
        if not re.fullmatch(r"[A-Za-z][\w-]*", anchor) or anchor in anchors or anchor.startswith("figure-"):
            raise PageError(f"section {section.title!r}: the anchor {anchor!r} is taken or is not a word; give another")
        anchors.add(anchor)
        views = []
        for block in section.blocks:
            if isinstance(block, Figure):
                figures.append(_figure(block, len(figures) + 1))
                views.append(figures[-1])
                continue
            tables += isinstance(block, Table)
            views.append(_view(block, tables))
        sections.append({"section": section, "anchor": anchor, "blocks": views})
    return sections, figures


def _view(block: b.Block, number: int) -> dict[str, Any]:
    if isinstance(block, Table):
        return {"kind": "table", "table": _table(block), "number": number}
    if isinstance(block, Contexts):
        return _contexts(block)
    if isinstance(block, SideBySide):
        rows = [(row[0], [r if isinstance(r, Reply) else Reply(r) for r in row[1:]]) for row in block.rows]
        return {"kind": "sidebyside", "block": block, "rows": rows}
    if isinstance(block, Text):
        return {"kind": "text", "block": block}
    raise PageError(f"a page has no block of type {type(block).__name__}")


def _figure(block: Figure, number: int) -> dict[str, Any]:
    drawn = json.loads(block.figure.to_json())
    layout = drawn["layout"]
    title = (layout.pop("title", None) or {}).get("text")
    title = block.title or (b.words(title) if title else None)
    table = block.table or b.figure_table(block.figure, f"The numbers of figure {number}")
    return {
        "kind": "figure",
        "block": block,
        "number": number,
        "title": title,
        "table": _table(table),
        "height": int(layout.get("height") or 420),
        "json": {"data": drawn["data"], "layout": layout},
    }


def _table(table: Table) -> dict[str, Any]:
    columns = [c if isinstance(c, Column) else Column(c) for c in table.columns]
    by_column = [_cells([row[i] for row in table.rows], column) for i, column in enumerate(columns)]
    heads = [
        {"name": c.name, "null": c.null, "number": cells["number"]} for c, cells in zip(columns, by_column, strict=True)
    ]
    rows = list(zip(*(cells["cells"] for cells in by_column), strict=True))
    return {"columns": heads, "rows": rows, "caption": table.caption}


def _cells(values: list[Any], column: Column) -> dict[str, Any]:
    """Return a column's cells as (text, interval) pairs, rounded alike, and whether it is one of numbers."""
    estimates = [v for v in values if isinstance(v, Estimate)]
    reals = [v for v in values if isinstance(v, Real) and not isinstance(v, bool)] + [e.value for e in estimates]
    number = all(v is None or (isinstance(v, Estimate | Real) and not isinstance(v, bool)) for v in values)
    decimals = column.decimals
    if decimals is None and reals and not all(isinstance(v, int) for v in reals):
        decimals = _decimals([float(v) for v in reals])
    cells = []
    for value in values:
        if isinstance(value, Estimate):
            low, high = show(value.low, decimals), show(value.high, decimals)
            cells.append((show(value.value, decimals), f"[{low}, {high}]"))
        elif isinstance(value, Real) and not isinstance(value, bool) and decimals is not None:
            cells.append((show(float(value), decimals), ""))
        else:
            cells.append((show(value), ""))
    return {"cells": cells, "number": number and bool(reals)}


def _decimals(values: list[float]) -> int | None:
    """Return decimals that show three digits of every value of a column (at most 3), None where each needs its own."""
    sizes = [abs(v) for v in values if v]
    if not sizes:
        return 0
    if max(sizes) < 1e-3 or max(sizes) > 1e4 * min(sizes):
        return None
    return max(decimals_for(values), min(3, decimals_for([min(sizes)])))


def _contexts(block: Contexts) -> dict[str, Any]:
    peak = max((max(e.activations, default=0.0) for e in block.examples), default=0.0)
    examples = [_example(e, peak) for e in block.examples]
    return {"kind": "contexts", "block": block, "examples": examples, "peak": peak}


def _example(example: Example, maximum: float) -> dict[str, Any]:
    """Return an example as runs of text: active tokens with level, quartile and value; the rest merged."""
    values = [float(v) for v in example.activations]
    top = max(range(len(values)), key=values.__getitem__, default=-1)
    runs: list[dict[str, Any]] = []
    for i, (token, value) in enumerate(zip(example.tokens, values, strict=True)):
        text = glyphs(token)
        if value <= 0 or maximum <= 0:
            runs.append({"text": text, "level": 0})
            continue
        word = text.lstrip(" ") or text or "∅"
        # the space before a word stays outside its mark, or a mark would begin at the end of the line above
        runs.append({"text": text.removesuffix(word), "level": 0})
        share = min(1.0, value / maximum)
        run = {"text": word, "level": round(100 * alpha(value, maximum)), "quartile": math.ceil(4 * share)}
        runs.append(run | {"token": text, "value": show(value), "share": round(100 * share), "peak": i == top})
    if runs:
        runs[0]["text"] = runs[0]["text"].lstrip(" ")
    active = top >= 0 and values[top] > 0
    badge = {"token": glyphs(example.tokens[top]).strip(" "), "value": show(values[top])} if active else None
    return {"runs": runs, "badge": badge, "note": example.note}


def _spans(text: str) -> Iterator[tuple[bool, str]]:
    """Yield (is code, text): what stands between backticks is code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        parts[-2:] = ["`".join(parts[-2:])]
    yield from ((i % 2 == 1, part) for i, part in enumerate(parts) if part)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _height_rules(figures: Sequence[dict[str, Any]]) -> str:
    """Return rules that keep each figure's room free before it is drawn (a style attribute is not allowed)."""
    return "".join(f"#plot-{f['number']}{{min-height:{f['height']}px}}\n" for f in figures)


@lru_cache
def _level_rules() -> str:
    """Return one rule a highlight level. On a dark page the text turns from white to black where that reads better."""
    light = [f".h{n}{{background:rgba(52,211,153,{n / 100:.2f})}}" for n in range(5, 101)]
    dark = [f".h{n}{{color:{dark_text(n / 100)}}}" for n in range(5, 101)]
    return "\n".join(light) + "\n@media screen and (prefers-color-scheme: dark){" + "".join(dark) + "}\n"


def dark_text(opacity: float) -> str:
    """Return black or white, whichever has the higher contrast on an emerald of this opacity over the dark page."""
    mixed = [opacity * e + (1 - opacity) * p for e, p in zip(EMERALD, DARK_PAGE, strict=True)]
    light = luminance(mixed)
    return "#000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#fff"


def luminance(rgb: Sequence[Scalar]) -> float:
    """Return the relative luminance of an sRGB colour given as 0 to 255 (WCAG 2.2)."""
    linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
