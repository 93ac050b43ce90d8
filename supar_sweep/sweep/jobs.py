"""The door between a grid and the processes that train it: jobs, and what a launcher must do.

It stands here, not in launchers/, because `complete` and `tune` are handed a launcher and import
none. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.sweep.identity import cell_id, label
from supar_sweep.sweep.records import CellFolder, Store
from supar_sweep.sweep.submission import Plan

RETRIES = 2
"""A cell whose process was lost is tried again so often within one call."""

POLL_S = 0.5
"""How long a Ctrl-C, or a cell held by another process, may wait to be noticed."""

Job = Mapping[str, Any]
"""One cell's work as plain values, resolved at submission. A worker runs from it and nothing else.

    store         path of the runs folder's cells
    folder        the cell's folder, relative to it
    cell_id       16 hex digits
    cell          CellConfig, plain
    runtime       RuntimeConfig, plain
    fingerprint   of the corpus
    provenance    facts of the submission, kept in each attempt
"""


class Event(NamedTuple):
    """The end of one job.

    Args:
        cell_id: whose.
        end: a typed end (records.End), or "busy": another process holds the cell.
        message: one line on the cause; "" where the end says it all.
        died: the process ended without a word (killed, crashed).
        wanted: somebody asked for this end (SLURM's scancel).
    """

    cell_id: str
    end: str
    message: str = ""
    died: bool = False
    wanted: bool = False

    @property
    def lost(self) -> bool:
        """Whether the cell's process was taken from it, killed or told to stop by nobody knows whom: worth another try,
        where it was not the coordinator itself that told it.
        """
        return self.died or (self.end == "cancelled" and not self.wanted)


class Launcher(Protocol):
    """Brings jobs to processes. Records are the workers' doing; a launcher tells only that and how
    a job ended.
    """

    @property
    def name(self) -> str:
        """Return the word of conf/launcher that chose it."""

    @property
    def processes(self) -> int:
        """Return how many groups are trained at once."""

    @property
    def slots(self) -> int:
        """Return how many calls of `submit` are worth having under way at once: the rest is better kept back, where
        it can be held.
        """

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs that one process trains together, and return at once. They may be gathered with others until the next
        call of `events`.

        Args:
            jobs: at least one, of different cells.
        """

    def events(self, timeout_s: float) -> list[Event]:
        """Return the ends since the last call, in order; wait up to `timeout_s` for the first.

        Every submitted job yields exactly one event, as soon as it has ended, whatever it was submitted with; also after
        `cancel`. Nothing under way: returns [] at once.
        """

    def known(self) -> Mapping[str, str]:
        """Return pending, held or running of each cell that is in a queue already, by cell_id: such a job, submitted again, is
        followed.
        """

    def waiting(self) -> set[str]:
        """Return the cells that were submitted and have not begun, as far as was seen."""

    def withdraw(self) -> set[str]:
        """Take back what has not begun, and return its cell_ids: these have no event."""

    def cancel(self, *, now: bool = False) -> None:
        """Ask every job to save and end as `cancelled`; `now` kills instead. Nothing is taken
        afterwards.
        """

    def close(self) -> None:
        """Let go of all processes: asked to stop first, killed after a grace."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def make_job(
    store: Store,
    cell: CellConfig,
    runtime: RuntimeConfig,
    fingerprint: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the job of one cell: plain values all through, ready for JSON.

    Args:
        store: where its record goes.
        cell: what to train.
        runtime: how to compute it.
        fingerprint: of the corpus.
        provenance: facts of the submission, kept in each attempt.
    """
    this = cell_id(cell, fingerprint)
    folder = store.folder(this, label(cell))
    return _job(store, folder, encode(cell), encode(runtime), fingerprint, provenance)


def planned_job(store: Store, folder: CellFolder, plan: Plan) -> dict[str, Any]:
    """Return the job of a cell of a frozen plan.

    Args:
        store: where its record goes.
        folder: the cell's, in the store.
        plan: has the cell.
    """
    cell = plan.cells[folder.cell_id]
    return _job(store, folder, cell.cell, plan.runtime, cell.fingerprint, plan.provenance)


def _job(
    store: Store,
    folder: CellFolder,
    cell: Mapping[str, Any],
    runtime: Mapping[str, Any],
    fingerprint: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "store": str(store.root.absolute()),
        "folder": str(folder.path.relative_to(store.root)),
        "cell_id": folder.cell_id,
        "cell": dict(cell),
        "runtime": dict(runtime),
        "fingerprint": fingerprint,
        "provenance": dict(provenance),
    }


def folder_of(job: Job) -> CellFolder:
    """Return the cell folder that a job works in."""
    return CellFolder(Path(job["store"]) / job["folder"])
