"""Cells that go wrong on one rank: what their seeds stand for happens to rank 1, in the middle, while rank 0 is well."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from supar_sweep.training import run_cell
from supar_sweep.training.corpus import Corpus
from supar_sweep.training.ranks import Ranks
from supar_sweep.training.trainer import Trainer

RUN = "tests.rank_cells:run"
OTHER_MASKS, RAISES, HUNGRY, KILLED = range(1000, 1004)
AT_STEP = 5


def run(jobs: Sequence[Mapping[str, Any]], *, ranks: Ranks, **others: Any) -> None:
    """Train the cells; see `run_cell.run_cells`."""
    if ranks.rank == 1:
        jobs = [with_other_masks(job) if job["cell"]["seed"] == OTHER_MASKS else job for job in jobs]
        take_step = Trainer.step

        def goes_wrong(self: Trainer, corpus: Corpus, step: int) -> tuple[Tensor, Tensor, float]:
            if step == AT_STEP:
                misbehave(self.cell.seed)
            return take_step(self, corpus, step)

        Trainer.step = goes_wrong  # type: ignore[method-assign]
    run_cell.run_cells(jobs, ranks=ranks, **others)


def with_other_masks(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the job as another version of the code would have understood it."""
    return {**job, "cell": {**job["cell"], "seed": OTHER_MASKS - 1}}


def misbehave(seed: int) -> None:
    """Do what the seed stands for."""
    if seed == RAISES:
        raise RuntimeError("no luck")
    if seed == HUNGRY:
        raise MemoryError("not one byte left")
    if seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
