"""CoordinateSet -> Figure: a statistic against width or density, a line per step; rows of sites, a column a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import style
from .coordinates import KINDS, CoordinatePanel, CoordinateSet, data_rows

NAMES = {
    "activation": "mean |activation|",
    "gradient": "mean |gradient to the activation|",
    "change": "mean |change of the activation by one update|",
}
ROWS = {"embedding": "Embedding", "attention": "Attention", "mlp": "MLP", "logits": "Logits"}
ANSWERS = {"pass": style.INK, "fail": "#B3261E", "undecided": style.MUTED, None: style.MUTED}
_LEAST_SPAN_OCTAVES = 2.0
"""A row shows at least so much, so that noise does not look like a trend."""


def draw(found: CoordinateSet) -> Figure:
    """Return the figure: a row per kind of site, a column per parameterization, one scale a row."""
    with style.look():
        names = list(dict.fromkeys(panel.parameterization for panel in found.panels))
        kinds = [kind for kind in KINDS if any(panel.kind == kind for panel in found.panels)]
        drawn = style.figure(max(style.COLUMN_IN * 0.8 * len(names), style.COLUMN_IN * 1.2), 1.55 * len(kinds) + 1.2)
        grid = drawn.subplots(len(kinds), len(names), sharex=True, sharey="row", squeeze=False)
        steps = sorted({trace.step for panel in found.panels for trace in panel.traces})
        colors = dict(zip(steps, style.ordered_colors(len(steps)), strict=True))
        by_place = {(panel.kind, panel.parameterization): panel for panel in found.panels}
        for row, kind in enumerate(kinds):
            for column, name in enumerate(names):
                panel = by_place.get((kind, name))
                if panel is not None:
                    _panel(grid[row, column], panel, colors)
            _limits(grid[row, 0], [by_place[kind, name] for name in names if (kind, name) in by_place])
            grid[row, 0].set_ylabel(ROWS[kind])
            grid[row, 0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
            grid[row, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.power_of_two(round(value, 6))))
        xs = sorted({x for panel in found.panels for trace in panel.traces for x in trace.x})
        for column, name in enumerate(names):
            grid[0, column].set_title(style.title(name))
            grid[-1, column].set_xlabel(style.axis_name(found.axis))
        style.value_ticks(grid[-1, 0], xs)
        if found.axis == "density":
            grid[-1, 0].invert_xaxis()
        n = style.seeds_text(found.n_seeds, found.n_seeds)
        at = style.fixed_text(found.fixed)
        threshold = found.panels[0].test.threshold
        rule = f"pass: 95% CI of the slope within \N{PLUS-MINUS SIGN}{threshold:g} of the expected one"
        style.heading(drawn, f"{NAMES[found.statistic]}, {at}, {n}, {rule}")
        shown = steps if len(steps) <= 6 else [steps[round(i * (len(steps) - 1) / 4)] for i in range(5)]
        handles = [Line2D([], [], color=colors[step]) for step in shown]
        style.legend(drawn, handles, [f"step {step}" for step in shown])
    return drawn


def _panel(axes: Axes, panel: CoordinatePanel, colors: dict[int, str]) -> None:
    for trace in panel.traces:
        x = np.log2(trace.x)
        mean = np.array(trace.mean)
        if trace.stderr is not None:
            error = np.array(trace.stderr)
            axes.fill_between(x, mean - error, mean + error, color=colors[trace.step], alpha=0.15, linewidth=0)
        axes.plot(x, mean, ".-", color=colors[trace.step], linewidth=1.1, markersize=3)
    _expected(axes, panel)
    test = panel.test
    claim = "nothing expected" if test.expected is None else f"expected {test.expected:g}: {test.answer}"
    ci = "" if test.ci is None else f" ({test.ci[0]:+.2f} to {test.ci[1]:+.2f})"
    text = f"slope {test.slope:+.2f}{ci}\n{claim}"
    axes.annotate(
        text.replace("-", "\N{MINUS SIGN}"),
        (0.03, 0.95),
        xycoords="axes fraction",
        va="top",
        fontsize=6.8,
        color=ANSWERS[test.answer],
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
        zorder=6,
    )


def _expected(axes: Axes, panel: CoordinatePanel) -> None:
    """Draw the expected slope, dashed, through the middle of the last step's line."""
    if panel.test.expected is None:
        return
    last = panel.traces[-1]
    x, mean = np.log2(last.x), np.array(last.mean)
    axes.plot(
        x, mean.mean() + panel.test.expected * (x - x.mean()), color=style.INK, linewidth=0.9, dashes=(4, 3), zorder=5
    )


def _limits(axes: Axes, panels: Sequence[CoordinatePanel]) -> None:
    values = [v for panel in panels for trace in panel.traces for v in trace.mean]
    low, high = min(values), max(values)
    spare = max(_LEAST_SPAN_OCTAVES - (high - low), 0.0) / 2
    span = high - low + 2 * spare
    axes.set_ylim(low - spare - 0.06 * span, high + spare + 0.36 * span)


def save(drawn: Figure, found: CoordinateSet, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
