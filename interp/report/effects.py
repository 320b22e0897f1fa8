"""The page of a dose curve with its nulls: one figure, one table, the texts side by side, one recommendation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.concepts.effects.dosing import MEANINGS, Beside, EffectsReport, Side
from interp.report import drawing as dr
from interp.report.pages import Column, Estimate, Fact, Figure, Page, Reply, Section, SideBySide, Table, Text
from interp.report.text import show

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Drawn

__all__ = ["effects_figure", "effects_page", "effects_section", "effects_table"]

NAMES = {
    "margin": "margin (nats)",
    "reading": "re-read probability",
    "gain": "gain in probability",
    "nll": "loss of new text (nats / token)",
    "distinct2": "distinct pairs",
    "longest_repeat": "longest repeat (tokens)",
    "zlib": "zlib ratio",
    "kl": "KL (nats / token)",
    "extra_nll": "extra loss (nats / token)",
    "concept": "concept score",
    "fluency": "fluency score",
    "damage": "damage score",
    "combined": "harmonic mean",
}
MAX_SIDES = 12


def effects_page(report: EffectsReport) -> Page:
    """Return the report as a page of its own; `interp.report.pages.write_report` writes it as one offline file."""
    use = report.recommended
    title = "No usable strength" if use is None else f"Steer at {use:g} median residual norms"
    about = {
        "model": report.model, "hook point": report.direction.hook, "direction": report.direction.method,
        "positions": report.positions, "new tokens": report.max_new_tokens, "prompts reported on": len(report.prompts),
        "prompts that chose": len(report.choosing_prompts), "neutral texts": report.n_neutral,
        "KL budget (nats / token)": report.kl_budget, "level": report.level, "seed": report.seed,
        "answers' log-probability": "mean of their tokens" if report.per_token else "sum of their tokens",
    }  # fmt: skip
    return Page(
        title=title,
        kicker=f"interp effects · {report.model} · {report.direction.hook}",
        lead=report.reason,
        facts=_facts(report),
        sections=[effects_section(report), _meanings(report)],
        about=about | {name: value for name, value in report.direction.versions.items()},
    )


def effects_section(report: EffectsReport) -> Section:
    """Return the figure, the table and the texts as one section of a page."""
    nulls = _nulls(report)
    caption = (
        f"On the {len(report.prompts)} prompts that did not choose the strength. Grey: {nulls} of equal norm, from the "
        "lowest to the highest. The scores and their harmonic mean are those of the direction."
    )
    return Section(
        "Effect and damage",
        [
            Figure(effects_figure(report), caption, table=_figure_table(report)),
            effects_table(report),
            _slopes(report),
            _texts(report),
        ],
        lead="Strength is in median residual norms of the hook point. The concept's effect is a change against the "
        f"model as it is, beside {nulls} at the same strength; no language model judges.",
    )


def effects_figure(report: EffectsReport) -> "Drawn":
    """Draw the gain in probability over strength with its nulls, and below it the three scores and their mean."""
    x = np.array([row.strength for row in report.doses])
    gains = [row["gain"] for row in report.doses]
    traces = dr.band("random directions", x, _range([g.random for g in gains]), dr.NULL_BAND, dr.NULL)
    if gains[0].shuffled:
        low, high = _range([g.shuffled for g in gains]).T
        mark = {"mode": "lines", "line": {"color": dr.NULL, "width": 1.5, "dash": "dash"}}
        traces.append({"name": "shuffled labels, highest", "x": x, "y": high} | mark)
        traces.append({"name": "shuffled labels, lowest", "x": x, "y": low, "showlegend": False} | mark)
    traces += dr.band("interval", x, np.array([_interval(g) for g in gains]), dr.BAND, dr.SERIES[0], edge=False)
    traces.append(dr.curve("gain", x, np.array([g.value for g in gains]), 0))
    for i, name in enumerate(("concept", "fluency", "damage", "combined"), 1):
        y = np.array([row[name].value for row in report.doses])
        traces.append(dr.curve(NAMES[name], x, y, i) | {"yaxis": "y2"})
    shapes, notes = [dr.rule("x", report.shown, color=dr.INK)] if report.chosen is not None else [], []
    if report.chosen is not None:
        word = "recommended" if report.recommended is not None else "chosen, not confirmed"
        notes = [dr.note(f"{word}: {report.shown:g}", report.shown)]
    use = report.recommended
    return dr.draw(
        traces,
        title="No usable strength" if use is None else f"The harmonic mean is best at {use:g}, and others confirm it",
        height=620,
        xaxis=dr.axis("strength (median residual norms)", anchor="y2"),
        yaxis=dr.axis("gain in probability", domain=[0.54, 1]),
        yaxis2=dr.axis("score (0 to 1)", domain=[0, 0.4], anchor="x", range=[-0.03, 1.05]),
        shapes=shapes,
        annotations=notes,
    )


def effects_table(report: EffectsReport) -> Table:
    """Return the one table: the direction's value of every quantity at every strength, and the nulls at the one shown.

    Nulls at the other strengths stand in the page's last table and in `EffectsReport.to_dict()`.
    """
    at = report.dose(report.shown)
    rows: list[Sequence[Any]] = []
    for name in _measured(report):
        b = at[name]
        interval = None if b.interval is None else f"[{show(b.interval[0], 3)}, {show(b.interval[1], 3)}]"
        values = [show(row[name].value, 3) for row in report.doses]
        rows.append([NAMES[name], *values, interval, *_null_cells(b)[1:], _rank(name, b)])
    shown = f"{report.shown:g}"
    columns = ["at strength", *(f"{row.strength:g}" for row in report.doses), f"{shown}: 95% interval",
               *(Column(f"{shown}: {null}, range", null=True) for null in ("random", "shuffled")), "p"]  # fmt: skip
    return Table(columns, rows, f"Effect, fluency and damage; p: rank among {len(at['gain'].random)} random directions")


def _every_number(report: EffectsReport) -> Table:
    """Return a row a quantity and strength, each beside its nulls."""
    rows = []
    for name in _measured(report):
        for row in report.doses:
            b = row[name]
            value = show(Estimate(b.value, *b.interval) if b.interval and row.strength else b.value)
            rank = _rank(name, b) if row.strength else None
            rows.append([NAMES[name], f"{row.strength:g}", value, *_null_cells(b), rank])
    columns = ["quantity", "strength", "the direction", Column("random: mean", null=True),
               Column("random: range", null=True), Column("shuffled: range", null=True), "p"]  # fmt: skip
    return Table(columns, rows, "Every quantity at every strength")


def _measured(report: EffectsReport) -> list[str]:
    return [name for name in NAMES if name in report.doses[0].measures]


def _null_cells(b: Beside) -> list[str | None]:
    return [show(float(np.mean(b.random)), 3), _span(b.random), _span(b.shuffled) if b.shuffled else None]


def _rank(name: str, b: Beside) -> str | None:
    """Return the p of quantities of which more is better and that a null leaves at 0; others have none."""
    return f"{b.p_random:.3f}" if name in ("margin", "reading", "gain", "concept", "combined") else None


def _facts(report: EffectsReport) -> list[Fact]:
    row = report.dose(report.shown)
    gain, best = row["gain"], row["combined"]
    random = f"{show(float(np.mean(gain.random)))} under random directions, {show(max(gain.random))} at most"
    where = f"at strength {row.strength:g}"
    facts = [
        Fact("Recommended strength", "none" if report.recommended is None else f"{report.recommended:g}", "",
             "Chosen on half of the prompts, confirmed or not on the other half."),
        Fact("Gain in probability", Estimate(gain.value, *_interval(gain)), random, f"Of the concept, {where}."),
        Fact("KL on neutral text", row["kl"].value, f"{show(float(np.mean(row['kl'].random)))} under random directions",
             f"Nats a token, {where}; the budget is {report.kl_budget:g}."),
        Fact("Harmonic mean", Estimate(best.value, *_interval(best)), f"{show(max(best.random))} at most under random",
             "Of the concept, fluency and damage scores."),
    ]  # fmt: skip
    if report.reading:
        r = report.reading
        meaning = f"On {r.n_texts} labelled texts in {r.n_groups} groups, held out; {r.separate}."
        facts.append(Fact("The classifier's AUROC", Estimate(r.auroc, *r.interval), "0.5 by chance", meaning))
    return facts


def _slopes(report: EffectsReport) -> Table:
    rows = []
    for name, b in report.slopes.items():
        sds = b.in_random_sd if len(set(b.random)) > 1 else None
        rows.append([
            NAMES[name], Estimate(b.value, *_interval(b)), float(np.mean(b.random)), _span(b.random),
            _span(b.shuffled) if b.shuffled else None, sds,
        ])  # fmt: skip
    columns = ["change a unit of strength", "slope", Column("random: mean", null=True),
               Column("random: range", null=True), Column("shuffled: range", null=True), "in random sd"]  # fmt: skip
    return Table(columns, rows, "Least-squares slopes over all strengths, bootstrap over prompts")


def _texts(report: EffectsReport) -> SideBySide:
    columns = ["unsteered", f"steered, {report.shown:g}", "random direction"]
    shuffled = bool(report.sides) and report.sides[0].shuffled is not None
    rows = [_replies(side) for side in report.sides[:MAX_SIDES]]
    caption = f"Greedy continuations of {len(rows)} of the {len(report.sides)} prompts reported on"
    return SideBySide(columns + ["shuffled labels"] * shuffled, rows, caption)


def _replies(side: Side) -> tuple[Any, ...]:
    texts = [side.unsteered, side.steered, side.random, side.shuffled]
    pairs = zip([t for t in texts if t is not None], side.probabilities, strict=True)
    return side.prompt, *(Reply(text, "" if p is None else f"concept {p:.2f}") for text, p in pairs)


def _meanings(report: EffectsReport) -> Section:
    rows = [[NAMES[name], MEANINGS[name]] for name in _measured(report)]
    unsteered = ", ".join(f"{NAMES[name]} {show(value)}" for name, value in report.unsteered.items())
    note = f"Of the model as it is, on the same prompts: {unsteered}."
    blocks = [Table(["quantity", "definition"], rows, "Definitions"), Text(note, "note"), _every_number(report)]
    return Section("What each quantity is", blocks)


def _figure_table(report: EffectsReport) -> Table:
    rows = [
        [row.strength, Estimate(g.value, *_interval(g)), _span(g.random), _span(g.shuffled) if g.shuffled else None,
         *(row[name].value for name in ("concept", "fluency", "damage", "combined")), row.chosen_on]
        for row in report.doses
        for g in [row["gain"]]
    ]  # fmt: skip
    columns = ["strength", "gain", Column("random: range", null=True), Column("shuffled: range", null=True), "concept",
               "fluency", "damage", "harmonic mean", "harmonic mean, choosing prompts"]  # fmt: skip
    return Table(columns, rows, "The numbers of the figure")


def _nulls(report: EffectsReport) -> str:
    gain = report.doses[0]["gain"]
    shuffled = f" and {len(gain.shuffled)} fitted to shuffled labels" if gain.shuffled else ""
    return f"{len(gain.random)} random directions{shuffled}"


def _interval(b: Beside) -> tuple[float, float]:
    return b.interval or (b.value, b.value)


def _range(values: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([[min(v), max(v)] for v in values])


def _span(values: Sequence[float]) -> str:
    return f"[{show(min(values), 3)}, {show(max(values), 3)}]"
