"""hand_over(plan): submit what is not complete to a queue that goes on without us, and return at once. No torch.

Its counterpart is `complete`, which stays. Either continues what the other began: the records and the queue are their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import NamedTuple, Protocol

from supar_sweep.sweep.cohorts import Price, groups
from supar_sweep.sweep.jobs import Launcher, planned_job
from supar_sweep.sweep.status import cell_state, folders, set_aside_torn
from supar_sweep.sweep.submission import Experiment, Plan, PlannedCell


class QueueLauncher(Launcher, Protocol):
    """A launcher whose jobs outlive it."""

    def flush(self) -> set[str]:
        """Submit what was gathered, and return the cells that the queue does not take now."""


class Handover(NamedTuple):
    """What became of a plan's cells.

    Args:
        complete: they are done or diverged.
        in_queue: they were there before, waiting or running.
        submitted: they are there now.
        held: the queue is full, or max_elements are in it: the next call submits them.
        refused: one line on why the queue does not take them at all, by cell_id.
    """

    complete: int
    in_queue: int
    submitted: int
    held: int
    refused: Mapping[str, str]


def hand_over(
    experiment: Experiment,
    plan: Plan,
    launcher: QueueLauncher,
    *,
    price: Callable[[PlannedCell], Price] = lambda cell: Price(),
) -> Handover:
    """Return what became of each cell, after every one that is neither complete nor in the queue was submitted.

    The plan is frozen to plan.json first.

    Args:
        experiment: where.
        plan: what.
        launcher: to whom; the caller closes it.
        price: what a cell costs and what it can be trained with.

    Raises:
        BusyError: a `run` works on this experiment.
        RecordError: the runs folder cannot be written.
    """
    with experiment.hold():
        experiment.write(plan)
        cells = folders(experiment.store, plan)
        states = {this: cell_state(folder) for this, folder in cells.items()}
        known = launcher.known()
        there = {this for this, state in states.items() if this in known or state.state == "running"}
        complete = {this for this, state in states.items() if state.complete}
        prices = {this: price(cell) for this, cell in plan.cells.items()}
        left = [this for this in states if this not in there | complete]
        for this in left:  # a torn result is moved out of the way of a new one
            set_aside_torn(cells[this], states[this])
        beyond = {*left}
        for group in islice(groups(left, prices, launcher.processes), max(0, launcher.slots - len(there))):
            launcher.submit([planned_job(experiment.store, cells[this], plan) for this in group])
            beyond -= {*group}
        held = launcher.flush() | beyond
        refused = {event.cell_id: event.message for event in launcher.events(0) if event.end == "failed"}
        return Handover(
            complete=len(complete),
            in_queue=len(there - complete),
            submitted=len({*left} - held - refused.keys()),
            held=len(held),
            refused=refused,
        )
