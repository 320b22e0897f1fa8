"""What the commands share: exit codes, options, and how results are shown."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

MISSING, FAILED, USAGE, INTERRUPTED, TERMINATED = 3, 1, 2, 130, 143

ModelArg = Annotated[str, typer.Argument(help="'tiny' (bundled), a folder, or a hub id")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, all else on stderr")]
Seed = Annotated[int, typer.Option(help="seed of every random choice")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def application(name: str, about: str) -> typer.Typer:
    """Return an empty set of commands."""
    return typer.Typer(
        name=name, help=about, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )  # fmt: skip


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a result on stdout: as one JSON document, or as lines."""
    print(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines))


def count(text: str | None, flag: str) -> int | None:
    """Return the number that "500000", "500k" or "2M" means."""
    if text is None:
        return None
    scale = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text.rstrip("kKmMbBgG").replace("_", "")) * scale)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{flag} {text!r} is no number; write 500000, 500k or 2M") from None


def flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return a nested table as (dotted name, value) pairs."""
    rows: list[tuple[str, Any]] = []
    for name, value in table.items():
        rows += flat(value, f"{prefix}{name} ") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return rows


def table_lines(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a table as lines, the first column to the left and the others to the right."""
    cells = [[str(c) for c in columns], *([show_cell(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def show_cell(value: Any) -> str:
    """Return a cell as text: numbers to three digits, None as a dash."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty. Raises MissingError or ValueError."""
    from sae.extras import MissingError

    if not path.is_file():
        raise MissingError(f"there is no file {path}")
    texts = [line for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text; it needs one text a line")
    return texts
