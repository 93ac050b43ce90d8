"""Table of runs -> Pareto -> Figure: loss against density (or width), with each method's transferred or own best values.

Where a line was swept over lr or init_std, it gives two: at the value transferred from its reference (the dense end, or
the narrowest), and at its own best, both read off the fitted basin. Where it was not, it is shown as it was run.

Source: SuPar figs. 3, 8, 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from supar_sweep.errors import ConfigError

from . import basins, style
from .basins import Line, Panel, lr_basins, points_of
from .fit import Side
from .frames import (
    SWEPT,
    axes_of,
    check_axes,
    check_metric,
    having,
    panels_of,
    rounded,
    single_values,
    values_of,
    varied,
    where,
)

At = Literal["as run", "transferred", "own best"]


@dataclass(frozen=True)
class Point:
    """One point of a line: the seeds' losses at, or nearest to, the value of the swept axis that is shown.

    `loss` is the fitted basin's where it was swept, else the mean of the losses; None where runs diverge or are missing. Where
    it is `censored`, its best value lies beyond the grid: the lowest measured, an upper bound.
    """

    x: float
    loss: float | None
    losses: Mapping[int, float]
    n_diverged: int = 0
    log2_swept: float | None = None
    note: str = ""
    censored: bool = False

    @property
    def stderr(self) -> float | None:
        """Standard error over seeds."""
        n = len(self.losses)
        return float(np.std([*self.losses.values()], ddof=1)) / math.sqrt(n) if n > 1 else None


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    hue: Any
    at: At
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Gain:
    """How far the reference method's loss lies below another's at one x, in % of the other's.

    `stderr`: over seeds, paired where both have them; None with fewer than two. `side`: where one of the two losses is an upper
    bound, because its best value lies beyond the grid, so is the gain one ("high": it is at least `percent`).
    """

    col: str
    over: Any
    at: At
    x: float
    percent: float
    stderr: float | None
    side: Side | None = None


@dataclass(frozen=True)
class Pareto:
    """Everything the figure shows. `best`: the hue that the gains are of."""

    x: str
    hue: str
    col: str | None
    metric: str
    swept: str | None
    best: Any
    panels: tuple[tuple[str, tuple[Curve, ...]], ...]
    gains: tuple[Gain, ...]
    fixed: Mapping[str, Any]


def pareto(
    table: pd.DataFrame,
    x: str = "density",
    hue: str = "parameterization",
    col: str | None = None,
    metric: str = "train_loss",
    reference: float | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Pareto:
    """Return loss against x, a line per hue.

    Args:
        table: made by frames.frame.
        x: numeric axis; others may go with it (width with density, iso-parameter; lr with width).
        hue: axis of the lines; the gains are SuPar's, or else the last hue's.
        col: axis of the panels; None = one.
        metric: "train_loss" or "val_loss".
        reference: x whose best value is transferred; default: density 1, else the smallest x.
        fixed: values of other axes to keep.

    Raises:
        ConfigError: an unknown axis, one that is not numeric, or one that has several values at a point.
    """
    check_axes(table, x=x, hue=hue, col=col)
    check_metric(metric)
    kept = where(table, fixed or {})
    xs = values_of(kept, x)
    if not all(isinstance(value, float) and value > 0 for value in xs):
        raise ConfigError("x", "needs an axis of positive numbers", value=x, allowed=axes_of(table))
    at = reference if reference is not None else 1.0 if x == "density" else xs[0]
    swept = _swept(kept, (x, hue, col))
    hues = values_of(kept, hue)
    panels, gains = [], []
    best = "supar" if "supar" in hues else hues[-1]
    for name, rows in panels_of(kept, col):
        curves: list[Curve] = []
        for each in values_of(rows, hue):
            line = having(rows, hue, each)
            found = _as_run(line, x, metric) if swept is None else _fitted(line, x, swept, metric, rounded(at))
            curves += [Curve(each, kind, points) for kind, points in found.items()]
        panels.append((name, tuple(curves)))
        gains += _gains(name, curves, best)
    return Pareto(
        x, hue, col, metric, swept, best, tuple(panels), tuple(gains), single_values(kept, but=(x, hue, col, swept))
    )


def _swept(rows: pd.DataFrame, names: Sequence[str | None]) -> str | None:
    """Return which axis has several values at one point of the figure."""
    several = varied(rows, names)
    if not several:
        return None
    if len(several) > 1 or several[0] not in SWEPT:
        key = next((axis for axis in several if axis not in SWEPT), several[-1])
        raise ConfigError(f"where.{key}", "a point of the figure mixes several", value=values_of(rows, key))
    return several[0]


def _as_run(rows: pd.DataFrame, x: str, metric: str) -> dict[At, tuple[Point, ...]]:
    points = []
    for value in values_of(rows, x):
        (runs,) = points_of(having(rows, x, value), x, metric)
        note = "diverged" if runs.n_diverged else "" if runs.losses else "missing"
        loss = runs.mean if runs.eligible else None
        points.append(Point(value, loss, runs.observed.losses, runs.n_diverged, note=note))
    return {"as run": tuple(points)}


def _fitted(rows: pd.DataFrame, x: str, swept: str, metric: str, at: float) -> dict[At, tuple[Point, ...]]:
    """Return the line at the reference's optimum and at each x' own, from the basins over the swept axis."""
    (panel,) = lr_basins(rows, swept, x, None, metric, reference=at).panels
    lines = sorted(panel.lines, key=lambda line: float(line.hue))
    return {
        "transferred": tuple(_transferred(panel, line) for line in lines),
        "own best": tuple(_own_best(line) for line in lines),
    }


def _own_best(line: Line) -> Point:
    best = line.optimum
    if best.best_loss is None:
        return Point(float(line.hue), None, {}, note=best.reason)
    lowest = min((point for point in line.points if point.eligible), key=lambda point: point.mean or math.inf)
    point = lowest if best.x is None else _nearest(line, best.x)
    note = "best at the grid's edge" if best.censored else ""
    at = point.log2_x if best.x is None else best.x
    return Point(float(line.hue), best.best_loss, point.observed.losses, 0, at, note, best.censored)


def _transferred(panel: Panel, line: Line) -> Point:
    if panel.transferred is None or panel.transferred.x is None:
        return Point(float(line.hue), None, {}, note="the reference has no optimum to transfer")
    at = panel.transferred.x
    regret = panel.regret(line)
    nearest = _nearest(line, at)
    beside = [point for point in line.points if abs(point.log2_x - at) <= abs(nearest.log2_x - at) + 1e-9]
    n_diverged = max((point.n_diverged for point in beside), default=0)
    best = line.optimum.best_loss
    if regret.value is None or best is None:
        return Point(float(line.hue), None, {}, n_diverged, at, "diverged" if n_diverged else regret.reason)
    return Point(float(line.hue), best + regret.value, nearest.observed.losses, n_diverged, at)


def _nearest(line: Line, at: float) -> basins.Point:
    return min(line.points, key=lambda point: (not point.losses, abs(point.log2_x - at)))


def _gains(col: str, curves: Sequence[Curve], best: Any) -> list[Gain]:
    found = []
    for curve in curves:
        mine = next((each for each in curves if each.hue == best and each.at == curve.at), None)
        if mine is None or curve.hue == best:
            continue
        by_x = {point.x: point for point in mine.points}
        for point in curve.points:
            here = by_x.get(point.x)
            if here is None or here.loss is None or not point.loss or (here.censored and point.censored):
                continue  # of two upper bounds the difference says nothing
            percent = 100.0 * (point.loss - here.loss) / point.loss
            side: Side | None = "high" if here.censored else "low" if point.censored else None
            found.append(Gain(col, curve.hue, curve.at, point.x, percent, _gain_stderr(here, point), side))
    return found


def _gain_stderr(mine: Point, other: Point) -> float | None:
    """Return the standard error of a gain in %: of the differences seed by seed, in which their shared part cancels."""
    seeds = sorted(set(mine.losses) & set(other.losses))
    if len(seeds) < 2:
        return None
    differences = [100.0 * (other.losses[s] - mine.losses[s]) / other.losses[s] for s in seeds]
    return float(np.std(differences, ddof=1)) / math.sqrt(len(seeds))


_GAIN_IS: Mapping[Side | None, str] = {None: "measured", "high": "at least", "low": "at most"}


def data_rows(found: Pareto) -> list[dict[str, Any]]:
    """Return the figure's data, a row per point, with the gain over it."""
    gains = {(gain.col, gain.over, gain.at, gain.x): gain for gain in found.gains}
    rows = []
    for col, curves in found.panels:
        for curve in curves:
            for point in curve.points:
                gain = gains.get((col, curve.hue, curve.at, point.x))
                rows.append(
                    {
                        **found.fixed,
                        **({} if found.col is None else {found.col: col}),
                        found.hue: curve.hue,
                        "at": curve.at,
                        found.x: point.x,
                        found.metric: point.loss,
                        "stderr": point.stderr,
                        "n_seeds": len(point.losses),
                        "n_diverged": point.n_diverged,
                        **({} if found.swept is None else {f"log2_{found.swept}": point.log2_swept}),
                        f"gain_of_{found.best}_percent": None if gain is None else gain.percent,
                        "gain_stderr": None if gain is None else gain.stderr,
                        "gain_is": None if gain is None else _GAIN_IS[gain.side],
                        "note": point.note,
                    }
                )
    return rows


def draw(found: Pareto) -> Figure:
    """Return the figure: a panel per value of col and kind of hyperparameters, gains written where they are greatest."""
    with style.look():
        order: tuple[At, ...] = ("as run", "transferred", "own best")
        kinds = [at for at in order if any(c.at == at for _, cs in found.panels for c in cs)]
        shown = [(name, at, [c for c in curves if c.at == at]) for name, curves in found.panels for at in kinds]
        drawn, grid = style.panels(
            len(shown), style.COLUMN_IN * (1.0 if len(shown) > 1 else 1.3), 3.0, per_row=len(kinds) if found.col else 4
        )
        hues = list(dict.fromkeys(curve.hue for _, curves in found.panels for curve in curves))
        looks = style.looks(found.hue, hues)
        xs = sorted({point.x for _, curves in found.panels for curve in curves for point in curve.points})
        for axes, (name, at, curves) in zip(grid, shown, strict=True):
            for curve in curves:
                _curve(axes, curve, looks[curve.hue])
            heads = {
                "as run": "",
                "transferred": f"transferred {_swept_name(found)}",
                "own best": f"own best {_swept_name(found)}",
            }
            parts = [style.panel_title(found.col, name), heads[at]]
            heading = ", ".join(part for part in parts if part)
            axes.set_title(heading[:1].upper() + heading[1:])
            axes.set_xlabel(style.axis_name(found.x))
            style.value_ticks(axes, xs)
            if found.x == "density" and not axes.xaxis_inverted():
                axes.invert_xaxis()  # sparser to the right, as in the paper
        low, high = grid[0].get_ylim()
        n_lines = max(_annotate(axes, found, name, at) for axes, (name, at, _) in zip(grid, shown, strict=True))
        grid[0].set_ylim(low, high + (high - low) * 0.075 * n_lines)
        for first in grid[:: len(kinds) if found.col else 4]:
            first.set_ylabel(f"{style.METRIC_NAMES[found.metric]} (nats)")
        text = style.fixed_text(found.fixed)
        n_seeds = max((len(p.losses) for _, cs in found.panels for c in cs for p in c.points), default=0)
        style.heading(drawn, ", ".join(part for part in (text, style.seeds_text(n_seeds, n_seeds)) if part))
        handles = [
            Line2D(
                [], [], color=looks[hue].color, marker=looks[hue].marker, markersize=5, linestyle=looks[hue].linestyle
            )
            for hue in hues
        ]
        labels = [style.value_text(found.hue, hue) for hue in hues]
        notes = [p for _, cs in found.panels for c in cs for p in c.points]
        if any(p.censored for p in notes):
            handles.append(Line2D([], [], color=style.MUTED, marker="o", linewidth=0, markerfacecolor="white"))
            labels.append("best at grid edge: an upper bound")
        if any(p.loss is None for p in notes):
            handles.append(Line2D([], [], color=style.MUTED, marker="x", linewidth=0))
            labels.append("diverged, or nothing to transfer")
        style.legend(drawn, handles, labels)
    return drawn


def _swept_name(found: Pareto) -> str:
    return "" if found.swept is None else style.axis_name(found.swept).lower()


def _curve(axes: Axes, curve: Curve, look: style.Look) -> None:
    x = np.log2([point.x for point in curve.points])
    y = np.array([np.nan if point.loss is None else point.loss for point in curve.points])
    error = np.array([point.stderr or 0.0 for point in curve.points])
    axes.fill_between(x, y - error, y + error, color=look.color, alpha=0.18, linewidth=0)
    axes.plot(x, y, color=look.color, linestyle=look.linestyle)
    for at, height, point in zip(x, y, curve.points, strict=True):
        if point.loss is None:
            axes.plot(
                at, 0.99, "x", color=look.color, transform=axes.get_xaxis_transform(), markersize=5, clip_on=False
            )
        else:
            face = "white" if point.censored else look.color
            axes.plot(at, height, look.marker, color=look.color, markerfacecolor=face, markersize=5, zorder=3)


def _annotate(axes: Axes, found: Pareto, col: str, at: At) -> int:
    """Write the gain over each other line at the harshest x: the lowest density, or else the greatest x.

    Returns how many lines of text that took.
    """
    mine = [gain for gain in found.gains if (gain.col, gain.at) == (col, at)]
    lines = []
    for over in dict.fromkeys(gain.over for gain in mine):
        of_line = [gain for gain in mine if gain.over == over]
        end = min(of_line, key=lambda gain: gain.x) if found.x == "density" else max(of_line, key=lambda gain: gain.x)
        error = "" if end.stderr is None else f" \N{PLUS-MINUS SIGN} {end.stderr:.1f}"
        name, other = style.value_text(found.hue, found.best), style.value_text(found.hue, over)
        least = {None: "", "high": "\N{GREATER-THAN OR EQUAL TO} ", "low": "\N{LESS-THAN OR EQUAL TO} "}[end.side]
        text = f"{name} vs {other}: {least}{end.percent:+.1f}{error}% at {style.number(end.x)}"
        if all(gain.side is None for gain in of_line):  # a mean over bounds is none
            text += f", {np.mean([gain.percent for gain in of_line]):+.1f}% on average"
        lines.append(text)
    if not lines:
        return 0
    text = "\n".join(["lower loss:", *lines]).replace("-", "\N{MINUS SIGN}")
    axes.annotate(text, (0.03, 0.98), xycoords="axes fraction", va="top", fontsize=7.0, color=style.MUTED)
    return len(lines) + 1


def save(drawn: Figure, found: Pareto, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
