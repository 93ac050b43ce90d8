"""A training function (train.target) whose basins are known by formula: no model, real records.

The optimum of log2 lr is OPTIMUM at density 1 and moves up by MOVED octaves for each halving of density; lr of 2^WALL and more
diverge. One above 2^SLOW_ABOVE takes SLOW_S where it has SLOW_STEPS, to be disturbed.
"""

from __future__ import annotations

import math
import time
from typing import Any

from supar_sweep.config.schema import CellConfig
from supar_sweep.training.member import Outcome

TARGET = "tests.known_basin.train"
OPTIMUM, MOVED, WALL, FLOOR, CURVATURE = -7.0, 1.0, 0.0, 2.4, 0.02
SLOW_STEPS, SLOW_ABOVE, SLOW_S = 1000, -5.0, 1.0


def optimum(density: float) -> float:
    """Return log2 of the best lr."""
    return OPTIMUM - MOVED * math.log2(density)


def loss(cell: CellConfig) -> float:
    """Return the final loss: a parabola, and what a seed adds to all of its runs and to this one."""
    log2_lr = math.log2(cell.hparams.lr)
    noise = 1e-3 * math.sin(997.0 * (cell.seed + 1) * (log2_lr + 0.37) * (cell.density + 0.11))
    return FLOOR + CURVATURE * (log2_lr - optimum(cell.density)) ** 2 + 0.01 * cell.seed + noise


def train(cell: CellConfig, *rest: Any, sink: Any, **more: Any) -> Outcome:
    """Return the outcome of a run without having one."""
    if cell.train.steps == SLOW_STEPS and math.log2(cell.hparams.lr) > SLOW_ABOVE:
        time.sleep(SLOW_S)
    found, steps = loss(cell), cell.train.steps
    sink.begin(0)
    sink.log(step=steps, loss=found)
    if math.log2(cell.hparams.lr) >= WALL:
        return Outcome(end="diverged", steps_done=steps, last_finite_loss=found)
    return Outcome(end="done", steps_done=steps, train_loss=found, val_loss=found, last_finite_loss=found)
