"""`supar-sweep calibrate`: how long a step of each shape of a grid takes, measured in the processes that `run` would start."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from supar_sweep.cli.launch import (
    Grid,
    LocalConfig,
    experiment_of,
    freeze,
    launcher_config,
    make_launcher,
    price,
    ranks_for,
    with_threads,
)
from supar_sweep.cli.output import emit, say, say_written
from supar_sweep.cli.progress import Live
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import Settings
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.errors import ConfigError, RecordError
from supar_sweep.sweep import calibration
from supar_sweep.sweep.cohorts import groups
from supar_sweep.sweep.jobs import POLL_S, Event, Job, Launcher, folder_of, make_job
from supar_sweep.sweep.records import Store
from supar_sweep.sweep.status import states
from supar_sweep.training.cost import flops_per_step

INCOMPLETE = 1
TARGET = "supar_sweep.training.calibrate.train"
IDLE = (
    *("launcher.wait", "launcher.max_elements"),
    *("runtime.checkpoint_every_s", "runtime.checkpoint_every_steps", "runtime.keep_checkpoints"),
)
"""Settings of a grid that play no part in a measurement."""


def calibrate(settings: Settings) -> int:
    """Measure each shape of the grid, and write runs_dir/calibration; return 0, or 1 where one could not be measured."""
    for key in settings.given():
        if key in IDLE:
            raise ConfigError(key, "has no effect on calibrate", allowed="leave it out")
    grid = freeze(settings)
    ours = _to_time(settings, grid.cells)
    found = states(experiment_of(settings), grid.plan)
    left = [cell for this, cell in grid.cells.items() if not found[this].complete]
    settings = with_threads(settings, left or grid.cells.values())
    with make_launcher(settings) as launcher, _scratch(settings.runs_dir) as scratch:
        shapes = _shapes(settings, ours, launcher)
        jobs = [job for shape in shapes for job in shape.jobs(grid, settings.runtime(), Store(scratch / "cells"))]
        with Live(f"calibrate {settings.experiment}") as live:
            ends = _measured(launcher, jobs, live)
        rows, written = _kept(settings, shapes, jobs)
    emit(
        rows,
        _COLUMNS if settings.format == "table" else None,
        settings.format,
        title="a step of one run, in the company that `run` gives it",
    )
    say_written(written)
    failed = {event.message: event for event in ends.values() if event.end != "done"}
    for event in failed.values():
        say(f"{event.end}: {event.message}")
    return INCOMPLETE if failed else 0


def _to_time(settings: Settings, cells: Mapping[str, CellConfig]) -> dict[str, CellConfig]:
    """Return the cells that one process trains by itself, and by our own training function.

    Raises:
        ConfigError: there are none.
    """
    ours = {this: cell for this, cell in cells.items() if cell.train.target is None}
    if not ours:
        target = next(iter(cells.values())).train.target
        raise ConfigError("train.target", "has no steps that calibrate could time", value=target, allowed="null")
    ranks_of, config = ranks_for(settings), launcher_config(settings)
    ranks = {this: ranks_of(cell) for this, cell in ours.items()}
    alone = {this: cell for this, cell in ours.items() if ranks[this] == 1}
    if not alone:
        of_all = {"nodes": config.nodes > 1, "gpus_per_node": config.gpus_per_node, "tasks_per_node": True}
        key = "larger" if config.ranks == 1 else next(key for key, has in of_all.items() if has)
        raise ConfigError(
            f"launcher.{key}",
            f"has {max(ranks.values())} processes train each cell together, and calibrate times one by itself",
            value=getattr(config, key),
            allowed="one process a cell, or processes_per_gpu=1, which gives each process cells of its own",
        )
    if len(alone) < len(ours):
        say(f"{len(ours) - len(alone)} cells are not timed: several processes train each of them together")
    return alone


_COLUMNS = {
    "device": "device",
    "width": "width",
    "n_layer": "n_layer",
    "density": "density",
    "cells": "cells",
    "threads": "threads",
    "processes": "processes",
    "together": "together",
    "stacked": "stacked",
    "step_s": "s/step",
    "setup_s": "s set-up",
    "tokens_per_s": "tokens/s",
    "flops_per_s": "FLOP/s",
}


@dataclass(frozen=True)
class _Shape:
    """Cells whose steps take equally long.

    Args:
        key: calibration.shape_key.
        like: one of them, its id.
        n: how many there are.
        together: how many share a process.
        processes: how many processes of this shape are at work at once.
    """

    key: str
    like: str
    n: int
    together: int
    processes: int

    def jobs(self, grid: Grid, runtime: RuntimeConfig, store: Store) -> Iterator[Job]:
        """Yield a measurement for each process."""
        cell = grid.cells[self.like]
        runtime = replace(runtime, cohort=self.together)
        # never twice the same cell: what an earlier call has in a queue would be followed, and it writes elsewhere
        first = secrets.randbelow(2**62)
        for seed in range(first, first + self.processes):
            measured = replace(cell, seed=seed, train=replace(cell.train, target=TARGET))
            facts = {**grid.plan.provenance, "calibrates": self.key}
            yield make_job(store, measured, runtime, grid.plan.cells[self.like].fingerprint, facts)


def _shapes(settings: Settings, ours: Mapping[str, CellConfig], launcher: Launcher) -> list[_Shape]:
    """Return the distinct shapes of these cells, the dearest first, each in the company of its first group."""
    runtime, price_of = settings.runtime(), price(settings, launcher.processes)
    prices = {this: price_of(cell) for this, cell in ours.items()}
    members: dict[str, list[str]] = {}
    together: dict[str, int] = {}
    for group in groups(ours, prices, launcher.processes):
        for this in group:
            key = calibration.shape_key(ours[this], runtime)
            members.setdefault(key, []).append(this)
            together.setdefault(key, len(group))
    # those of this machine, or of an element, share its memory and its bandwidth, so they are measured side by side
    config = launcher_config(settings)
    at_once = launcher.processes if isinstance(config, LocalConfig) else config.processes
    return [
        _Shape(key, these[0], len(these), together[key], min(at_once, math.ceil(len(these) / together[key])))
        for key, these in members.items()
    ]


@contextmanager
def _scratch(runs: Path) -> Iterator[Path]:
    """Give a folder for the measurements' own records, on the file system that the runs folder is on."""
    folder = runs / calibration.FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"cannot write {folder}: {error.strerror}") from error
    with TemporaryDirectory(prefix=".measuring-", dir=folder, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def _measured(launcher: Launcher, jobs: Sequence[Job], live: Live) -> dict[str, Event]:
    """Return how each measurement ended."""
    ends: dict[str, Event] = {}
    try:
        for job in jobs:
            launcher.submit([job])
        while len(ends) < len(jobs):
            live.show(len(ends), len(jobs))
            ends |= {event.cell_id: event for event in launcher.events(POLL_S)}
        live.show(len(ends), len(jobs))
    except BaseException:  # Ctrl-C: a queue would go on
        launcher.cancel(now=True)
        raise
    return ends


def _kept(settings: Settings, shapes: Sequence[_Shape], jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return a row a shape and device, and the files that they were written to."""
    device_of = room("analysis.report_cost").device
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for job in jobs:
        if (result := folder_of(job).result()) is not None:
            of = (device_of(result), str(result["device"]), job["provenance"]["calibrates"])
            found.setdefault(of, []).append(result)
    rows: list[dict[str, Any]] = []
    by_device: dict[tuple[str, str], dict[str, Any]] = {}
    for shape in shapes:
        for (device, kind, key), results in found.items():
            if key == shape.key:
                row = _row(settings, shape, results)
                rows.append({"device": device, "cells": shape.n, **row})
                by_device.setdefault((device, kind), {})[key] = row
    launcher = str(launcher_config(settings).name)
    written = [
        calibration.store(settings.runs_dir, launcher, device, kind, rows_of)
        for (device, kind), rows_of in by_device.items()
    ]
    return rows, written


def _row(settings: Settings, shape: _Shape, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from supar_sweep.config.decode import decode

    cell = decode(CellConfig, results[0]["cell"])
    means = {name: fmean(float(each[name]) for each in results) for name in ("step_s", "setup_s", "eval_seq_s")}
    tokens = cell.train.batch_seqs * cell.model.context_tokens
    return {
        "width": cell.model.width,
        "n_layer": cell.model.n_layer,
        "density": cell.density,
        "batch_seqs": cell.train.batch_seqs,
        "context_tokens": cell.model.context_tokens,
        "precision": cell.train.precision,
        "optimizer": cell.optimizer.name,
        "threads": results[0]["threads"],
        "processes": len(results),
        "together": results[0]["together"],
        "stacked": results[0]["stacked"],
        **means,
        "tokens_per_s": tokens / means["step_s"],
        "flops_per_s": flops_per_step(cell) / means["step_s"],
        "host": results[0]["host"],
        "torch": results[0]["versions"]["torch"],
    }
