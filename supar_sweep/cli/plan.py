"""`supar-sweep plan`: what a grid costs, what is done, and what `run` would hand to the launcher. Nothing is started."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from supar_sweep.cli.extend import say_idle
from supar_sweep.cli.launch import (
    LocalConfig,
    device_kind,
    experiment_of,
    flops,
    freeze,
    launcher_config,
    price,
    processes_of,
    ranks_for,
    say_other_optimizer,
    shape_key,
    sizes,
    tell_environment,
    with_threads,
)
from supar_sweep.cli.output import emit, say, write_json
from supar_sweep.cli.plot import check_drawn
from supar_sweep.cli.progress import duration
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import Settings
from supar_sweep.cli.status import UNDER_WAY, with_queue
from supar_sweep.cli.transfer import say_few_live
from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError, SuparError
from supar_sweep.sweep import calibration
from supar_sweep.sweep.arrays import ArrayFolder
from supar_sweep.sweep.code import code_version
from supar_sweep.sweep.cohorts import groups
from supar_sweep.sweep.extension import n_added
from supar_sweep.sweep.files import write_file
from supar_sweep.sweep.pace import S_AN_HOUR
from supar_sweep.sweep.status import STATES, states
from supar_sweep.training.cost import count_parameters, memory_gb
from supar_sweep.training.environment import device_name
from supar_sweep.training.worker import RUN_CELLS

METRICS_LINE_BYTES = 150
CELL_OVERHEAD_BYTES = 12_000
"""ASSUMPTION: what a cell's files take besides its metrics, in file system blocks."""


def plan(settings: Settings) -> int:
    """Print which cells the grid has, what they cost, what is done, what would be submitted; nothing is started."""
    local = isinstance(launcher_config(settings), LocalConfig)
    test_only = _test_only(settings, local)
    check_drawn(settings)
    grid = freeze(settings)
    say_idle(grid)
    say_few_live(grid.cells.values())
    say_other_optimizer(settings, grid.cells.values())
    found = with_queue(settings, states(experiment_of(settings), grid.plan))
    left = {this: cell for this, cell in grid.cells.items() if not found[this].complete}
    settings = with_threads(settings, left.values())
    runs = _runs(settings, grid.cells)
    rows = _shape_rows(grid.cells, left, runs.s)
    counts = Counter(state.state for state in found.values())
    total: dict[str, Any] = {
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
    to_start = {this: cell for this, cell in left.items() if found[this].state not in UNDER_WAY}
    price_of = price(settings, processes_of(settings))
    prices = {this: price_of(cell) for this, cell in to_start.items()}
    grouped = list(groups(to_start, prices, processes_of(settings)))
    total |= {"to_start": len(to_start), "groups": len(grouped), "together": max(map(len, grouped), default=0)}
    total |= _time(settings, left, grouped, runs)
    arrays = [] if local else _arrays(settings, grid.cells, grouped, len(left) - len(to_start), test_only=test_only)
    if not local:
        n_submitted = sum(array["cells"] for array in arrays)
        total |= {"arrays": len(arrays), "elements": sum(array["elements"] for array in arrays)}
        total |= {"held": len(to_start) - n_submitted}
    if settings.format == "json":
        write_json({**total, "shapes": rows, **({} if local else {"submission": arrays})})
        return 0
    shown = [key for key in _PLAN_COLUMNS if key != "hours_left" or total["calibration"]]
    emit(rows, {key: _PLAN_COLUMNS[key] for key in shown}, settings.format, title=_title(total))
    if arrays and settings.format == "table":
        _show(arrays)
    return 0


def _test_only(settings: Settings, local: bool) -> bool:
    asked = settings.plain.get("test_only")
    if not isinstance(asked, bool):
        raise ConfigError("test_only", "must be true or false", value=asked)
    if asked and local:
        raise ConfigError("test_only", "has no effect with launcher=local: there is no sbatch to ask", value=asked)
    return asked


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
    "hours_left": "hours left",
}


def _title(total: Mapping[str, Any]) -> str:
    by_state = ", ".join(f"{n} {state}" for state, n in total["states"].items())
    start = f"{total['to_start']} to start in {total['groups']} groups of up to {total['together']}"
    if "arrays" in total:
        start += f": {total['elements']} elements of {total['arrays']} arrays"
        start += f", {total['held']} held back" if total["held"] else ""
    more = f", {total['extended']} of them by extend" if total["extended"] else ""
    return (
        f"{total['experiment']}: {total['points']} points, {total['cells']} cells{more} ({by_state}); "
        f"{total['flops']:.3g} FLOPs of live weights, {total['flops_left']:.3g} left "
        f"({total['flops_left_dense']:.3g} if every layer is computed dense); "
        f"records {total['records_gb']:.3g} GB\n{start}\n{_time_text(total)}"
    )


def _time_text(total: Mapping[str, Any]) -> str:
    if total["calibration"] is None:
        return "hours: not known; `calibrate` with the same words measures them"  # or says why it cannot
    known = f"{total['device_hours_left']:.3g} {total['device_hours_unit']} left, "
    known += f"{duration(total['wall_s'])} once all may run (measured on {total['calibration']})"
    n = total["unmeasured"]
    return known + (f"; {n} cells of shapes not measured are not in it: `calibrate` measures them" if n else "")


def _shape_rows(
    cells: Mapping[str, CellConfig], left: Mapping[str, CellConfig], runs_s: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Return one row a shape: how many cells, what they cost."""
    by_shape: dict[tuple[Any, ...], list[str]] = {}
    for this, cell in cells.items():
        by_shape.setdefault(shape_key(cell), []).append(this)
    rows = []
    for members in by_shape.values():
        cell = cells[members[0]]
        n_left = sum(this in left for this in members)
        count = count_parameters(cell)
        run_s = runs_s[members[0]]
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
                "hours_left": None if run_s is None else n_left * run_s / S_AN_HOUR,
            }
        )
    return rows


def _record_bytes(cell: CellConfig) -> float:
    return CELL_OVERHEAD_BYTES + METRICS_LINE_BYTES * cell.train.steps


# -- hours ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """Seconds of a whole run by cell_id, None = not measured; and on what they were measured, None = nowhere."""

    s: Mapping[str, float | None]
    device: str | None


def _runs(settings: Settings, cells: Mapping[str, CellConfig]) -> _Runs:
    """Return the seconds that a process spends on each cell, by the newest calibration of the launcher's device."""
    kind, launcher = device_kind(settings), str(launcher_config(settings).name)
    # what the nodes of a cluster are, and which GPU this is, only the measurement itself knows
    device = f"{device_name('cpu')} (cpu)" if (launcher, kind) == ("local", "cpu") else None
    known = calibration.newest(settings.runs_dir, launcher, kind, device)
    runtime, ranks_of = settings.runtime(), ranks_for(settings)
    by_shape: dict[tuple[Any, ...], float | None] = {}
    found = {}
    for this, cell in cells.items():
        key = shape_key(cell)
        if key not in by_shape:
            measured = known and cell.train.target is None and ranks_of(cell) == 1  # by itself, as calibrate times it
            by_shape[key] = known.run_s(cell, runtime) if known and measured else None
        found[this] = by_shape[key]
    return _Runs(found, known.device if known and any(found.values()) else None)


def _time(
    settings: Settings, left: Mapping[str, CellConfig], grouped: Sequence[Sequence[str]], runs: _Runs
) -> dict[str, Any]:
    """Return the hours that the cells left take of devices, and of a clock on the wall.

    wall_s: no less than the groups to be started take on all processes, and than the longest of them.
    """
    if runs.device is None:
        return {"calibration": None}
    seconds = {this: runs.s[this] or 0.0 for this in left}
    devices_of, on_gpu = _devices(settings)
    device_s = sum(devices_of(cell) * seconds[this] for this, cell in left.items())
    of_groups_s = [sum(seconds[this] for this in group) for group in grouped]
    return {
        "calibration": runs.device,
        "device_hours_left": device_s / S_AN_HOUR,
        "device_hours_unit": "GPU-hours" if on_gpu else "core-hours",
        "wall_s": max([sum(seconds.values()) / processes_of(settings), *of_groups_s]),
        "unmeasured": sum(runs.s[this] is None for this in left),
    }


def _devices(settings: Settings) -> tuple[Callable[[CellConfig], float], bool]:
    """Return how many GPUs, or cores, a process has that trains a cell, and whether they are GPUs."""
    config = launcher_config(settings)
    if isinstance(config, LocalConfig):
        on_gpu = device_kind(settings) == "cuda"
        return (lambda cell: 1.0 if on_gpu else float(settings.runtime().n_threads)), on_gpu
    size_of = sizes(settings)
    asked = [config.with_row(row) for row in range(len(config.larger) + 1)]
    shares = [(each.gpus_per_node or each.cpus) / each.processes for each in asked]
    return (lambda cell: shares[config.row_for(*size_of(cell))]), bool(config.gpus_per_node)


# -- SLURM ---------------------------------------------------------------------------------------


def _arrays(
    settings: Settings,
    cells: Mapping[str, CellConfig],
    grouped: Sequence[Sequence[str]],
    n_there: int,
    *,
    test_only: bool,
) -> list[dict[str, Any]]:
    """Return the arrays that `run` would submit now, with the text of each; no text where there is no SLURM."""
    config = launcher_config(settings)
    queue, script, of_slurm = (
        room("launchers.slurm_queue"),
        room("launchers.slurm_script"),
        room("launchers.slurm_arrays"),
    )
    runtime, size_of = settings.runtime(), sizes(settings)
    tell_environment(settings)
    try:
        slurm = queue.Slurm()
        max_array_size = slurm.max_array_size()
    except SuparError as error:
        if test_only:
            raise
        slurm, max_array_size = None, of_slurm.USUAL_MAX_ARRAY_SIZE
        say(f"{error}; arrays are shown as of SLURM's usual MaxArraySize, their sbatch text only on the cluster")
    if slurm and config.further_options:
        config.check_options(slurm.options())
    now = islice(grouped, max(0, config.max_elements * config.processes - n_there))
    batches = of_slurm.batches(
        [[{"cell_id": this, "runtime": encode(runtime)} for this in group] for group in now],
        config,
        size=lambda job: of_slurm.Size(*size_of(cells[job["cell_id"]])),
        threads=runtime.threads,
        max_array_size=max_array_size,
    )
    arrays: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="supar-plan-") as scratch:
        for batch in batches:
            array: dict[str, Any] = {
                "elements": len(batch.elements),
                "cells": sum(1 for _ in batch.jobs),
                "at_once": batch.at_once,
                "script": None,
            }
            if slurm:
                array["script"] = script.submission_script(
                    batch.config,
                    ArrayFolder((settings.runs_dir / "slurm" / "ARRAY").absolute()),
                    n=len(batch.elements),
                    at_once=batch.at_once,
                    threads=runtime.threads or batch.config.threads,
                    function=RUN_CELLS,
                    code=(settings.runs_dir / "code" / code_version()).absolute(),
                )
            if test_only:
                written = write_file(Path(scratch) / f"{len(arrays)}.sh", array["script"])
                array["test_only"] = slurm.test_only(written)
            arrays.append(array)
    return arrays


def _show(arrays: Sequence[Mapping[str, Any]]) -> None:
    sys.stdout.write("\n")
    emit([{"array": n, **{k: v for k, v in array.items() if k != "script"}} for n, array in enumerate(arrays)])
    for n, array in enumerate(arrays):
        if array["script"] is not None:
            sys.stdout.write(f"\n# array {n}\n{array['script']}")
