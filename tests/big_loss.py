"""A training function (train.target) whose losses are far above log(n_vocab): no model, real records."""

from __future__ import annotations

import math
from typing import Any

from supar_sweep.config.schema import CellConfig
from supar_sweep.training.member import Outcome

TARGET = "tests.big_loss.train"
OPTIMUM, WALL, FLOOR = -8.0, -6.0, 300.0


def train(cell: CellConfig, *rest: Any, sink: Any, **more: Any) -> Outcome:
    """Return the outcome of a run without having one: a parabola in log2 lr, and divergence above 2^WALL."""
    log2_lr, steps = math.log2(cell.hparams.lr), cell.train.steps
    loss = FLOOR + (log2_lr - OPTIMUM) ** 2
    sink.begin(0)
    sink.log(step=steps, loss=loss)
    if log2_lr > WALL:
        return Outcome(end="diverged", steps_done=steps, last_finite_loss=loss)
    return Outcome(end="done", steps_done=steps, train_loss=loss, val_loss=loss, last_finite_loss=loss)
