"""Text and numbers as a reader sees them: escaped for plotly, cleaned for HTML, rounded once."""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = ["Estimate", "Scalar", "clean", "decimals_for", "glyphs", "plain", "show"]

Scalar = float | int | np.number
MINUS = "\u2212"
_CONTROL = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, shown as `0.981 [0.970, 0.990]`. Raises ValueError where low > high."""

    value: Scalar
    low: Scalar
    high: Scalar

    def __post_init__(self):
        if not self.low <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] is upside down: give low first, then high")


def clean(text: str) -> str:
    """Return the text without what UTF-8 or HTML cannot hold: lone surrogates become U+FFFD, controls their pictures.

    Private-use and ordinary format characters stay; the page isolates the direction of foreign text by itself.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)
    return "".join("\ufffd" if unicodedata.category(c) == "Cs" else c for c in text)


def glyphs(token: str) -> str:
    """Return a token piece as a reader expects it: word-start marks as spaces, a line break as ↵.

    Knows the marks of byte-level BPE (Ġ, Ċ), SentencePiece (▁) and byte fallback (<0x0A>).
    """
    match = _BYTE_PIECE.fullmatch(token)
    if match:
        byte = int(match.group(1), 16)
        token = chr(byte) if byte < 0x80 else "\ufffd"
    token = token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n")
    return clean(token).replace("\n", "↵").replace("\t", "⇥")


def plain(text: Any) -> str:
    """Return text that plotly draws as it is: plotly reads labels and hover texts as a small HTML."""
    text = clean(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("\n", " ↵ ")


def decimals_for(values: Sequence[Any]) -> int:
    """Return how many decimals give the largest of the values three significant digits (0 to 4)."""
    top = max((abs(float(v)) for v in values if math.isfinite(v)), default=0.0)
    if top == 0:
        return 0
    return min(4, max(0, 2 - math.floor(math.log10(top))))


def show(value: Any, decimals: int | None = None) -> str:
    """Return a cell as text: None as a dash, counts with separators, other numbers to three significant digits.

    Raises ValueError for nan and infinity: a number that means nothing has no place in a report.
    """
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        decimals = decimals_for([value.value, value.low, value.high]) if decimals is None else decimals
        return f"{show(value.value, decimals)} [{show(value.low, decimals)}, {show(value.high, decimals)}]"
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}".replace("-", MINUS)
    if isinstance(value, Real):
        return _real(float(value), decimals)
    return clean(str(value))


def _real(value: float, decimals: int | None) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number that a report can show; leave the cell out with None")
    if value != 0 and ((abs(value) < 1e-3 and decimals is None) or abs(value) >= 1e9):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    text = f"{value:,.{decimals_for([value]) if decimals is None else decimals}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")
