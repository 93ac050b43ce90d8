"""stdout: tables and nothing else, so that format=json can be piped. The rest goes to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from supar_sweep.sweep.tables import render


def emit(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    format: str = "table",
    *,
    title: str = "",
) -> None:
    """Write rows to stdout, drawn where it is a terminal.

    Args:
        rows, columns, format, title: as for `sweep.tables.render`.
    """
    terminal = sys.stdout.isatty()
    sys.stdout.write(render(rows, columns, format, title=title, terminal=terminal))
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """Write one JSON value to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def say(text: str = "") -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def say_written(paths: Iterable[Path]) -> None:
    """Name the files that were written, a line each."""
    for path in paths:
        say(f"wrote {path}")
