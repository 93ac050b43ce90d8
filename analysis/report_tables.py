"""Tables of a report that stand beside its verdict: the scaling fits, and what was added to the grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supar_sweep.sweep.extension import Added, added_of
from supar_sweep.sweep.submission import Plan

from . import style
from .report_origin import Table
from .scaling import FORM, interval_text


def scaling_fits(found: Mapping[str, Any]) -> Table:
    """Return a row per parameterization: its fit with 95% intervals, or why the grid does not allow one.

    Args:
        found: of scaling.summary.
    """
    rows = []
    for name, each in found["fits"].items():
        fit = each["fit"]
        shown = [interval_text(fit[key]) for key in ("floor", "alpha", "gamma")] if fit else ["-"] * 3
        rms = f"{fit['rms']:.4f}" if fit else "-"
        rows.append((style.title(name), *shown, rms, str(each["n_points"]), str(each["n_censored"]), each["reason"]))
    columns = ("", "floor, nats", "alpha", "gamma", "rms, nats", "points", "left out", "note")
    fitted = any(each["fit"] for each in found["fits"].values())
    empty = () if fitted else ("floor, nats", "alpha", "gamma", "rms, nats")
    said = () if any(row[-1] for row in rows) else ("note",)
    kept = [i for i, name in enumerate(columns) if name not in (*empty, *said)]
    return Table(
        "Scaling fit",
        tuple(columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        f"{FORM}. live: live hidden weights, live_0 their geometric mean; each point a width and density at its own best value, "
        "left out where that lies beyond the grid. In brackets the 95% interval; ?: the data do not bound it.",
    )


def extension(plan: Plan) -> Table | None:
    """Return what `extend=true` added to the grid, a row per line and round; None where nothing was added."""
    rounds: dict[tuple[int, str, str, str], list[Added]] = {}
    for each in added_of(plan):
        if each.n_cells:
            rounds.setdefault((each.round, each.line, each.axis, each.why), []).append(each)
    if not rounds:
        return None
    rows = [
        (str(number), line, f"{axis} {', '.join(f'{each.value:.4g}' for each in added)}", why)
        for (number, line, axis, why), added in rounds.items()
    ]
    return Table(
        "Added to the grid because optima lay beyond it",
        ("round", "line", "values", "because"),
        tuple(rows),
        "Each with every seed of the grid. Of lines that share their cells the first is listed.",
    )
