"""Rows of records -> one checked pandas table; its axes by name; its parts, one for each figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from supar_sweep.errors import ConfigError
from supar_sweep.rules.mask_schedule import DYNAMIC_METHODS
from supar_sweep.rules.parameterization import PARAMETERIZATIONS

AXES = ("parameterization", "width", "density", "n_layer", "lr", "init_std")
"""What every row has a value of, besides the seed. A grid's further axes are columns of their own."""

SWEPT = ("lr", "init_std")
"""Axes along which a line has an optimum that may be transferred, the usual one first."""

METRICS = ("train_loss", "val_loss")

REQUIRED = (*AXES, "seed", "end", *METRICS)

DONE, DIVERGED, MISSING = "done", "diverged", "missing"

NO_AXES = frozenset({*METRICS, "seed", "cell_id", "end", "kind", "last_finite_loss", "live_parameters", "curve"})
"""Columns that are results or names."""


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one table row per grid point, parameterization and seed.

    `end` keeps its value; `kind` is added: "done" (it has a result), "diverged" (data too), or
    "missing" (anything else: running, failed, stale, never started).

    Args:
        rows: plain dicts with the keys of `REQUIRED`; others are kept.

    Raises:
        ConfigError: no rows, a row without a required key, or an lr, density or init_std that is not positive.
    """
    listed = [dict(row) for row in rows]
    if not listed:
        raise ConfigError("records", "there is nothing to analyse: no rows")
    for row in listed:
        absent = [name for name in REQUIRED if name not in row]
        if absent:
            raise ConfigError("records", f"a row lacks {', '.join(absent)}", allowed=REQUIRED)
        for name in ("lr", "density", "init_std"):
            value = float(row[name])
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(name, "a row holds no positive number", value=row[name])
    table = pd.DataFrame(listed)
    for name in METRICS:
        table[name] = pd.to_numeric(table[name], errors="coerce")
    known = np.where(table["end"].isin([DONE, DIVERGED]), table["end"], MISSING)
    table["kind"] = known
    return table


def where(table: pd.DataFrame, fixed: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows whose columns have the given values (floats compared to 1e-9 relative).

    Raises:
        ConfigError: a column that does not exist, or a value that no row has.
    """
    kept = table
    for name, value in fixed.items():
        if name not in table.columns:
            raise ConfigError(f"where.{name}", "no such column", allowed=sorted(table.columns), nearest_to=name)
        column = table[name]
        if value is None or value != value:  # pandas writes null as NaN
            mask = column.isna().to_numpy()
        elif isinstance(value, float):
            numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
            mask = np.isclose(numbers, value, rtol=1e-9, atol=0.0)
        else:
            mask = (column == value).to_numpy()
        if not mask.any():
            raise ConfigError(f"where.{name}", "no row has it", value=value, allowed=sorted(map(str, set(column))))
        kept = kept[mask[table.index.get_indexer(kept.index)]]
    return kept


def axes_of(table: pd.DataFrame) -> tuple[str, ...]:
    """Return the axes of a table by name: AXES, then whatever else its grid varied."""
    return (*AXES, *sorted(str(name) for name in table.columns if name not in NO_AXES and name not in AXES))


def check_axes(table: pd.DataFrame, **names: str | None) -> None:
    """Check that the axes of a figure exist and differ.

    Args:
        table: made by `frame`.
        names: what the axis is for (x, hue, col) -> its name; None = not used.

    Raises:
        ConfigError: an axis that is none (the valid ones are listed), or one named twice.
    """
    allowed = axes_of(table)
    for key, name in names.items():
        if name is not None and name not in allowed:
            raise ConfigError(key, "no such axis", value=name, allowed=allowed, nearest_to=str(name))
    used = [name for name in names.values() if name is not None]
    if len(set(used)) < len(used):
        shown = ", ".join(f"{key}={name}" for key, name in names.items())
        raise ConfigError("x", f"all axes of a figure must differ, got {shown}", allowed=allowed)


def check_metric(metric: str) -> None:
    """Raise ConfigError where `metric` is no loss of a record."""
    if metric not in METRICS:
        raise ConfigError("metric", "no such metric", value=metric, allowed=METRICS, nearest_to=metric)


def rounded(value: Any) -> Any:
    """Return a number with nine digits, so that values computed in two ways are one; anything else as it is.

    Null is None, also where pandas writes NaN.
    """
    if isinstance(value, bool | str) or value is None:
        return value
    return None if value != value else float(f"{float(value):.9g}")


def values_of(table: pd.DataFrame, axis: str) -> list[Any]:
    """Return an axis' distinct values in order: parameterizations as in the rule table, methods from static masks to gmp,
    numbers and text rising.
    """
    found = list(dict.fromkeys(rounded(value) for value in table[axis].tolist()))
    if axis == "parameterization":
        return sorted(found, key=in_rule_table)
    if axis == "method":
        known = ("static", *DYNAMIC_METHODS)
        return sorted(found, key=lambda value: known.index(value) if value in known else len(known))
    return sorted(
        found, key=lambda value: (not isinstance(value, float), value if isinstance(value, float) else str(value))
    )


def in_rule_table(name: Any) -> tuple[int, str]:
    """Return the key that sorts parameterizations as the rule table lists them, unknown ones behind."""
    known = name in PARAMETERIZATIONS
    return PARAMETERIZATIONS.index(name) if known else len(PARAMETERIZATIONS), str(name)


def having(table: pd.DataFrame, axis: str | None, value: Any) -> pd.DataFrame:
    """Return the rows whose axis has the (rounded) value, None for null; all of them where the axis is None."""
    if axis is None:
        return table
    return table[table[axis].isna() if value is None else table[axis].map(rounded) == value]


def panels_of(table: pd.DataFrame, col: str | None) -> list[tuple[str, pd.DataFrame]]:
    """Return the panels along one axis: its value as text, and its rows; one panel named "" where the axis is None.

    In the axis' order, densities from dense to sparse.
    """
    if col is None:
        return [("", table)]
    ordered = values_of(table, col)
    return [(text(value), having(table, col, value)) for value in (ordered[::-1] if col == "density" else ordered)]


def text(value: Any) -> str:
    """Return a value of an axis as plain text: 0.25, 256, sp, null."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def parsed(shown: str) -> Any:
    """Return the value of an axis from its `text`."""
    try:
        return None if shown == text(None) else float(shown)
    except ValueError:
        return shown


def parts(table: pd.DataFrame, within: Sequence[str | None], swept: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return what tells the figures of a table apart: one {axis: value, ...} for each, [{}] for one figure.

    An axis tells figures apart where it has several values among rows that agree in all of `within`. One that goes with
    another (width with density, in an iso-parameter grid) does not.

    Args:
        table: made by `frame`.
        within: the figure's axes, without the one it sweeps; None = not used.
        swept: further axes that a figure may hold all values of.
    """
    apart = varied(table, within, swept)
    if not apart:
        return [{}]
    found = table[apart].drop_duplicates().sort_values(apart)
    return [dict(zip(apart, (_plain(v) for v in row), strict=True)) for row in found.itertuples(index=False)]


def varied(table: pd.DataFrame, within: Sequence[str | None], swept: Sequence[str] = ()) -> list[str]:
    """Return the axes that have several values among rows that agree in all of `within`.

    Args:
        table, within, swept: as for `parts`.
    """
    names = [name for name in within if name is not None]
    key = [table[name].map(rounded) for name in names]
    found = []
    for axis in axes_of(table):
        if axis in names or axis in swept:
            continue
        column = table[axis].map(rounded)
        if (column.groupby(key).nunique(dropna=False).max() if key else column.nunique(dropna=False)) > 1:
            found.append(axis)
    return found


def telling(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the axes in which things differ, without what goes with another: a grid's drop_fraction, which follows its method.

    Args:
        settings: each thing's axes, by name; a missing one is null.
    """
    listed = list(settings)
    names = dict.fromkeys(axis for each in listed for axis in each)
    values = {axis: [text(rounded(each.get(axis))) for each in listed] for axis in names}
    apart = [axis for axis in names if len(set(values[axis])) > 1]
    kept = [axis for axis in apart if axis in AXES]
    # one that is null for some is a setting of the others alone, so what it goes with is named instead
    further = [axis for axis in apart if axis not in AXES]
    for axis in sorted(further, key=lambda name: (text(None) in values[name], -len(set(values[name])))):
        if all(len(set(zip(values[other], values[axis], strict=True))) > len(set(values[other])) for other in kept):
            kept.append(axis)
    return [axis for axis in apart if axis in kept]


def refuse_mixed(table: pd.DataFrame, what: str, within: Sequence[str | None], swept: Sequence[str] = ()) -> None:
    """Raise ConfigError where one thing of a figure, a line or a point, would hold several values of an axis.

    Args:
        table, within, swept: as for `parts`.
        what: the thing, for the error.
    """
    if mixed := varied(table, within, swept):
        raise ConfigError(
            f"where.{mixed[0]}",
            f"{what} mixes several",
            value=values_of(table, mixed[0]),
            allowed="one of them, or make it an axis of the figure",
        )


def single_values(rows: pd.DataFrame, but: Sequence[str | None]) -> dict[str, Any]:
    """Return the axes that have one value in these rows, those in `but` left out: name -> value."""
    return {
        axis: _plain(rows[axis].iloc[0])
        for axis in axes_of(rows)
        if axis not in but and len(rows) and rows[axis].map(rounded).nunique(dropna=False) == 1
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def one_run_a_seed(rows: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the rows of one point with each cell once.

    Args:
        rows: of one point of a figure.
        where: the point, for the error.

    Raises:
        ConfigError: two different cells of one seed.
    """
    runs = rows.drop_duplicates(["cell_id", "seed"]) if "cell_id" in rows else rows
    if runs["seed"].duplicated().any():
        twice = sorted(set(runs.loc[runs["seed"].duplicated(), "seed"].tolist()))
        raise ConfigError("seed", f"two different cells of one seed at {where}", value=twice)
    return runs
