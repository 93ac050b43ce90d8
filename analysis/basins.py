"""Table of runs -> BasinSet: loss against log2 of an axis, panels of lines with their optima."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from supar_sweep.errors import ConfigError

from .fit import LineFit, Optimum, Regret, fit_panel
from .frames import (
    DIVERGED,
    DONE,
    check_axes,
    check_metric,
    having,
    one_run_a_seed,
    panels_of,
    parts,
    refuse_mixed,
    rounded,
    single_values,
    telling,
    text,
    values_of,
    where,
)
from .observed import Observed


@dataclass(frozen=True)
class Point:
    """All seeds of one line at one x.

    `mean`, `stderr` are over the seeds that have a loss: None without any, without two.
    """

    log2_x: float
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    n_diverged: int
    n_missing: int

    @property
    def mean(self) -> float | None:
        """Mean loss over the seeds that have one."""
        return float(np.mean(self.losses)) if self.losses else None

    @property
    def stderr(self) -> float | None:
        """Standard error over seeds (of the plain mean, so with the seeds' shared offsets)."""
        n = len(self.losses)
        return float(np.std(self.losses, ddof=1)) / math.sqrt(n) if n > 1 else None

    @property
    def eligible(self) -> bool:
        """Whether the optimum may lie here."""
        return self.n_diverged == 0 and bool(self.losses)

    @property
    def observed(self) -> Observed:
        """The point as the fit takes it."""
        return Observed(self.log2_x, dict(zip(self.seeds, self.losses, strict=True)), self.n_diverged)


@dataclass(frozen=True)
class Line:
    """One line of a panel: a value of the hue axis. `tied`: the axes that go with it (iso-parameter: its width)."""

    hue: float | str
    points: tuple[Point, ...]
    fit: LineFit
    tied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def optimum(self) -> Optimum:
        """Where the line is lowest."""
        return self.fit.optimum

    @property
    def n_seeds(self) -> int:
        """Number of seeds with data (a loss or a divergence) at the best-covered x."""
        return max((len(point.losses) + point.n_diverged for point in self.points), default=0)


@dataclass(frozen=True)
class Panel:
    """A value of the col axis, and of the row axis: its lines by falling hue, and the reference among them."""

    col: str
    lines: tuple[Line, ...]
    reference_hue: float | str | None
    row: str = ""

    @property
    def reference(self) -> Line | None:
        """The line whose optimum is transferred to the others."""
        return next((line for line in self.lines if line.hue == self.reference_hue), None)

    @property
    def transferred(self) -> Optimum | None:
        """The reference's optimum; None if there is no such line, or it is censored."""
        line = self.reference
        return None if line is None or line.optimum.x is None else line.optimum

    def regret(self, line: Line) -> Regret:
        """Return the regret of the transferred value on `line`."""
        if self.transferred is None or self.transferred.x is None:
            return Regret(None, None, reason="the reference has no optimum to transfer")
        if line.hue == self.reference_hue:
            return Regret(0.0, 0.0)
        return line.fit.regret(self.transferred.x, self.transferred.ci)


@dataclass(frozen=True)
class BasinSet:
    """Everything a figure of basins shows: panels row by row. `fixed`: the axes that have one value, by name."""

    x: str
    hue: str
    col: str | None
    metric: str
    panels: tuple[Panel, ...]
    fixed: Mapping[str, Any]
    n_missing: int
    row: str | None = None

    def place(self, panel: Panel) -> dict[str, str]:
        """Return where one of the panels stands: the row and col axes, those that there are, each with its value as text."""
        placed = ((self.row, panel.row), (self.col, panel.col))
        return {axis: value for axis, value in placed if axis is not None}


def lr_basins(
    table: pd.DataFrame,
    x: str = "lr",
    hue: str = "density",
    col: str | None = "parameterization",
    metric: str = "train_loss",
    reference: float | None = None,
    fixed: Mapping[str, Any] | None = None,
    row: str | None = None,
) -> BasinSet:
    """Return the basins of a table made by frames.frame: over lr, or over any other axis that was swept (init_std).

    Args:
        table: one row per grid point, parameterization and seed.
        x: axis that was swept, positive; shown and fitted in log2.
        hue: axis of the lines. col: axis of the panels; None = one panel.
        metric: "train_loss" or "val_loss".
        reference: hue whose optimum is transferred; default: density 1, else the smallest value.
            Where no line has it, nothing is transferred; nor where the lines are named, not numbered.
        fixed: values of other axes to keep, where the table has several.
        row: axis of the rows of panels; None = one row. A row need not have all the panels of another.

    Raises:
        ConfigError: an unknown axis or metric, or an axis that varies along a line.
    """
    check_axes(table, x=x, hue=hue, col=col, row=row)
    check_metric(metric)
    kept = where(table, fixed or {})
    if not (pd.to_numeric(kept[x], errors="coerce") > 0).all():
        raise ConfigError("x", "is fitted in log2, so it must be positive numbers", value=x)
    axes = (x, hue, col, row)
    common = single_values(kept, but=axes)
    panels = []
    placed = ((above, name, rows) for above, of_row in panels_of(kept, row) for name, rows in panels_of(of_row, col))
    for above, name, rows in placed:
        hues = values_of(rows, hue)[::-1] if _numbered(rows, hue) else values_of(rows, hue)
        usual = 1.0 if hue == "density" else min(hues) if _numbered(rows, hue) else None
        wanted = usual if reference is None else rounded(reference)
        of_line = [having(rows, hue, each) for each in hues]
        for line in of_line:
            named = [axis for axis in (row, col, hue) if axis is not None]
            shown = " ".join(f"{axis}={text(rounded(line[axis].iloc[0]))}" for axis in named)
            refuse_mixed(line, f"the line {shown}", (), [x, *named])
        points = [points_of(line, x, metric) for line in of_line]
        tied = [
            {axis: v for axis, v in single_values(line, but=axes).items() if axis not in common} for line in of_line
        ]
        fits = fit_panel([[point.observed for point in line] for line in points])
        lines = tuple(map(Line, hues, points, fits, tied))
        panels.append(Panel(name, lines, wanted if wanted in hues else None, above))
    return BasinSet(
        x=x,
        hue=hue,
        col=col,
        metric=metric,
        panels=tuple(panels),
        fixed=common,
        n_missing=sum(p.n_missing for panel in panels for line in panel.lines for p in line.points),
        row=row,
    )


def basin_sets(
    table: pd.DataFrame,
    metric: str = "train_loss",
    x: str = "lr",
    hue: str = "density",
    col: str | None = "parameterization",
    fixed: Mapping[str, Any] | None = None,
    reference: float | None = None,
    row: str | None = None,
) -> list[BasinSet]:
    """Return the basins of every part of a table that is a figure of its own (each width, say), ascending.

    Args:
        table, metric, x, hue, col, fixed, reference, row: as for `lr_basins`.
    """
    check_axes(table, x=x, hue=hue, col=col, row=row)
    kept = where(table, fixed or {})
    return [
        lr_basins(table, x, hue, col, metric, reference, {**(fixed or {}), **part}, row)
        for part in parts(kept, (hue, col, row), (x,))
    ]


def told_apart(each: BasinSet, sets: Sequence[BasinSet]) -> dict[str, Any]:
    """Return what tells a figure from the others of `basin_sets`: axis -> its value."""
    return {axis: each.fixed[axis] for axis in telling(other.fixed for other in sets)}


def _numbered(rows: pd.DataFrame, axis: str) -> bool:
    return all(isinstance(value, float) for value in values_of(rows, axis))


def points_of(rows: pd.DataFrame, x: str, metric: str) -> tuple[Point, ...]:
    """Return the points of one line by rising x.

    Args:
        rows: of one line: no axis but x has several values.
        x: axis of positive numbers. metric: "train_loss" or "val_loss".

    Raises:
        ConfigError: two different cells of one seed at a point.
    """
    log2_x = np.log2(rows[x].to_numpy(dtype=float)).round(6)
    at = pd.Series(log2_x, index=rows.index)
    if "cell_id" in rows:
        kept = ~pd.concat([at, rows[["cell_id", "seed"]]], axis=1).duplicated()
        rows, at = rows[kept], at[kept]
    for twice in at[pd.concat([at, rows["seed"]], axis=1).duplicated()]:
        one_run_a_seed(rows[at == twice], f"{x}={2.0**twice:g}")
    # thousands of points would take pandas seconds
    runs: dict[float, list[tuple[int, str, float]]] = {}
    columns = (at, rows["seed"], rows["kind"], rows[metric])
    for place, seed, kind, loss in zip(*(column.tolist() for column in columns), strict=True):
        runs.setdefault(place, []).append((int(seed), kind, loss))
    points = []
    for place, members in sorted(runs.items()):
        good = sorted((seed, loss) for seed, kind, loss in members if kind == DONE and math.isfinite(loss))
        n_diverged = sum(kind == DIVERGED for _, kind, _ in members)
        points.append(
            Point(
                log2_x=place,
                seeds=tuple(seed for seed, _ in good),
                losses=tuple(loss for _, loss in good),
                n_diverged=n_diverged,
                n_missing=len(members) - len(good) - n_diverged,
            )
        )
    return tuple(points)


def data_rows(basins: BasinSet) -> list[dict[str, Any]]:
    """Return the figure's data, a row per point (the CSV beside the figure)."""
    rows = []
    for panel in basins.panels:
        for line in panel.lines:
            best = line.optimum
            for point in line.points:
                rows.append(
                    {
                        **basins.fixed,
                        **basins.place(panel),
                        basins.hue: line.hue,
                        **line.tied,
                        basins.x: 2.0**point.log2_x,
                        f"log2_{basins.x}": point.log2_x,
                        f"mean_{basins.metric}": point.mean,
                        "stderr": point.stderr,
                        "n_seeds": len(point.losses),
                        "n_diverged": point.n_diverged,
                        "n_missing": point.n_missing,
                        "by_seed": " ".join(
                            f"{seed}:{loss!r}" for seed, loss in zip(point.seeds, point.losses, strict=True)
                        ),
                        "optimum_status": best.status,
                        "optimum_log2": best.x,
                        "optimum_ci_low": None if best.ci is None else best.ci[0],
                        "optimum_ci_high": None if best.ci is None else best.ci[1],
                    }
                )
    return rows
