"""Numbers are rounded once and texts shown as they are, whatever they hold."""

import html
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.report.text import Estimate, clean, glyphs, plain, show


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.98266, "0.983"),
        (12.349, "12.3"),
        (-0.5, "−0.500"),
        (-0.0, "0"),
        (200_000, "200,000"),
        (1234.5, "1,234"),
        (0.00012, "1.2e−4"),
        (True, "yes"),
        ("text", "text"),
        (Estimate(0.983, 0.97, 0.9921), "0.983 [0.970, 0.992]"),
    ],
)
def test_numbers_are_shown_to_three_significant_digits(value, shown):
    assert show(value) == shown


@pytest.mark.parametrize("value", [math.nan, math.inf, Estimate(math.nan, 0.0, 1.0)])
def test_a_number_that_means_nothing_is_refused(value):
    with pytest.raises(ValueError, match="not a number that a report can show"):
        show(value)


@pytest.mark.parametrize("pair", [(1.0, 0.5), (math.nan, 1.0)])
def test_an_interval_upside_down_is_refused(pair):
    with pytest.raises(ValueError, match="upside down"):
        Estimate(0.7, *pair)


@given(st.floats(1e-3, 1e8))
def test_a_shown_number_is_within_half_a_percent_of_itself(value):
    assert float(show(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@given(st.text())
def test_what_plotly_draws_reads_as_the_text_itself(text):
    assert html.unescape(plain(text)) == clean(text).replace("\n", " ↵ ")
    assert "<" not in plain(text) and ">" not in plain(text)


@given(st.text(st.characters(categories=["Cs", "Cc", "Lu", "So"])))
def test_cleaned_text_is_utf8_without_controls_and_cleaning_it_again_changes_nothing(text):
    shown = clean(text)
    shown.encode("utf-8")
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert clean(shown) == shown


@pytest.mark.parametrize(
    ("piece", "shown"),
    [("Ġthe", " the"), ("▁the", " the"), ("Ċ", "↵"), ("<0x0A>", "↵"), ("<0xE2>", "\ufffd"), ("\ud800", "\ufffd")],
)
def test_token_pieces_lose_their_marks(piece, shown):
    assert glyphs(piece) == shown
