"""The page of a dose curve: offline, with the numbers of its figure, honest where no strength is usable."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.acts.direction import Direction
from interp.concepts.effects.dosing import MEANINGS, Beside, DoseRow, EffectsReport, Reading, Side
from interp.report.effects import effects_figure, effects_page, effects_section, effects_table
from interp.report.pages import render_page, write_report
from interp.report.text import show

STRENGTHS = (0.0, 0.1, 0.25, 0.4)


def beside(value, spread, seed, *, interval=True, shuffled=10):
    g = np.random.default_rng(seed)
    nulls = (spread * g.standard_normal(20 + shuffled)).round(4).tolist()
    pair = (round(value - 0.05, 4), round(value + 0.06, 4)) if interval else None
    return Beside(value=value, interval=pair, random=tuple(nulls[:20]), shuffled=tuple(nulls[20:]))


def make(*, usable=True, shuffled=10):
    """Return a report such as a run gives, its numbers all different."""
    rows = []
    for i, s in enumerate(STRENGTHS):
        measures = {
            name: beside(round(0.1 * k + 0.317 * s + 0.013 * i, 4), 0.1 * s, 10 * k + i,
                         interval=name not in ("kl", "extra_nll", "damage"), shuffled=shuffled)
            for k, name in enumerate(MEANINGS)
        }  # fmt: skip
        rows.append(DoseRow(strength=s, measures=measures, chosen_on=round(0.777 * s, 4)))
    direction = Direction(
        vector=torch.eye(8)[0], hook="blocks.2.hook_resid_post", method="mean_difference", scale=1.0, norm=2.0,
        model="abc",
    )  # fmt: skip
    sides = tuple(
        Side(prompt=f"The <day> {i}", unsteered=" was bad & grey", steered=" was <b>good</b>", random=" was long",
             shuffled=" was short" if shuffled else None, probabilities=(0.11, 0.93, 0.2, 0.3)[: 4 if shuffled else 3])
        for i in range(3)
    )  # fmt: skip
    slopes = {name: beside(1.234, 0.2, 5, shuffled=shuffled) for name in ("margin", "reading", "gain")}
    reading = Reading(hook=direction.hook, auroc=0.953, interval=(0.912, 0.981), n_texts=300, n_groups=41, separate="x")
    return EffectsReport(
        model="tiny", direction=direction, doses=tuple(rows), slopes=slopes, chosen=0.25,
        unsteered={"margin": -1.4437, "reading": 0.1354}, recommended=0.25 if usable else None, reading=reading,
        reason="Use 0.25: it is so." if usable else "No usable strength: 3 of 20 random directions gain as much.",
        sides=sides, prompts=("a", "b"), choosing_prompts=("c", "d"), n_neutral=12, kl_budget=0.1, level=0.05,
        positions="all", per_token=False, max_new_tokens=20, seed=0,
    )  # fmt: skip


def test_the_page_is_one_offline_file_with_the_numbers_of_its_figure(tmp_path):
    report = make()
    path = write_report(effects_page(report), tmp_path / "effects.html")
    html = path.read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in html
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", html, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", body)
    text = re.sub(r"<[^>]+>", " ", body)
    for row in report.doses:
        for name in ("gain", "concept", "fluency", "damage", "combined"):
            assert show(row[name].value, 3) in text or show(row[name].value) in text, (row.strength, name)
    assert report.reason in html and "Steer at 0.25 median residual norms" in html
    assert "was &lt;b&gt;good&lt;/b&gt;" in html and "<b>good</b>" not in html
    assert render_page(effects_page(report)) == render_page(effects_page(make())), "the same report, the same bytes"


def test_the_figure_holds_the_values_and_the_range_of_the_nulls():
    report = make()
    traces = {t.name: t for t in effects_figure(report).data}
    assert list(traces["gain"].y) == [row["gain"].value for row in report.doses]
    assert list(traces["harmonic mean"].y) == [row["combined"].value for row in report.doses]
    assert list(traces["random directions"].y) == [max(row["gain"].random) for row in report.doses]
    assert list(traces["random directions, low"].y) == [min(row["gain"].random) for row in report.doses]
    assert list(traces["shuffled labels, highest"].y) == [max(row["gain"].shuffled) for row in report.doses]
    looks = [(t.yaxis, t.marker.symbol, t.line.dash) for t in traces.values() if t.mode == "lines+markers"]
    assert len(set(looks)) == len(looks) == 5


def test_the_table_holds_every_quantity_at_every_strength_and_its_nulls():
    report = make()
    table = effects_table(report)
    assert len(table.rows) == len(MEANINGS) and len(table.columns) == len(table.rows[0])
    margin = table.rows[0]
    at = report.dose(0.25)["margin"]
    assert margin[1:5] == [show(row["margin"].value, 3) for row in report.doses]
    assert margin[6] == f"[{show(min(at.random), 3)}, {show(max(at.random), 3)}]" and margin[-1] == f"{at.p_random:.3f}"


def test_no_usable_strength_is_said_first():
    report = make(usable=False)
    page = effects_page(report)
    assert page.title == "No usable strength" and "gain as much" in page.lead and page.facts[0].value == "none"
    assert "chosen, not confirmed: 0.25" in [a.text for a in effects_figure(report).layout.annotations]
    nothing = replace(report, chosen=None)
    assert (
        not effects_figure(nothing).layout.annotations and "steered, 0.1" in effects_section(nothing).blocks[3].columns
    )


def test_a_report_without_shuffled_directions_or_classifier_has_no_such_column():
    report = replace(make(shuffled=0), reading=None)
    names = [t.name for t in effects_figure(report).data]
    assert (
        "shuffled labels, highest" not in names and "shuffled labels" not in effects_section(report).blocks[3].columns
    )
    assert "AUROC" not in " ".join(fact.name for fact in effects_page(report).facts)
    assert render_page(effects_page(report))


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_drawn_in_a_browser_in_silence(browser, tmp_path, width):
    address = write_report(effects_page(make()), tmp_path / "effects.html").as_uri()
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(address, timeout=120_000)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws what is not in view yet
    assert page.evaluate("document.querySelectorAll('.plot .main-svg .ytick').length") > 4
    assert (asked, said) == ([address], [])
