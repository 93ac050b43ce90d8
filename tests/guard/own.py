"""A training function of a user's own: the loss is a formula, so its record is exact on every machine."""

from __future__ import annotations

import math
from typing import Any

from supar_sweep.config.schema import CellConfig
from supar_sweep.training.member import Outcome

TARGET = "tests.guard.own.train"


def train(cell: CellConfig, *rest: Any, sink: Any, **more: Any) -> Outcome:
    """Return the outcome of a basin in log2 lr.

    Its optimum is -7 at density 1, and a third of an octave more for each halving of density. An lr of 1 and more diverges.
    """
    log2_lr, steps = math.log2(cell.hparams.lr), cell.train.steps
    at = log2_lr + 7 + math.log2(cell.density) / 3
    loss = 2.5 + 0.05 * at**2 + 0.003 * at**3 + 0.01 * cell.seed + 2e-4 * ((7 * cell.seed + 3 * int(log2_lr)) % 5)
    sink.begin(0)
    for step in range(1, steps + 1):
        sink.log(step=step, loss=loss + (steps - step) / steps)
    if log2_lr >= 0:
        return Outcome(end="diverged", steps_done=steps, last_finite_loss=loss)
    return Outcome(end="done", steps_done=steps, train_loss=loss, val_loss=loss + 0.1, last_finite_loss=loss)
