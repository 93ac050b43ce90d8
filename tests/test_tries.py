"""What follows from the end of a try: one rule for `run` and for the tuner."""

from __future__ import annotations

import pytest

from supar_sweep.sweep.jobs import Event
from supar_sweep.sweep.status import CellState
from supar_sweep.sweep.tries import Tries, as_recorded, next_try


def follow(*ends: tuple[Event, int], retries: int = 2, in_company: bool = False) -> list[str]:
    """Return what follows from each of several ends in turn, each of a try that had begun at a step."""
    tries = Tries()
    said: list[str] = []
    for event, begun_at_step in ends:
        what, tries, _ = next_try(event, tries, begun_at_step=begun_at_step, in_company=in_company, retries=retries)
        said.append(what)
    return said


KILLED = Event("c", "failed", "killed", died=True)
STOPPED = Event("c", "cancelled")
TIMEOUT = Event("c", "timeout")


def test_a_lost_process_is_tried_again_so_often() -> None:
    assert follow(*[(KILLED, 0)] * 3) == ["again", "again", "failed"]
    assert follow(*[(STOPPED, 0)] * 3) == ["again", "again", "failed"]
    assert follow((KILLED, 0), retries=0) == ["failed"]


def test_a_timeout_is_tried_again_once_and_as_long_as_it_gets_further() -> None:
    assert follow((TIMEOUT, 0), (TIMEOUT, 0)) == ["again", "failed"]
    assert follow(*[(TIMEOUT, step) for step in range(0, 50, 5)]) == ["again"] * 10
    assert follow((TIMEOUT, 0), (TIMEOUT, 5), (TIMEOUT, 5)) == ["again", "again", "failed"]
    assert follow((TIMEOUT, 0), retries=0) == ["failed"]


def test_getting_further_excuses_who_was_told_to_stop_and_no_crash() -> None:
    assert follow((KILLED, 0), (STOPPED, 4), (KILLED, 4), (KILLED, 4)) == ["again", "again", "again", "failed"]
    assert follow(*[(KILLED, step) for step in (0, 4, 8)]) == ["again", "again", "failed"]


def test_what_lacked_room_beside_others_is_tried_alone_and_has_not_failed() -> None:
    crowded = Event("c", "oom", "no room")
    assert follow((crowded, 0), in_company=True) == ["again alone"]
    assert follow((crowded, 0)) == ["failed"]


@pytest.mark.parametrize("event", [Event("c", "failed", "boom"), Event("c", "cancelled", wanted=True)])
def test_an_error_or_somebodys_word_is_final(event: Event) -> None:
    assert follow((event, 0)) == ["failed"]


def test_the_record_has_the_last_word() -> None:
    assert as_recorded(Event("c", "done"), CellState("missing")).message == "said done, but its record is missing"
    assert as_recorded(Event("c", "done"), CellState("missing")).end == "failed"
    assert as_recorded(Event("c", "done"), CellState("diverged")).end == "diverged"
    assert as_recorded(TIMEOUT, CellState("timeout")) == TIMEOUT
