"""Records of a made-up grid whose optima, costs and failures are known by formula, as `report` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log2, sin
from typing import Any

from analysis.report import Records, StudyRecords, study_cell_ids
from supar_sweep.config.decode import decode, encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.rules.hparams import HParams
from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.status import CellState
from supar_sweep.sweep.submission import Plan, make_plan
from supar_sweep.sweep.winner import Winner
from supar_sweep.training.cost import flops_per_step
from tests.tiny import tiny_cell, tiny_runtime

OPTIMA = {"sp": (-7.0, -4.5), "mup": (-7.0, -6.6), "supar": (-7.0, -7.05)}
"""log2 of the best lr at each of DENSITIES: SP moves far, muP stays with too much noise to say so, SuPar stays."""
NOISE = {"sp": 0.0005, "mup": 0.004, "supar": 0.0005}
DENSITIES = (1.0, 1 / 16)
LRS = tuple(2.0**x for x in range(-11, -2))
SEEDS = (0, 1)
FINGERPRINT = "f" * 64
VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "supar_sweep": "0.1.0"}
PROVENANCE: Mapping[str, Any] = {
    "git_sha": "0123456789abcdef0123456789abcdef01234567",
    "git_dirty": None,
    "versions": VERSIONS,
    "argv": ["supar-sweep run", "experiment=mine", "experiment.axes.lr={log2: [-11, -3]}", "hydra.run.dir=."],
    "host": "host",
    "time": "2026-11-20T10:00:00+0000",
    "hparams": {"file": "runs/studies/proxy/best.yaml", "study": "proxy", "study_hash": "abc", "trial": 2},
}
TRAIN_S, STUDY_TRAIN_S = 3.0, 0.5


def grid(provenance: Mapping[str, Any] | None = None, width: int = 32) -> Plan:
    """Return a plan over parameterization x density x lr x seed."""
    points = []
    for name in OPTIMA:
        for density in DENSITIES:
            for lr in LRS:
                for seed in SEEDS:
                    axes = {"parameterization": name, "density": density, "lr": lr, "seed": seed}
                    settings = {"hparams.lr": lr, **{k: v for k, v in axes.items() if k != "lr"}, "model.width": width}
                    points.append(GridPoint(axes, tiny_cell(**settings)))
    return make_plan(
        "mine",
        points,
        runtime=tiny_runtime(),
        fingerprint=lambda data: FINGERPRINT,
        provenance={**PROVENANCE, **(provenance or {})},
    )


def loss_of(point: Mapping[str, Any]) -> float:
    """Return the made-up loss of a grid point: a parabola around its optimum, a seed's offset, fixed noise."""
    name, x, seed = point["parameterization"], log2(point["lr"]), point["seed"]
    trained_as = "mup" if name == "supar" and point["density"] == 1 else name  # they share a cell
    optimum = OPTIMA[name][DENSITIES.index(point["density"])]
    noise = NOISE["supar" if point["density"] == 1 else trained_as] * sin(17 * x + 5 * seed + 3 * point["density"])
    return 2.4 + 0.02 * (x - optimum) ** 2 + 0.01 * seed + noise


def proxy() -> CellConfig:
    """Return the cell that the study tuned: the base itself."""
    return tiny_cell(**{"model.width": 16, "density": 1.0, "parameterization": "mup"})


def winner(**lineage: Any) -> Winner:
    """Return the best.yaml of the study that the grid names."""
    hparams = HParams(lr=2.0**-7, init_std=0.1, alpha_in=2.0, alpha_out=1.0, weight_decay=0.1)
    known = {
        "study": "proxy",
        "study_hash": "abc",
        "trial": 2,
        "n_trials": 3,
        "metric": "train_loss",
        "value": 2.5,
        "confirmed": [{"trial": 2, "seeds": [7, 8], "values": [2.5, 2.7]}],
        "space": {"lr": {"low_log2": -11.0, "high_log2": -4.0}},
        "sampler": {"name": "tpe", "seed": 0},
        "data": {"name": "stdlib", "fingerprint": FINGERPRINT},
        "rules_version": 1,
        "proxy": encode(proxy()),
        "provenance": {"argv": ["supar-sweep tune", "study.name=proxy"], "git_sha": PROVENANCE["git_sha"]},
        **lineage,
    }
    return Winner(hparams, known, proxy().base)


TRIALS: tuple[dict[str, Any], ...] = (
    {"number": 0, "end": "done", "loss": 2.9, "params": {"lr": 2.0**-9}},
    {"number": 1, "end": "diverged", "loss": None, "params": {"lr": 2.0**-4}},
    {"number": 2, "end": "done", "loss": 2.5, "params": {"lr": 2.0**-7}},
    {"number": 3, "end": "failed", "loss": None, "params": {"lr": 2.0**-8}},
)


def study(**lineage: Any) -> StudyRecords:
    """Return the study's records: each of its runs took STUDY_TRAIN_S."""
    best = winner(**lineage)
    ended = [row for row in TRIALS if row["end"] != "failed"]
    flops = proxy().train.steps * flops_per_step(proxy())
    results = {this: {"end": "done", "flops": flops, "train_s": STUDY_TRAIN_S} for this in study_cell_ids(best, ended)}
    return StudyRecords(winner=best, trials=TRIALS, results=results)


def records(plan: Plan | None = None, ends: Mapping[str, CellState] | None = None, **changes: Any) -> Records:
    """Return the records of a grid, all done but the cells in `ends`.

    Args:
        plan: default: `grid()`.
        ends: cell id -> where it stands instead.
        changes: of the Records.
    """
    plan, ends = plan or grid(), ends or {}
    flops = {this: run_flops(plan, this) for this in plan.cells}
    states = {this: ends.get(this, CellState("done", attempts=1)) for this in plan.cells}
    results = {
        this: {
            "end": state.state,
            "flops": flops[this],
            "train_s": TRAIN_S,
            "device": "cpu",
            "device_name": "A processor",
            "versions": VERSIONS,
            "provenance": PROVENANCE,
            "data": {"name": "stdlib", "fingerprint": FINGERPRINT, "bytes": 1000},
        }
        for this, state in states.items()
        if state.complete
    }
    rows = []
    for point in plan.points:
        end = states[point["cell_id"]].state
        loss = loss_of(point) if end == "done" else None
        rows.append({**point, "end": end, "train_loss": loss, "val_loss": loss, "live_parameters": 1000})
    made = Records(
        plan=plan,
        rows=rows,
        states=states,
        results=results,
        curve_of=lambda this: [{"step": s, "tokens": 64 * s, "loss": 5.0 / s} for s in range(1, 13)],
        study=study(),
        unfinished_s=0.0,
        metric="train_loss",
        argv=["supar-sweep report", "experiment.name=mine"],
        made="2026-11-20 10:00 +0000",
        version="0.1.0",
    )
    return replace(made, **changes)


def run_flops(plan: Plan, this: str) -> float:
    """Return the FLOPs of one run of a planned cell."""
    cell = cell_of(plan, this)
    return float(cell.train.steps * flops_per_step(cell))


def cell_of(plan: Plan, this: str) -> CellConfig:
    """Return a planned cell, decoded."""
    return decode(CellConfig, plan.cells[this].cell)
