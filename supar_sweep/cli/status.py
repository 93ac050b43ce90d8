"""`supar-sweep status`: a grid's cells by state, how fast they go, what they took, and the first errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from supar_sweep.cli.launch import experiment_of
from supar_sweep.cli.output import say, write_json
from supar_sweep.cli.progress import duration
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import FIGURE, READS, Settings
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.extension import n_added
from supar_sweep.sweep.locks import Holder
from supar_sweep.sweep.pace import Pace, pace, used_hours
from supar_sweep.sweep.status import STATES, CellState, first_errors, folded_counts, states, status_counts
from supar_sweep.sweep.submission import Plan
from supar_sweep.sweep.tables import render
from supar_sweep.training.cost import relative_cost

WATCH_EVERY_S = 5.0
CLEAR = "\x1b[H\x1b[2J"
UNDER_WAY = ("running", "pending", "held")


def status(settings: Settings) -> int:
    """Print the grid's cells by state, grouped by its axes, with pace, cost and the first errors; return 0."""
    watch = settings.plain.get("watch")
    if not isinstance(watch, bool):
        raise ConfigError("watch", "must be true or false", value=watch)
    if watch and settings.format != "table":
        raise ConfigError("watch", f"has no effect with format={settings.format}", value=watch, allowed="format=table")
    frozen = experiment_of(settings).plan()
    by = _group_by(settings, frozen)
    note_unread(settings)
    if watch:
        return _watch(settings, frozen, by)
    look = _look(settings, frozen, {})
    if settings.format == "json":
        write_json(look.plain(settings, by))
        return 0
    sys.stdout.write(look.table(settings, by))
    sys.stdout.flush()
    for line in look.errors():
        say(line)
    return 0


def _watch(settings: Settings, frozen: Plan, by: Sequence[str]) -> int:
    """Show the table again and again until nothing is under way; Ctrl-C leaves, and changes nothing else."""
    known: Mapping[str, CellState] = {}
    terminal = sys.stdout.isatty()
    before = ""
    try:
        while True:
            look = _look(settings, frozen, known)
            known = look.found
            shown = "\n".join([look.table(settings, by).rstrip("\n"), *look.errors()]) + "\n"
            if terminal or shown != before:
                sys.stdout.write(CLEAR + shown if terminal else shown)
                sys.stdout.flush()
            before = shown
            if not look.under_way and look.runner is None:
                return 0
            time.sleep(WATCH_EVERY_S)
    except KeyboardInterrupt:
        return 0


@dataclass(frozen=True)
class _Look:
    """Where a grid stands now."""

    frozen: Plan
    found: Mapping[str, CellState]
    runner: Holder | None
    pace: Pace | None

    @property
    def under_way(self) -> list[str]:
        """The cells that somebody works on, or will."""
        return [this for this, state in self.found.items() if state.state in UNDER_WAY]

    @property
    def used(self) -> dict[str, float]:
        """GPU-hours and core-hours of the complete cells."""
        return used_hours(state.spent for state in self.found.values() if state.spent)

    def plain(self, settings: Settings, by: Sequence[str]) -> dict[str, Any]:
        """Return all of it for JSON."""
        [total] = status_counts(self.frozen, self.found)
        return {
            "experiment": settings.experiment,
            "runner": str(self.runner) if self.runner else None,
            "total": total,
            "extended": n_added(self.frozen),
            "cells_per_hour": self.pace.cells_per_hour if self.pace else None,
            "eta_s": self.pace.eta_s if self.pace else None,
            "used": self.used,
            "groups": status_counts(self.frozen, self.found, by=by),
            "errors": first_errors(self.frozen, self.found),
        }

    def table(self, settings: Settings, by: Sequence[str]) -> str:
        """Return the counts as a table, or as CSV."""
        [total] = status_counts(self.frozen, self.found)
        # whoever names the columns, or has a program read them, gets every row
        whole = settings.format != "table" or settings.plain.get("by") is not None
        groups = (status_counts if whole else folded_counts)(self.frozen, self.found, by)
        shown = [state for state in STATES if total[state]]
        by_state = ", ".join(f"{total[state]} {state}" for state in shown)
        who = f"; run by {self.runner}" if self.runner else "; no run is working on it"
        more = f" ({n_added(self.frozen)} by extend)" if n_added(self.frozen) else ""
        title = f"{settings.experiment}: {total['n']} cells{more}: {by_state}{who if not self._queued else ''}"
        facts = [f"{hours:.3g} {unit} used" for unit, hours in self.used.items()]
        if self.pace:
            facts += [f"{self.pace.cells_per_hour:.3g} cells an hour", f"{duration(self.pace.eta_s)} left"]
        title += f"\n{'; '.join(facts)}" if facts else ""
        columns = [*(by if groups else []), "n", *shown]
        return render(groups, columns, settings.format, title=title, terminal=sys.stdout.isatty())

    @property
    def _queued(self) -> bool:
        """Whether a queue works on it, with no `run` of ours."""
        return self.runner is None and bool(self.under_way)

    def errors(self) -> list[str]:
        """Return a line for each kind of trouble."""
        return [
            f"{row['n']} {row['state']}, first {row['cell']}: {row['message']}"
            + (f" (see {row['log']})" if row["log"] else "")
            for row in first_errors(self.frozen, self.found)
        ]


def _look(settings: Settings, frozen: Plan, known: Mapping[str, CellState]) -> _Look:
    experiment = experiment_of(settings)
    found = with_queue(settings, states(experiment, frozen, known))
    runner = experiment.runner()
    look = _Look(frozen, found, runner, None)
    if not look.under_way:
        return look
    costs = {this: state.spent for this, state in found.items() if state.spent}
    now = pace(costs, _weights(frozen), look.under_way, since_s=runner.since_s if runner else 0.0, now_s=time.time())
    return _Look(frozen, found, runner, now)


def _weights(frozen: Plan) -> dict[str, float]:
    """Return what each cell costs beside others; 1 for one that cannot be."""
    runtime = decode(RuntimeConfig, frozen.runtime, prefix="runtime")
    compact = runtime.compute != "dense" and not runtime.compile
    known: dict[str, float] = {}
    found = {}
    for this, planned in frozen.cells.items():
        key = repr(
            [planned.cell.get(name) for name in ("model", "train", "density", "layer_density", "sparsity", "data")]
        )
        if key not in known:
            try:
                known[key] = relative_cost(decode(CellConfig, planned.cell), compact=compact)
            except ConfigError:
                known[key] = 1.0
        found[this] = known[key]
    return found


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
    if not isinstance(asked, str | list):
        raise ConfigError("by", "must be a list of columns", value=asked, allowed=known)
    names = [asked] if isinstance(asked, str) else asked
    for name in names:
        if name not in known:
            raise ConfigError("by", "is not a column of this grid", value=name, allowed=known, nearest_to=str(name))
    return names


def note_unread(settings: Settings) -> None:
    """Say which of the user's settings play no part, because `run` has frozen the grid."""
    read = ("experiment", "experiment.name", "scale", "runs_dir", "format", "by", "watch", "cell")
    draws = "figure" in READS[settings.command]
    idle = [
        key
        for key in settings.given()
        if key not in read
        and key.partition(".")[0] not in FIGURE
        and not (draws and f"{key}.".startswith("experiment.plot."))
    ]
    if idle:
        say(
            f"note: {settings.command} reads the grid as `run` froze it; "
            f"no effect here: {', '.join(dict.fromkeys(idle))}"
        )
