"""Table of runs -> BasinSet: loss against log2 of an axis, panels of lines with their optima."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import PARAMETERIZATIONS

from .fit import LineFit, Observed, Optimum, Regret, fit_panel
from .frames import AXES, DIVERGED, DONE, METRICS, MISSING, where


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


@dataclass(frozen=True)
class Line:
    """One line of a panel: a value of the hue axis."""

    hue: float
    points: tuple[Point, ...]
    fit: LineFit

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
    """A value of the col axis: its lines by falling hue, and the reference among them."""

    col: str
    lines: tuple[Line, ...]
    reference_hue: float | None

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
    """Everything a figure of basins shows. `fixed`: the axes that have one value, by name."""

    x: str
    hue: str
    col: str
    metric: str
    panels: tuple[Panel, ...]
    fixed: Mapping[str, Any]
    n_missing: int


def lr_basins(
    table: pd.DataFrame,
    x: str = "lr",
    hue: str = "density",
    col: str = "parameterization",
    metric: str = "train_loss",
    reference: float | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> BasinSet:
    """Return the basins of a table made by frames.frame.

    Args:
        table: one row per grid point, parameterization and seed.
        x: axis that was swept, positive; shown and fitted in log2.
        hue: axis of the lines, numeric. col: axis of the panels.
        metric: "train_loss" or "val_loss".
        reference: hue whose optimum is transferred; default: density 1, else the smallest value.
            Where no line has it, nothing is transferred.
        fixed: values of other axes to keep, where the table has several.

    Raises:
        ConfigError: an unknown axis or metric, or an axis that varies along a line.
    """
    names = {"x": x, "hue": hue, "col": col}
    for key, name in names.items():
        if name not in table.columns or name not in AXES:
            raise ConfigError(f"plot.{key}", "no such axis", value=name, allowed=AXES, nearest_to=name)
    if len(set(names.values())) < len(names):
        raise ConfigError("plot", f"x, hue and col must differ, got {x}, {hue}, {col}")
    if metric not in METRICS:
        raise ConfigError("plot.metric", "no such metric", value=metric, allowed=METRICS)
    kept = where(table, fixed or {})
    panels = []
    for value in _panel_values(kept, col):
        rows = kept[kept[col] == value]
        hues = sorted({_rounded(each) for each in rows[hue]}, reverse=True)
        usual = 1.0 if hue == "density" else min(hues)
        wanted = usual if reference is None else _rounded(reference)
        points = [_points(rows[rows[hue].map(_rounded) == each], x, hue, col, metric) for each in hues]
        fits = fit_panel([_observed(line) for line in points])
        lines = tuple(Line(each, line, fit) for each, line, fit in zip(hues, points, fits, strict=True))
        panels.append(Panel(str(value), lines, wanted if wanted in hues else None))
    others = [axis for axis in AXES if axis not in names.values()]
    single = {axis: kept[axis].iloc[0] for axis in others if kept[axis].nunique() == 1}
    return BasinSet(
        x=x,
        hue=hue,
        col=col,
        metric=metric,
        panels=tuple(panels),
        fixed={axis: getattr(value, "item", lambda v=value: v)() for axis, value in single.items()},
        n_missing=sum(p.n_missing for panel in panels for line in panel.lines for p in line.points),
    )


def _rounded(value: float) -> float:
    return float(f"{float(value):.9g}")


def _panel_values(table: pd.DataFrame, col: str) -> list[Any]:
    found = list(dict.fromkeys(table[col].tolist()))
    if col == "parameterization":
        rank = {name: index for index, name in enumerate(PARAMETERIZATIONS)}
        return sorted(found, key=lambda name: (rank.get(name, len(rank)), str(name)))
    return sorted(found)


def _points(rows: pd.DataFrame, x: str, hue: str, col: str, metric: str) -> tuple[Point, ...]:
    for axis in AXES:
        if axis not in (x, hue, col) and rows[axis].nunique() > 1:
            values = sorted(set(rows[axis].tolist()))
            raise ConfigError(
                f"where.{axis}",
                f"the line {col}={rows[col].iloc[0]} {hue}={rows[hue].iloc[0]:g} mixes several",
                value=values,
                allowed="one of them, or make it x, hue or col",
            )
    points = []
    for log2_x, group in rows.groupby(np.log2(rows[x]).round(6), sort=True):
        runs = group.drop_duplicates(["cell_id", "seed"]) if "cell_id" in group else group
        if runs["seed"].duplicated().any():
            twice = sorted(set(runs.loc[runs["seed"].duplicated(), "seed"].tolist()))
            raise ConfigError("seed", f"two different cells of one seed at {x}={2.0**log2_x:g}", value=twice)
        known = runs[metric].notna() & np.isfinite(runs[metric])
        good = runs[(runs["kind"] == DONE) & known].sort_values("seed")
        points.append(
            Point(
                log2_x=float(log2_x),
                seeds=tuple(int(seed) for seed in good["seed"]),
                losses=tuple(float(loss) for loss in good[metric]),
                n_diverged=int((runs["kind"] == DIVERGED).sum()),
                n_missing=int(((runs["kind"] == MISSING) | ((runs["kind"] == DONE) & ~known)).sum()),
            )
        )
    return tuple(points)


def _observed(points: tuple[Point, ...]) -> list[Observed]:
    return [
        Observed(point.log2_x, dict(zip(point.seeds, point.losses, strict=True)), point.n_diverged) for point in points
    ]


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
                        basins.col: panel.col,
                        basins.hue: line.hue,
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
