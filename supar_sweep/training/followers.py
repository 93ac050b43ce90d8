"""What the ranks above 0 do while rank 0 trains its cells (run_cell.py): the same steps, from the same checkpoint, on their own
share of every batch. They take no lock, make no attempt and write nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.training.checkpoint import Checkpoints
from supar_sweep.training.member import ShouldStop
from supar_sweep.training.ranks import Ranks, one_line
from supar_sweep.training.run_cell import corpus_of, train_all

if TYPE_CHECKING:
    from supar_sweep.training.train import Run

log = logging.getLogger(__name__)


def follow(jobs: Sequence[Mapping[str, Any]], *, should_stop: ShouldStop, ranks: Ranks) -> None:
    """Train along with rank 0, which says which of the cells it trains and from which step.

    Args:
        jobs: as rank 0 has them.
        should_stop: polled before each step; answers the same on every rank.
        ranks: this one is above 0.
    """
    begins: Mapping[str, int] = ranks.from_first(dict)
    followers = [Follower(job, begins[job["cell_id"]]) for job in jobs if job["cell_id"] in begins]
    train_all(followers, should_stop, ranks)


class Follower:
    """A rank's part in one cell.

    Args:
        job: the cell's.
        step: of the checkpoint that rank 0 goes on from; 0 = from the start.
    """

    def __init__(self, job: Mapping[str, Any], step: int) -> None:
        self.job, self.step = job, step

    def begin(self, together: int, ranks: Ranks) -> Run:
        """Return the cell's run; see `train.Run`."""
        from supar_sweep.training.train import Run

        cell = decode(CellConfig, self.job["cell"], prefix="cell")
        runtime = decode(RuntimeConfig, self.job["runtime"], prefix="runtime")
        checkpoints = Checkpoints(folder_of(self.job).checkpoints, self.job["cell_id"])
        resume = checkpoints.at(self.step) if self.step else None
        corpus = corpus_of(cell.data, self.job["fingerprint"])
        return Run(cell, runtime, corpus, sink=Silent(), resume=resume, together=together, ranks=ranks)

    def fail(self, error: Exception) -> None:
        """Leave a word in this rank's log; the record is rank 0's."""
        log.error("%s: %s", self.job["cell_id"], one_line(error), exc_info=error)

    def come_out(self, outcome: object) -> None:
        """Do nothing: rank 0 has the same outcome, and publishes it."""


class Silent:
    """A run's sink that writes nothing."""

    def begin(self, step: int, **info: Any) -> None:
        """Rank 0 writes it."""

    def log(self, **values: Any) -> None:
        """Rank 0 writes it."""

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Rank 0 writes it."""

    def warn(self, message: str) -> None:
        """Say it in this rank's log."""
        log.warning(message)
