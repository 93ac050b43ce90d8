"""Table of runs -> which power of density the best lr goes with: lr ~ density^-a, a by density, with its interval.

Where the best lr of hidden weights moves by d octaves against the dense model's, under rules that already multiply it by
density^-r, the lr of hidden weights that is best goes as density^-a with

    a = r + d / log2(1 / density)

so SuPar's rule (r = 1) is right where a = 1, muP's (r = 0) where a = 0, and a rule with r = a would leave the optimum where it
is. ASSUMPTION: it is the hidden weights' lr that places the optimum; the lr of embedding, head and norms moves along in a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from supar_sweep.rules.hparams import Ratios
from supar_sweep.rules.parameterization import Method, multiplier

from . import style
from .basins import BasinSet, Panel, lr_basins
from .fit import Interval, Side
from .frames import check_axes, parsed, rounded
from .verdict import Shift, shift

KNOWN = ((0.0, "mup"), (0.5, "SMET"), (1.0, "supar"))
"""Exponents that somebody's rule has. Sources: SuPar table 1, hidden LR; SMET (arXiv:2606.00888), LR ~ 1/sqrt(density)."""

_ASIDE_OCTAVES = 0.1


@dataclass(frozen=True)
class Exponent:
    """a by one density. `value`, `ci`: as of the shift that it is made of; without a `ci`, `bound` with `side` may hold."""

    density: float
    value: float | None
    ci: Interval | None
    bound: float | None
    side: Side | None
    shift: Shift


@dataclass(frozen=True)
class Series:
    """One line: a value of the hue axis in one panel. `rule`: the exponent that its runs were trained with."""

    hue: str
    rule: float
    exponents: tuple[Exponent, ...]


@dataclass(frozen=True)
class LrExponents:
    """Everything the figure shows: the name and the series of each panel. `fixed`: the axes that have one value."""

    hue: str
    col: str | None
    metric: str
    panels: tuple[tuple[str, tuple[Series, ...]], ...]
    fixed: Mapping[str, Any]


def lr_exponent(
    table: pd.DataFrame,
    hue: str = "method",
    col: str | None = "parameterization",
    metric: str = "train_loss",
    reference: float | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> LrExponents:
    """Return the exponents of a table made by frames.frame.

    Args:
        table: of a grid over lr and density.
        hue: axis of the lines. col: axis of the panels; None = one panel.
        metric: "train_loss" or "val_loss".
        reference: density whose optimum is the reference; default 1.
        fixed: values of other axes to keep, where the table has several.

    Raises:
        ConfigError: an axis that does not exist, or one that varies along a line.
    """
    check_axes(table, hue=hue, col=col)
    basins = lr_basins(table, "lr", "density", col, metric, reference, fixed, row=hue)
    panels: dict[str, list[Series]] = {}
    for panel in basins.panels:
        rule = _rule(basins, panel)
        found = tuple(
            _exponent(rule, float(line.hue), float(panel.reference_hue), shift(panel, line))
            for line in panel.lines
            if panel.reference_hue is not None and line.hue != panel.reference_hue
        )
        panels.setdefault(panel.col, []).append(Series(panel.row, rule, found))
    return LrExponents(hue, col, metric, tuple((name, tuple(series)) for name, series in panels.items()), basins.fixed)


def _exponent(rule: float, density: float, reference: float, moved: Shift) -> Exponent:
    octaves = math.log2(reference / density)

    def at(shift_octaves: float | None) -> float | None:
        return None if shift_octaves is None else rule + shift_octaves / octaves

    ci = None if moved.ci is None else (rule + moved.ci[0] / octaves, rule + moved.ci[1] / octaves)
    return Exponent(density, at(moved.value), ci, at(moved.bound), moved.side, moved)


def _rule(basins: BasinSet, panel: Panel) -> float:
    """Return the power of 1/density by which the panel's rules multiply the lr of hidden weights."""
    tied = panel.lines[0].tied
    placed = {axis: parsed(shown) for axis, shown in basins.place(panel).items()}
    known = {**basins.fixed, **tied, **placed}
    method = Method(
        parameterization=known["parameterization"], lr_density_exponent=rounded(known.get("dynamic_lr_exponent"))
    )
    at_half = multiplier("lr", "hidden", method, Ratios(m_d=1.0, m_rho=0.5), in_block=True)
    assert at_half is not None
    return float(rounded(math.log2(at_half)))


def data_rows(found: LrExponents) -> list[dict[str, Any]]:
    """Return the figure's data, a row per line and density."""
    return [
        {
            **found.fixed,
            **({} if found.col is None else {found.col: name}),
            found.hue: series.hue,
            "rule_exponent": series.rule,
            "density": each.density,
            "shift_octaves": each.shift.value,
            "exponent": each.value,
            "exponent_ci_low": None if each.ci is None else each.ci[0],
            "exponent_ci_high": None if each.ci is None else each.ci[1],
            "exponent_bound": each.bound,
            "exponent_bound_side": each.side,
        }
        for name, of_panel in found.panels
        for series in of_panel
        for each in series.exponents
    ]


def draw(found: LrExponents) -> Figure:
    """Return the figure: the exponent against density, a line per value of hue; the rules that somebody has as level lines."""
    with style.look():
        n = len(found.panels)
        drawn, grid = style.panels(n, style.COLUMN_IN * (0.9 if n > 1 else 1.3), 2.9, legend_in=0.7)
        names = list(dict.fromkeys(series.hue for _, of_panel in found.panels for series in of_panel))
        looks = style.looks(found.hue, names)
        every = [each.density for _, of_panel in found.panels for series in of_panel for each in series.exponents]
        densities = sorted(set(every), reverse=True)
        for axes, (name, of_panel) in zip(grid, found.panels, strict=True):
            for level, owner in KNOWN:
                axes.axhline(level, color=style.MUTED, linewidth=0.9, dashes=(4, 3), zorder=1.5)
                axes.annotate(
                    style.title(owner), (1.0, level), xycoords=axes.get_yaxis_transform(), xytext=(-2, 2),
                    textcoords="offset points", ha="right", fontsize=7.5, color=style.MUTED,
                )  # fmt: skip
            for series in of_panel:
                aside = _ASIDE_OCTAVES * (names.index(series.hue) - (len(names) - 1) / 2)
                _series(axes, series, looks[series.hue], aside)
            axes.set_title(style.panel_title(found.col, name))
            axes.set_xlabel("Density")
            if densities:
                style.value_ticks(axes, densities)
                # from dense to sparse, with room for the names of the level lines
                axes.set_xlim(math.log2(densities[0]) + 0.5, math.log2(densities[-1]) - 1.3)
        grid[0].set_ylabel("Best learning rate ~ density$^{-a}$: a")
        style.heading(drawn, style.fixed_text(found.fixed))
        handles = [
            Line2D(
                [],
                [],
                color=looks[name].color,
                linestyle=looks[name].linestyle,
                marker=looks[name].marker,
                markersize=5,
            )
            for name in names
        ]
        style.legend(drawn, handles, [style.value_text(found.hue, name) for name in names])
    return drawn


def _series(axes: Axes, series: Series, look: style.Look, aside: float) -> None:
    known = [each for each in series.exponents if each.value is not None]
    x = [math.log2(each.density) + aside for each in known]
    axes.plot(x, [each.value for each in known], color=look.color, linestyle=look.linestyle, linewidth=1.0, alpha=0.6)  # type: ignore[arg-type]
    for each in series.exponents:
        at = math.log2(each.density) + aside
        if each.value is not None and each.ci is not None:
            error = [[each.value - each.ci[0]], [each.ci[1] - each.value]]
            axes.errorbar(
                at, each.value, yerr=error, fmt=look.marker, color=look.color, markersize=5, elinewidth=1.1, capsize=2.2
            )
        elif each.value is not None:
            axes.plot(at, each.value, look.marker, color=look.color, markersize=5, markerfacecolor="white")
        if each.bound is not None:
            axes.annotate(
                "", xy=(at, each.bound), xytext=(0, 16 if each.side == "high" else -16), textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": look.color, "linewidth": 1.1},
            )  # fmt: skip
            axes.plot(at, each.bound, "_", color=look.color, markersize=7)


def save(drawn: Figure, found: LrExponents, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
