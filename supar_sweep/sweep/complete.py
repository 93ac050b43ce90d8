"""complete(plan): skip what is done, resume what is partial, try again what failed. No torch.

The records are the only memory: a coordinator killed at any moment is replaced by the next `run`,
which reads them.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from supar_sweep.errors import RecordError
from supar_sweep.sweep.cohorts import Price, Queue
from supar_sweep.sweep.interrupt import Interrupts
from supar_sweep.sweep.jobs import POLL_S, RETRIES, Event, Launcher, planned_job
from supar_sweep.sweep.records import COMPLETE_ENDS
from supar_sweep.sweep.status import CellState, cell_state, folders, set_aside_torn
from supar_sweep.sweep.submission import Experiment, Plan, PlannedCell
from supar_sweep.sweep.tries import Tries, as_recorded, next_try

SHOW_EVERY_S, SHOW_EVERY_TIMES = 0.2, 50
"""The progress is told no more than once in so many seconds, nor in so many times what it takes to count all cells."""


class Progress(Protocol):
    """Somebody who shows how far a grid is."""

    def update(self, counts: Mapping[str, int], eta_s: float | None) -> None:
        """Show the cells by state (n, done, diverged, running, pending, failed, ...) and the
        seconds left, None = unknown.
        """

    def message(self, text: str) -> None:
        """Show one line that stays."""


class Silent:
    """A Progress that shows nothing."""

    def update(self, counts: Mapping[str, int], eta_s: float | None) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One kind of end that completes no cell: how many cells, and the first one's label, message
    and log.
    """

    end: str
    n: int
    cell: str
    message: str
    log: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a `run` leaves behind.

    Args:
        counts: distinct cells by state; `n` = all of them.
        skipped: complete before this run began.
        held: not started because the first ones all failed alike.
        interrupted: stopped by Ctrl-C or `cancel`.
        troubles: the kinds of failure, most frequent first.
        wall_s: seconds from start to end.
        left: cells whose jobs were left to themselves.
    """

    counts: Mapping[str, int]
    skipped: int
    held: int
    interrupted: bool
    troubles: tuple[Trouble, ...]
    wall_s: float
    left: int = 0

    @property
    def complete(self) -> bool:
        """Whether every cell is done or diverged."""
        return sum(self.counts.get(end, 0) for end in COMPLETE_ENDS) == self.counts["n"]


def complete(
    experiment: Experiment,
    plan: Plan,
    launcher: Launcher,
    *,
    price: Callable[[PlannedCell], Price] = lambda cell: Price(),
    progress: Progress | None = None,
    retries: int = RETRIES,
    alike: int = 5,
    leave: Callable[[Interrupts], bool] = lambda interrupts: False,
) -> Summary:
    """Return what came of the grid, after every cell of the plan that is not complete was tried.

    The plan is frozen to plan.json first. A cell that failed is tried once by each call; within the call, one that lost
    its process is tried again, and one that ran out of memory or time once more: alone, or as long as it gets further.
    Ctrl-C (or SIGTERM) lets the cells save and ends them as cancelled; a second one kills them.

    Args:
        experiment: where.
        plan: what.
        launcher: by whom; the caller closes it.
        price: what a cell costs and what it can be trained with: the dear ones go first, and groups get smaller, so that
            no long one runs alone at the end.
        progress: told after each change; None = nobody.
        retries: further tries of a cell whose process was lost (jobs.Event.lost), >= 0. One that was told to stop (preempted,
            out of time) starts the count anew where it had begun further on than the try before it.
        alike: when so many first ends are the same failure, the rest is held, >= 1: what waits here, and what the launcher
            can still take back.
        leave: asked once, at a Ctrl-C: whether the jobs are left to themselves, with a launcher that they outlive.

    Raises:
        BusyError: another `run` works on this experiment.
        RecordError: the runs folder cannot be written.
    """
    # the handlers come first: whoever can read the lock may signal its holder
    with Interrupts() as interrupts, experiment.hold():
        experiment.write(plan)
        run = _Run(experiment, plan, launcher, price, progress or Silent(), retries, alike, leave)
        return run.through(interrupts)


@dataclass(eq=False)
class _Group:
    """Cells that were given to one process: how many, and which ends of the process itself were judged."""

    n: int
    judged: set[str] = field(default_factory=set)


@dataclass
class _Run:
    experiment: Experiment
    plan: Plan
    launcher: Launcher
    price: Callable[[PlannedCell], Price]
    progress: Progress
    retries: int
    alike: int
    leave: Callable[[Interrupts], bool]
    todo: Queue = field(default_factory=lambda: Queue((), {}))
    under_way: dict[str, _Group] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    troubles: dict[str, Event] = field(default_factory=dict)
    tries: defaultdict[str, Tries] = field(default_factory=lambda: defaultdict(Tries))
    first: list[str] = field(default_factory=list)
    tripped: Event | None = None
    held: int = 0
    interrupts: int = 0
    left: bool = False
    known: Mapping[str, str] = field(default_factory=dict)
    paid: float = 0.0
    shown: dict[str, int] = field(default_factory=dict)
    news: bool = True
    show_at_s: float = 0.0

    def through(self, interrupts: Interrupts) -> Summary:
        """Take the grid to its end, and return the summary."""
        begun_s = time.monotonic()
        self.folders = folders(self.experiment.store, self.plan)
        self.states = {this: cell_state(folder) for this, folder in self.folders.items()}
        self.prices = {this: self.price(cell) for this, cell in self.plan.cells.items()}
        self._sort_out()
        skipped = sum(state.complete for state in self.states.values())
        self.paid, self.clock_s = 0.0, time.monotonic()  # what was set aside unmended cost nothing
        self._show()
        while self.todo or self.under_way or self.elsewhere:
            self._obey(interrupts)
            if self.left:
                break
            self._hold()
            n_groups = len(set(self.under_way.values()))
            while self.todo and n_groups < self.launcher.slots:
                self._submit(self.todo.take(self.launcher.processes))
                n_groups += 1
            if self.under_way:
                events = self.launcher.events(POLL_S)
            else:
                events = []
                time.sleep(POLL_S if self.elsewhere else 0)
            for event in events:
                self._take(event)
            self._look_elsewhere()
            self.news |= bool(events)
            if time.monotonic() >= self.show_at_s:
                self._show()
        self._show()
        return self._summary(skipped, time.monotonic() - begun_s)

    def _sort_out(self) -> None:
        """Decide what is to be done with each cell, by its state."""
        todo: list[str] = []
        aside: dict[bool, list[str]] = {True: [], False: []}
        self.known = self.launcher.known()
        for this, state in self.states.items():
            if state.complete:
                self.folders[this].sweep()
                continue
            if state.state == "running" and this not in self.known:
                self.elsewhere.add(this)
                continue
            if state.state == "corrupt":
                if (moved := self._set_aside(this)) is None:
                    continue
                aside[moved].append(this)
            todo.append(this)
        self.todo = Queue(todo, self.prices)
        for moved, cells in aside.items():
            what = (
                "a torn result, which is set aside: trained again"
                if moved
                else "a record that cannot be read: tried again"
            )
            if cells:
                first = f"{self._name(cells[0])}: {self.states[cells[0]].message}"
                self.progress.message(f"{_cells(len(cells))} had {what} ({first})")
        if self.elsewhere:
            self.progress.message(f"{_cells(len(self.elsewhere))} being trained by another process: waiting for it")

    def _set_aside(self, this: str) -> bool | None:
        """Move a torn result aside and return whether there was one; None where that is impossible: the cell has failed, and
        the others go on.
        """
        try:
            return set_aside_torn(self.folders[this], self.states[this])
        except RecordError as error:
            self._fail(Event(this, "failed", str(error)))
            return None

    def _obey(self, interrupts: Interrupts) -> None:
        """Act on Ctrl-C: the first lets cells save, the second kills them."""
        if interrupts.count <= self.interrupts:
            return
        first = self.interrupts == 0
        self.left = first and self.leave(interrupts)
        self.interrupts = interrupts.count
        if self.left:
            return
        if first:
            self.progress.message("stopping: cells save and end (Ctrl-C again kills them)")
            for this in self.known.keys() & set(self.todo):  # an earlier `run` has submitted it: to be cancelled, too
                self._submit([this])
            self.todo.clear()
            self.elsewhere.clear()
            self.launcher.cancel()
        if self.interrupts >= 2:
            self.launcher.cancel(now=True)

    def _submit(self, cells: list[str]) -> None:
        group = _Group(len(cells))
        self.under_way |= dict.fromkeys(cells, group)
        self.launcher.submit([planned_job(self.experiment.store, self.folders[this], self.plan) for this in cells])

    def _take(self, event: Event) -> None:
        """Note how a cell ended, and what follows from it."""
        this = event.cell_id
        group = self.under_way.pop(this, None) or _Group(1)
        if event.end == "busy":
            if not self.interrupts:
                self.elsewhere.add(this)
            return
        if event.end in COMPLETE_ENDS:
            state = cell_state(self.folders[this])
            if state.complete:
                self._finish(this, state)
                return
            event = as_recorded(event, state)
        if self.interrupts:
            self.states[this] = CellState(event.end, event.message)
            return
        what, self.tries[this], how = next_try(
            event,
            self.tries[this],
            begun_at_step=self.folders[this].begun_at(),
            in_company=group.n > 1,
            retries=self.retries,
        )
        if what == "failed":
            self._fail(event)
        else:
            self._again(event, how)
        if what == "again alone":  # no failure
            return
        if event.wanted:
            return  # somebody's word, and no failure
        # what one end of a process did to its whole group is one failure
        of_process = event.died or event.end in ("cancelled", "timeout")
        if not of_process or event.end not in group.judged:
            self._judge(event)
        if of_process:
            group.judged.add(event.end)

    def _again(self, event: Event, how: str) -> None:
        """Try a cell once more, by itself: what ended it may have been another's doing, or the company's."""
        self.todo.put_back(event.cell_id, alone=True)
        self.progress.message(f"{self._name(event.cell_id)}: {event.message or event.end}; {how}")

    def _finish(self, this: str, state: CellState) -> None:
        self.states[this] = state
        self.troubles.pop(this, None)
        self.first.append("")
        self.paid += self.prices[this].cost

    def _fail(self, event: Event) -> None:
        found = cell_state(self.folders[event.cell_id])
        self.states[event.cell_id] = CellState(event.end, event.message, found.attempts, found.log)
        self.troubles[event.cell_id] = event
        self.paid += self.prices[event.cell_id].cost

    def _judge(self, event: Event) -> None:
        """Hold the rest of the grid when its first ends are one and the same failure."""
        # numbers differ (pids, steps, addresses) where the cause is one
        self.first.append(f"{event.end}: {re.sub(r'[0-9a-f]*[0-9][0-9a-f]*', '#', event.message)}")
        if len(self.first) == self.alike and len(set(self.first)) == 1:
            self.tripped = event
            self._hold()

    def _hold(self) -> None:
        """Keep back what has not begun, once the first ends were alike: here, and at the launcher."""
        event = self.tripped
        if event is None or self.interrupts:
            return
        withdrawn = self.launcher.withdraw()
        for this in withdrawn:
            self.under_way.pop(this, None)
            self.states[this] = cell_state(self.folders[this])
        back = [*self.todo, *withdrawn]
        self.todo.clear()
        if back and not self.held:
            log = cell_state(self.folders[event.cell_id]).log
            self.progress.message(
                f"the first {self.alike} cells all failed alike, so {_cells(len(back))} held back. "
                f"{event.end}: {event.message}" + (f" (see {log})" if log else "")
            )
        self.held += len(back)
        for this in back:
            if self.tries[this].n_lost:
                self._fail(event._replace(cell_id=this))

    def _look_elsewhere(self) -> None:
        """Take up what another process let go of."""
        for this in list(self.elsewhere):
            state = cell_state(self.folders[this])
            if state.state == "running":
                continue
            self.elsewhere.discard(this)
            if state.complete:
                self._finish(this, state)
            else:
                self.todo.put_back(this)

    def _counts(self) -> dict[str, int]:
        waiting = {*self.todo} | self.launcher.waiting()
        active = self.under_way.keys() | self.elsewhere
        counts = Counter(
            "pending" if this in waiting else "running" if this in active else state.state
            for this, state in self.states.items()
        )
        return {"n": len(self.states), **counts}

    def _show(self) -> None:
        """Tell the progress where something has changed, with an ETA from what the finished cells cost."""
        now_s = time.monotonic()
        counts = self._counts()
        if self.news or counts != self.shown:
            left = sum(self.prices[this].cost for this in (*self.todo, *self.under_way, *self.elsewhere))
            eta_s = (now_s - self.clock_s) * left / self.paid if self.paid > 0 else None
            self.progress.update(counts, eta_s)
        self.shown, self.news = counts, False
        took_s = time.monotonic() - now_s
        self.show_at_s = now_s + max(SHOW_EVERY_S, SHOW_EVERY_TIMES * took_s)

    def _summary(self, skipped: int, wall_s: float) -> Summary:
        kinds: dict[str, list[str]] = {}
        for this, event in self.troubles.items():
            kinds.setdefault(event.end, []).append(this)
        return Summary(
            counts=self._counts(),
            skipped=skipped,
            held=self.held,
            interrupted=self.interrupts > 0,
            troubles=tuple(
                Trouble(
                    end=end,
                    n=len(members),
                    cell=self._name(members[0]),
                    message=self.troubles[members[0]].message,
                    log=self.states[members[0]].log,
                )
                for end, members in sorted(kinds.items(), key=lambda item: -len(item[1]))
            ),
            wall_s=wall_s,
            left=len(self.under_way.keys() | (self.known.keys() & set(self.todo))) if self.left else 0,
        )

    def _name(self, this: str) -> str:
        return self.folders[this].path.name


def _cells(n: int) -> str:
    return "1 cell" if n == 1 else f"{n} cells"
