"""Figures hold the numbers they were given, in marks that can be told apart, on axes that name their units."""

import json

import numpy as np
import pytest

from interp.report import drawing, figures
from interp.report.blocks import figure_table
from interp.report.pages import DARK_PAGE, luminance


def rgb(color):
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def axes(figure):
    return {name: axis for name, axis in figure.to_plotly_json()["layout"].items() if name[1:5] == "axis"}


def test_every_figure_function_is_drawn_in_the_sample(sample_figures):
    assert sorted(sample_figures) == sorted(set(figures.__all__) - {"DARK", "FigureError"})


def test_every_axis_has_a_title_or_names_its_rows(sample_figures):
    for name, figure in sample_figures.items():
        for axis in axes(figure).values():
            words = axis["title"]["text"] or axis.get("ticktext") or any(t.type == "bar" for t in figure.data)
            assert words, f"{name} has an axis that says nothing"


def test_series_that_share_a_panel_differ_without_colour(sample_figures):
    for name, figure in sample_figures.items():
        looks = []
        for trace in figure.data:
            if getattr(trace, "fill", None) or trace.name.endswith(", low"):
                continue
            marker = trace.marker
            line = getattr(trace, "line", None)
            look = (
                trace.yaxis,
                getattr(marker, "symbol", None),
                getattr(line, "dash", None),
                str(getattr(marker, "pattern", None)),
            )
            looks.append(look)
        assert len(set(looks)) == len(looks), f"{name} tells series apart by colour alone"


def test_colours_reach_the_contrast_that_graphics_and_text_need_on_both_pages():
    for light, dark in figures.DARK.items():
        if light in (drawing.GRID, drawing.BAND, drawing.NULL_BAND):
            continue
        need = 4.5 if light in (drawing.INK, drawing.MUTED) else 3
        assert contrast(rgb(light), (255, 255, 255)) >= need, light
        assert contrast(rgb(dark), DARK_PAGE) >= need, dark


def test_every_colour_of_every_figure_has_a_twin_for_dark_pages(sample_figures):
    def colours(value):
        if isinstance(value, dict):
            return {c for v in value.values() for c in colours(v)}
        if isinstance(value, list | tuple):
            return {c for v in value for c in colours(v)}
        return {value} if isinstance(value, str) and (value.startswith("#") or value.startswith("rgb")) else set()

    for name, figure in sample_figures.items():
        assert colours(json.loads(figure.to_json())) <= {*figures.DARK, "rgba(0,0,0,0)"}, name


def test_nulls_are_grey_and_hollow_and_findings_are_not():
    figure = figures.analogy_by_layer([0, 1], [0.5, 0.9], [0.4, 0.8], [0.1, 0.2])
    found, honest, null = figure.data
    assert null.marker.color == null.line.color == drawing.NULL and null.marker.symbol.endswith("-open")
    for trace in (found, honest):
        assert trace.marker.color != drawing.NULL and not trace.marker.symbol.endswith("-open")
    assert figure.layout.title.text == "Analogies hold best at layer 1"


def test_the_dead_are_counted_and_left_out_of_the_histogram():
    figure = figures.density_histogram([0, 0, 0.001, 0.01, 0.01, 0.1], bins=2)
    assert list(figure.data[0].y) == [1, 3]
    assert figure.layout.title.text == "2 of 6 latents are dead (33.3 %)"
    with pytest.raises(figures.FigureError, match="all 2 latents are dead"):
        figures.density_histogram([0, 0])
    with pytest.raises(figures.FigureError, match="share of tokens"):
        figures.density_histogram([0.1, 1.1])


def test_score_histograms_hold_every_text_once():
    scores = np.linspace(-3, 3, 41)
    figure = figures.probe_scores(scores, -scores[:17], auroc=0.5)
    assert [round(float(np.sum(t.y)), 9) for t in figure.data] == [100, 100]
    assert [t.name for t in figure.data] == ["negative (17)", "positive (41)"]


def test_losses_are_drawn_in_order_and_a_missing_one_is_named():
    losses = {"ce_clean": 1.0, "ce_spliced": 1.5, "ce_mean": 4.0, "ce_zero": 6.0}
    assert list(figures.loss_bars(losses | {"other": 1}).data[0].x) == [1.0, 1.5, 4.0, 6.0]
    del losses["ce_mean"]
    with pytest.raises(figures.FigureError, match="lack ce_mean"):
        figures.loss_bars(losses)


def test_error_bars_end_at_the_interval():
    figure = figures.probe_controls(0.9, (0.85, 0.97), [0.5, 0.52])
    bars = figure.data[0].error_x
    assert (0.9 - bars.arrayminus[0], 0.9 + bars.array[0]) == pytest.approx((0.85, 0.97))


def test_hover_texts_and_labels_are_drawn_as_text_not_as_markup():
    figure = figures.map_2d([[0, 0], [1, 1]], ["<b>a</b>", "b"], ['<a href="https://x.example">x</a>', "y"])
    assert figure.data[0].name == "&lt;b&gt;a&lt;/b&gt;"
    assert "<a" not in figure.data[0].text[0] and "&lt;a" in figure.data[0].text[0]
    hostile = figures.layer_curve(["<i>0</i>"], {"<u>s</u>": [1.0]}, y_title="<b>y</b>", title="<b>t</b>")
    assert "<" not in str(hostile.data[0].x[0]) + hostile.data[0].name + hostile.layout.title.text
    assert "<" not in hostile.layout.yaxis.title.text


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: figures.training_curve([0, 1], [0.5], [3, 4]), "differ in length"),
        (lambda: figures.training_curve([], [], []), "non-empty"),
        (lambda: figures.training_curve([0], [float("nan")], [1]), "fve holds nan or infinity at index 0"),
        (lambda: figures.dose_curve([0, 1], [0, 1], [(0, 1)]), "interval must be 2 finite pairs"),
        (lambda: figures.dose_curve([0, 1], [0, 1], [(0, 1), (1, 0)]), "low end is above"),
        (lambda: figures.dose_curve([0, 1], [0, 1], kl=[1]), "kl has 1 values for 2 strengths"),
        (lambda: figures.layer_curve([0, 1], {"a": [1]}, y_title="y", title="t"), "a has 1 values for 2 layers"),
        (lambda: figures.dot_rows(["r"], {"a": [1, 2]}, x_title="x", title="t"), "a has 2 values for 1 rows"),
        (lambda: figures.map_2d([[0, 0]], ["a"], ["x", "y"]), "2 texts for 1 points"),
        (lambda: figures.map_2d([[0, 0]] * 9, list("abcdefghi")), "9 labels are more than the 8"),
    ],
)
def test_numbers_that_cannot_be_drawn_are_refused_by_name(draw, words):
    with pytest.raises(figures.FigureError, match=words):
        draw()


def test_the_table_of_a_figure_holds_its_numbers():
    table = figure_table(figures.training_curve([0, 10], [0.25, 0.5], [40, 32.5]), "T")
    assert (table.rows, table.columns[0]) == ([[0, 0.25, 40.0], [10, 0.5, 32.5]], "optimiser step")
    assert [c.name for c in table.columns[1:]] == ["FVE", "L0"]


def test_the_table_of_a_figure_turns_bands_and_error_bars_into_intervals_and_marks_nulls():
    figure = figures.dose_curve([0, 1], [0, 0.5], placebo=[(-0.1, 0.1), (-0.25, 0.25)])
    table = figure_table(figure, "T")
    assert [(c.name, c.null) for c in table.columns[1:]] == [("random directions", True), ("effect", False)]
    assert table.rows[1] == [1, "[−0.250, 0.250]", 0.5]
    rows = figure_table(figures.probe_controls(0.9, (0.8, 1.0), [0.5, 0.25]), "T").rows
    assert [row[0] for row in rows] == ["probe, held out", "shuffled labels (×\xa02)", "shuffled labels (×\xa02)"]
    assert rows[2][1] == 0.25
    assert (rows[0][1].value, rows[0][1].low, rows[0][1].high) == pytest.approx((0.9, 0.8, 1.0))


def test_a_long_table_is_thinned_and_says_so():
    xy = np.arange(400.0).reshape(200, 2)
    table = figure_table(figures.map_2d(xy, ["a"] * 100 + ["b"] * 100, ["<i>"] * 200), "Points", max_rows=50)
    assert len(table.rows) == 50 and table.caption == "Points (one in 4 of 200 rows)"
    assert table.rows[0] == ["a", 0, 1, "<i>"] and list(table.columns)[-1] == "text"
