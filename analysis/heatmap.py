"""Table of runs -> HeatMap -> Figure: the optimum's shift from one reference, and its regret, over width x density.

A verdict's shift is measured from the dense line of the same width. Here there is one reference a panel, the proxy's
own shape (the densest and narrowest), because that is where hyperparameters are tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from supar_sweep.errors import ConfigError

from . import style
from .basins import Line, Panel, points_of
from .fit import Regret, fit_panel
from .frames import (
    axes_of,
    check_axes,
    check_metric,
    having,
    panels_of,
    refuse_mixed,
    single_values,
    values_of,
    varied,
    where,
)
from .verdict import MAX_REGRET_PERCENT, MAX_SHIFT_OCTAVES, Shift, shift


@dataclass(frozen=True)
class Cell:
    """One square of the map. `regret_percent`: of the line's best loss."""

    x: float
    y: float
    log2_opt: float | None
    shift: Shift
    regret: Regret
    regret_percent: float | None
    is_reference: bool


@dataclass(frozen=True)
class HeatMap:
    """Everything the figure shows."""

    x: str
    y: str
    col: str | None
    swept: str
    metric: str
    panels: tuple[tuple[str, tuple[Cell, ...]], ...]
    fixed: Mapping[str, Any]


def heatmap(
    table: pd.DataFrame,
    x: str = "density",
    hue: str = "width",
    col: str | None = "parameterization",
    metric: str = "train_loss",
    fixed: Mapping[str, Any] | None = None,
) -> HeatMap:
    """Return the optimum of every (x, hue) of each panel against the panel's one reference.

    The reference has the greatest density and the smallest of any other axis. The noise is pooled over a panel. What is
    fitted is the best init_std where it alone varies at a square, else the best lr.

    Args:
        table: made by frames.frame.
        x, hue: the map's axes, numeric. col: axis of the panels; None = one.
        metric: "train_loss" or "val_loss".
        fixed: values of other axes to keep.

    Raises:
        ConfigError: an unknown axis, one that is not numeric, or lines that mix several values of an axis.
    """
    check_axes(table, x=x, hue=hue, col=col)
    check_metric(metric)
    kept = where(table, fixed or {})
    swept = "init_std" if varied(kept, (x, hue, col)) == ["init_std"] else "lr"
    check_axes(table, x=x, hue=hue, col=col, swept=swept)
    for key, name in (("x", x), ("hue", hue)):
        if not all(isinstance(value, float) for value in values_of(kept, name)):
            raise ConfigError(key, "needs an axis of numbers", value=name, allowed=axes_of(table))
    refuse_mixed(kept, "a square of the map", (x, hue, col), (swept,))
    panels = []
    for name, rows in panels_of(kept, col):
        panels.append((name, _cells(rows, x, hue, swept, metric)))
    return HeatMap(x, hue, col, swept, metric, tuple(panels), single_values(kept, but=(x, hue, col, swept)))


def _cells(rows: pd.DataFrame, x: str, y: str, swept: str, metric: str) -> tuple[Cell, ...]:
    places: list[tuple[float, float]] = []
    points = []
    for at in values_of(rows, y):
        row = having(rows, y, at)
        for value in values_of(row, x)[::-1]:
            places.append((value, at))
            points.append(points_of(having(row, x, value), swept, metric))
    fits = fit_panel([[point.observed for point in line] for line in points])
    reference = min(range(len(places)), key=lambda i: (_from_proxy(x, places[i][0]), _from_proxy(y, places[i][1])))
    lines = tuple(Line(float(i), line, fit) for i, (line, fit) in enumerate(zip(points, fits, strict=True)))
    whole = Panel("", lines, float(reference))
    cells = []
    for place, line in zip(places, lines, strict=True):
        regret, best = whole.regret(line), line.optimum.best_loss
        percent = None if regret.value is None or not best else 100 * regret.value / best
        is_reference = line.hue == whole.reference_hue
        cells.append(Cell(*place, line.optimum.x, shift(whole, line), regret, percent, is_reference))
    return tuple(cells)


def _from_proxy(axis: str, value: float) -> float:
    return -value if axis == "density" else value


def data_rows(found: HeatMap) -> list[dict[str, Any]]:
    """Return the figure's data, a row per square."""
    return [
        {
            **found.fixed,
            **({} if found.col is None else {found.col: name}),
            found.x: cell.x,
            found.y: cell.y,
            f"log2_{found.swept}_opt": cell.log2_opt,
            "shift_octaves": cell.shift.value,
            "shift_ci_low": None if cell.shift.ci is None else cell.shift.ci[0],
            "shift_ci_high": None if cell.shift.ci is None else cell.shift.ci[1],
            "shift_bound": cell.shift.bound,
            "shift_bound_side": cell.shift.side,
            "regret": cell.regret.value,
            "regret_upper": cell.regret.upper,
            "regret_percent": cell.regret_percent,
            "regret_is_lower_bound": cell.regret.lower_bound_only,
            "is_reference": cell.is_reference,
        }
        for name, cells in found.panels
        for cell in cells
    ]


def draw(found: HeatMap) -> Figure:
    """Return the figure: shift above, regret below, a column per panel; darker is worse.

    The signed number stands in the square; colour is its size. The reference is framed.
    """
    with style.look():
        n = len(found.panels)
        xs = sorted({cell.x for _, cells in found.panels for cell in cells}, reverse=found.x == "density")
        ys = sorted({cell.y for _, cells in found.panels for cell in cells}, reverse=found.y == "density")
        height = max(0.36 * len(ys), 0.8)
        drawn = style.figure(max(max(0.62 * len(xs), 1.6) * n + 1.4, style.COLUMN_IN), 2 * height + 1.6)
        grid = drawn.subplots(2, n, sharex=True, sharey=True, squeeze=False)
        # the ends of the scales: far beyond what transfers, the same in every figure
        rows = (
            ("shift (octaves)", Normalize(0, 6 * MAX_SHIFT_OCTAVES), _shift),
            ("regret (% of the loss)", Normalize(0, 6 * MAX_REGRET_PERCENT), _regret),
        )
        for row, (label, scale, value) in enumerate(rows):
            for column, (name, cells) in enumerate(found.panels):
                axes = grid[row, column]
                _map(axes, cells, xs, ys, scale, value)
                if row == 0:
                    axes.set_title(style.panel_title(found.col, name))
                else:
                    axes.set_xlabel(style.axis_name(found.x))
                if column == 0:
                    axes.set_ylabel(style.axis_name(found.y))
            painted = mpl.cm.ScalarMappable(norm=scale, cmap=_MAP)
            drawn.colorbar(painted, ax=[*grid[row]], label=label, extend="max", aspect=12)
        grid[-1, 0].set_xticks(range(len(xs)), [style.number(x) for x in xs])
        grid[-1, 0].set_yticks(range(len(ys)), [style.number(y) for y in ys])
        proxy = next(cell for cell in found.panels[0][1] if cell.is_reference)
        at = f"{style.value_text(found.x, proxy.x)}, {style.value_text(found.y, proxy.y)}"
        common = style.fixed_text(found.fixed)
        text = f"best {style.axis_name(found.swept).lower()} against that of {at} (framed)"
        style.heading(drawn, f"{common}\n{text}" if common else text)
    return drawn


_MAP = ListedColormap(mpl.colormaps["viridis_r"](np.linspace(0.0, 0.95, 256)))
_DARK = 0.5


def _shift(cell: Cell) -> tuple[float | None, str]:
    moved = cell.shift
    if moved.value is not None:
        return abs(moved.value), f"{moved.value:+.1f}".replace("-0.0", "+0.0")
    if moved.bound is None:
        return None, "?"
    least = moved.bound if moved.side == "high" else -moved.bound
    # a bound on the near side of no shift says nothing of its size
    return (least if least > 0 else None), f"{'>' if moved.side == 'high' else '<'}{moved.bound:+.1f}"


def _regret(cell: Cell) -> tuple[float | None, str]:
    if cell.regret_percent is None:
        return None, "div." if "runs diverge" in cell.regret.reason else "?"
    return cell.regret_percent, f"{'>' if cell.regret.lower_bound_only else ''}{cell.regret_percent:.1f}"


def _map(axes: Axes, cells: Sequence[Cell], xs: list[float], ys: list[float], scale: Normalize, value: Any) -> None:
    image = np.full((len(ys), len(xs)), np.nan)
    for cell in cells:
        at = ys.index(cell.y), xs.index(cell.x)
        found, text = value(cell)
        image[at] = np.nan if found is None else found
        dark = found is not None and float(scale(found)) > _DARK
        color = "white" if dark else style.INK
        text = text.replace("-", "\N{MINUS SIGN}")
        axes.text(at[1], at[0], text, ha="center", va="center", fontsize=7.5, color=color, zorder=3)
        if cell.is_reference:
            frame = Rectangle((at[1] - 0.47, at[0] - 0.47), 0.94, 0.94, fill=False, edgecolor=style.INK, linewidth=1.6)
            axes.add_patch(frame)
    axes.imshow(np.ma.masked_invalid(image), cmap=_MAP, norm=scale, aspect="auto", origin="lower")
    axes.grid(False)
    for a, b in pairwise(range(len(xs))):
        axes.axvline((a + b) / 2, color="white", linewidth=1)
    for a, b in pairwise(range(len(ys))):
        axes.axhline((a + b) / 2, color="white", linewidth=1)


def save(drawn: Figure, found: HeatMap, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
