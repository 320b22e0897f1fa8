"""One function a figure: numbers that are already computed in, a plotly figure out.

Grey, dashed or hollow always means a null: what the same measurement gives where there is nothing to find. Series
differ by marker and dash as well as by colour. Titles are the figures' own in a notebook; a page sets them as headings.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Real

from interp.report import drawing as dr
from interp.report.drawing import DARK, FigureError
from interp.report.text import Estimate, Scalar, plain, show

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = [
    "DARK",
    "FigureError",
    "analogy_by_layer",
    "density_histogram",
    "dose_curve",
    "dot_rows",
    "layer_curve",
    "loss_bars",
    "map_2d",
    "placebo_strip",
    "probe_controls",
    "probe_scores",
    "training_curve",
]

Values = Real[np.ndarray, " n"] | Sequence[Any]
More = Real[np.ndarray, " m"] | Sequence[Any]
Pair = Real[np.ndarray, "2"] | Sequence[Any]
Pairs = Real[np.ndarray, "n 2"] | Sequence[Any]


def training_curve(steps: Values, fve: Values, l0: Values, *, target_l0: Scalar | None = None) -> "Figure":
    """Draw FVE (share of variance) and L0 (active latents a token) over the optimiser steps, one panel each."""
    x, variance, active = dr.check_lines(steps=steps, fve=fve, l0=l0)
    solid = {"mode": "lines", "line": {"color": dr.SERIES[0], "width": 2}}
    traces = [
        {"name": "FVE", "x": x, "y": variance} | solid,
        {"name": "L0", "x": x, "y": active, "yaxis": "y2"} | solid,
    ]
    top, bottom = dr.axis("FVE", domain=[0.56, 1]), dr.axis("L0 (latents / token)", domain=[0, 0.44])
    return dr.draw(
        traces,
        title=f"The autoencoder explains {show(float(variance[-1]))} of the variance after {show(int(x[-1]))} steps",
        height=460,
        xaxis=dr.axis("optimiser step", anchor="y2"),
        yaxis=top,
        yaxis2=bottom | {"anchor": "x"},
        shapes=[dr.rule("y2", target_l0)] if target_l0 is not None else [],
        annotations=[dr.note("target", target_l0, axis="y2")] if target_l0 is not None else [],
        showlegend=False,
        hovermode="x unified",
    )


def density_histogram(density: Values, *, bins: int = 40) -> "Figure":
    """Draw how often latents fire: a histogram of log10 density of those alive; the dead (density 0) are counted."""
    (shares,) = dr.check_lines(density=density)
    if shares.min() < 0 or shares.max() > 1:
        raise FigureError("a density is a share of tokens, from 0 to 1")
    alive = shares[shares > 0]
    if not len(alive):
        raise FigureError(f"all {len(shares)} latents are dead: there is no density to draw")
    dead = len(shares) - len(alive)
    counts, edges = np.histogram(np.log10(alive), bins=bins)
    trace = dr.histogram("latents", edges, counts, dr.SERIES[0])
    trace["hovertemplate"] = "%{y} latents at 10^%{x:.2f}<extra></extra>"
    share = f"{show(dead)} of {show(len(shares))} latents are dead ({show(100 * dead / len(shares))} %)"
    return dr.draw(
        [trace],
        title=share,
        height=320,
        xaxis=dr.axis("share of tokens on which a latent fires (log10)"),
        yaxis=dr.axis("latents", rangemode="tozero"),
        showlegend=False,
    )


def loss_bars(losses: Mapping[str, Any]) -> "Figure":
    """Draw next-token cross-entropy (nats a token) of the model clean, spliced, mean- and zero-ablated.

    Takes ce_clean, ce_spliced, ce_mean, ce_zero and, for the title, recovered_mean; other keys are left alone.
    Raises FigureError naming a key that is absent.
    """
    names = {
        "ce_clean": "the model as it is",
        "ce_spliced": "through the autoencoder",
        "ce_mean": "mean ablation (null)",
        "ce_zero": "zero ablation (null)",
    }
    missing = [key for key in names if key not in losses]
    if missing:
        raise FigureError(f"the losses lack {', '.join(missing)}; they need {', '.join(names)}")
    (values,) = dr.check_lines(losses=[float(losses[key]) for key in names])
    recovered = losses.get("recovered_mean")
    title = "Cross-entropy with the layer replaced"
    if recovered is not None:
        title = f"Through the autoencoder the model keeps {show(float(recovered))} of what the layer gives it"
    trace = {
        "type": "bar",
        "orientation": "h",
        "name": "cross-entropy",
        "x": values,
        "y": [dr.wrap(name) for name in names.values()],
        "text": [show(v, 3) for v in values],
        # inside a hatched bar a label cannot be read
        "textposition": "outside",
        "marker": {
            "color": [dr.SERIES[0], dr.SERIES[0], dr.NULL, dr.NULL],
            "pattern": {"shape": ["", "", "/", "/"], "fillmode": "replace", "solidity": 0.35},
        },
        "hovertemplate": "%{y}: %{x:.4f} nats a token<extra></extra>",
        "cliponaxis": False,
    }
    return dr.draw(
        [trace],
        title=title,
        height=280,
        xaxis=dr.axis("cross-entropy (nats / token)", range=[0, float(values.max()) * 1.3]),
        yaxis=dr.axis("", autorange="reversed", gridcolor="rgba(0,0,0,0)"),
        showlegend=False,
        bargap=0.35,
    )


def probe_scores(
    positive: Values,
    negative: More,
    *,
    auroc: Scalar,
    interval: Pair | None = None,
    names: tuple[str, str] = ("positive", "negative"),
    bins: int = 30,
) -> "Figure":
    """Draw the probe's held-out scores of both classes as two overlaid histograms, AUROC in the title."""
    (pos,), (neg,) = dr.check_lines(positive=positive), dr.check_lines(negative=negative)
    edges = np.histogram_bin_edges(np.concatenate([pos, neg]), bins=bins)
    traces = []
    for values, name, color, shape in ((neg, names[1], dr.SERIES[1], "/"), (pos, names[0], dr.SERIES[0], "")):
        counts, _ = np.histogram(values, bins=edges)
        trace = dr.histogram(f"{name} ({show(len(values))})", edges, 100 * counts / len(values), color, shape)
        trace["hovertemplate"] = "%{y:.1f} % at %{x:.2f}<extra>" + plain(name) + "</extra>"
        traces.append(trace)
    shown = Estimate(auroc, *interval) if interval else auroc
    return dr.draw(
        traces,
        title=f"Held-out AUROC {show(shown)}",
        height=340,
        xaxis=dr.axis("score of the probe (logit)"),
        yaxis=dr.axis("share of the class (%)", rangemode="tozero"),
        barmode="overlay",
    )


def probe_controls(
    auroc: Scalar,
    interval: Pair,
    shuffled: Values,
    random_direction: Scalar | None = None,
    *,
    others: Mapping[str, Scalar] | None = None,
) -> "Figure":
    """Draw the probe's AUROC with its interval above its nulls: shuffled-label AUROCs as a strip, chance as a line.

    `others` adds named points of comparison (an untrained model, a bag of words).
    """
    (null,) = dr.check_lines(shuffled=shuffled)
    singles = {"random direction": random_direction} if random_direction is not None else {}
    singles |= dict(others or {})
    rows = ["probe, held out", f"shuffled labels (×\u00a0{len(null)})", *singles]
    traces = [dr.point("probe", auroc, interval, row=0), dr.strip("shuffled labels", null, row=1)]
    for row, (name, value) in enumerate(singles.items(), start=2):
        mark = dr.marker(row, null=True)
        traces.append({"name": plain(name), "x": [value], "y": [row], "mode": "markers", "marker": mark})
    low = min(0.4, float(null.min()), *map(float, singles.values())) - 0.04
    return dr.draw(
        traces,
        title=f"The probe reaches {show(Estimate(auroc, *interval))}; shuffled labels {show(float(null.mean()))}",
        height=150 + 48 * len(rows),
        xaxis=dr.axis("held-out AUROC (dashed: chance)", range=[low, 1.02]),
        yaxis=dr.rows_axis(rows),
        shapes=[dr.rule("x", 0.5)],
        showlegend=False,
    )


def placebo_strip(
    effect: Scalar,
    placebo: Values,
    *,
    interval: Pair | None = None,
    z: Scalar | None = None,
    effect_name: str = "change in score",
) -> "Figure":
    """Draw the effect of a direction beside the effects of random directions of equal norm."""
    (null,) = dr.check_lines(placebo=placebo)
    rows = ["the direction", f"random directions (×\u00a0{len(null)})"]
    title = f"The direction moves the score by {show(float(effect))}"
    if z is not None:
        title += f": {show(float(z))} placebo standard deviations"
    return dr.draw(
        [dr.point("the direction", effect, interval, row=0), dr.strip("random directions", null, row=1)],
        title=title,
        height=246,
        xaxis=dr.axis(effect_name),
        yaxis=dr.rows_axis(rows),
        shapes=[dr.rule("x", 0)],
        showlegend=False,
    )


def dose_curve(
    strengths: Values,
    effect: Values,
    interval: Pairs | None = None,
    *,
    placebo: Pairs | None = None,
    kl: Values | None = None,
    kl_budget: Scalar | None = None,
    chosen: Scalar | None = None,
    effect_name: str = "change in score",
) -> "Figure":
    """Draw the effect over steering strength (median residual norms), and below it what it costs in KL (nats a token).

    `interval` and `placebo` are a (low, high) pair a strength: the effect's interval and the band of random directions.
    """
    x, y = dr.check_lines(strengths=strengths, effect=effect)
    traces = []
    if placebo is not None:
        traces += dr.band("random directions", x, dr.check_pairs("placebo", placebo, len(x)), dr.NULL_BAND, dr.NULL)
    if interval is not None:
        traces += dr.band(
            "interval", x, dr.check_pairs("interval", interval, len(x)), dr.BAND, dr.SERIES[0], edge=False
        )
    traces.append(dr.curve("effect", x, y, 0))
    layout: dict[str, Any] = {
        "xaxis": dr.axis("strength (median residual norms)"),
        "yaxis": dr.axis(effect_name),
        "shapes": [dr.rule("x", chosen, color=dr.INK)] if chosen is not None else [],
    }
    if chosen is not None:
        layout["annotations"] = [dr.note(f"chosen: {chosen:g}", chosen)]
    if kl is not None:
        (costs,) = dr.check_lines(kl=kl)
        if len(costs) != len(x):
            raise FigureError(f"kl has {len(costs)} values for {len(x)} strengths")
        traces.append(dr.curve("KL", x, costs, 1) | {"yaxis": "y2", "showlegend": False})
        layout["yaxis"] |= {"domain": [0.48, 1]}
        layout["yaxis2"] = dr.axis("KL (nats / token)", domain=[0, 0.36], anchor="x", rangemode="tozero")
        layout["xaxis"] |= {"anchor": "y2"}
        if kl_budget is not None:
            layout["shapes"].append(dr.rule("y2", kl_budget))
            layout.setdefault("annotations", []).append(dr.note("budget", kl_budget, axis="y2"))
    title = "Effect over strength, and its cost" if kl is not None else "Effect over strength"
    return dr.draw(traces, title=title, height=520 if kl is not None else 360, **layout)


def layer_curve(
    layers: Sequence[Any],
    values: Mapping[str, Any],
    *,
    y_title: str,
    title: str,
    intervals: Mapping[str, Any] | None = None,
    nulls: Sequence[str] = (),
    chance: Scalar | None = None,
    x_title: str = "layer",
    y_range: Pair | None = None,
) -> "Figure":
    """Draw one line a named series over the layers; series listed in `nulls` are grey and hollow.

    `intervals` holds a (low, high) pair a layer for the series it names; `chance` is a dashed level.
    """
    labels = [plain(layer) for layer in layers]
    traces = []
    for i, (name, series) in enumerate(values.items()):
        (y,) = dr.check_lines(**{name: series})
        if len(y) != len(labels):
            raise FigureError(f"{name} has {len(y)} values for {len(labels)} layers")
        trace = dr.curve(name, labels, y, i, null=name in nulls)
        if intervals and name in intervals:
            bars = dr.error_bars(y, dr.check_pairs(name, intervals[name], len(y)), trace["line"]["color"])
            trace["error_y"] = bars
        traces.append(trace)
    return dr.draw(
        traces,
        title=title,
        height=380,
        xaxis=dr.axis(x_title, type="category"),
        yaxis=dr.axis(y_title, range=list(y_range) if y_range else None),
        shapes=[dr.rule("y", chance)] if chance is not None else [],
        hovermode="x unified",
    )


def analogy_by_layer(
    layers: Sequence[Any],
    accuracy: Values,
    honest: Values,
    only_b: Values,
    *,
    intervals: Mapping[str, Any] | None = None,
) -> "Figure":
    """Draw analogy accuracy by layer: query words left out, no word left out (honest), and the only-b null.

    `intervals` may hold (low, high) pairs under "accuracy", "honest" and "only_b".
    """
    names = {"accuracy": "query words left out", "honest": "no word left out", "only_b": "only b (null)"}
    series = {"accuracy": accuracy, "honest": honest, "only_b": only_b}
    best = int(np.argmax(dr.check_lines(accuracy=accuracy)[0]))
    return layer_curve(
        layers,
        {names[key]: values for key, values in series.items()},
        y_title="share of analogies answered",
        title=f"Analogies hold best at layer {layers[best]}",
        intervals={names[key]: pairs for key, pairs in (intervals or {}).items()},
        nulls=(names["only_b"],),
        y_range=(-0.03, 1.03),
    )


def dot_rows(
    names: Sequence[Any],
    values: Mapping[str, Any],
    *,
    x_title: str,
    title: str,
    intervals: Mapping[str, Any] | None = None,
    nulls: Sequence[str] = (),
) -> "Figure":
    """Draw one row a name (a relation, a concept) with one marker a series; series in `nulls` are grey and hollow."""
    rows = np.arange(len(names))
    traces = []
    for i, (name, series) in enumerate(values.items()):
        (x,) = dr.check_lines(**{name: series})
        if len(x) != len(rows):
            raise FigureError(f"{name} has {len(x)} values for {len(rows)} rows")
        marker = dr.marker(i, null=name in nulls)
        trace = {"name": plain(name), "x": x, "y": rows, "mode": "markers", "marker": marker, "cliponaxis": False}
        if intervals and name in intervals:
            bars = dr.error_bars(x, dr.check_pairs(name, intervals[name], len(x)), marker["color"])
            trace["error_x"] = bars
        traces.append(trace)
    return dr.draw(
        traces,
        title=title,
        height=130 + 30 * len(rows),
        xaxis=dr.axis(x_title),
        yaxis=dr.rows_axis(list(names), size=12) | {"showgrid": True},
    )


def map_2d(
    xy: Pairs,
    labels: Sequence[Any],
    texts: Sequence[str] | None = None,
    *,
    axes: tuple[str, str] = ("first principal component", "second principal component"),
    title: str = "A map of the texts",
) -> "Figure":
    """Draw labelled points on a plane, the text of a point on hover. Axes share one scale (residual-stream units)."""
    points = dr.check_pairs("xy", xy, len(labels), ordered=False)
    if texts is not None and len(texts) != len(points):
        raise FigureError(f"{len(texts)} texts for {len(points)} points")
    groups = list(dict.fromkeys(labels))
    if len(groups) > len(dr.SERIES):
        raise FigureError(f"{len(groups)} labels are more than the {len(dr.SERIES)} that a reader can tell apart")
    traces = []
    for i, group in enumerate(groups):
        rows = [row for row, label in enumerate(labels) if label == group]
        name = plain(group)
        marker = {"color": dr.SERIES[i], "symbol": dr.MARKERS[i], "size": 7, "opacity": 0.8, "line": {"width": 0}}
        trace: dict[str, Any] = {"name": name, "x": points[rows, 0], "y": points[rows, 1], "mode": "markers"}
        trace |= {"marker": marker, "hovertemplate": f"{name}<extra></extra>"}
        if texts is not None:
            trace["text"] = [dr.wrap(plain(dr.shorten(texts[row])), 48) for row in rows]
            trace["hovertemplate"] = "%{text}<extra>" + name + "</extra>"
        traces.append(trace)
    return dr.draw(
        traces,
        title=title,
        height=520,
        xaxis=dr.axis(axes[0], showgrid=False),
        yaxis=dr.axis(axes[1], showgrid=False, scaleanchor="x"),
    )
