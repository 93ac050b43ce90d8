"""`supar-sweep logs <cell>`: what is known of one cell: its attempts, how they ended, and what was printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from supar_sweep.cli.output import emit, write_json
from supar_sweep.cli.settings import Settings
from supar_sweep.cli.status import with_queue
from supar_sweep.errors import ConfigError, RecordError
from supar_sweep.sweep.arrays import ArrayFolder, elements_of
from supar_sweep.sweep.files import read_json
from supar_sweep.sweep.records import CellFolder, Store
from supar_sweep.sweep.status import CellState, cell_state, folders
from supar_sweep.sweep.submission import Experiment

SHOWN = 10
"""Most names that an error lists."""


def logs(settings: Settings) -> int:
    """Print a cell's state, its attempts, and the last lines of its logs; return 0."""
    lines, asked = settings.plain.get("lines"), settings.plain.get("attempt")
    if not isinstance(lines, int) or isinstance(lines, bool) or lines < 1:
        raise ConfigError("lines", "must be a whole number", value=lines, allowed=">= 1")
    folder = find_cell(settings.runs_dir, settings.plain.get("cell"))
    state = with_queue(settings, {folder.cell_id: cell_state(folder)})[folder.cell_id]
    attempts = [_attempt(folder, path, state) for path in folder.attempts()]
    known = [row["attempt"] for row in attempts]
    if asked is not None and asked not in known:
        raise ConfigError(
            "attempt", f"{folder.path.name} has none of this number", value=asked, allowed=map(str, known)
        )
    chosen = [row for row in attempts if asked in (None, row["attempt"])][-1:]
    tails = {path: _tail(path, lines) for path in _log_files(settings.runs_dir, folder, chosen)}
    if settings.format == "json":
        found = {"cell": folder.path.name, "folder": str(folder.path), "state": state.state, "message": state.message}
        write_json({**found, "attempts": attempts, "logs": {str(path): tail for path, (tail, _) in tails.items()}})
        return 0
    cause = f": {state.message}" if state.message else ""
    emit(attempts, _COLUMNS, settings.format, title=f"{folder.path}\n{state.state}{cause}")
    if settings.format == "table":
        for path, (tail, n) in tails.items():
            part = f"the last {len(tail)} of {n} lines; lines=N shows more" if len(tail) < n else f"{n} lines"
            sys.stdout.write("\n".join([f"\n--- {path} ({part})", *tail]) + "\n")
        if not tails:
            sys.stdout.write("\nnothing was printed\n")
    return 0


_COLUMNS = {
    "attempt": "attempt",
    "end": "end",
    "begun": "begun",
    "wall_s": "wall s",
    "resumed_from_step": "from step",
    "host": "host",
    "device": "device",
    "element": "element",
    "message": "message",
}


def find_cell(runs: Path, asked: object) -> CellFolder:
    """Return the one cell that is meant.

    Args:
        runs: the runs folder.
        asked: an id, a label, a folder's name or path, or an unambiguous beginning of one of these.

    Raises:
        ConfigError: nothing, no cell, or several.
    """
    allowed = "an id, a label, or an unambiguous beginning of one, as status names them"
    if not isinstance(asked, str) or not asked:
        raise ConfigError("cell", "must be set", value=asked, allowed=allowed)
    name = asked.rstrip("/").rpartition("/")[2]
    cells = Store(runs / "cells").index()
    found = _matching(cells.values(), name)
    if not found:  # one that was never begun has no folder yet
        cells = {**_planned(runs), **cells}
        found = _matching(cells.values(), name)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError("cell", f"is the beginning of {len(found)}", value=asked, allowed=_some(found))
    names = [each for cell in cells.values() for each in (cell.path.name, cell.cell_id)]
    near = get_close_matches(name, names, SHOWN, cutoff=0.4)
    problem = f"is none of the {len(cells)} cells of {runs}"
    raise ConfigError("cell", problem, value=asked, allowed=near or allowed, nearest_to=name)


def _matching(cells: Collection[CellFolder], name: str) -> list[CellFolder]:
    """Return the cells that a name means: by their whole names where there are any, else by a beginning."""
    for matching in (
        [cell for cell in cells if name in (cell.cell_id, cell.path.name)],
        [cell for cell in cells if cell.path.name == f"{name}-{cell.cell_id}"],
        [cell for cell in cells if cell.cell_id.startswith(name) or cell.path.name.startswith(name)],
    ):
        if matching:
            return matching
    return []


def _planned(runs: Path) -> dict[str, CellFolder]:
    """Return the folders that the cells of all frozen grids have, or will have, by id."""
    found: dict[str, CellFolder] = {}
    for path in runs.glob("experiments/*/plan.json"):
        experiment = Experiment(runs, path.parent.name)
        with suppress(RecordError):
            found |= folders(experiment.store, experiment.plan())
    return found


def _some(cells: Sequence[CellFolder]) -> str:
    names = sorted(cell.path.name for cell in cells)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _attempt(folder: CellFolder, path: Path, state: CellState) -> dict[str, Any]:
    """Return a row: who worked on the cell, where, since when, and how it ended."""
    info: dict[str, Any] = {}
    end: dict[str, Any] = {}
    with suppress(RecordError):  # torn: the rest is still worth showing
        info = read_json(path / "attempt.json") or {}
        end = read_json(path / "end.json") or {}
    provenance = info.get("provenance") or {}
    slurm = provenance.get("slurm") or {}
    at_work = state.state == "running" and path == folder.attempts()[-1]
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info["started_s"])) if "started_s" in info else None
    return {
        "attempt": int(path.name),
        "end": end.get("end") or ("running" if at_work else None),
        "begun": begun,
        "wall_s": round(end["wall_s"], 1) if "wall_s" in end else None,
        "resumed_from_step": info.get("resumed_from_step"),
        "host": slurm.get("node") or info.get("host"),
        "device": info.get("device"),
        "element": slurm.get("element"),
        "process": slurm.get("process", 0),
        "array": slurm.get("array"),
        "worker_log": provenance.get("worker_log"),
        "message": end.get("message") or None,
        "folder": str(path),
    }


def _log_files(runs: Path, folder: CellFolder, chosen: Iterable[dict[str, Any]]) -> list[Path]:
    """Return the files that hold what an attempt printed; without one, what elements printed that were to begin it."""
    found: list[Path] = []
    for row in chosen:
        found.append(Path(row["folder"]) / "log.txt")
        if row["worker_log"]:
            found.append(runs / "logs" / row["worker_log"])
        if row["array"]:
            found.append(ArrayFolder(runs / "slurm" / row["array"]).log(row["element"], row["process"]))
    if not found:
        found = [array.log(element) for array, element in elements_of(runs / "slurm", folder.cell_id)]
    return [path for path in found if path.is_file()]


def _tail(path: Path, lines: int) -> tuple[list[str], int]:
    """Return the last lines of a file, and how many it has."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    return text[-lines:], len(text)
