"""Table of runs under several exponents -> with which power of density the lr must go so that its optimum stays.

Rules multiply the lr of hidden weights by density^-a: SuPar's a is 1, muP's 0. Each exponent that was run has a shift of its
own, how far the best lr of a sparse model lies from the dense one's, and the exponent that transfers is where the shift
crosses zero. One sweep under a = 0 does not say it: there the lr of embedding, head and norms moves along, and its shift over
log2(1/density) is too small an exponent: .6 for static masks (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import Ratios
from supar_sweep.rules.parameterization import Method, multiplier

from . import style
from .basins import BasinSet, Panel, lr_basins
from .frames import check_axes, parsed, rounded
from .verdict import Shift, shift

KNOWN = ((0.0, "mup"), (0.5, "SMET"), (1.0, "supar"))
"""Exponents that somebody's rule has. Sources: SuPar table 1, hidden LR; SMET (arXiv:2606.00888), LR ~ 1/sqrt(density)."""

_ASIDE = 0.025


@dataclass(frozen=True)
class Best:
    """The exponent at which the shift is zero, between those that were run; `low`, `high`: where its 95% interval leaves zero.

    None is beyond what was run: with `low` alone, the exponent is at least that.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Series:
    """One line: a value of the hue axis at one density. `shifts`: by rising exponent of the rule."""

    hue: str
    shifts: tuple[tuple[float, Shift], ...]

    @property
    def best(self) -> Best:
        """The exponent that would have kept the optimum."""
        fitted = [(rule, each) for rule, each in self.shifts if each.value is not None]
        ends = [(rule, each.ci) for rule, each in self.shifts if each.ci is not None]
        return Best(
            falls_through_zero([(rule, float(each.value or 0.0)) for rule, each in fitted]),
            falls_through_zero([(rule, ci[0]) for rule, ci in ends]),
            falls_through_zero([(rule, ci[1]) for rule, ci in ends]),
        )


@dataclass(frozen=True)
class LrExponents:
    """Everything the figure shows: the series of each density. `x`: the axis whose values are the rules."""

    x: str
    hue: str
    metric: str
    panels: tuple[tuple[float, tuple[Series, ...]], ...]
    fixed: Mapping[str, Any]


def lr_exponent(
    table: pd.DataFrame,
    x: str = "dynamic_lr_exponent",
    hue: str = "method",
    metric: str = "train_loss",
    reference: float | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> LrExponents:
    """Return the shifts under every exponent, of a table made by frames.frame.

    Args:
        table: of a grid over lr, density and `x`.
        x: axis whose values have different exponents: dynamic_lr_exponent, or parameterization. hue: axis of the lines.
        metric: "train_loss" or "val_loss".
        reference: density whose optimum is the reference; default 1.
        fixed: values of other axes to keep, where the table has several.

    Raises:
        ConfigError: an axis that does not exist, one that varies along a line, or two values of `x` with one exponent.
    """
    check_axes(table, x=x, hue=hue)
    basins = lr_basins(table, "lr", "density", x, metric, reference, fixed, row=hue)
    found: dict[float, dict[str, dict[float, Shift]]] = {}
    for panel in basins.panels:
        rule = _rule(basins, panel)
        for line in panel.lines:
            if panel.reference is None or line.hue == panel.reference_hue:
                continue
            of_line = found.setdefault(float(line.hue), {}).setdefault(panel.row, {})
            if rule in of_line:
                raise ConfigError(
                    f"where.{x}",
                    f"two values of it have the exponent {rule:g}",
                    value=panel.col,
                    allowed="one of each exponent",
                )
            of_line[rule] = shift(panel, line)
    panels = tuple(
        (density, tuple(Series(name, tuple(sorted(by_rule.items()))) for name, by_rule in lines.items()))
        for density, lines in sorted(found.items(), reverse=True)
    )
    return LrExponents(x, hue, metric, panels, basins.fixed)


def falls_through_zero(points: Sequence[tuple[float, float]]) -> float | None:
    """Return where a broken line first falls through zero, or None.

    Args:
        points: (x, y) by rising x.
    """
    for (x, y), (x_next, y_next) in pairwise(points):
        if y >= 0 > y_next or y > 0 >= y_next:
            return x + (x_next - x) * y / (y - y_next)
    return None


def _rule(basins: BasinSet, panel: Panel) -> float:
    """Return the power of 1/density by which the panel's rules multiply the lr of hidden weights."""
    tied = panel.lines[0].tied
    placed = {axis: parsed(shown) for axis, shown in basins.place(panel).items()}
    known = {**basins.fixed, **tied, **placed}
    own = rounded(known.get("dynamic_lr_exponent"))
    method = Method(parameterization=known["parameterization"], lr_density_exponent=own)
    at_half = multiplier("lr", "hidden", method, Ratios(m_d=1.0, m_rho=0.5), in_block=True)
    assert at_half is not None
    return float(rounded(math.log2(at_half)))


def data_rows(found: LrExponents) -> list[dict[str, Any]]:
    """Return the figure's data, a row per density, line and exponent, with the line's best exponent in each."""
    return [
        {
            **found.fixed,
            "density": density,
            found.hue: series.hue,
            "rule_exponent": rule,
            "shift_octaves": each.value,
            "shift_ci_low": None if each.ci is None else each.ci[0],
            "shift_ci_high": None if each.ci is None else each.ci[1],
            "shift_bound": each.bound,
            "shift_bound_side": each.side,
            "best_exponent": series.best.value,
            "best_exponent_low": series.best.low,
            "best_exponent_high": series.best.high,
        }
        for density, of_panel in found.panels
        for series in of_panel
        for rule, each in series.shifts
    ]


def draw(found: LrExponents) -> Figure:
    """Return the figure: the shift against the rule's exponent, a panel per density. A line's best exponent is where it is 0."""
    with style.look():
        n = max(len(found.panels), 1)
        drawn, grid = style.panels(n, style.COLUMN_IN * (0.9 if n > 1 else 1.3), 2.9, legend_in=0.7)
        names = list(dict.fromkeys(series.hue for _, of_panel in found.panels for series in of_panel))
        looks = style.looks(found.hue, names)
        rules = [rule for _, of_panel in found.panels for series in of_panel for rule, _ in series.shifts]
        for axes, (density, of_panel) in zip(grid, found.panels, strict=False):
            axes.axhline(0.0, color=style.INK, linewidth=1.1, dashes=(4, 3), zorder=1.5)
            for level, owner in KNOWN:
                if min(rules) <= level <= max(rules):
                    axes.axvline(level, color=style.GRID, linewidth=1.1, zorder=1.2)
                    axes.annotate(
                        style.title(owner), (level, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, -2),
                        textcoords="offset points", ha="center", va="top", fontsize=7.5, color=style.MUTED,
                    )  # fmt: skip
            for rank, series in enumerate(of_panel):
                _series(axes, series, looks[series.hue], _ASIDE * (rank - (len(of_panel) - 1) / 2))
            axes.set_title(style.panel_title("density", density))
            axes.set_xlabel("a in learning rate ~ density$^{-a}$")
        grid[0].margins(x=0.12, y=0.14)
        grid[0].set_ylabel("Shift of the best learning rate (octaves)")
        style.heading(drawn, style.fixed_text(found.fixed))
        handles = []
        for name in names:
            look = looks[name]
            handles.append(Line2D([], [], color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=5))
        style.legend(drawn, handles, [style.value_text(found.hue, name) for name in names])
    return drawn


def _series(axes: Axes, series: Series, look: style.Look, aside: float) -> None:
    fitted = [(rule, each.value) for rule, each in series.shifts if each.value is not None]
    axes.plot([r + aside for r, _ in fitted], [v for _, v in fitted], color=look.color, linestyle=look.linestyle)
    for rule, each in series.shifts:
        x = rule + aside
        if each.value is not None and each.ci is not None:
            error = [[each.value - each.ci[0]], [each.ci[1] - each.value]]
            axes.errorbar(
                x, each.value, yerr=error, fmt=look.marker, color=look.color, markersize=5, elinewidth=1.1, capsize=2.2
            )
        elif each.value is not None:
            axes.plot(x, each.value, look.marker, color=look.color, markersize=5, markerfacecolor="white")
        if each.bound is not None:
            up = 16 if each.side == "high" else -16
            axes.annotate(
                "", xy=(x, each.bound), xytext=(0, up), textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": look.color, "linewidth": 1.1},
            )  # fmt: skip
            axes.plot(x, each.bound, "_", color=look.color, markersize=7)


def save(drawn: Figure, found: LrExponents, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
