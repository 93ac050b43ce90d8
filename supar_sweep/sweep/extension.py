"""Values added to a frozen grid because an optimum lay beyond it (`run extend=true`). No torch.

What was added is kept in plan.json as values of lines, not as cells alone: every later `run` of the experiment adds them to its
own grid again, for all seeds that the line has by then. A line is known by the cells that it had when it was extended: where the
settings have changed so that none of them is in the grid any more, its values stay in plan.json and have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from supar_sweep.config.decode import decode, encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.sweep.identity import cell_id, label
from supar_sweep.sweep.submission import Plan, PlannedCell


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What would settle one line's censored optimum.

    Args:
        line: which, for people.
        axis: lr or init_std.
        values: of it, the nearest to the grid first; each is to be run with every seed of the line.
        of: ids of the line's own cells.
        why: what is known of the optimum.
    """

    line: str
    axis: str
    values: tuple[float, ...]
    of: tuple[str, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class Added:
    """A value that was added to a line: one entry of a plan's `extended`.

    Args:
        line, axis, of, why: as for `Wanted`.
        value: of the axis.
        round: in which it was added, from 1.
        n_cells: cells that it adds to the grid; 0 where another line has them too, or the grid has changed.
    """

    line: str
    axis: str
    value: float
    of: tuple[str, ...]
    why: str
    round: int
    n_cells: int = 0


@dataclass(frozen=True)
class Budget:
    """What may be added to a grid in all, over all calls; None = no bound.

    Args:
        max_cells: cells.
        max_flops: FLOPs of live weights.
    """

    max_cells: int | None
    max_flops: float | None

    def holds(self, n_cells: int, flops: float) -> bool:
        """Return whether so much is within it."""
        return (self.max_cells is None or n_cells <= self.max_cells) and (
            self.max_flops is None or flops <= self.max_flops * (1 + 1e-9)
        )


def added_of(plan: Plan) -> tuple[Added, ...]:
    """Return what was added to a plan."""
    return tuple(Added(**{**entry, "of": tuple(entry["of"])}) for entry in plan.extended)


def n_added(plan: Plan) -> int:
    """Return how many of a plan's cells were added to it."""
    return sum(entry["n_cells"] for entry in plan.extended)


def extended(own: Plan, added: Iterable[Added]) -> Plan:
    """Return a grid with values added to its lines; those that it has already, or whose line it has not, add nothing.

    Args:
        own: the grid as its settings say.
        added: in the order in which they were.
    """
    grown = _Grown(own)
    for each in added:
        grown.add(each, grown.new(each))
    return grown.plan()


def idle(plan: Plan) -> list[Added]:
    """Return those of the added values whose line the grid has not any more."""
    here = {point["cell_id"] for point in plan.points}
    return [each for each in added_of(plan) if here.isdisjoint(each.of)]


def extend(
    plan: Plan, own: Plan, wanted: Sequence[Wanted], budget: Budget, flops: Callable[[PlannedCell], float]
) -> tuple[Plan, tuple[Wanted, ...]]:
    """Return the plan with as many of the wanted values as the budget allows, and the lines that it was too small for.

    The values nearest to the grid come first, line after line, so that the lines share the budget. Where a value is beyond it,
    so are the further ones of its line: a line has no gaps.

    Args:
        plan: the grid with what was added before.
        own: the grid as its settings say.
        wanted: a line each.
        budget: for all that was ever added, that before included.
        flops: of a cell's whole run.
    """
    before = added_of(plan)
    number = 1 + max((each.round for each in before), default=0)
    grown = _Grown(own)
    for each in before:
        grown.add(each, grown.new(each))
    cost = [flops(cell) for this, cell in grown.cells.items() if this not in own.cells]
    stopped: list[Wanted] = []
    for rank in range(max((len(each.values) for each in wanted), default=0)):
        for line in wanted:
            if rank >= len(line.values) or line in stopped:
                continue
            value = line.values[rank]
            new = Added(line=line.line, axis=line.axis, value=value, of=line.of, why=line.why, round=number)
            found = grown.new(new)
            if not found:  # another line's cells, say: muP's and SuPar's at density 1 are the same
                continue
            more = [
                flops(cell)
                for cell in {cell.cell_id: cell for _, cell in found}.values()
                if cell.cell_id not in grown.cells
            ]
            if not budget.holds(len(cost) + len(more), sum(cost) + sum(more)):
                stopped.append(line)
                continue
            cost += more
            grown.add(new, found)
    return grown.plan(), tuple(stopped)


_Row = Mapping[str, Any]
_Place = tuple[str, Any, float]
"""A line, a seed, and log2 of the axis: rounded, because a value computed in two ways is one."""


class _Grown:
    """A grid that values are added to.

    Args:
        own: the grid as its settings say.
    """

    def __init__(self, own: Plan) -> None:
        self.own, self.points, self.cells = own, list(own.points), dict(own.cells)
        self._entries: list[dict[str, Any]] = []
        self._lines: dict[str, dict[str, list[_Row]]] = {}
        self._taken: dict[str, set[_Place]] = {}

    def plan(self) -> Plan:
        """Return it as a plan."""
        return replace(self.own, points=tuple(self.points), cells=self.cells, extended=tuple(self._entries))

    def new(self, each: Added) -> list[tuple[_Row, PlannedCell]]:
        """Return the points that a value adds, a row and its cell for each seed of its lines."""
        found: list[tuple[_Row, PlannedCell]] = []
        for line, rows in self._own_lines(each.axis).items():
            if not any(row["cell_id"] in each.of for row in rows):
                continue
            nearest: dict[Any, _Row] = {}
            for row in rows:
                if row["seed"] not in nearest or _octaves(row, each) < _octaves(nearest[row["seed"]], each):
                    nearest[row["seed"]] = row
            found += [
                ({**row, each.axis: each.value, "cell_id": planned.cell_id}, planned)
                for seed, row in nearest.items()
                if (line, seed, _log2(each.value)) not in self._taken[each.axis]
                for planned in [_with_value(self.own.cells[row["cell_id"]], each)]
            ]
        return found

    def add(self, each: Added, found: Iterable[tuple[_Row, PlannedCell]]) -> None:
        """Add the points of a value, by `new`."""
        n_before = len(self.cells)
        for row, planned in found:
            self.points.append(row)
            self.cells.setdefault(planned.cell_id, planned)
            self._taken[each.axis].add((_line(row, each.axis), row["seed"], _log2(row[each.axis])))
        plain = {**asdict(each), "of": list(each.of)}
        self._entries.append({**plain, "n_cells": len(self.cells) - n_before})

    def _own_lines(self, axis: str) -> Mapping[str, list[_Row]]:
        """Return the grid's own points by line."""
        if axis not in self._lines:
            lines: dict[str, list[_Row]] = {}
            for point in self.own.points:
                lines.setdefault(_line(point, axis), []).append(point)
            self._lines[axis] = lines
            self._taken[axis] = {
                (line, row["seed"], _log2(row[axis])) for line, rows in lines.items() for row in rows
            }  # fmt: skip
        return self._lines[axis]


def _line(point: _Row, axis: str) -> str:
    """Return what the points of a line have in common."""
    return repr(sorted((key, value) for key, value in point.items() if key not in (axis, "seed", "cell_id")))


def _log2(value: float) -> float:
    return round(math.log2(value), 6)


def _octaves(row: _Row, each: Added) -> float:
    return abs(math.log2(row[each.axis] / each.value))


def _with_value(like: PlannedCell, each: Added) -> PlannedCell:
    """Return a cell that differs from another in one value alone."""
    cell = decode(CellConfig, like.cell)
    cell = replace(cell, hparams=replace(cell.hparams, **{each.axis: each.value}))
    return PlannedCell(
        cell_id=cell_id(cell, like.fingerprint), label=label(cell), fingerprint=like.fingerprint, cell=encode(cell)
    )
