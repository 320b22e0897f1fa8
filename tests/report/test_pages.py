"""A page is one file that loads nothing, runs only what its policy names, and shows every text as text."""

import base64
import dataclasses
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest

from interp.report import figures, pages
from interp.report.pages import (
    Column,
    Contexts,
    Estimate,
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
    alpha,
    render_page,
    write_page,
    write_report,
)

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover=\"alert(1)' x='",
    "</style><style>*{display:none}",
    "<!--",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
    "https://evil.example/x.js",
    "javascript:alert(1)",
)


class Reader(HTMLParser):
    """Collect elements, and the text of scripts, styles and everything else."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.words = [], [], [], []
        self.inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        bucket = {"script": self.scripts, "style": self.styles}.get(self.inside)
        if bucket is None:
            self.words.append(data)
        else:
            bucket[-1] = (bucket[-1][0], bucket[-1][1] + data)

    @property
    def policy(self):
        return next(a["content"] for t, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")

    def count(self, tag):
        return sum(t == tag for t, _ in self.elements)


@pytest.fixture(scope="module")
def text(sample_page):
    return render_page(sample_page)


@pytest.fixture(scope="module")
def read(text):
    return Reader(text)


def small(*blocks, **more):
    return Page("A page", [Section("Part", list(blocks))], **more)


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_comes_first_and_the_encoding_within_the_bytes_that_browsers_sniff(text):
    assert re.search(r"<head>\s*<(\S+ \S+)", text).group(1) == 'meta http-equiv="Content-Security-Policy"'
    assert text.encode().index(b'<meta charset="utf-8">') < 1000


def test_the_policy_names_exactly_the_scripts_and_styles_of_the_page(read):
    rules = dict(rule.strip().split(" ", 1) for rule in read.policy.split(";"))
    run = [script for attrs, script in read.scripts if attrs.get("type") != "application/json"]
    assert rules["script-src"].split() == [digest(script) for script in run]
    assert rules["style-src"].split() == [digest(style) for _, style in read.styles] + [digest("")]
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    assert "unsafe" not in read.policy and "http" not in read.policy and "connect-src" not in rules


def test_nothing_in_the_page_loads_from_elsewhere(read):
    for tag, attrs in read.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "audio", "video", "img")
        assert "style" not in attrs and not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith("#") or attrs[name] == "data:,", (tag, attrs)
    (style,) = [style for _, style in read.styles]
    assert "url(" not in style and "@import" not in style and "http" not in style
    own = [script for attrs, script in read.scripts if not script.startswith("/**\n* plotly.js")]
    assert len(own) == len(read.scripts) - 1
    assert not any(re.search(r"https?:|//[a-z]|import\(|fetch\(", script) for script in own)


def test_plotly_is_embedded_once_and_only_where_a_figure_needs_it(text, read):
    assert text.count("* plotly.js v") == 1
    assert text.count("displaylogo: false, showSendToCloud: false") == 1
    without = render_page(small(Text("words")))
    assert "plotly.js v" not in without and len(without) < 60_000


def test_every_figure_has_a_caption_a_table_and_its_data(read, sample_page):
    drawn = [b for s in sample_page.sections for b in s.blocks if isinstance(b, Figure)]
    plots = [a["id"] for t, a in read.elements if "plot" in a.get("class", "").split()]
    assert plots == [f"plot-{i}" for i in range(1, len(drawn) + 1)]
    data = {a["id"]: json.loads(s) for a, s in read.scripts if a.get("type") == "application/json"}
    for plot, block in zip(plots, drawn, strict=True):
        assert len(data[f"{plot}-data"]["data"]) == len(block.figure.data)
        assert "title" not in data[f"{plot}-data"]["layout"]
    assert read.count("figcaption") == read.count("details") == len(drawn)
    tables = sum(isinstance(b, Table) for s in sample_page.sections for b in s.blocks)
    assert read.count("table") == read.count("caption") == len(drawn) + tables


def test_headings_descend_one_level_at_a_time_and_ids_are_unique(read):
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for t, a in read.elements if t == "a"} <= set(ids)


def test_hostile_text_is_shown_as_text_wherever_it_stands():
    bad = "".join(HOSTILE) + "\ud800\x00\x1b"
    figure = figures.map_2d([[0, 0], [1, 1]], [bad, "b"], [bad, bad], title=bad, axes=(bad, "y"))
    foreign = go.Figure({"data": [{"type": "scatter", "name": bad, "x": [0], "y": [1]}]})  # not escaped for plotly
    page = Page(
        title=bad,
        lead=bad,
        kicker=bad,
        facts=[Fact(bad, bad, bad, bad)],
        about={bad: bad},
        sections=[
            Section(
                bad,
                [
                    Text(bad),
                    Text(bad, "note"),
                    Text(bad, "code"),
                    Table([bad, Column(bad, null=True)], [[bad, bad]], bad),
                    Figure(figure, bad),
                    Figure(foreign, bad),
                    Contexts(bad, [Example([bad, bad], [1.0, 0.0], bad)], bad, {bad: bad}, [(bad, 1.0)], [(bad, -1.0)]),
                    SideBySide([bad], [(bad, Reply(bad, bad))], bad),
                ],
                lead=bad,
                anchor="part",
            )
        ],
    )
    text = render_page(page)
    text.encode("utf-8")
    read = Reader(text)
    assert not {t for t, _ in read.elements} & {"img", "iframe", "form", "svg"}
    assert read.count("script") == 5 and read.count("style") == 1
    assert len(read.styles) == 1
    run = [s for a, s in read.scripts if a.get("type") != "application/json"]
    assert len(run) == 2 and run[0].startswith("/**\n* plotly.js") and run[1].startswith('"use strict"')
    assert not any(name.startswith("on") for _, attrs in read.elements for name in attrs)
    assert "\x00" not in text and "49" not in "".join(read.words)
    # as text: once in h1, title, contents, ... and never less than one place a block
    assert "".join(read.words).count("<img src=x onerror=alert(1)>") > 25
    data = [json.loads(s) for a, s in read.scripts if a.get("type") == "application/json"]
    assert "&lt;img src=x" in json.dumps(data)


def test_a_page_is_the_same_bytes_each_time(sample_page, text):
    assert render_page(sample_page) == text


def test_tables_right_align_numbers_mark_nulls_and_round_a_column_alike():
    table = Table(
        ["name", "value", Column("shuffled", null=True), Column("n", decimals=0), "note"],
        [["a", Estimate(0.98266, 0.97, 0.99), 0.5, 3.0, "x"], ["b", 0.5, None, 12, "y"], ["c", 0.05, 0.25, 1, None]],
        "T",
    )
    view = pages._table(table)
    assert [column["number"] for column in view["columns"]] == [False, True, True, True, False]
    assert [column["null"] for column in view["columns"]] == [False, False, True, False, False]
    assert [row[1] for row in view["rows"]] == [("0.983", "[0.970, 0.990]"), ("0.500", ""), ("0.050", "")]
    assert [row[2][0] for row in view["rows"]] == ["0.500", "–", "0.250"]
    assert [row[3][0] for row in view["rows"]] == ["3", "12", "1"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.911, 31.9], ["1.91", "31.90"]),
        ([1e-5, 2e-4], ["1.0e−5", "2.0e−4"]),
        ([200_000, 0.5], ["200,000", "0.500"]),
        ([1, 20], ["1", "20"]),
        ([0.0, 0.0], ["0", "0"]),
        ([np.float32(0.25), np.int64(3)], ["0.250", "3.000"]),
        ([True, False], ["yes", "no"]),
    ],
)
def test_a_column_is_rounded_so_that_its_smallest_value_can_be_read(values, shown):
    assert [text for text, _ in pages._cells(values, Column("c"))["cells"]] == shown


def test_the_highlight_follows_the_logarithm_of_the_share_of_the_peak():
    assert alpha(0, 5) == 0 and alpha(-1, 5) == 0
    assert alpha(5, 5) == pytest.approx(1) and alpha(1e-12, 5) == pytest.approx(0.05)
    assert alpha(1, 9) == pytest.approx(0.05 + 0.95 * np.log10(2))


def test_active_tokens_carry_level_quartile_value_and_the_peak_a_badge():
    contexts = Contexts("L", [Example(["Ġa", "Ġb", "Ċ", "▁c"], [1.0, 0.0, 4.0, 2.0]), Example([" d"], [0.0])])
    first, second = pages._contexts(contexts)["examples"]
    marks = [run for run in first["runs"] if run["level"]]
    assert [(m["text"], m["quartile"], m["value"], m["share"], m["peak"]) for m in marks] == [
        ("a", 1, "1.00", 25, False),
        ("↵", 4, "4.00", 100, True),
        ("c", 2, "2.00", 50, False),
    ]
    assert [m["level"] for m in marks] == [round(100 * alpha(v, 4)) for v in (1, 4, 2)]
    assert "".join(run["text"] for run in first["runs"]) == "a b↵ c"
    assert first["badge"] == {"token": "↵", "value": "4.00"} and second["badge"] is None


def test_one_token_of_each_example_is_reached_by_tab_and_none_of_a_silent_one(read):
    stops = [attrs["tabindex"] for tag, attrs in read.elements if "t" in attrs.get("class", "").split()]
    assert stops.count("0") == 8 and set(stops) == {"0", "-1"}
    silent = render_page(small(Contexts("L", [Example(["a"], [0.0])])))
    assert "It fires on none of the texts tried." in silent and 'class="t ' not in silent


def test_text_on_a_highlight_reaches_the_contrast_of_body_text_on_both_pages():
    def contrast(a, b):
        low, high = sorted([pages.luminance(a), pages.luminance(b)])
        return (high + 0.05) / (low + 0.05)

    for level in range(5, 101):
        day = [level / 100 * c + (1 - level / 100) * 255 for c in pages.EMERALD]
        assert contrast((0x11, 0x18, 0x27), day) >= 4.5
        night = [level / 100 * c + (1 - level / 100) * p for c, p in zip(pages.EMERALD, pages.DARK_PAGE, strict=True)]
        assert contrast((0, 0, 0) if pages.dark_text(level / 100) == "#000" else (255, 255, 255), night) >= 4.5


def test_colours_of_the_page_reach_the_contrast_of_body_text():
    css = pages._asset("page.css")
    for theme in re.findall(r":root \{(.*?)\}", css, re.S):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        rgb = {name: [int(c[i : i + 2], 16) for i in (1, 3, 5)] for name, c in colours.items()}
        for text in ("ink", "muted", "link"):
            for ground in ("page", "soft"):
                low, high = sorted(pages.luminance(rgb[name]) for name in (text, ground))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_backticks_set_code_and_a_lone_one_stays():
    assert list(pages._spans("a `b` c")) == [(False, "a "), (True, "b"), (False, " c")]
    assert list(pages._spans("a `b` c`d")) == [(False, "a "), (True, "b"), (False, " c`d")]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Table(["a", "b"], [[1, 2], [1]], "T"), "row 1 of 'T' has 1 cells for 2 columns"),
        (lambda: Example(["a"], [1.0, 2.0]), "1 tokens have 2 activations"),
        (lambda: Example(["a"], [float("nan")]), "nan or infinite"),
        (lambda: SideBySide(["a", "b"], [("p", "x")]), "row 0 has 1 texts"),
        (lambda: Text("x", "loud"), "not 'loud'"),
        (
            lambda: render_page(small(Figure(go.Figure(go.Heatmap(z=[[1]])), "c"))),
            "a figure with heatmap needs a table",
        ),
        (lambda: render_page(small(Figure(go.Figure(), "c"))), "a figure with no trace needs a table"),
        (lambda: render_page(Page("P", [Section("A"), Section("a")])), "anchor 'a' is taken"),
        (lambda: render_page(Page("P", [Section("數")])), "anchor '' is taken or is not a word"),
    ],
)
def test_parts_that_do_not_fit_are_refused(build, words):
    with pytest.raises(PageError, match=words):
        build()


def test_a_nan_in_a_table_is_refused():
    with pytest.raises(ValueError, match="not a number that a report can show"):
        render_page(small(Table(["a"], [[float("nan")]], "T")))


def test_write_report_takes_a_page_or_what_offers_one_and_leaves_no_other_file(tmp_path):
    page = small(Text("words"))

    @dataclasses.dataclass
    class Result:
        def page(self):
            return page

    one, two = tmp_path / "one.html", tmp_path / "two.html"
    assert write_report(Result(), one) == one and write_page(page, str(two)) == two
    assert one.read_bytes() == two.read_bytes() == render_page(page).encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.html", "two.html"]
    with pytest.raises(TypeError, match="dict offers no page"):
        write_report({}, one)
