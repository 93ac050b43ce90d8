"""Table of runs -> the values that would settle its censored optima, line by line."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from supar_sweep.sweep.extension import Wanted

from .basins import BasinSet, Line, Panel, told_apart
from .frames import MISSING, having, panels_of, text, where
from .report_figures import LINES, basins_of


def wanted(table: pd.DataFrame, metric: str = "train_loss") -> tuple[list[Wanted], list[str]]:
    """Return what would settle each censored optimum of a grid, and those of its lines that have runs without a result: of them
    nothing is known yet.

    Args:
        table: made by frames.frame, of a grid that swept lr or init_std.
        metric: "train_loss" or "val_loss".
    """
    found, waiting = [], []
    sets = basins_of(table, metric)
    for each in sets:
        rows_of = dict(panels_of(where(table, each.fixed), each.col))
        for panel in each.panels:
            for line in panel.lines:
                rows = having(rows_of[panel.col], each.hue, line.hue)
                name = _name(each, panel, line, sets)
                if (rows["kind"] == MISSING).any():
                    waiting.append(name)
                elif line.optimum.censored:
                    found.append(_wanted(name, each.x, line, rows))
    return found, waiting


def _wanted(name: str, axis: str, line: Line, rows: pd.DataFrame) -> Wanted:
    best = line.optimum
    # counted from the grid's own last value: its step, not the last digit of a logarithm, says what comes next
    edge = float(rows[axis].max() if best.side == "high" else rows[axis].min())
    values = tuple(edge * 2.0 ** round(log2 - math.log2(edge), 6) for log2 in best.proposals)
    side = "above" if best.side == "high" else "below"
    bound = "" if best.bound is None else f"; the optimum is {side} 2^{best.bound:.2f}"
    return Wanted(
        line=name,
        axis=axis,
        values=values,
        of=tuple(sorted(set(rows["cell_id"]))),
        why=f"{best.reason}, {edge:.4g}{bound}",
    )


def _name(each: BasinSet, panel: Panel, line: Line, sets: Sequence[BasinSet]) -> str:
    """Return the values that tell the line from the others: supar density 0.25 width 64."""
    named = {} if each.col is None else {each.col: panel.col}
    tied = {axis: line.tied[axis] for axis in LINES if axis in line.tied}
    axes = {**named, each.hue: line.hue, **tied, **told_apart(each, sets)}
    return " ".join(
        text(value) if axis == "parameterization" else f"{axis} {text(value)}" for axis, value in axes.items()
    )
