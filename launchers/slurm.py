"""Cells as job arrays on SLURM. submitit writes the batch script; what an element trains is frozen in a file beside it
(supar_sweep.sweep.arrays), and how it ended is read from the cells' records first, then asked of SLURM.

submitit's own results are left aside: a pickle that a killed submitter has not moved yet is a lost element, and a job that
died without one is waited for without end where a site has no accounting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from supar_sweep.errors import RecordError, SuparError
from supar_sweep.sweep.arrays import ArrayFolder, OwnRecord, is_of, own_record
from supar_sweep.sweep.code import freeze_code
from supar_sweep.sweep.jobs import Event, Job, folder_of
from supar_sweep.sweep.records import CellFolder, End
from supar_sweep.training.epitaph import LAST_WORDS_CHARS
from supar_sweep.training.slurm_job import SETTLED
from supar_sweep.training.worker import RUN_CELLS

from .slurm_arrays import Batch, Size
from .slurm_config import SlurmConfig
from .slurm_follow import Queued, in_queue
from .slurm_outbox import Outbox
from .slurm_queue import Slurm
from .slurm_script import check_folder
from .state import Report, Verdict, judge, live_state, words_of_its_own

TICK_S = 0.2
RELEASES = 3
"""SLURM holds an element for good that a node could not start: it is let go again so often."""


class SlurmLauncher:
    """Trains groups of jobs as elements of SLURM arrays, and follows them.

    The arrays are SLURM's: they outlive this process, and a later launcher on the same folder follows those that are still
    there instead of submitting their cells again.

    Args:
        config: conf/launcher/slurm.yaml.
        threads: threads of each process, >= 1; None = its share of the element's cores.
        folder: of the arrays' files, in the runs folder, on a file system that the nodes share.
        function: what an element calls with its group, "module:name".
        size: of a job's cell, for those that ask for more.

    Raises:
        ConfigError: no SLURM here, or an option that its sbatch does not have.
        SuparError: its controller does not answer.
        RecordError: the runs folder does not take a copy of the code.
    """

    name = "slurm"

    def __init__(
        self,
        config: SlurmConfig,
        *,
        threads: int | None,
        folder: Path,
        function: str = RUN_CELLS,
        size: Callable[[Job], Size] = lambda job: Size(),
    ) -> None:
        self._slurm = Slurm()
        if config.further_options:
            config.check_options(self._slurm.options())
        check_folder(folder)
        self._config, self._folder = config, folder.absolute()
        self._outbox = Outbox(
            self._slurm,
            config,
            threads=threads,
            folder=self._folder,
            function=function,
            size=size,
            code=freeze_code(self._folder.parent / "code"),
        )
        self.slots = config.max_elements * config.processes
        self.processes = config.array_parallelism * config.processes
        self._elements: dict[str, _Element] = {}
        self._left_over: dict[str, Queued] = {}
        self._events: list[Event] = []
        self._cancelled = False
        self._withdrawn: set[str] = set()
        self._look_at_s = self._withdraw_at_s = self._left_over_until_s = 0.0

    # -- the protocol ------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs that one element trains together, and return at once: `events` submits what was gathered."""
        rest = [job for job in jobs if not self._adopted(job)]
        if rest:
            self._outbox.add(rest)

    def events(self, timeout_s: float) -> list[Event]:
        """Return the ends since the last call, waiting up to `timeout_s` for the first; [] at once when nothing is under
        way.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._follow(*self._outbox.submitted())
            if self._elements and time.monotonic() >= self._look_at_s:
                self._look()
            now_s = time.monotonic()
            if self._events or now_s >= deadline_s or not (self._outbox or self._elements):
                found, self._events = self._events, []
                return found
            time.sleep(min(self._outbox.tick_s or TICK_S, deadline_s - now_s))

    def waiting(self) -> set[str]:
        """Return the cells that had not begun at the last look."""
        queued = (element.waiting for element in self._elements.values() if not element.begun)
        return {job["cell_id"] for job in self._outbox.jobs()}.union(*queued)

    def withdraw(self) -> set[str]:
        """Take back what has not begun, and return its cells. What is not known to be gone is told by a later call: what was just
        about to begin, and the whole queue while the controller is away.
        """
        self._follow(*self._outbox.settled())
        back = {job["cell_id"] for job in self._outbox.drop()} | self._withdrawn
        self._withdrawn = set()
        waiting = {each: element for each, element in self._elements.items() if not element.begun}
        if not waiting or time.monotonic() < self._withdraw_at_s:
            return back
        names = sorted({element.array.job_name for element in waiting.values()})
        queue = self._slurm.queue(names) or {}
        pending = [each for each in waiting if each in queue and queue[each].to_begin]
        self._slurm.cancel(pending, now=False)
        left = self._slurm.queue(names) if pending else None
        for each in pending:
            waiting[each].withdrawn = True
            if left is not None and (each not in left or not left[each].live):
                back |= self._elements.pop(each).waiting.keys()
        self._withdraw_at_s = time.monotonic() + self._config.poll_s
        return back

    def cancel(self, *, now: bool = False) -> None:
        """Drop what was not submitted; have SLURM end the rest: asked to save first, or killed `now`."""
        self._cancelled = True
        self._follow(*self._outbox.settled())
        # what was withdrawn and not told yet: nobody will ask for it now
        back = [*(job["cell_id"] for job in self._outbox.drop()), *self._withdrawn]
        self._withdrawn = set()
        self._events += [Event(this, "cancelled") for this in back]
        whole = {element.array.key for element in self._elements.values() if not element.adopted}
        ids = {
            each if element.array.key not in whole else each.partition("_")[0]
            for each, element in self._elements.items()
        }
        self._slurm.cancel(sorted(ids), now=now)
        self._look_at_s = 0.0

    def close(self) -> None:
        """Let go. What is in the queue stays there, for the next launcher on this folder to follow."""
        self._outbox.settled()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def flush(self) -> set[str]:
        """Submit what was gathered, and return the cells that the queue does not take now."""
        self._follow(*self._outbox.submitted())
        while (tick_s := self._outbox.tick_s) is not None:
            time.sleep(tick_s)
            self._follow(*self._outbox.submitted())
        # whoever does not stay wants sbatch's word alone: an element may have begun, and failed, by now
        self._look_at_s = time.monotonic() + self._config.poll_s
        return {job["cell_id"] for job in self._outbox.jobs()}

    def _follow(self, arrays: Mapping[str, Batch], refusals: Sequence[Event]) -> None:
        """Note what became of a submission."""
        self._events += refusals
        for job_id, batch in arrays.items():
            assert batch.array is not None
            for index, groups in enumerate(batch.elements):
                folders = {job["cell_id"]: folder_of(job) for job in chain.from_iterable(groups)}
                self._elements[f"{job_id}_{index}"] = _Element(batch.array, folders)

    # -- arrays of a launcher that is gone ---------------------------------------------------------

    def known(self) -> dict[str, str]:
        """Return pending, held or running of each cell that is in the queue already, by cell_id.

        Raises:
            SuparError: the controller does not answer; what is submitted now might be there already.
        """
        queued = in_queue(self._slurm, self._folder)
        if queued is None:
            raise SuparError(
                "SLURM's controller does not tell what is in the queue: nothing was submitted, try again later"
            )
        return {this: live_state(each.report) for this, each in queued.items()}

    def _adopted(self, job: Job) -> bool:
        """Return whether an element that is in the queue already will train the cell: then that is followed."""
        if time.monotonic() >= self._left_over_until_s:
            queue = in_queue(self._slurm, self._folder)
            self._left_over = self._left_over if queue is None else queue
            self._left_over_until_s = time.monotonic() + self._config.poll_s
        queued = self._left_over.get(job["cell_id"])
        if queued is None or own_record(folder_of(job), queued.array.key).end in SETTLED:
            return False
        followed = _Element(queued.array, adopted=True)
        self._elements.setdefault(queued.element, followed).waiting[job["cell_id"]] = folder_of(job)
        return True

    # -- following ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask SLURM once for all, and tell of the cells that have ended."""
        queue = self._slurm.queue(sorted({element.array.job_name for element in self._elements.values()}))
        now_s = time.monotonic()
        self._look_at_s = now_s + self._config.poll_s
        if queue is None:
            return
        for each, element in self._elements.items():
            if each not in queue or not queue[each].live:
                element.gone_s = element.gone_s or now_s
            else:
                element.gone_s = None
                if queue[each].launch_failed and element.releases < RELEASES:
                    element.releases += 1
                    self._slurm.release(each)
        gone = {each.partition("_")[0] for each in self._elements if each not in queue or not queue[each].live}
        accounts = self._slurm.accounts(sorted(gone))
        for each, element in list(self._elements.items()):
            report = queue.get(each)
            if report is not None and report.to_begin:
                continue  # its cells' files have nothing to tell
            element.begun = True
            self._judge(each, element, report, accounts.get(each), now_s - (element.gone_s or now_s))
            if not element.waiting:
                del self._elements[each]

    def _judge(
        self, each: str, element: _Element, queue: Report | None, account: Report | None, since_gone_s: float
    ) -> None:
        live = queue is not None and queue.live
        last_words = "" if live else element.array.last_words(each)
        for cell_id, folder in list(element.waiting.items()):
            own = own_record(folder, element.array.key)
            verdict = judge(
                own,
                queue,
                account,
                since_gone_s=since_gone_s,
                grace_s=self._config.grace_s,
                last_words=last_words,
            )
            if verdict.settled:
                del element.waiting[cell_id]
                event = self._told(verdict, own, folder, element.array, each, last_words)
                if element.withdrawn and not self._cancelled and verdict.state in ("cancelled", "missing"):
                    self._withdrawn.add(cell_id)
                else:
                    self._events.append(event)

    def _told(
        self, verdict: Verdict, own: OwnRecord, folder: CellFolder, array: ArrayFolder, each: str, last_words: str
    ) -> Event:
        """Return the event of a settled verdict, written into the cell's record where its process could not do that."""
        end, died, message = verdict.state, verdict.died, verdict.message
        if own.end is None:
            last, log = words_of_its_own(last_words), array.log(each)
            if last:
                message += f"; its last words: {last[:LAST_WORDS_CHARS]} (all of them: {log})"
            elif died and log.exists():
                message += f"; its log: {log}"
        if end not in ENDS:  # preempted, node-failed, stale, missing, unknown
            message = f"{verdict.state}: {message}"
            end = "cancelled" if verdict.state == "preempted" else "failed"
            died = True
        if self._cancelled and end not in ("done", "diverged"):
            end, died = "cancelled", False
        if own.begun and (own.end is None or end != own.end or message != own.message):
            with suppress(RecordError):
                folder.close_attempt(ENDS[end], message, lambda info: is_of(info, array.key))
        return Event(folder.cell_id, end, message, died, wanted=verdict.wanted)


ENDS: dict[str, End] = {
    "done": "done",
    "diverged": "diverged",
    "oom": "oom",
    "timeout": "timeout",
    "failed": "failed",
    "cancelled": "cancelled",
}


@dataclass
class _Element:
    """One element that is followed.

    Args:
        array: its array.
        waiting: the cells whose end was not told yet, by id.
        gone_s: when it was first seen to be neither waiting nor running (time.monotonic); None = it is.
        adopted: submitted by an earlier launcher.
        releases: how often it was let go after a node could not start it.
        begun: it was seen to have begun, or to be gone.
        withdrawn: SLURM was asked to end it before it had begun.
    """

    array: ArrayFolder
    waiting: dict[str, CellFolder] = field(default_factory=dict)
    gone_s: float | None = None
    adopted: bool = False
    releases: int = 0
    begun: bool = False
    withdrawn: bool = False
