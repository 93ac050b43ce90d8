"""Studies whose losses are a formula, for the tests of the tuner: no processes, exact and fast."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from supar_sweep.config.schema import CellConfig
from supar_sweep.config.study import StudyConfig
from supar_sweep.sweep.identity import cell_id
from supar_sweep.sweep.journal import read_trials
from supar_sweep.sweep.trainer import CellEnd
from supar_sweep.sweep.tune import tune
from tests.tiny import tiny_cell

FINGERPRINT = "f" * 16
LOG2_LR_OPT, LOG2_STD_OPT = -7.3, -3.6


@dataclass
class Basin:
    """A trainer whose loss is a formula: a paraboloid in (log2 lr, log2 init_std) with a seed's offset.

    It diverges above a learning rate, and for chosen learning rates on chosen seeds.
    """

    slots: int = 4
    diverges_above_log2_lr: float = 0.0
    diverges_on_seeds: Mapping[float, Collection[int]] = field(default_factory=dict)
    fails_above_log2_lr: float = 0.0
    floor: float = 2.0
    slow_s: float = 0.0
    trained: list[CellConfig] = field(default_factory=list)
    _ends: list[CellEnd] = field(default_factory=list)

    def submit(self, cell: CellConfig) -> str:
        made = cell_id(cell, FINGERPRINT)
        self.trained.append(cell)
        x, y = math.log2(cell.hparams.lr), math.log2(cell.hparams.init_std)
        end = "done"
        if x > self.diverges_above_log2_lr or cell.seed in self.diverges_on_seeds.get(cell.hparams.lr, ()):
            end = "diverged"
        if x > self.fails_above_log2_lr:
            end = "failed"
        loss = self.floor + 0.05 * (x - LOG2_LR_OPT) ** 2 + 0.02 * (y - LOG2_STD_OPT) ** 2 + 0.01 * cell.seed
        result = {"summary": {"train_loss": loss, "val_loss": loss + 1}} if end == "done" else None
        self._ends.append(CellEnd(made, end, "boom" if end == "failed" else "", result))
        return made

    def ends(self, timeout_s: float) -> Sequence[CellEnd]:
        time.sleep(self.slow_s)
        # last in, first out: a batch must not depend on who finished first
        return [self._ends.pop()] if self._ends else []


def proxy(**overrides: Any) -> CellConfig:
    return tiny_cell(
        **{
            "density": 1.0,
            "seed": 0,
            "hparams.lr": 2.0**-9,
            "hparams.init_std": 2.0**-4,
            **overrides,
        }
    )


def study(**overrides: Any) -> StudyConfig:
    values: dict[str, Any] = {
        "name": "proxy",
        "n_trials": 24,
        "sampler": "tpe",
        "seed": 0,
        "metric": "train_loss",
        "batch_trials": 4,
        "confirm_top_k": 2,
        "confirm_seeds": (1, 2),
        "space": {
            "lr": {"low_log2": -12, "high_log2": -2},
            "init_std": {"low_log2": -7, "high_log2": -1},
        },
    }
    return StudyConfig(**{**values, **overrides})


def run(folder: Path, trainer: Basin, config: StudyConfig | None = None, **kwargs: Any) -> Any:
    return tune(
        config or study(),
        kwargs.pop("proxy", proxy()),
        trainer,
        folder,
        fingerprint=kwargs.pop("fingerprint", FINGERPRINT),
        provenance={"version": "test"},
        **kwargs,
    )


def trials(folder: Path) -> list[FrozenTrial]:
    return read_trials(folder / "journal.log", "proxy")


def values(folder: Path) -> list[float | None]:
    return [trial.value for trial in trials(folder)]
