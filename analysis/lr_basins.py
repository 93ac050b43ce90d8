"""BasinSet -> Figure: loss against log2 of the swept axis (lr, init_std, any other), a panel per parameterization, in rows
where there is a second axis of panels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from . import style
from .basins import BasinSet, Line, Panel, data_rows
from .fit import Side

_PANEL_HEIGHT_IN = 3.1
_HEADROOM = 0.10
_FLOOR = 0.06
_EXCESS_SHOWN = 0.35
"""At most this far (relative) above the lowest loss is drawn to scale; the rest is at the edge."""
_LEAST_EXCESS = 0.02
_EDGE_MARKER_PT = 5.0
_NO_CI = "D"
"""Marker of a fitted optimum whose interval has no end on one side or on both: it must not look like a sure one."""


def draw(basins: BasinSet) -> Figure:
    """Return the figure: panels side by side that share both axes, one legend below.

    With a row axis, its value stands at the left of its panels.
    """
    with style.look():
        drawn, grid = _grid(basins)
        low, high = loss_limits(basins)
        hues = list(dict.fromkeys(line.hue for panel in basins.panels for line in panel.lines))
        if all(isinstance(hue, float) for hue in hues):
            hues.sort(key=float, reverse=True)
        reference = {panel.reference_hue for panel in basins.panels}
        darkest = next(iter(reference)) if len(reference) == 1 else None
        looks = style.looks(basins.hue, hues, darkest)
        xs = [p.log2_x for panel in basins.panels for line in panel.lines for p in line.points]
        loss = f"{style.METRIC_NAMES[basins.metric]} (nats)"
        for axes, panel, above in zip(grid, basins.panels, [None, *basins.panels], strict=False):
            _panel(axes, panel, looks, high)
            axes.set_title(style.panel_title(basins.col, panel.col))
            if axes.xaxis.get_tick_params()["labelbottom"]:  # the lowest of its column
                axes.set_xlabel(f"{style.axis_name(basins.x)} (log$_2$ scale)")
            axes.set_ylim(low, high)
            axes.set_xlim(min(xs) - 0.45, max(xs) + 0.45)
            style.log2_ticks(axes, max(xs) - min(xs))
            if above is None or panel.row != above.row:
                axes.set_ylabel(f"{style.panel_title(basins.row, panel.row)}\n{loss}" if basins.row else loss)
        style.heading(drawn, _title(basins))
        handles, labels = _legend(basins, hues, looks)
        style.legend(drawn, handles, labels)
    return drawn


def save(drawn: Figure, basins: BasinSet, stem: Path) -> list[Path]:
    """Write `stem`.png and .pdf, and the data as `stem`.csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(basins), stem)


def loss_limits(basins: BasinSet) -> tuple[float, float]:
    """Return the y limits: all basins' floors, and their walls only as far as they are of interest.

    The top is the 85th percentile of the means, but never below any line's optimum with a margin,
    and never more than 35 % above the lowest loss.
    """
    lines = [line for panel in basins.panels for line in panel.lines]
    means = [point.mean for line in lines for point in line.points if point.mean is not None]
    if not means:
        return 0.0, 1.0
    floors = [line.optimum.best_loss for line in lines if line.optimum.best_loss is not None]
    lowest = min([*means, *floors])  # a fitted optimum may lie below every mean
    top = min(float(np.quantile(means, 0.85)), lowest + _EXCESS_SHOWN * abs(lowest))
    top = max(top, 1.5 * max([*floors, lowest]) - 0.5 * lowest, lowest + _LEAST_EXCESS * abs(lowest))
    span = top - lowest
    return lowest - _FLOOR * span, top + _HEADROOM * span


def _grid(basins: BasinSet) -> tuple[Figure, list[Axes]]:
    """Return an empty figure, and the axes of each panel: a row a value of the row axis, else as many side by side as fit."""
    n = len(basins.panels)
    if basins.row is None:
        return style.panels(n, style.COLUMN_IN * (0.9 if n > 1 else 1.3), _PANEL_HEIGHT_IN, legend_in=1.0)
    rows = list(dict.fromkeys(panel.row for panel in basins.panels))
    # in the order of the fullest row first, so that a row which lacks one does not reorder the others
    by_row = [[panel.col for panel in basins.panels if panel.row == row] for row in rows]
    cols = list(dict.fromkeys(col for of_row in sorted(by_row, key=len, reverse=True) for col in of_row))
    wide = style.COLUMN_IN * (0.9 if len(cols) > 1 else 1.3)
    drawn, grid = style.panels(len(rows) * len(cols), wide, _PANEL_HEIGHT_IN, legend_in=1.0, per_row=len(cols))
    places = [rows.index(panel.row) * len(cols) + cols.index(panel.col) for panel in basins.panels]
    style.hide([axes for place, axes in enumerate(grid) if place not in places], len(cols), grid)
    return drawn, [grid[place] for place in places]


def _panel(axes: Axes, panel: Panel, looks: dict[Any, style.Look], top: float) -> None:
    transferred = panel.transferred
    if transferred is not None and transferred.x is not None:
        axes.axvline(transferred.x, color=style.INK, linewidth=1.1, dashes=(4, 3), zorder=1.5)
    for rank, line in enumerate(panel.lines):
        _line(axes, line, looks[line.hue], top, rank)
    _edge(axes, panel, looks, top)
    for line in panel.lines:
        _optimum(axes, line, looks[line.hue].color, top)


def _line(axes: Axes, line: Line, look: style.Look, top: float, rank: int) -> None:
    color = look.color
    x = np.array([point.log2_x for point in line.points])
    # A NaN breaks the line where some seed diverged: a mean over the survivors is not the mean.
    shown = [point.mean if point.eligible else np.nan for point in line.points]
    mean_loss = np.array(shown, dtype=float)
    error = np.array([point.stderr or 0.0 for point in line.points])
    order = 2.5 - 0.01 * rank
    axes.fill_between(
        x,
        mean_loss - error,
        mean_loss + error,
        color=color,
        alpha=0.22,
        linewidth=0,
        zorder=order - 0.3,
    )
    axes.plot(x, mean_loss, color=color, linestyle=look.linestyle, zorder=order)
    inside = mean_loss <= top
    axes.plot(x[inside], mean_loss[inside], ".", color=color, markersize=4.5, zorder=order)


def _edge(axes: Axes, panel: Panel, looks: dict[Any, style.Look], top: float) -> None:
    """Mark at the top edge what the panel cannot show: runs that diverged, and losses above the axis."""
    marks: dict[float, list[tuple[str, str]]] = {}
    for line in panel.lines:
        for point in line.points:
            if point.n_diverged:
                marks.setdefault(point.log2_x, []).append(("x", looks[line.hue].color))
            elif point.mean is not None and point.mean > top:
                marks.setdefault(point.log2_x, []).append(("^", looks[line.hue].color))
    for x, at_x in marks.items():
        for rank, (marker, color) in enumerate(at_x):
            # side by side: below one another they would read as losses
            aside_in = (rank - (len(at_x) - 1) / 2) * _EDGE_MARKER_PT / 72
            aside = ScaledTranslation(aside_in, 0, axes.get_figure(root=True).dpi_scale_trans)  # type: ignore[union-attr]
            axes.plot(
                x,
                1.0,
                marker,
                color=color,
                markersize=_EDGE_MARKER_PT,
                markeredgewidth=1.5 if marker == "x" else 0.0,
                transform=axes.get_xaxis_transform() + aside,
                clip_on=False,
                zorder=4,
            )


def _optimum(axes: Axes, line: Line, color: str, top: float) -> None:
    best = line.optimum
    if best.x is not None and best.loss is not None:
        if best.ci is not None:
            axes.errorbar(
                best.x,
                best.loss,
                xerr=[[max(best.x - best.ci[0], 0.0)], [max(best.ci[1] - best.x, 0.0)]],
                fmt="none",
                ecolor=style.INK,
                elinewidth=1.1,
                capsize=2.2,
                capthick=1.1,
                zorder=6,
            )
        elif best.bound is not None:
            axes.plot(
                [best.bound, best.x], [best.loss, best.loss], "|-", color=style.INK, linewidth=1.1,
                markevery=[0], markersize=4.4, markeredgewidth=1.1, zorder=6,
            )  # fmt: skip
            _arrow(axes, best.x, best.loss, best.side, style.INK)
        axes.plot(
            best.x, best.loss, _NO_CI if best.ci is None else "o", markersize=7.0, markerfacecolor=color,
            markeredgecolor="white", markeredgewidth=1.1, zorder=5,
        )  # fmt: skip
    elif best.censored:
        eligible = [point for point in line.points if point.eligible]
        end = eligible[-1] if best.side == "high" else eligible[0]
        assert end.mean is not None
        height = min(end.mean, top)
        _arrow(axes, end.log2_x, height, best.side, color)
        axes.plot(
            end.log2_x, height, "o", markersize=7.0, markerfacecolor="white",
            markeredgecolor=color, markeredgewidth=1.7, zorder=5, clip_on=False,
        )  # fmt: skip


def _arrow(axes: Axes, x: float, y: float, side: Side | None, color: str) -> None:
    """Point from (x, y) to the side on which nothing bounds the optimum."""
    axes.annotate(
        "",
        xy=(x, y),
        xytext=(16 if side == "high" else -16, 0),
        textcoords="offset points",
        arrowprops={"arrowstyle": "<-", "color": color, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 3},
        annotation_clip=False,
        zorder=4.4,
    )


def _title(basins: BasinSet) -> str:
    shown = [text] if (text := style.fixed_text(basins.fixed)) else []
    n_seeds = {line.n_seeds for panel in basins.panels for line in panel.lines}
    if n_seeds:
        shown.append(style.seeds_text(min(n_seeds), max(n_seeds)))
    if basins.n_missing:
        shown.append(f"{basins.n_missing} runs missing")
    return ", ".join(shown)


def _tied(basins: BasinSet, hue: Any) -> list[str]:
    """Return what goes with the hue in every panel, as text: the width of an iso-parameter line."""
    found = [line.tied for panel in basins.panels for line in panel.lines if line.hue == hue]
    common = {axis: v for axis, v in found[0].items() if all(each.get(axis) == v for each in found)}
    return [style.value_text(axis, common[axis]) for axis in ("width", "density", "n_layer") if axis in common]


def _legend(basins: BasinSet, hues: list[Any], looks: dict[Any, style.Look]) -> tuple[list[Line2D], list[str]]:
    """Return handles and labels: a line per hue, then only the marks that the figure has."""
    lines = [line for panel in basins.panels for line in panel.lines]
    handles: list[Line2D] = []
    labels: list[str] = []
    for hue in hues:
        handles.append(Line2D([], [], color=looks[hue].color, linestyle=looks[hue].linestyle))
        labels.append(", ".join([style.value_text(basins.hue, hue), *_tied(basins, hue)]))
    grey = style.MUTED

    def mark(label: str, **look: object) -> None:
        handles.append(Line2D([], [], **look))  # type: ignore[arg-type]
        labels.append(label)

    found = [line.optimum for line in lines if line.optimum.x is not None]
    if any(best.ci is not None for best in found):
        mark(
            "fitted optimum, 95% CI", color=style.INK, marker="o", markersize=7, markerfacecolor=grey,
            markeredgecolor="white", linewidth=1.1,
        )  # fmt: skip
    if any(best.ci is None for best in found):
        mark(
            "fitted optimum, open-ended CI", color=grey, marker=_NO_CI, linewidth=0, markersize=7,
            markeredgecolor="white",
        )  # fmt: skip
    if any(panel.transferred is not None for panel in basins.panels):
        dense = "dense optimum" if basins.hue == "density" else "reference optimum"
        mark(f"{dense}, transferred", color=style.INK, linewidth=1.1, dashes=(4, 3))
    if any(line.optimum.censored for line in lines):
        mark(
            "best at grid edge (censored)", color=grey, marker="o", linewidth=0, markersize=7,
            markerfacecolor="white", markeredgewidth=1.7,
        )  # fmt: skip
    if any(point.n_diverged for line in lines for point in line.points):
        mark("diverged", color=grey, marker="x", linewidth=0, markersize=_EDGE_MARKER_PT, markeredgewidth=1.5)
    top = loss_limits(basins)[1]
    above = [p for line in lines for p in line.points if p.eligible and (p.mean or 0.0) > top]
    if above:
        mark("loss above the axis", color=grey, marker="^", linewidth=0, markersize=_EDGE_MARKER_PT)
    return handles, labels
