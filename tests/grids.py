"""Grids of made-up cells, real pools, and `run`s in processes of their own, to be disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers.local import LocalLauncher
from supar_sweep.sweep.complete import Summary, complete
from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.jobs import make_job
from supar_sweep.sweep.records import Store
from supar_sweep.sweep.status import (
    folders,
)
from supar_sweep.sweep.submission import Experiment, Plan, make_plan
from tests import fake_cells
from tests.clusters import PATIENCE_S
from tests.tiny import tiny_cell, tiny_runtime


def pool(runs: Path, processes: int = 2, **options: Any) -> LocalLauncher:
    options = {"function": fake_cells.RUN, "grace_s": 30.0, **options}
    return LocalLauncher(processes=processes, threads=1, log_folder=runs / "logs", **options)


def job_of(runs: Path, seed: int) -> dict[str, Any]:
    return make_job(Store(runs / "cells"), tiny_cell(seed=seed), tiny_runtime(), "data", {})


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody collects orphans in a container without an init


def experiment(runs: Path, name: str = "test") -> Experiment:
    return Experiment(runs, name)


def plan_of(axes: Sequence[Mapping[str, Any]], name: str = "test") -> Plan:
    points = [GridPoint(axes=each, cell=tiny_cell(**each)) for each in axes]
    return make_plan(name, points, runtime=tiny_runtime(), fingerprint=lambda data: "data", provenance={"v": 1})


def seeds(*values: int) -> Plan:
    return plan_of([{"seed": value} for value in values])


class Told:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.counts: list[Mapping[str, int]] = []
        self.etas: list[float | None] = []
        self.messages: list[str] = []

    def update(self, counts: Mapping[str, int], eta_s: float | None) -> None:
        self.counts.append(counts)
        self.etas.append(eta_s)

    def message(self, text: str) -> None:
        self.messages.append(text)


def run(runs: Path, plan: Plan, told: Told | None = None, **options: Any) -> Summary:
    of_pool = {key: options.pop(key) for key in ("processes", "function") if key in options}
    with pool(runs, **of_pool) as launcher:
        return complete(experiment(runs), plan, launcher, progress=told, **options)


def curves(runs: Path, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    cells = folders(experiment(runs).store, plan)
    return {this: folder.metrics() for this, folder in cells.items()}


RUN = """
import sys, pathlib
from tests.grids import run, seeds, Told
told = Told()
summary = run(pathlib.Path(sys.argv[1]), seeds(*map(int, sys.argv[2:])), told)
print(dict(summary.counts), summary.interrupted, told.messages, flush=True)
"""


def start(runs: Path, *values: int, **options: Any) -> subprocess.Popen[str]:
    """A `run` of a grid with a slow cell, in a process group of its own, at work on that cell when this returns."""
    command = [sys.executable, "-c", RUN, str(runs), *map(str, values)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)
    wait_for(lambda: list((runs / "cells").glob(f"*/*-s{fake_cells.SLOW}-*/checkpoints/last.json")))
    return process


def worker_pids(runs: Path) -> list[int]:
    infos = (json.loads(p.read_text()) for p in runs.glob("cells/*/*/attempts/*/attempt.json"))
    return [info["pid"] for info in infos]
