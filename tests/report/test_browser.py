"""The page in a real browser: silent network and console, figures drawn, tokens reached by keyboard, printed whole."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from interp.report.pages import Page, Section, Text, write_page

pytestmark = pytest.mark.browser
PLOTS = "[...document.querySelectorAll('.plot')]"
DRAWN = f"{PLOTS}.filter(p => p.querySelector('.main-svg .xtick, .main-svg .ytick')).length"
OUTSIDE = """
[...document.querySelectorAll('.plot')].filter((plot) => [...plot.querySelectorAll('text')].some((text) => {
  const t = text.getBoundingClientRect(), p = plot.getBoundingClientRect();
  return t.width && (t.left < p.left - 1 || t.right > p.right + 1 || t.top < p.top - 1 || t.bottom > p.bottom + 1);
})).map((plot) => plot.id)
"""
INTRUDE = """
() => {
  window.stopped = [];
  document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
  const script = document.createElement("script");
  script.textContent = "window.ran = 1";
  document.body.append(script);
  new Image().src = "http://127.0.0.1:9/x.png";
  fetch("http://127.0.0.1:9/x").catch(() => 0);
}
"""
LABEL = "getComputedStyle(document.querySelector('#plot-1 .ytick text')).fill"
N_FIGURES = 12


@dataclass
class Visit:
    """An open page, with all that it asked for and all that it said."""

    page: Any
    requests: list = field(default_factory=list)
    said: list = field(default_factory=list)


@pytest.fixture(scope="module")
def address(sample_page, tmp_path_factory):
    return write_page(sample_page, tmp_path_factory.mktemp("report") / "report.html").as_uri()


def visit(browser, address, **options):
    seen = Visit(browser.new_context(**options).new_page())
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("console", lambda message: seen.said.append(message.text))
    seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
    seen.page.goto(address, timeout=120_000)
    return seen


@pytest.fixture(scope="module")
def desktop(browser, address):
    return visit(browser, address, viewport={"width": 1280, "height": 900}, color_scheme="light")


@pytest.fixture(scope="module")
def phone(browser, address):
    return visit(browser, address, viewport={"width": 360, "height": 800}, color_scheme="dark", has_touch=True)


def wait(page, script, value):
    # wait_for_function evaluates a string in the page, which the policy forbids
    for _ in range(600):
        if page.evaluate(script) == value:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{script} is {page.evaluate(script)}, not {value}")


@pytest.mark.parametrize("screen", ["desktop", "phone"])
def test_every_figure_is_drawn_inside_its_frame_in_silence(screen, address, request):
    seen = request.getfixturevalue(screen)
    wait(seen.page, DRAWN, N_FIGURES)
    assert seen.page.evaluate(OUTSIDE) == []
    assert seen.page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    assert (seen.requests, seen.said) == ([address], [])


def test_tokens_are_reached_and_read_by_keyboard(desktop):
    page = desktop.page
    page.focus(".example .t[tabindex='0']")
    tip = "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
    assert "activation 12.4, 100 % of the strongest" in page.evaluate(tip)
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement === document.querySelector('.example .t')")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.example .t')[1]")
    assert page.evaluate("document.querySelector('.tokens').querySelectorAll('.t[tabindex=\"0\"]').length") == 1
    page.keyboard.press("Escape")
    assert page.evaluate(tip) is None


def test_values_can_be_shown_beside_the_tokens(desktop):
    page = desktop.page
    content = "getComputedStyle(document.querySelector('.example .t'), '::after').content"
    assert page.evaluate(content) == "none"
    page.click(".toggle >> nth=0")
    assert page.evaluate(content).strip('"') == page.evaluate("document.querySelector('.example .t').dataset.value")
    assert page.evaluate("document.querySelector('.toggle').getAttribute('aria-pressed')") == "true"


def test_a_change_of_colour_scheme_redraws_the_figures(desktop):
    wait(desktop.page, DRAWN, N_FIGURES)
    assert desktop.page.evaluate(LABEL) == "rgb(87, 96, 106)"
    desktop.page.emulate_media(color_scheme="dark")
    wait(desktop.page, LABEL, "rgb(163, 173, 184)")
    assert desktop.said == []


def test_print_shows_every_figure_in_light_colours_before_any_was_scrolled_to(browser, address):
    seen = visit(browser, address, color_scheme="dark", viewport={"width": 1280, "height": 400})
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.className") == "skip"
    before = seen.page.evaluate(DRAWN)
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert before < N_FIGURES and seen.page.evaluate(DRAWN) == N_FIGURES
    assert seen.page.evaluate(LABEL) == "rgb(87, 96, 106)"
    assert seen.page.evaluate("document.querySelector('#plot-12 .main-svg').width.baseVal.value") == 640
    assert (seen.requests, seen.said) == ([address], [])


def test_the_policy_stops_what_the_page_did_not_bring(browser, tmp_path):
    page = Page("A page", [Section("Part", [Text("words")])])
    seen = visit(browser, write_page(page, tmp_path / "page.html").as_uri())
    seen.page.evaluate(INTRUDE)
    wait(seen.page, "stopped.sort().join()", "connect-src,img-src,script-src-elem")
    assert seen.page.evaluate("window.ran") is None
