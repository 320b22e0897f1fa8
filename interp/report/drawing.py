"""What every figure is drawn with: the palette, axes, markers, checks, and the one place that imports plotly."""

from typing import TYPE_CHECKING, Any

import numpy as np

from interp.report.text import Scalar, plain

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, MUTED, GRID, NULL = "#1b1f24", "#57606a", "#e6e9ed", "#6b7280"
BAND, NULL_BAND = "rgba(0,96,168,0.16)", "rgba(107,114,128,0.18)"
SERIES = ("#0060a8", "#c2500a", "#0b7a5b", "#8e4b9e", "#8a6500", "#b5305c", "#3b6ea5", "#5f6b00")
# every colour above and its twin for a dark page, which page.js swaps in; tests hold both to the contrast they need
DARK = {
    INK: "#e6e9ee",
    MUTED: "#a3adb8",
    GRID: "#2a313a",
    NULL: "#98a2b0",
    BAND: "rgba(108,176,245,0.20)",
    NULL_BAND: "rgba(152,162,176,0.22)",
    "#0060a8": "#6cb0f5",
    "#c2500a": "#f2935c",
    "#0b7a5b": "#4cc9a0",
    "#8e4b9e": "#cf9be0",
    "#8a6500": "#e0b44c",
    "#b5305c": "#f58aae",
    "#3b6ea5": "#a8c7ea",
    "#5f6b00": "#c3d05a",
}
MARKERS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


class FigureError(ValueError):
    """The numbers given cannot be drawn: empty, of unequal length, or not finite."""


def check_lines(**series: Any) -> tuple[np.ndarray, ...]:
    """Return the series as float arrays of one length; name the one that is empty, ragged or not finite."""
    arrays = {}
    for name, values in series.items():
        array = np.asarray(values, dtype=float)
        if array.ndim != 1 or not len(array):
            raise FigureError(f"{name} must be a non-empty line of numbers, and has the shape {array.shape}")
        if not np.isfinite(array).all():
            raise FigureError(f"{name} holds nan or infinity at index {int(np.argmin(np.isfinite(array)))}")
        arrays[name] = array
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise FigureError(f"the series differ in length: {lengths}")
    return tuple(arrays.values())


def check_pairs(name: str, pairs: Any, n: int, *, ordered: bool = True) -> np.ndarray:
    """Return n (low, high) pairs as a float array [n, 2]."""
    array = np.asarray(pairs, dtype=float)
    if array.shape != (n, 2) or not np.isfinite(array).all():
        raise FigureError(f"{name} must be {n} finite pairs, and has the shape {array.shape}")
    if ordered and (array[:, 0] > array[:, 1]).any():
        raise FigureError(f"{name} holds an interval whose low end is above its high end")
    return array


def draw(traces: list[dict[str, Any]], *, title: str, height: int, **layout: Any) -> "Figure":
    """Return the figure in the house's look. The only place that imports plotly."""
    import plotly.graph_objects as go

    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 13}}
    base = {
        "template": "none",
        "title": {"text": plain(title), "x": 0, "xref": "paper", "automargin": True, "font": {"size": 16}},
        "height": height,
        "autosize": True,
        "font": {"family": FONT, "size": 13, "color": INK},
        "margin": {"l": 16, "r": 16, "t": 20, "b": 16},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": legend,
        "hoverlabel": {"font": {"family": FONT, "size": 13}, "align": "left"},
        "showlegend": len(traces) > 1,
    }
    data = [{"type": "scatter"} | trace for trace in traces]
    return go.Figure({"data": data, "layout": base | layout})


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with its title (and unit); plotly settings in `more` win, those that are None are left out."""
    base = {
        "title": {"text": plain(title), "font": {"size": 13, "color": MUTED}, "standoff": 10},
        "tickfont": {"size": 12, "color": MUTED},
        "automargin": True,
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": MUTED,
        "ticks": "",
    }
    return base | {key: value for key, value in more.items() if value is not None}


def rows_axis(rows: list[Any], size: int = 13) -> dict[str, Any]:
    """Return an upright axis whose ticks are the names of rows, the first on top."""
    base = axis("", range=[len(rows) - 0.5, -0.5], showgrid=False)
    base |= {"tickvals": list(range(len(rows))), "ticktext": [wrap(plain(row)) for row in rows]}
    return base | {"tickfont": {"size": size, "color": INK}}


def curve(name: str, x: Any, y: np.ndarray, i: int, *, null: bool = False) -> dict[str, Any]:
    """Return the i-th line of a figure, told apart by colour, marker and dash; a null is grey, hollow and dashed."""
    mark = marker(i, null=null, size=8)
    line = {"color": mark["color"], "width": 2, "dash": "dash" if null else DASHES[i % len(DASHES)]}
    return {"name": plain(name), "x": x, "y": y, "mode": "lines+markers", "line": line, "marker": mark}


def marker(i: int, *, null: bool = False, size: int = 10) -> dict[str, Any]:
    """Return the i-th marker, told apart by colour and shape; a null is grey and hollow."""
    shape = {"color": NULL if null else SERIES[i % len(SERIES)], "size": size, "line": {"width": 2 if null else 0}}
    return shape | {"symbol": MARKERS[i % len(MARKERS)] + ("-open" if null else "")}


def band(name: str, x: np.ndarray, pairs: np.ndarray, fill: str, color: str, *, edge: bool = True) -> list[dict]:
    """Return the two traces of a filled band; hover is silent, the curve inside speaks."""
    line = {"color": color, "width": 1 if edge else 0, "dash": "dot"}
    low = {"name": f"{name}, low", "x": x, "y": pairs[:, 0], "mode": "lines", "line": line, "showlegend": False}
    high = {"name": name, "x": x, "y": pairs[:, 1], "mode": "lines", "line": line, "fill": "tonexty", "fillcolor": fill}
    return [low | {"hoverinfo": "skip"}, high | {"hoverinfo": "skip"}]


def point(name: str, value: Scalar, interval: Any | None, *, row: int) -> dict[str, Any]:
    """Return one estimate on a row, with its interval."""
    mark = {"color": SERIES[0], "size": 13, "symbol": "diamond"}
    point = {
        "name": plain(name),
        "x": [float(value)],
        "y": [row],
        "mode": "markers",
        "marker": mark,
        "cliponaxis": False,
    }
    if interval is not None:
        pair = check_pairs(name, [interval], 1)
        point["error_x"] = error_bars(np.array([value]), pair, SERIES[0]) | {"thickness": 2.5, "width": 6}
    return point


def error_bars(values: np.ndarray, pairs: np.ndarray, color: str) -> dict[str, Any]:
    """Return plotly's error bars from (low, high) pairs."""
    # a percentile interval may leave its own point outside; plotly would draw a negative arm backwards
    up, down = np.maximum(pairs[:, 1] - values, 0), np.maximum(values - pairs[:, 0], 0)
    error = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return error | {"thickness": 1.2, "width": 3, "color": color}


def strip(name: str, values: np.ndarray, *, row: int) -> dict[str, Any]:
    """Return the values of a null on a row, spread upright so that none hides another."""
    # the golden ratio spreads neighbours evenly, and the same way each time
    offset = (np.arange(len(values)) * 0.6180339887 % 1 - 0.5) * 0.5
    marker = {"color": NULL, "size": 8, "symbol": "circle-open", "line": {"width": 1.5}}
    return {
        "name": plain(name),
        "x": values,
        "y": row + offset,
        "mode": "markers",
        "marker": marker,
        "hovertemplate": "%{x:.3f}<extra>" + plain(name) + "</extra>",
    }


def histogram(name: str, edges: np.ndarray, heights: np.ndarray, color: str, hatch: str = "") -> dict[str, Any]:
    """Return the bars of a histogram; hatched ones can be laid over plain ones and both be seen."""
    mark = {"color": color, "line": {"color": color, "width": 1 if hatch else 0}}
    mark["pattern"] = {"shape": hatch, "fillmode": "replace", "solidity": 0.4}
    bars = {"type": "bar", "name": plain(name), "x": (edges[1:] + edges[:-1]) / 2, "y": heights, "marker": mark}
    return bars | {"width": 0.92 * np.diff(edges), "opacity": 0.75 if hatch else 0.85}


def rule(axis: str, at: Scalar, color: str = NULL) -> dict[str, Any]:
    """Return a dashed line across the plot at a value of the axis ("x", "y" or "y2")."""
    line = {"color": color, "width": 1.5, "dash": "dash"}
    if axis == "x":
        return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    return {"type": "line", "y0": at, "y1": at, "x0": 0, "x1": 1, "xref": "paper", "yref": axis, "line": line}


def note(text: str, at: Scalar, axis: str = "x") -> dict[str, Any]:
    """Return the words beside a rule."""
    note = {"text": text, "showarrow": False, "font": {"size": 12, "color": INK if axis == "x" else MUTED}}
    if axis == "x":
        return note | {"x": at, "y": 1, "yref": "paper", "xanchor": "right", "yanchor": "top", "xshift": -5}
    return note | {"x": 0, "xref": "paper", "y": at, "yref": axis, "xanchor": "left", "yanchor": "bottom"}


def wrap(text: str, width: int = 18) -> str:
    """Return the label broken at spaces into lines of about `width` characters; text must be escaped already."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)


def shorten(text: str, limit: int = 240) -> str:
    """Return the text, cut at `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
