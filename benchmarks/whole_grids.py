"""Benchmark b: a whole grid, one process a point the reference way, against one `supar-sweep run`, in wall time.

The reference's time is extrapolated from real processes spread over the grid, in two schedules: one after another with torch's
default threads, as its scripts do, and as many at a time as there are cores, each with one thread. Ours is run in full.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cells import SHAPE, reference_point, settings, write_tokens
from benchmarks.machine import cores
from benchmarks.reference import Point, to_command_line
from benchmarks.turns import plain_environment
from supar_sweep.sparse.route import choose_route
from supar_sweep.sweep.records import finite
from supar_sweep.sweep.status import folders
from supar_sweep.sweep.submission import Experiment

REFERENCE = Path(__file__).with_name("reference.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Setting:
    """What to measure.

    Args:
        widths: a grid each.
        parameterizations, one_in, n_lrs, seeds: the grid's axes; densities are 1 / one_in, lrs powers of 2 from 2^-11 up.
        n_processes: real processes of the reference, in each schedule.
        steps, batch_seqs, context_tokens: of a point.
        device: "cpu" or "cuda".
        precision: train.precision.
    """

    widths: Sequence[int] = (64, 256)
    parameterizations: Sequence[str] = ("sp", "mup", "supar")
    one_in: Sequence[int] = (1, 4, 16, 64)
    n_lrs: int = 8
    seeds: Sequence[int] = (0, 1)
    n_processes: int = 12
    steps: int = 100
    batch_seqs: int = 8
    context_tokens: int = 64
    device: str = "cpu"
    precision: str = "float32"

    def words(self, width: int) -> list[str]:
        """Return what is typed after `supar-sweep run`."""
        densities = ", ".join(repr(1 / each) for each in self.one_in)
        return [
            *SHAPE,
            *(f"model.width={width}", f"model.context_tokens={self.context_tokens}"),
            *(f"train.steps={self.steps}", f"train.batch_seqs={self.batch_seqs}", f"train.precision={self.precision}"),
            *(f"runtime.device={self.device}", f"experiment.name=benchmark_{width}"),
            f"experiment.axes.parameterization=[{', '.join(self.parameterizations)}]",
            f"experiment.axes.density=[{densities}]",
            f"experiment.axes.lr={{log2: [-11, {self.n_lrs - 12}], step: 1}}",
            f"experiment.axes.seed=[{', '.join(map(str, self.seeds))}]",
        ]

    def shared(self, share: float) -> Setting:
        """Return the grid with so many of its lrs only, at least one.

        Args:
            share: in (0, 1].
        """
        return replace(self, n_lrs=max(1, round(share * self.n_lrs)))


def spread(n_points: int, n: int, inner: int) -> list[int]:
    """Return n indices spread evenly over the grid, and over the positions within a block of its inner axes.

    Args:
        n_points: points of the grid, outer axes slowest.
        n: how many, at most n_points.
        inner: points of the inner axes (lr, seed), a divisor of n_points.
    """
    n_blocks = n_points // inner
    # 5 is prime to every number of lrs and seeds in use, so it walks through all of them
    return [i * n_blocks // n * inner + (5 * i) % inner for i in range(min(n, n_points))]


def measure(setting: Setting, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return a row for each width, see `compare`.

    Args:
        setting: what to measure.
        folder: an empty one, for the reference's tokens.
        say: told what is measured now.
    """
    rows = []
    for width in setting.widths:
        words = setting.words(width)
        cells = [point.cell for point in settings(words).points()]
        data = write_tokens(cells[0], folder)
        chosen = spread(len(cells), setting.n_processes, setting.n_lrs * len(setting.seeds))
        points = [reference_point(cells[index], data=data, device=setting.device) for index in chosen]
        model = cells[0].model
        route = choose_route(setting.device, setting.batch_seqs * model.context_tokens, width, model.d_ffn).route
        say(f"width {width}: {len(points)} processes of the reference, one after another on {setting.device}")
        sequential = run_reference(points, 1, {})
        at_a_time = cores() if setting.device == "cpu" else 2
        say(f"width {width}: {at_a_time} at a time with one thread")
        packed = run_reference(points, at_a_time, ONE_THREAD)
        same_route = [replace(point, route=route) for point in points]
        faster_is_packed = packed["wall_s"] < sequential["wall_s"]
        say(f"width {width}: the faster of the two on our matmul route, {route}")
        routed = run_reference(same_route, *((at_a_time, ONE_THREAD) if faster_is_packed else (1, {})))
        say(f"width {width}: supar-sweep run, {len(cells)} points")
        ours = run_ours(words, chosen)
        walls = (each["wall_s"] for each in (sequential, packed, routed, ours))
        row = {"device": setting.device, "width": width, **compare(len(cells), len(points), *walls)}
        facts = {"ours_cells": ours["cells"], "ours_diverged": ours["diverged"], "at_a_time": at_a_time, "route": route}
        rows.append({**row, **same_losses(packed["val_losses"], ours["val_losses"]), **facts})
    return rows


def compare(
    n_points: int, n_processes: int, sequential_s: float, packed_s: float, routed_s: float, ours_s: float
) -> dict[str, Any]:
    """Return the grid's times and ratios.

    Args:
        n_points: of the grid.
        n_processes: processes of the reference that were run.
        sequential_s, packed_s: their wall time in the two schedules.
        routed_s: in the faster of them, on ours' matmul route.
        ours_s: wall time of the whole grid.
    """
    scale = n_points / n_processes
    faster = "packed" if packed_s < sequential_s else "sequential"
    return {
        "points": n_points,
        "processes": n_processes,
        "sequential_s": sequential_s * scale,
        "packed_s": packed_s * scale,
        "same_route_s": routed_s * scale,
        "ours_s": ours_s,
        "faster": faster,
        "sequential_x": sequential_s * scale / ours_s,
        "x": min(sequential_s, packed_s) * scale / ours_s,
        "x_same_route": routed_s * scale / ours_s,
    }


def same_losses(reference: Sequence[float | None], ours: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean held-out losses over the points that both trained to the end. Their batches and starts are different draws.

    Args:
        reference, ours: the losses of the same points; None where there is none.
    """
    both = [(a, b) for a, b in zip(reference, ours, strict=True) if a is not None and b is not None]
    means = (
        {"reference_val_loss": fmean(a for a, _ in both), "ours_val_loss": fmean(b for _, b in both)} if both else {}
    )
    return {**means, "losses_of": len(both)}


def run_reference(points: Sequence[Point], at_a_time: int, env: Mapping[str, str]) -> dict[str, Any]:
    """Return the wall time of a process a point, and their held-out losses.

    Args:
        points: what to train.
        at_a_time: processes at once.
        env: what sets their threads.
    """

    def one(point: Point) -> dict[str, Any]:
        command = [sys.executable, str(REFERENCE), *to_command_line(point)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, env={**plain_environment(), **env}
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    begun_s = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        answers = list(pool.map(one, points))
    wall_s = time.perf_counter() - begun_s
    return {"wall_s": wall_s, "val_losses": [finite(answer["val_loss"]) for answer in answers]}


def run_ours(words: Sequence[str], chosen: Sequence[int]) -> dict[str, Any]:
    """Return the wall time of `supar-sweep run` in a fresh folder, what was trained, and the sample's held-out losses.

    Args:
        words: after `supar-sweep run`.
        chosen: which points of the grid the reference ran.
    """
    with tempfile.TemporaryDirectory(prefix="supar-benchmark-") as folder:
        name = next(word.partition("=")[2] for word in words if word.startswith("experiment.name="))
        command = [sys.executable, "-m", "supar_sweep", "run", *words, f"runs_dir={folder}", "format=json"]
        begun_s = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=plain_environment())
        wall_s = time.perf_counter() - begun_s
        experiment = Experiment(Path(folder), name)
        plan = experiment.plan()
        results = {this: cell.result() or {} for this, cell in folders(experiment.store, plan).items()}
        losses = [results[plan.points[index]["cell_id"]].get("summary", {}).get("val_loss") for index in chosen]
    ends = [result.get("end") for result in results.values()]
    return {"wall_s": wall_s, "val_losses": losses, "cells": len(ends), "diverged": ends.count("diverged")}
