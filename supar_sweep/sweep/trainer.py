"""Cells trained for a coordinator that decides as it goes (the tuner), over any
launcher. No torch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.sweep.cohorts import Price, split
from supar_sweep.sweep.jobs import POLL_S, RETRIES, Event, Job, Launcher, folder_of, make_job
from supar_sweep.sweep.records import COMPLETE_ENDS, Store
from supar_sweep.sweep.status import cell_state, set_aside_torn
from supar_sweep.sweep.tries import Tries, as_recorded, next_try


@dataclass(frozen=True)
class CellEnd:
    """How a cell ended: id, typed end, message, and its result record where it has one."""

    cell_id: str
    end: str
    message: str
    result: Mapping[str, Any] | None


class CellTrainer:
    """Hands cells to a launcher and tells of each one's end once.

    A cell that is complete already ends at once; one that another process trains is waited for; one
    that lost its process, or its time, is tried again by the rule of `run` (tries.next_try).

    Args:
        store: where records are.
        launcher: who trains; the caller closes it.
        runtime: how cells are computed.
        fingerprint: of the corpus of all these cells.
        provenance: facts of the submission.
        price: what a cell can be trained with. Cells submitted since the last call of `ends` are trained together where
            they can be.
        retries: further tries of a cell whose process was lost (jobs.Event.lost), >= 0.
    """

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        runtime: RuntimeConfig,
        *,
        fingerprint: str,
        provenance: Mapping[str, Any],
        price: Callable[[CellConfig], Price] = lambda cell: Price(),
        retries: int = RETRIES,
    ) -> None:
        self._store, self._launcher, self._runtime = store, launcher, runtime
        self._fingerprint, self._provenance = fingerprint, provenance
        self._price, self._retries = price, retries
        self._new: list[tuple[Job, Price]] = []
        self._in_company: set[str] = set()
        self._jobs: dict[str, Job] = {}
        self._elsewhere: set[str] = set()
        self._tries: defaultdict[str, Tries] = defaultdict(Tries)
        self._ends: list[CellEnd] = []

    @property
    def slots(self) -> int:
        """How many cells are worth submitting at once."""
        return self._launcher.processes

    def submit(self, cell: CellConfig) -> str:
        """Return the cell's id at once. `ends` tells its end, also where it is complete already.

        Args:
            cell: what to train.

        """
        job = make_job(self._store, cell, self._runtime, self._fingerprint, self._provenance)
        this: str = job["cell_id"]
        if this in self._jobs:  # asked for twice while under way: its one end tells both
            return this
        state = cell_state(folder_of(job))
        if state.complete:
            folder_of(job).sweep()
            self._tell(job, state.state, "")
            return this
        set_aside_torn(folder_of(job), state)
        self._jobs[this] = job
        self._new.append((job, self._price(cell)))
        return this

    def ends(self, timeout_s: float) -> list[CellEnd]:
        """Return the ends since the last call, waiting up to timeout_s for one.

        Args:
            timeout_s: seconds; with nothing under way the answer comes at once.

        Raises:
            RecordError: the launcher cannot start a process.
        """
        deadline_s = time.monotonic() + timeout_s
        self._launch()
        while not self._ends and self._jobs:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            pause_s = min(left_s, POLL_S) if self._elsewhere else left_s
            if len(self._elsewhere) == len(self._jobs):
                time.sleep(pause_s)
            for event in self._launcher.events(pause_s):
                self._take(event)
            self._look_elsewhere()
        found, self._ends = self._ends, []
        return found

    def _launch(self) -> None:
        """Hand over what was submitted since the last time."""
        new, self._new = self._new, []
        for group in split(
            [price.shape for _, price in new], [price.together for _, price in new], self._launcher.processes
        ):
            if len(group) > 1:
                self._in_company |= {new[index][0]["cell_id"] for index in group}
            self._launcher.submit([new[index][0] for index in group])

    def _take(self, event: Event) -> None:
        cell_id = event.cell_id
        if event.end == "busy":
            self._elsewhere.add(cell_id)
            return
        job = self._jobs[cell_id]
        folder = folder_of(job)
        if event.end in COMPLETE_ENDS:
            event = as_recorded(event, cell_state(folder))
        if event.end not in COMPLETE_ENDS:
            what, self._tries[cell_id], _ = next_try(
                event,
                self._tries[cell_id],
                begun_at_step=folder.begun_at(),
                in_company=cell_id in self._in_company,
                retries=self._retries,
            )
            if what != "failed":
                self._in_company.discard(cell_id)
                self._launcher.submit([job])
                return
        self._tell(self._jobs.pop(cell_id), event.end, event.message)

    def _look_elsewhere(self) -> None:
        for this in list(self._elsewhere):
            state = cell_state(folder_of(self._jobs[this]))
            if state.state != "running":
                self._elsewhere.discard(this)
                if state.complete:
                    self._tell(self._jobs.pop(this), state.state, "")
                else:
                    self._launcher.submit([self._jobs[this]])

    def _tell(self, job: Job, end: str, message: str) -> None:
        result = folder_of(job).result() if end in COMPLETE_ENDS else None
        self._ends.append(CellEnd(job["cell_id"], end, message, result))
