"""What follows when a try at a cell ends: one rule for `run` and for the tuner. No torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from supar_sweep.sweep.jobs import Event
from supar_sweep.sweep.records import COMPLETE_ENDS
from supar_sweep.sweep.status import CellState


class Tries(NamedTuple):
    """The history of a cell's lost tries.

    Args:
        n_lost: tries lost since the cell last got further.
        begun_at_step: the step from which the last lost try had gone on; None = no try was lost yet.
    """

    n_lost: int = 0
    begun_at_step: int | None = None


class Next(NamedTuple):
    """What follows from an end.

    Args:
        what: "again alone" is no failure: the cell only lacked room beside others. Every further try is made alone.
        tries: the history, this end included.
        how: the same for a person; "" where the cell has failed.
    """

    what: Literal["again", "again alone", "failed"]
    tries: Tries
    how: str = ""


def as_recorded(event: Event, state: CellState) -> Event:
    """Return the end as the cell's record has it: a cell is complete only where its record says so.

    Args:
        event: an end, of any kind.
        state: the cell's state, read after the end.
    """
    if state.complete:
        return event._replace(end=state.state)
    if event.end in COMPLETE_ENDS:
        return Event(event.cell_id, "failed", f"said {event.end}, but its record is {state.state}")
    return event


def next_try(event: Event, tries: Tries, *, begun_at_step: int, in_company: bool, retries: int) -> Next:
    """Return what follows from an end that completes no cell.

    A lost process (Event.lost) allows `retries` further tries, a timeout one. Where the process was told to stop (preempted,
    out of time), the count starts anew if the try had gone on from further than the lost one before it: so a cell that
    saves and gets further is never given up.

    Args:
        event: the end.
        tries: the cell's history before it.
        begun_at_step: the step from which the try that ended had gone on (CellFolder.begun_at).
        in_company: the process had been given other cells, too.
        retries: further tries of a cell whose process was lost, >= 0.
    """
    if event.end == "oom" and in_company:
        return Next("again alone", tries, "again, alone")
    allowed = retries if event.lost else min(1, retries) if event.end == "timeout" else 0
    if allowed == 0:
        return Next("failed", tries)
    told_to_stop = event.end in ("cancelled", "timeout")
    further = told_to_stop and tries.begun_at_step is not None and begun_at_step > tries.begun_at_step
    tries = Tries(1 if further else tries.n_lost + 1, begun_at_step)
    if tries.n_lost > allowed:
        return Next("failed", tries)
    return Next("again", tries, f"try {tries.n_lost + 1} of {allowed + 1}")
