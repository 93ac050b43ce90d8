"""One renderer for every output table: aligned text, JSON or CSV of the same rows."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from supar_sweep.errors import ConfigError

FORMATS = ("table", "json", "csv")


def render(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    format: str = "table",
    *,
    title: str = "",
    terminal: bool = False,
) -> str:
    """Return the rows as text that ends in a newline.

    "table" is as wide as its cells need and never cut: a pipe has no width. "json" is a list of
    objects and "csv" has a header; both hold the values as they are, None as null or nothing.

    Args:
        rows: one mapping per row; a column that a row lacks is None there.
        columns: which keys, in order; a mapping gives each key its heading in the "table" form.
            Default: the keys of all rows in order of first appearance.
        format: one of `FORMATS`.
        title: a line above the table; only in the "table" form.
        terminal: whether the text goes to a terminal that shows colours and box lines.

    Raises:
        ConfigError: an unknown format.
    """
    keys = list(columns) if columns is not None else list(dict.fromkeys(k for row in rows for k in row))
    match format:
        case "json":
            listed = [{key: _plain(row.get(key)) for key in keys} for row in rows]
            return json.dumps(listed, indent=2, allow_nan=False) + "\n"
        case "csv":
            return _csv(rows, keys)
        case "table":
            headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in keys}
            if terminal:
                return _rich(rows, headings, title)
            return _aligned(rows, headings, title)
        case _:
            raise ConfigError("format", "no such format", value=format, allowed=FORMATS, nearest_to=format)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: NaN is null, a tuple a list, an unknown type its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value)


def _csv(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        plain = (_plain(row.get(key)) for key in keys)
        writer.writerow(["" if v is None else json.dumps(v) if isinstance(v, list | dict) else v for v in plain])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(each) for each in value)
    return " ".join(str(value).split())  # a line break would tear the row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _right_aligned(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return bool(values) and all(_is_number(value) for value in values)


def _aligned(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], title: str) -> str:
    cells = {key: [_cell(row.get(key)) for row in rows] for key in headings}
    width = {key: max(map(len, [name, *cells[key]])) for key, name in headings.items()}
    right = {key: _right_aligned(rows, key) for key in headings}

    def line(texts: Mapping[str, str]) -> str:
        padded = [text.rjust(width[key]) if right[key] else text.ljust(width[key]) for key, text in texts.items()]
        return "  ".join(padded).rstrip()

    lines = [title] if title else []
    lines += [line(headings), line({key: "-" * width[key] for key in headings})]
    lines += [line({key: cells[key][index] for key in headings}) for index in range(len(rows))]
    return "\n".join(lines) + "\n"


def _rich(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], title: str) -> str:
    """Return a drawn table; wider than the terminal it folds its cells, and loses nothing."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", header_style="bold")
    for key, heading in headings.items():
        drawn.add_column(
            Text(heading),
            justify="right" if _right_aligned(rows, key) else "left",
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(Text(_cell(row.get(key))) for key in headings))
    console = Console(force_terminal=True)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get()
