"""Rows with their metrics -> LossCurves -> Figure: training loss over tokens or steps of any cells.

Lines of more than BINS steps are averaged over equal bins of steps, because a loss of one small batch is mostly noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from supar_sweep.errors import ConfigError

from . import style
from .frames import (
    DIVERGED,
    check_axes,
    having,
    one_run_a_seed,
    panels_of,
    refuse_mixed,
    single_values,
    values_of,
    where,
)

BINS = 80
ALONG = ("step", "tokens")
"""What a run's metrics know of how far it is."""


@dataclass(frozen=True)
class Curve:
    """One line: at each x, the mean loss of a bin and its standard error over seeds (None with one).

    Seeds that stop earlier (diverged) end the line: a mean over the survivors is not the mean.
    """

    hue: Any
    x: tuple[float, ...]
    loss: tuple[float, ...]
    stderr: tuple[float, ...] | None
    n_seeds: int
    n_diverged: int


@dataclass(frozen=True)
class LossCurves:
    """Everything the figure shows."""

    x: str
    hue: str
    col: str | None
    panels: tuple[tuple[str, tuple[Curve, ...]], ...]
    fixed: Mapping[str, Any]


def loss_curves(
    table: pd.DataFrame,
    x: str = "tokens",
    hue: str = "density",
    col: str | None = "parameterization",
    fixed: Mapping[str, Any] | None = None,
    n_bins: int = BINS,
) -> LossCurves:
    """Return the loss curves of a table whose column `curve` holds each cell's metrics (dicts with step, tokens, loss).

    Args:
        table: made by frames.frame.
        x: "tokens" or "step".
        hue: axis of the lines. col: axis of the panels; None = one.
        fixed: values of other axes to keep.
        n_bins: greatest number of points of a line.

    Raises:
        ConfigError: an unknown axis, or lines that mix several values of an axis.
    """
    if x not in ALONG:
        raise ConfigError("x", "loss curves go over", value=x, allowed=ALONG, nearest_to=x)
    check_axes(table, hue=hue, col=col)
    kept = where(table, fixed or {})
    refuse_mixed(kept, "a line", (hue, col))
    panels = []
    for name, rows in panels_of(kept, col):
        curves = [_curve(having(rows, hue, each), each, x, n_bins) for each in values_of(rows, hue)]
        panels.append((name, tuple(curves)))
    return LossCurves(x, hue, col, tuple(panels), single_values(kept, but=(hue, col)))


def _curve(rows: pd.DataFrame, hue: Any, x: str, n_bins: int) -> Curve:
    runs = one_run_a_seed(rows, f"hue {hue}")
    n_diverged = int((runs["kind"] == DIVERGED).sum())
    by_seed = [_series(metrics, x) for metrics in runs["curve"] if metrics]
    by_seed = [series for series in by_seed if len(series)]
    if not by_seed:
        return Curve(hue, (), (), None, 0, n_diverged)
    shared = sorted(set.intersection(*(set(series) for series in by_seed)))
    values = np.array([[series[at] for at in shared] for series in by_seed])
    edges = np.unique(np.linspace(0, len(shared), min(n_bins, len(shared)) + 1).round().astype(int))
    binned = np.stack([values[:, a:b].mean(axis=1) for a, b in pairwise(edges)], axis=1)
    at = [float(np.mean(shared[a:b])) for a, b in pairwise(edges)]
    stderr = None
    if len(binned) > 1:
        stderr = tuple(float(v) for v in binned.std(axis=0, ddof=1) / math.sqrt(len(binned)))
    return Curve(hue, tuple(at), tuple(float(v) for v in binned.mean(axis=0)), stderr, len(binned), n_diverged)


def _series(metrics: Iterable[Mapping[str, Any]], x: str) -> dict[float, float]:
    """Return x -> loss of the lines that have a finite loss (evaluations have none of their own)."""
    return {
        float(line[x]): float(line["loss"])
        for line in metrics
        if line.get("loss") is not None and line.get(x) is not None
    }


def data_rows(found: LossCurves) -> list[dict[str, Any]]:
    """Return the figure's data, a row per point."""
    return [
        {
            **found.fixed,
            **({} if found.col is None else {found.col: name}),
            found.hue: curve.hue,
            found.x: at,
            "loss": loss,
            "stderr": None if curve.stderr is None else curve.stderr[index],
            "n_seeds": curve.n_seeds,
        }
        for name, curves in found.panels
        for curve in curves
        for index, (at, loss) in enumerate(zip(curve.x, curve.loss, strict=True))
    ]


def draw(found: LossCurves) -> Figure:
    """Return the figure: a panel per value of col, a line per hue; a cross ends a diverged line."""
    with style.look():
        drawn, grid = style.panels(len(found.panels), style.COLUMN_IN * (0.9 if len(found.panels) > 1 else 1.3), 2.9)
        hues = list(dict.fromkeys(curve.hue for _, curves in found.panels for curve in curves))
        if all(isinstance(hue, float) for hue in hues):
            hues.sort(reverse=found.hue == "density")
        looks = style.looks(found.hue, hues)
        for axes, (name, curves) in zip(grid, found.panels, strict=True):
            for curve in curves:
                look = looks[curve.hue]
                x, y = np.array(curve.x), np.array(curve.loss)
                if curve.stderr is not None:
                    error = np.array(curve.stderr)
                    axes.fill_between(x, y - error, y + error, color=look.color, alpha=0.2, linewidth=0)
                axes.plot(x, y, color=look.color, linewidth=1.3, linestyle=look.linestyle)
                if curve.n_diverged and len(x):
                    axes.plot(x[-1], y[-1], "x", color=look.color, markersize=6, markeredgewidth=1.6)
            axes.set_title(style.panel_title(found.col, name))
            axes.set_xlabel("Tokens" if found.x == "tokens" else "Step")
        low, high = _limits(found)
        grid[0].set_ylim(low, high)
        grid[0].set_ylabel("Train loss (nats)")
        n_seeds = max((curve.n_seeds for _, curves in found.panels for curve in curves), default=0)
        seeds = style.seeds_text(n_seeds, n_seeds)
        text = ", ".join(part for part in (style.fixed_text(found.fixed), seeds) if part)
        style.heading(drawn, text)
        handles = [Line2D([], [], color=looks[hue].color, linestyle=looks[hue].linestyle) for hue in hues]
        labels = [style.value_text(found.hue, hue) for hue in hues]
        if any(curve.n_diverged for _, curves in found.panels for curve in curves):
            handles.append(Line2D([], [], color=style.MUTED, marker="x", linewidth=0))
            labels.append("diverged")
        style.legend(drawn, handles, labels)
    return drawn


def _limits(found: LossCurves) -> tuple[float, float]:
    """Return the y limits: all of the lines but what lies above twice the first losses, where runs blow up."""
    curves = [curve for _, curves in found.panels for curve in curves if curve.loss]
    if not curves:
        return 0.0, 1.0
    first = max(curve.loss[0] for curve in curves)
    values = [loss for curve in curves for loss in curve.loss]
    low, high = min(values), min(max(values), 2 * first)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def save(drawn: Figure, found: LossCurves, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
