"""Rows of records -> one checked pandas table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from supar_sweep.errors import ConfigError

AXES = ("parameterization", "width", "density", "n_layer", "lr", "init_std")
"""What a grid may vary, besides the seed."""

METRICS = ("train_loss", "val_loss")

REQUIRED = (*AXES, "seed", "end", *METRICS)

DONE, DIVERGED, MISSING = "done", "diverged", "missing"


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
        if isinstance(value, float):
            mask = np.isclose(column.to_numpy(dtype=float), value, rtol=1e-9, atol=0.0)
        else:
            mask = (column == value).to_numpy()
        if not mask.any():
            raise ConfigError(f"where.{name}", "no row has it", value=value, allowed=sorted(map(str, set(column))))
        kept = kept[mask[table.index.get_indexer(kept.index)]]
    return kept
