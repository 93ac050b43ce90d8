"""Best loss of each width and density -> a scaling fit with intervals -> Figure: loss against live parameters.

    loss = floor + scale * (live / live_0)^-alpha * density^gamma

`live` counts the live hidden weights (no embedding, no head, as is customary), live_0 is their geometric mean over the
points. gamma > 0: at equally many live weights a sparser, wider model is better. It is fitted by least squares over all
points of a parameterization; intervals are profile likelihood with an F quantile, so noise and misfit both widen them.

Source of the form: Frantar et al., arXiv 2309.08520, eq. 1, with one power of the density for their a_S (1-S)^b_S + c_S
and the number of tokens fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import brentq, least_squares
from scipy.special import fdtri

from supar_sweep.errors import ConfigError

from . import style
from .basins import basin_sets
from .frames import check_axes, check_metric, having, refuse_mixed, single_values, values_of, where
from .smooth import CONFIDENCE
from .wiener import Array

FORM = "loss = floor + exp(log_scale) (live / live_0)^-alpha density^gamma"
PARAMETERS = ("floor", "log_scale", "alpha", "gamma")
LEAST_LIVE = 3
LEAST_DENSITIES = 2
LEAST_DF = 2
_BOUNDS = (np.array([0.0, -30.0, -3.0, -3.0]), np.array([np.inf, 10.0, 3.0, 3.0]))
_REACH = 1.5
"""How far an exponent's interval is searched; beyond, it has no end."""


@dataclass(frozen=True)
class Point:
    """One width and density: the loss of its best value of the swept axis (censored: the lowest measured)."""

    width: float
    density: float
    live: float
    loss: float
    censored: bool


@dataclass(frozen=True)
class Estimate:
    """A parameter with its 95 % interval; an end that the data do not bound is None."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ScalingFit:
    """The fit of one parameterization. `rms`: of the residuals, in nats per degree of freedom; `live_0`: see above."""

    floor: Estimate
    log_scale: Estimate
    alpha: Estimate
    gamma: Estimate
    live_0: float
    rms: float
    df: int

    def loss(self, live: float, density: float) -> float:
        """Return the fitted loss.

        Args:
            live: number of live hidden weights. density: in (0, 1].
        """
        rest = -self.alpha.value * np.log(live / self.live_0) + self.gamma.value * np.log(density)
        return float(self.floor.value + np.exp(self.log_scale.value + rest))


@dataclass(frozen=True)
class Panel:
    """One panel: its points, and the fit or why there is none."""

    col: str
    points: tuple[Point, ...]
    fit: ScalingFit | None
    reason: str = ""


@dataclass(frozen=True)
class Scaling:
    """Everything the figure shows."""

    col: str | None
    metric: str
    panels: tuple[Panel, ...]
    fixed: Mapping[str, Any]


def scaling(
    table: pd.DataFrame,
    col: str | None = "parameterization",
    metric: str = "train_loss",
    fixed: Mapping[str, Any] | None = None,
) -> Scaling:
    """Return the fits of a table whose column `live_parameters` holds each cell's live hidden weights.

    Args:
        table: made by frames.frame.
        col: axis of the panels; None = one.
        metric: "train_loss" or "val_loss".
        fixed: values of other axes to keep.

    Raises:
        ConfigError: an unknown axis, or points that mix several values of one.
    """
    check_axes(table, col=col)
    check_metric(metric)
    if col in ("density", "width", "lr"):
        raise ConfigError("col", "has no effect on a fit over it", value=col, allowed="another axis")
    kept = where(table, fixed or {})
    refuse_mixed(kept, "a point of the fit", ("width", "density", col), ("lr",))
    found: dict[str, list[Point]] = {}
    for basins in basin_sets(kept, metric, col=col):
        for panel in basins.panels:
            for line in panel.lines:
                width = float({**basins.fixed, **line.tied}["width"])
                best = line.optimum.best_loss
                if best is not None:
                    rows = having(having(kept, "width", width), "density", line.hue)
                    live = float(rows["live_parameters"].iloc[0])
                    point = Point(width, float(line.hue), live, best, line.optimum.censored)
                    found.setdefault(panel.col, []).append(point)
    panels = []
    for name, points in found.items():
        fit, reason = fit_points(points)
        panels.append(Panel(name, tuple(sorted(points, key=lambda p: (-p.density, p.live))), fit, reason))
    return Scaling(col, metric, tuple(panels), single_values(kept, but=(col, "lr", "width", "density")))


def fit_points(points: Sequence[Point]) -> tuple[ScalingFit | None, str]:
    """Return the fit of some points, or None and why the grid does not allow one.

    Args:
        points: censored ones are left out: their loss is only an upper bound.
    """
    used = [point for point in points if not point.censored]
    n_live, n_densities = len({p.live for p in used}), len({p.density for p in used})
    if n_live < LEAST_LIVE or n_densities < LEAST_DENSITIES or len(used) < len(PARAMETERS) + LEAST_DF:
        return None, (
            f"too few shapes: {len(used)} points of {n_live} sizes and {n_densities} densities; a fit needs "
            f"{len(PARAMETERS) + LEAST_DF}, {LEAST_LIVE} and {LEAST_DENSITIES}"
        )
    live, density = np.array([p.live for p in used]), np.array([p.density for p in used])
    loss, live_0 = np.array([p.loss for p in used]), float(np.exp(np.log(live).mean()))
    x = np.stack([np.ones(len(used)), -np.log(live / live_0), np.log(density)], axis=1)
    if np.linalg.matrix_rank(x) < 3:
        return None, "size and density go together in this grid: their powers cannot be told apart"
    best, square_sum = _minimum(x, loss, {})
    df = len(used) - len(PARAMETERS)
    limit = square_sum * (1 + float(fdtri(1, df, CONFIDENCE)) / df) + 1e-18
    floor, log_scale, alpha, gamma = (_profile(x, loss, best, index, limit) for index in range(len(PARAMETERS)))
    rms = float(np.sqrt(square_sum / df))
    return ScalingFit(floor, log_scale, alpha, gamma, live_0, rms, df), ""


def _minimum(x: Array, loss: Array, held: Mapping[int, float], start: Array | None = None) -> tuple[Array, float]:
    """Return the parameters of least squares with some of them held, and the sum of squares.

    From `start`, or else from three guesses of the floor.
    """
    free = [index for index in range(len(PARAMETERS)) if index not in held]

    def whole(values: Array) -> Array:
        full = np.zeros(len(PARAMETERS))
        full[free] = values
        for index, value in held.items():
            full[index] = value
        return full

    def residual(values: Array) -> Array:
        floor, *powers = whole(values)
        left: Array = floor + np.exp(np.clip(x @ np.array(powers), -60.0, 60.0)) - loss
        return left

    def jacobian(values: Array) -> Array:
        _, *powers = whole(values)
        term = np.exp(np.clip(x @ np.array(powers), -60.0, 60.0))
        slopes: Array = np.concatenate([np.ones((len(loss), 1)), term[:, None] * x], axis=1)[:, free]
        return slopes

    starts = [] if start is None else [start]
    for share in (0.0, 0.5, 0.9) if start is None else ():
        floor = held.get(0, share * float(loss.min()))
        logs = np.log(np.maximum(loss - floor, 1e-6 * loss))
        starts.append(np.concatenate([[floor], np.linalg.lstsq(x, logs, rcond=None)[0]]))
    low, high = _BOUNDS[0][free], _BOUNDS[1][free]
    found = []
    for each in starts:
        first = np.clip(each[free], low + 1e-9, high - 1e-9)
        solved = least_squares(residual, first, jacobian, bounds=(low, high), x_scale=np.maximum(np.abs(first), 0.1))
        found.append((2 * float(solved.cost), whole(solved.x)))
    square_sum, values = min(found, key=lambda pair: pair[0])
    return values, square_sum


def _profile(x: Array, loss: Array, best: Array, index: int, limit: float) -> Estimate:
    """Return a parameter with the ends at which the least sum of squares of the others reaches the limit."""
    centre = float(best[index])

    def above(value: float) -> float:
        return _minimum(x, loss, {index: value}, best)[1] - limit

    ends: list[float | None] = []
    for sign in (-1.0, 1.0):
        edge = centre + sign * _REACH
        if index == 0:  # the floor lies between 0 and the lowest loss
            edge = 0.0 if sign < 0 else float(loss.min()) - 1e-9
        if (edge - centre) * sign <= 0 or above(edge) < 0:
            ends.append(None)
            continue
        ends.append(float(brentq(above, *sorted((centre, edge)), xtol=1e-4)))
    return Estimate(centre, ends[0], ends[1])


def summary(table: pd.DataFrame, metric: str = "train_loss", fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the fit of each parameterization in plain values, or why the grid does not allow one: the form, the metric, `fits`.

    A fit has n_points, n_censored (left out of it), `fit` (null, or each parameter with its value and its 95% interval's low and
    high, null where the data do not bound it; live_0, rms, df) and `reason` ("" with a fit).

    Args:
        table, metric, fixed: as for `scaling`.
    """
    fits: dict[str, dict[str, Any]]
    try:
        panels = scaling(table, "parameterization", metric, fixed).panels
    except ConfigError as error:
        names = values_of(where(table, fixed or {}), "parameterization")
        fits = {str(name): {"n_points": 0, "n_censored": 0, "fit": None, "reason": str(error)} for name in names}
    else:
        fits = {
            panel.col: {
                "n_points": len(panel.points),
                "n_censored": sum(point.censored for point in panel.points),
                "fit": None if panel.fit is None else asdict(panel.fit),
                "reason": panel.reason,
            }
            for panel in panels
        }
    return {"form": FORM, "metric": metric, "fits": fits}


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each fit of a `summary`, and one for each reason why there is none."""
    said: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name, each in found["fits"].items():
        if each["fit"] is None:
            reasons.setdefault(each["reason"], []).append(name)
        else:
            parts = [f"{key} {interval_text(each['fit'][key])}" for key in ("floor", "alpha", "gamma")]
            said.append(f"{name}: scaling fit {', '.join(parts)}")
    return [*said, *(f"{', '.join(names)}: no scaling fit ({reason})" for reason, names in reasons.items())]


def interval_text(estimate: Mapping[str, float | None]) -> str:
    """Return a parameter of a `summary` as text: 0.36 (0.02 to 0.90); an end that the data do not bound is a ?."""
    low, high = ("?" if estimate[end] is None else f"{estimate[end]:.2f}" for end in ("low", "high"))
    return f"{estimate['value']:.2f} ({low} to {high})"


def data_rows(found: Scaling) -> list[dict[str, Any]]:
    """Return the figure's data, a row per point, with the fit's loss and parameters."""
    rows = []
    for panel in found.panels:
        fitted = {}
        for name in PARAMETERS:
            estimate: Estimate | None = getattr(panel.fit, name, None)
            fitted[name] = None if estimate is None else estimate.value
            fitted[f"{name}_low"] = None if estimate is None else estimate.low
            fitted[f"{name}_high"] = None if estimate is None else estimate.high
        for point in panel.points:
            rows.append(
                {
                    **found.fixed,
                    **({} if found.col is None else {found.col: panel.col}),
                    "width": point.width,
                    "density": point.density,
                    "live_hidden_weights": point.live,
                    found.metric: point.loss,
                    "censored": point.censored,
                    "fitted": None if panel.fit is None else panel.fit.loss(point.live, point.density),
                    **fitted,
                    "reason": panel.reason,
                }
            )
    return rows


def draw(found: Scaling) -> Figure:
    """Return the figure: loss against live hidden weights, a line of the fit per density; censored points are hollow."""
    with style.look():
        n = len(found.panels)
        drawn, grid = style.panels(n, style.COLUMN_IN * (0.9 if n > 1 else 1.3), 3.0)
        densities = sorted({point.density for panel in found.panels for point in panel.points}, reverse=True)
        looks = style.looks("density", densities)
        for axes, panel in zip(grid, found.panels, strict=True):
            for density in densities:
                points = [point for point in panel.points if point.density == density]
                color = looks[density].color
                for point in points:
                    face = "white" if point.censored else color
                    axes.plot(
                        np.log2(point.live), point.loss, "o", color=color, markerfacecolor=face, markersize=5, zorder=3
                    )
                if panel.fit is not None and points:
                    sizes = np.geomspace(min(p.live for p in points), max(p.live for p in points), 50)
                    fitted = [panel.fit.loss(float(live), density) for live in sizes]
                    axes.plot(np.log2(sizes), fitted, color=color)
            axes.set_title(style.panel_title(found.col, panel.col))
            axes.set_xlabel("Live hidden weights")
            axes.annotate(
                _text(panel),
                (0.97, 0.97),
                xycoords="axes fraction",
                va="top",
                ha="right",
                fontsize=7.0,
                color=style.MUTED,
            )
        xs = [np.log2(point.live) for panel in found.panels for point in panel.points]
        style.log2_ticks(grid[0], 1.6 * (max(xs) - min(xs)))
        low, high = grid[0].get_ylim()
        grid[0].set_ylim(low, high + 0.2 * (high - low))
        grid[0].set_ylabel(f"{style.METRIC_NAMES[found.metric]} (nats)")
        style.heading(
            drawn, ", ".join(part for part in (style.fixed_text(found.fixed), "each at its own best") if part)
        )
        handles = [Line2D([], [], color=looks[density].color, marker="o", markersize=5) for density in densities]
        labels = [style.value_text("density", density) for density in densities]
        if any(point.censored for panel in found.panels for point in panel.points):
            handles.append(Line2D([], [], color=style.MUTED, marker="o", linewidth=0, markerfacecolor="white"))
            labels.append("best at grid edge: not fitted")
        style.legend(drawn, handles, labels)
    return drawn


def _text(panel: Panel) -> str:
    if panel.fit is None:
        return "no fit: " + panel.reason.replace("; ", ";\n").replace(": ", ":\n")
    lines = []
    for name, symbol in (("floor", "floor"), ("alpha", r"$\alpha$"), ("gamma", r"$\gamma$")):
        lines.append(f"{symbol} {interval_text(asdict(getattr(panel.fit, name)))}")
    return "\n".join(lines).replace("-", "\N{MINUS SIGN}")


def save(drawn: Figure, found: Scaling, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
