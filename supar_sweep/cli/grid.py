"""`supar-sweep run | cancel`: one grid to its completion, or to a stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from supar_sweep.cli.extend import Extension, say_idle
from supar_sweep.cli.launch import (
    Grid,
    experiment_of,
    freeze,
    launcher_config,
    make_launcher,
    price,
    say_other_optimizer,
    with_threads,
)
from supar_sweep.cli.leave import leaves_jobs
from supar_sweep.cli.logs import find_cell
from supar_sweep.cli.main import INTERRUPTED
from supar_sweep.cli.output import emit, say, write_json
from supar_sweep.cli.plot import check_drawn
from supar_sweep.cli.progress import Live, duration
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import Settings
from supar_sweep.cli.status import note_unread, slurm_was_used
from supar_sweep.cli.transfer import say_few_live
from supar_sweep.config.decode import encode
from supar_sweep.errors import ConfigError, SuparError
from supar_sweep.sweep.complete import Summary, complete
from supar_sweep.sweep.extension import n_added
from supar_sweep.sweep.handover import hand_over
from supar_sweep.sweep.jobs import Launcher
from supar_sweep.sweep.status import states

INCOMPLETE = 1


def run(settings: Settings) -> int:
    """Make the grid complete, with extend=true larger first where an optimum lies beyond it; return 0 when every cell is,
    1 when not, 130 after Ctrl-C.
    """
    extension = Extension.asked(settings)
    check_drawn(settings)
    grid = freeze(settings)
    say_idle(grid)
    say_few_live(grid.cells.values())
    say_other_optimizer(settings, grid.cells.values())
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
        write_json({**row, "interrupted": summary.interrupted, "complete": summary.complete})
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


def submit(settings: Settings, grid: Grid, launcher: Any) -> int:
    """Hand the grid to a queue that goes on without us; return 0, or 1 where it refused cells."""
    price_of = price(settings, launcher.processes)
    said = hand_over(
        experiment_of(settings),
        grid.plan,
        launcher,
        price=lambda planned: price_of(grid.cells[planned.cell_id]),
    )
    row = {"experiment": settings.experiment, "n": len(grid.cells), **said._asdict(), "refused": len(said.refused)}
    if settings.format == "json":
        write_json(row)
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
    price_of = price(settings, launcher.processes)
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


def cancel(settings: Settings) -> int:
    """Ask the grid's `run` to stop, as Ctrl-C does there, or SLURM to end its elements, or one cell's; return 0."""
    experiment = experiment_of(settings)
    frozen = experiment.plan()
    asked = settings.plain.get("cell")
    one = None if asked is None else find_cell(settings.runs_dir, asked).cell_id
    if one is not None and one not in frozen.cells:
        raise ConfigError("cell", f"is not a cell of {settings.experiment}", value=asked)
    if slurm_was_used(settings) and (one is not None or experiment.runner() is None):
        follow = room("launchers.slurm_follow")
        n = follow.cancel(settings.runs_dir / "slurm", frozen.cells.keys() if one is None else {one})
        note_unread(settings)
        what = settings.experiment if one is None else str(asked)
        if one is not None and not n:
            raise SuparError(f"{what} is not in SLURM's queue: there is nothing to cancel")
        say(f"{what}: {n} elements cancelled; cells at work save and end, `run` continues them")
        return 0
    if one is not None:
        allowed = "leave it out: the whole grid stops, and `run` continues it"
        raise ConfigError("cell", "one cell can be cancelled in SLURM's queue only", value=asked, allowed=allowed)
    holder = experiment.cancel()
    note_unread(settings)
    say(f"{settings.experiment}: asked {holder} to stop; cells save and end, `run` continues them")
    return 0
