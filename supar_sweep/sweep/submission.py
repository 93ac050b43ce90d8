"""A grid as it was submitted, frozen in plan.json, and the lock of its one `run`. No torch.

    <runs>/cells/                         the cells of all experiments: shared ones train once
    <runs>/experiments/<name>/plan.json   what was asked for: points, resolved cells, provenance
    <runs>/experiments/<name>/lock        held by the `run` that works on it

`run` writes the plan before anything starts; jobs, `status` and `plot` read it and nothing else, so
editing a config while jobs wait changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from supar_sweep.config.decode import Once, encode
from supar_sweep.config.fields import check_folder_name
from supar_sweep.config.schema import CellConfig, DataConfig, RuntimeConfig
from supar_sweep.errors import ConfigError, RecordError, SuparError
from supar_sweep.sweep import locks
from supar_sweep.sweep.code import code_version
from supar_sweep.sweep.files import read_json, write_json
from supar_sweep.sweep.identity import cell_id, label, plain_value
from supar_sweep.sweep.interrupt import CANCEL
from supar_sweep.sweep.records import Store

PLAN_VERSION = 1

_NOT_EXTENDED = f'"extended": [], "plan_version": {PLAN_VERSION}, '.encode()
"""How a plan's text tells that nothing was added. No text of the user's can hold it: JSON writes quotes in it as \\"."""


class Point(Protocol):
    """A grid point: where it stands (axis -> value) and its cell. grid.GridPoint is one."""

    @property
    def axes(self) -> Mapping[str, Any]: ...

    @property
    def cell(self) -> CellConfig: ...


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """One cell to train, whatever number of grid points it serves.

    Args:
        cell_id: 16 hex digits.
        label: short name for people.
        fingerprint: of its corpus.
        cell: CellConfig, plain.
    """

    cell_id: str
    label: str
    fingerprint: str
    cell: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A frozen grid.

    Args:
        experiment: its name.
        points: one row a grid point: what analysis reads of a cell, the axes' values, and the
            cell_id.
        cells: the distinct cells by id, in the order of the grid.
        runtime: RuntimeConfig, plain.
        provenance: code version, packages, command line, time.
        extended: what `extend=true` added to the grid, in plain values (extension.Added); its points and cells are among
            those above.
    """

    experiment: str
    points: tuple[Mapping[str, Any], ...]
    cells: Mapping[str, PlannedCell]
    runtime: Mapping[str, Any]
    provenance: Mapping[str, Any]
    extended: tuple[Mapping[str, Any], ...] = ()


def make_plan(
    experiment: str,
    points: Iterable[Point],
    *,
    runtime: RuntimeConfig,
    fingerprint: Callable[[DataConfig], str],
    provenance: Mapping[str, Any],
) -> Plan:
    """Return the frozen plan of a grid.

    Points that train the same way (muP and SuPar at density 1) share one cell.

    Args:
        experiment: its name: a folder of this name is made.
        points: the grid.
        runtime: how cells are computed.
        fingerprint: corpus -> fingerprint; asked once for each corpus of the grid.
        provenance: see `provenance`.
    """
    prints: dict[DataConfig, str] = {}
    encoded, plain = Once(encode), Once(plain_value)
    rows, cells = [], {}
    for point in points:
        cell = point.cell
        if cell.data not in prints:
            prints[cell.data] = fingerprint(cell.data)
        this = cell_id(cell, prints[cell.data], plain)
        if this not in cells:
            cells[this] = PlannedCell(
                cell_id=this,
                label=label(cell),
                fingerprint=prints[cell.data],
                cell=encode(cell, encoded),
            )
        rows.append({**facts(cell), **encode(dict(point.axes)), "cell_id": this})
    return Plan(
        experiment=experiment,
        points=tuple(rows),
        cells=cells,
        runtime=encode(runtime),
        provenance=dict(provenance),
    )


def facts(cell: CellConfig) -> dict[str, Any]:
    """Return what analysis reads of every cell, whether it is an axis or not."""
    return {
        "parameterization": cell.parameterization,
        "width": cell.model.width,
        "density": cell.density,
        "n_layer": cell.model.n_layer,
        "lr": cell.hparams.lr,
        "init_std": cell.hparams.init_std,
        "seed": cell.seed,
    }


@dataclass(frozen=True)
class Experiment:
    """One experiment's place in a runs folder.

    Args:
        runs: the runs folder.
        name: the experiment's name; one folder's name.

    Raises:
        ConfigError: a name that is no plain folder name.
    """

    runs: Path
    name: str

    def __post_init__(self) -> None:
        check_folder_name("experiment.name", self.name)

    @property
    def store(self) -> Store:
        """The cells, shared by all experiments of the runs folder."""
        return Store(self.runs / "cells")

    @property
    def folder(self) -> Path:
        """The experiment's own folder: plan, lock, figures."""
        return self.runs / "experiments" / self.name

    def hold(self) -> IO[str]:
        """Return the experiment's lock, held until it is closed. Raises BusyError where another
        `run` has it.
        """
        return locks.hold(self.folder / "lock", f"experiment {self.name}")

    def runner(self) -> locks.Holder | None:
        """Return the live `run` of the experiment, or None."""
        path = self.folder / "lock"
        return locks.holder(path) if locks.is_held(path) else None

    def write(self, plan: Plan) -> None:
        """Freeze the plan. Raises RecordError where the folder cannot be written."""
        cells = {this: vars(cell) for this, cell in plan.cells.items()}
        plain = {"plan_version": PLAN_VERSION, **vars(plan), "cells": cells}
        write_json(self.folder / "plan.json", plain, indent=None)

    def plan(self) -> Plan:
        """Return the plan as it was frozen by the last `run`.

        Raises:
            ConfigError: nothing of this name was ever run; the names that were are listed.
            RecordError: the file is torn.
        """
        path = self.folder / "plan.json"
        try:
            plain = read_json(path)
        except RecordError as error:
            mended = "" if isinstance(error.__cause__, OSError) else "; `run` writes it anew"
            raise RecordError(f"{error}{mended}") from error
        if plain is None:
            known = sorted(entry.parent.name for entry in self.runs.glob("experiments/*/plan.json"))
            raise ConfigError(
                "experiment.name",
                f"has not been run in {self.runs}",
                value=self.name,
                allowed=known or "none there; `run` comes first",
                nearest_to=self.name,
            )
        try:
            return Plan(
                experiment=plain["experiment"],
                points=tuple(plain["points"]),
                # JSON's keys are sorted; the grid's order is that of its points
                cells={point["cell_id"]: PlannedCell(**plain["cells"][point["cell_id"]]) for point in plain["points"]},
                runtime=plain["runtime"],
                provenance=plain["provenance"],
                extended=tuple(plain.get("extended", ())),  # plans from before it have none
            )
        except (KeyError, TypeError) as error:
            raise RecordError(f"{path} is torn ({error}); `run` writes it anew") from error

    def may_be_extended(self) -> bool:
        """Return False where no plan was written, or where the last one has nothing added to it: told from its text, because
        reading the plan of a large grid takes a second.
        """
        try:
            return _NOT_EXTENDED not in (self.folder / "plan.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # `plan` says what is wrong
            return True

    def cancel(self) -> locks.Holder:
        """Ask the experiment's `run` to stop its cells and itself, and return which process it is.

        Raises:
            SuparError: nothing runs, or it runs on another machine; the text says where.
        """
        runner = self.runner()
        if runner is None:
            raise SuparError(f"experiment {self.name} is not running in {self.runs}")
        if runner.host != socket.gethostname():
            raise SuparError(f"experiment {self.name} is run by {runner}: cancel it there")
        try:
            os.kill(runner.pid, CANCEL)
        except OSError as error:
            raise SuparError(f"cannot signal the run ({runner}): {error.strerror}") from error
        return runner


def provenance(package: Path, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of a submission: code version (git's, and a hash of the files), packages, command line, host, time.

    Args:
        package: folder of the code whose version counts: supar_sweep's own.
        versions: of Python and of the packages that decide a run's numbers.
    """
    return {
        **_git(package.resolve()),
        "code": code_version(package),
        "versions": dict(versions),
        "argv": list(sys.argv),
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git(package: Path) -> dict[str, Any]:
    """Return git_sha and git_dirty (a hash of the uncommitted changes, null for none); nulls
    outside a checkout.
    """
    nothing = {"git_sha": None, "git_dirty": None}

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, check=True).stdout

    try:
        if not git("ls-files", "--", "."):  # a virtual environment in somebody's repository
            return nothing
        sha = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD", "--", ".") + git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return nothing
    return {
        "git_sha": sha,
        "git_dirty": hashlib.sha256(changes).hexdigest()[:16] if changes else None,
    }
