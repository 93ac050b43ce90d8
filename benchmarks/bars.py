"""What the benchmarks must reach, and whether they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bar:
    """One number to reach.

    Args:
        part: the benchmark: a, b or d.
        claim: what is compared.
        value: rows of the part's table -> the number; None where these rows were not measured.
        bar: what it must reach.
        aim: what it should, or None.
        at_most: the number must not exceed the bar, rather than reach it.
    """

    part: str
    claim: str
    value: Callable[[Rows], float | None]
    bar: float
    aim: float | None = None
    at_most: bool = False


def least(key: str, **where: Any) -> Callable[[Rows], float | None]:
    """Return what finds the smallest number `key` of the rows with these values."""

    def value(rows: Rows) -> float | None:
        found = [float(row[key]) for row in rows if all(row[name] == wanted for name, wanted in where.items())]
        return min(found, default=None)

    return value


BARS = (
    Bar("a", "dense, 1 thread, every width and density: step time", least("dense_x", threads=1), 1.8),
    Bar("a", "auto, 1 thread, width 1024 at 1/16: step time", least("auto_x", threads=1, width=1024, one_in=16), 3.5),
    Bar("a", "auto, 1 thread, width 2048 at 1/64: step time", least("auto_x", threads=1, width=2048, one_in=64), 8),
    Bar("a", "auto, width 2048 at 1/64: sparse layers' state", least("state_x", threads=1, width=2048, one_in=64), 20),
    Bar("b", "whole grid, width 256: wall time", least("x", width=256), 3.5, aim=5),
    Bar("b", "whole grid, width 64: wall time", least("x", width=64), 6, aim=10),
    Bar(
        "d",
        "sparse layers' state, width 4096 at 1/256 over width 256 dense",
        least("state_x", width=4096, one_in=256),
        1.5,
        at_most=True,
    ),
)
"""All but the last: the reference as shipped over ours."""


def verdicts(tables: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Return a row for each bar of the benchmarks that were run; `met` is None where its rows were not measured.

    Args:
        tables: benchmark -> rows of its table (of a the ratios).
    """
    rows = []
    for bar in BARS:
        if bar.part not in tables:
            continue
        value = bar.value(tables[bar.part])
        met = None if value is None else (value <= bar.bar if bar.at_most else value >= bar.bar)
        sign = "<=" if bar.at_most else ">="
        row = {"benchmark": bar.part, "claim": bar.claim, "value": value, "bar": f"{sign} {bar.bar:g}"}
        rows.append({**row, "aim": bar.aim, "met": met})
    return rows
