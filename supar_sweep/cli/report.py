"""`supar-sweep report`: one HTML file of a grid: verdict, figures, tables, lineage, cost, failures, how to reproduce."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supar_sweep.cli.launch import experiment_of
from supar_sweep.cli.output import say_written
from supar_sweep.cli.plot import emit_verdict, grid_rows, metric_of, own_figure, say_verdicts
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import Settings
from supar_sweep.cli.status import note_unread
from supar_sweep.errors import RecordError
from supar_sweep.sweep.files import read_json, write_file
from supar_sweep.sweep.records import CellFolder, Store
from supar_sweep.sweep.status import folders, states
from supar_sweep.sweep.submission import Experiment, Plan
from supar_sweep.sweep.trials import trial_rows
from supar_sweep.sweep.winner import load_winner
from supar_sweep.training.environment import versions

READ = ("end", "flops", "train_s", "wall_s", "device", "device_name", "versions", "provenance", "data")
"""What a report takes of a result; the rest, layer by layer, would fill the memory for a large grid."""


def report(settings: Settings) -> int:
    """Write the report into the experiment's folder, print the verdict's table; return 0."""
    metric, own = metric_of(settings), own_figure(settings)
    experiment = experiment_of(settings)
    frozen = experiment.plan()
    note_unread(settings)
    found, path = write_report(experiment, frozen, metric, own)
    if found.entries:
        emit_verdict(list(found.entries), settings.format)
    say_verdicts(found.verdicts)
    say_written([path])
    return 0


def write_report(experiment: Experiment, frozen: Plan, metric: str, own: Any = None) -> tuple[Any, Path]:
    """Return the report (analysis.report.Report) and where its page was written.

    Args:
        experiment: the grid's place. frozen: its plan.
        metric: train_loss or val_loss.
        own: the figure that the experiment names (plot.own_figure); None = it names none.

    Raises:
        ConfigError: no cell is complete.
        RecordError: the page cannot be written.
    """
    module = room("analysis.report")
    cells = folders(experiment.store, frozen)
    results = _results(cells)
    found = module.report(
        module.Records(
            plan=frozen,
            rows=grid_rows(experiment, frozen),
            states=states(experiment, frozen),
            results=results,
            curve_of=lambda this: cells[this].metrics(),
            study=_study(experiment, frozen, module),
            unfinished_s=sum(map(_unfinished_s, cells.values())),
            metric=metric,
            argv=list(sys.argv),
            made=time.strftime("%Y-%m-%d %H:%M %z"),
            version=versions()["supar_sweep"],
            own=own,
        )
    )
    page = room("analysis.report_page").html(found)
    return found, write_file(experiment.folder / "report.html", page)


def _results(cells: Mapping[str, CellFolder]) -> dict[str, Mapping[str, Any]]:
    """Return the published results by id; a torn one is none (`status` names it)."""
    found: dict[str, Mapping[str, Any]] = {}
    for this, folder in cells.items():
        try:
            result = folder.result()
        except RecordError:
            continue
        if result is not None:
            found[this] = {key: result[key] for key in READ if key in result}
    return found


def _unfinished_s(folder: CellFolder) -> float:
    """Return how long those attempts of a cell took that published nothing."""
    total_s = 0.0
    for attempt in folder.attempts():
        try:
            end = read_json(attempt / "end.json") or {}
        except RecordError:
            continue
        if end.get("end") not in ("done", "diverged"):
            total_s += float(end.get("wall_s") or 0.0)
    return total_s


def _study(experiment: Experiment, frozen: Plan, module: Any) -> Any:
    """Return the records of the study that the grid's hyperparameters come from; None where they are not to be had."""
    named = frozen.provenance.get("hparams") or {}
    name = named.get("study")
    if not name:
        return None
    path = experiment.runs / "studies" / str(name) / "best.yaml"
    if not path.is_file():
        return None
    winner = load_winner(path)
    trials = trial_rows(experiment.runs, str(name))
    wanted = module.study_cell_ids(winner, trials)
    index = Store(experiment.runs / "cells").index()
    results = _results({this: index[this] for this in wanted if this in index})
    return module.StudyRecords(winner=winner, trials=trials, results=results)
