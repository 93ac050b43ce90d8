"""`supar-sweep plan | run | status | cancel`: one grid, from its cost to its completion."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from supar_sweep.cli.extend import Extension
from supar_sweep.cli.launch import (
    Grid,
    experiment_of,
    flops,
    freeze,
    launcher_config,
    make_launcher,
    price,
    shape_key,
    with_threads,
)
from supar_sweep.cli.leave import leaves_jobs
from supar_sweep.cli.main import INTERRUPTED
from supar_sweep.cli.output import emit, say
from supar_sweep.cli.progress import Live, duration
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import FIGURE, Settings
from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.complete import Summary, complete
from supar_sweep.sweep.extension import idle, n_added
from supar_sweep.sweep.handover import hand_over
from supar_sweep.sweep.jobs import Launcher
from supar_sweep.sweep.status import STATES, CellState, first_errors, states, status_counts
from supar_sweep.sweep.submission import Plan
from supar_sweep.training.cost import count_parameters, memory_gb

INCOMPLETE = 1

METRICS_LINE_BYTES = 150
CELL_OVERHEAD_BYTES = 12_000
"""ASSUMPTION: what a cell's files take besides its metrics, in file system blocks."""


def plan(settings: Settings) -> int:
    """Print which cells the grid has, what they cost, what is done; nothing is started."""
    grid = freeze(settings)
    say_idle(grid)
    found = states(experiment_of(settings), grid.plan)
    counts = Counter(state.state for state in found.values())
    left = {this: cell for this, cell in grid.cells.items() if not found[this].complete}
    rows = _shape_rows(grid.cells, left)
    total = {
        "experiment": settings.experiment,
        "points": len(grid.plan.points),
        "cells": len(grid.cells),
        "extended": n_added(grid.plan),
        "states": {state: counts[state] for state in STATES if counts[state]},
        "flops": sum(row["flops"] for row in rows),
        "flops_left": sum(row["flops_left"] for row in rows),
        "flops_left_dense": sum(row["flops_left_dense"] for row in rows),
        "peak_memory_gb": max(row["memory_gb"] for row in rows),
        "records_gb": sum(map(_record_bytes, grid.cells.values())) / 1e9,
    }
    if settings.format == "json":
        _write_json({**total, "shapes": rows})
        return 0
    emit(rows, _PLAN_COLUMNS, settings.format, title=_plan_title(total))
    return 0


_PLAN_COLUMNS = {
    "width": "width",
    "n_layer": "n_layer",
    "density": "density",
    "steps": "steps",
    "cells": "cells",
    "left": "left",
    "parameters": "parameters",
    "live": "live",
    "memory_gb": "GB dense",
    "compact_memory_gb": "GB compact",
    "flops": "FLOPs",
    "flops_left": "FLOPs left",
    "flops_left_dense": "dense left",
}


def _plan_title(total: Mapping[str, Any]) -> str:
    by_state = ", ".join(f"{n} {state}" for state, n in total["states"].items())
    more = f", {total['extended']} of them by extend" if total["extended"] else ""
    return (
        f"{total['experiment']}: {total['points']} points, {total['cells']} cells{more} ({by_state}); "
        f"{total['flops']:.3g} FLOPs of live weights, {total['flops_left']:.3g} left "
        f"({total['flops_left_dense']:.3g} if every layer is computed dense); "
        f"records {total['records_gb']:.3g} GB"
    )


def _shape_rows(cells: Mapping[str, CellConfig], left: Mapping[str, CellConfig]) -> list[dict[str, Any]]:
    """Return one row a shape: how many cells, what they cost."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for this, cell in cells.items():
        groups.setdefault(shape_key(cell), []).append(this)
    rows = []
    for members in groups.values():
        cell = cells[members[0]]
        n_left = sum(this in left for this in members)
        count = count_parameters(cell)
        rows.append(
            {
                "width": cell.model.width,
                "n_layer": cell.model.n_layer,
                "density": cell.density,
                "steps": cell.train.steps,
                "cells": len(members),
                "left": n_left,
                "parameters": count.total,
                "live": count.live,
                "memory_gb": memory_gb(cell),
                "compact_memory_gb": memory_gb(cell, compact=True),
                "flops": len(members) * flops(cell),
                "flops_left": n_left * flops(cell),
                "flops_left_dense": n_left * flops(cell, dense_compute=True),
            }
        )
    return rows


def _record_bytes(cell: CellConfig) -> float:
    return CELL_OVERHEAD_BYTES + METRICS_LINE_BYTES * cell.train.steps


def run(settings: Settings) -> int:
    """Make the grid complete, with extend=true larger first where an optimum lies beyond it; return 0 when every cell is,
    1 when not, 130 after Ctrl-C.
    """
    extension = Extension.asked(settings)
    grid = freeze(settings)
    say_idle(grid)
    if not getattr(launcher_config(settings), "wait", True):
        settings, grid = _threaded(settings, grid)
        with make_launcher(settings) as launcher:
            return submit(settings, grid, launcher)
    summary = first = _complete(settings, grid)
    wall_s = first.wall_s
    while extension and not summary.interrupted and (larger := extension.next(grid)):
        grid = larger
        summary = _complete(settings, grid)
        wall_s += summary.wall_s
    row = {"experiment": settings.experiment, **summary.counts, "skipped": first.skipped}
    row |= {"extended": n_added(grid.plan)} if extension else {}
    row |= {"held": summary.held, "wall_s": round(wall_s, 1)}
    if settings.format == "json":
        _write_json({**row, "interrupted": summary.interrupted, "complete": summary.complete})
    else:
        emit([row], format=settings.format)
    return exit_code(summary)


def _threaded(settings: Settings, grid: Grid) -> tuple[Settings, Grid]:
    """Return both with as many threads a process as the cells that are left can use."""
    found = states(experiment_of(settings), grid.plan)
    settings = with_threads(settings, [cell for this, cell in grid.cells.items() if not found[this].complete])
    return settings, replace(grid, plan=replace(grid.plan, runtime=encode(settings.runtime())))


def _complete(settings: Settings, grid: Grid) -> Summary:
    settings, grid = _threaded(settings, grid)
    with make_launcher(settings) as launcher:
        return train(settings, grid, launcher)


def say_idle(grid: Grid) -> None:
    """Say which of the values that were added to the grid have no effect, because its settings have changed since."""
    if found := idle(grid.plan):
        lines = ", ".join(dict.fromkeys(each.line for each in found))
        say(f"note: {len(found)} values that extend=true added are of lines that this grid has not: {lines}")


def submit(settings: Settings, grid: Grid, launcher: Any) -> int:
    """Hand the grid to a queue that goes on without us; return 0, or 1 where it refused cells."""
    price_of = price(settings, launcher)
    said = hand_over(
        experiment_of(settings),
        grid.plan,
        launcher,
        price=lambda planned: price_of(grid.cells[planned.cell_id]),
    )
    row = {"experiment": settings.experiment, "n": len(grid.cells), **said._asdict(), "refused": len(said.refused)}
    if settings.format == "json":
        _write_json(row)
    else:
        emit([row], format=settings.format)
    for reason in dict.fromkeys(said.refused.values()):
        say(reason)
    if said.held:
        say(
            f"{said.held} cells wait until the queue takes them: the same command submits them, launcher.wait=true by itself"
        )
    return INCOMPLETE if said.refused else 0


def run_grid(settings: Settings, launcher: Launcher) -> int:
    """Make the grid complete with a launcher that stays open; return the exit code of `run`."""
    return exit_code(train(settings, freeze(settings), launcher))


def train(settings: Settings, grid: Grid, launcher: Launcher) -> Summary:
    """Return what came of the grid. Progress, troubles and where the records are go to stderr."""
    say(f"{settings.experiment}: {len(grid.plan.points)} points, {len(grid.cells)} cells")
    experiment = experiment_of(settings)
    price_of = price(settings, launcher)
    with Live(settings.experiment) as progress:
        summary = complete(
            experiment,
            grid.plan,
            launcher,
            price=lambda planned: price_of(grid.cells[planned.cell_id]),
            progress=progress,
            leave=lambda interrupts: launcher.name != "local" and leaves_jobs(interrupts, progress),
        )
    for trouble in summary.troubles:
        log = f" (see {trouble.log})" if trouble.log else ""
        say(f"{trouble.n} {trouble.end}, first {trouble.cell}: {trouble.message}{log}")
    if summary.complete:
        say(f"complete in {duration(summary.wall_s)}; records in {settings.runs_dir / 'cells'}")
    elif summary.left:
        say(
            f"interrupted; {summary.left} cells go on in the queue: "
            "the same command follows them, supar-sweep cancel ends them"
        )
    elif summary.interrupted:
        say("interrupted; the same command continues")
    else:
        say("incomplete; the same command tries again what failed")
    return summary


def exit_code(summary: Summary) -> int:
    """Return 0 where every cell is complete, 130 after Ctrl-C, else 1."""
    if summary.complete:
        return 0
    return INTERRUPTED if summary.interrupted else INCOMPLETE


def status(settings: Settings) -> int:
    """Print the grid's cells by state, grouped by its axes, with the first errors; return 0."""
    experiment = experiment_of(settings)
    frozen = experiment.plan()
    note_unread(settings)
    found = with_queue(settings, states(experiment, frozen))
    groups = status_counts(frozen, found, by=_group_by(settings, frozen))
    [total] = status_counts(frozen, found)
    errors = first_errors(frozen, found)
    runner = experiment.runner()
    if settings.format == "json":
        running = str(runner) if runner else None
        _write_json(
            {
                "experiment": settings.experiment,
                "runner": running,
                "total": total,
                "groups": groups,
                "errors": errors,
            }
        )
        return 0
    shown = [state for state in STATES if total[state]]
    axes = [key for key in groups[0] if key not in (*STATES, "n")] if groups else []
    by_state = ", ".join(f"{total[state]} {state}" for state in shown)
    who = f"; run by {runner}" if runner else "; no run is working on it"
    more = f" ({n_added(frozen)} by extend)" if n_added(frozen) else ""
    title = f"{settings.experiment}: {total['n']} cells{more}: {by_state}{who}"
    emit(groups, [*axes, "n", *shown], settings.format, title=title)
    for row in errors:
        log = f" (see {row['log']})" if row["log"] else ""
        say(f"{row['n']} {row['state']}, first {row['cell']}: {row['message']}{log}")
    return 0


def with_queue(settings: Settings, found: Mapping[str, CellState]) -> dict[str, CellState]:
    """Return the states, with pending, held or running for what is neither complete nor at work and is in SLURM's queue."""
    queued = (
        room("launchers.slurm_follow").states_in_queue(settings.runs_dir / "slurm") if slurm_was_used(settings) else {}
    )
    return {
        this: state if state.complete or state.state == "running" or this not in queued else CellState(queued[this])
        for this, state in found.items()
    }


def slurm_was_used(settings: Settings) -> bool:
    """Return whether arrays were ever submitted from this runs folder."""
    return (settings.runs_dir / "slurm").is_dir()


def _group_by(settings: Settings, frozen: Plan) -> Sequence[str]:
    """Return the columns to group by: those asked for, or every axis that varies but the seed."""
    asked = settings.plain.get("by")
    known = [key for key in frozen.points[0] if key != "cell_id"] if frozen.points else []
    if asked is None:
        first = ("parameterization", "width", "n_layer", "density", "lr")
        ordered = [*(key for key in first if key in known), *(k for k in known if k not in first)]
        values = {key: {repr(row.get(key)) for row in frozen.points} for key in ordered}
        return [key for key in ordered if len(values[key]) > 1 and key != "seed"]
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in known:
            raise ConfigError("by", "is no column of this grid", value=name, allowed=known, nearest_to=str(name))
    return names


def note_unread(settings: Settings) -> None:
    """Say which of the user's settings play no part, because `run` has frozen the grid."""
    read = ("experiment", "experiment.name", "scale", "runs_dir", "format", "by")
    idle = [key for key in settings.given() if key not in read and key.partition(".")[0] not in FIGURE]
    if idle:
        say(
            f"note: {settings.command} reads the grid as `run` froze it; "
            f"no effect here: {', '.join(dict.fromkeys(idle))}"
        )


def cancel(settings: Settings) -> int:
    """Ask the grid's `run` to stop, as Ctrl-C does there; return 0."""
    experiment = experiment_of(settings)
    if experiment.runner() is None and slurm_was_used(settings):
        cells = experiment.plan().cells
        n = room("launchers.slurm_follow").cancel(settings.runs_dir / "slurm", cells.keys())
        note_unread(settings)
        say(f"{settings.experiment}: {n} elements cancelled; cells at work save and end, `run` continues them")
        return 0
    holder = experiment.cancel()
    note_unread(settings)
    say(f"{settings.experiment}: asked {holder} to stop; cells save and end, `run` continues them")
    return 0


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
