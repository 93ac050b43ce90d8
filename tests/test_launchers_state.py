"""What is made of a cell's records, SLURM's queue and its accounting (the words are those that a real SLURM gave); and how a
worker's death is put into words, checked on processes that really die so.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.state import (
    AT_WORK,
    ENDED,
    HELD,
    STATES,
    WAITING,
    Report,
    Verdict,
    exit_told,
    judge,
    words_of_its_own,
)
from supar_sweep.sweep.arrays import OwnRecord
from supar_sweep.training.epitaph import describe_exit

GRACE_S = 30.0
LATE_S = GRACE_S
reports = st.none() | st.builds(
    Report,
    st.sampled_from([*WAITING, *HELD, *AT_WORK, *ENDED, "NEVER_HEARD_OF"]),
    st.sampled_from(["", "None", "Resources", "JobHeldUser"]),
    st.integers(-15, 255),
)
records = st.builds(
    OwnRecord,
    st.sampled_from([None, "done", "diverged", "oom", "timeout", "failed", "cancelled"]),
    begun=st.booleans(),
    locked=st.booleans(),
)


def verdict(
    own: OwnRecord | None = None,
    queue: str | Report | None = None,
    account: str | Report | None = None,
    *,
    since_gone_s: float = LATE_S,
    last_words: str = "",
) -> Verdict:
    said = [Report(each) if isinstance(each, str) else each for each in (queue, account)]
    return judge(own or OwnRecord(begun=True), *said, since_gone_s=since_gone_s, grace_s=GRACE_S, last_words=last_words)


@given(records, reports, reports, st.floats(0, 2 * GRACE_S))
def test_every_answer_is_a_state_and_the_cells_own_result_comes_first(
    own: OwnRecord, queue: Report | None, account: Report | None, since_gone_s: float
) -> None:
    found = judge(own, queue, account, since_gone_s=since_gone_s, grace_s=GRACE_S)
    assert found.state in STATES
    assert found.settled or not found.died
    if own.end in ("done", "diverged", "failed", "oom"):
        assert (found.state, found.settled) == (own.end, True)
        assert found.died == (own.died and own.end in ("failed", "oom"))
    elif since_gone_s < GRACE_S or own.locked or (queue and queue.live):
        assert not found.settled, "nothing is called lost before the grace, or beside a living process"


@pytest.mark.parametrize(
    ("queue", "state"),
    [
        (Report("PENDING", "Resources"), "pending"),
        (Report("PENDING", "JobHeldUser"), "held"),
        (Report("PENDING", "launch failed requeued held"), "held"),
        (Report("REQUEUE_HOLD"), "held"),
        (Report("RUNNING", "None"), "running"),
        (Report("COMPLETING", "None"), "running"),
    ],
)
@pytest.mark.parametrize("account", [None, "RUNNING", "NODE_FAIL", "PREEMPTED", "COMPLETED"])
def test_what_is_in_the_queue_is_under_way_whatever_the_accounting_says(
    queue: Report, state: str, account: str | None
) -> None:
    for own in (OwnRecord(), OwnRecord("cancelled", begun=True), OwnRecord("timeout", begun=True)):
        found = verdict(own, queue, account)
        assert (found.state, found.settled) == (state, False)


def test_a_failed_launch_is_told_from_a_hold_that_somebody_wanted() -> None:
    assert Report("PENDING", "launch failed requeued held").launch_failed
    assert Report("REQUEUE_HOLD", "launch_failed_requeued_held").launch_failed
    assert not Report("PENDING", "JobHeldUser").launch_failed
    assert not Report("RUNNING", "None").launch_failed


@pytest.mark.parametrize(
    ("said", "state", "died"),
    [
        ("OUT_OF_MEMORY", "oom", False),
        ("TIMEOUT", "timeout", False),
        ("CANCELLED", "cancelled", False),
        ("PREEMPTED", "preempted", True),
        ("NODE_FAIL", "node-failed", True),
        ("FAILED", "failed", True),
        ("COMPLETED", "failed", True),
        ("NEVER_HEARD_OF", "unknown", True),
        (None, "stale", True),
    ],
)
def test_a_process_that_left_no_word_has_slurms(said: str | None, state: str, died: bool) -> None:
    for found in (
        verdict(None, said, None),
        verdict(None, None, said),
        verdict(None, "FAILED" if said else None, said),
    ):
        assert (found.state, found.settled, found.died) == (state, True, died), found
        assert found.message


def test_an_element_that_never_began_and_is_gone_is_missing() -> None:
    assert verdict(OwnRecord())[:3:2] == ("missing", True)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("FAILED", "cancelled"),
        ("COMPLETED", "cancelled"),
        (None, "cancelled"),
        ("PREEMPTED", "preempted"),
        ("NODE_FAIL", "node-failed"),
    ],
)
def test_one_that_saved_and_was_not_started_again_keeps_its_words(said: str | None, state: str) -> None:
    found = verdict(OwnRecord("cancelled", "cancelled after 3 of 9 steps", begun=True), said)
    assert found[:3] == (state, "cancelled after 3 of 9 steps", True)


@pytest.mark.parametrize("said", ["FAILED", "COMPLETED", "PREEMPTED", None])
def test_one_that_was_preempted_and_not_requeued_was_not_cancelled_by_anybody(said: str | None) -> None:
    own = OwnRecord("cancelled", "preempted after 3 of 9 steps; not requeued: no", begun=True)
    assert verdict(own, said)[:3] == ("preempted", own.message, True)
    assert verdict(own, "CANCELLED").wanted, "a scancel while it waits for its new start"
    assert verdict(OwnRecord("timeout", "timeout after 3 of 9 steps", begun=True), "CANCELLED").wanted


def test_who_was_cancelled_by_somebody_is_slurms_word() -> None:
    own = OwnRecord("cancelled", "cancelled after 3 of 9 steps", begun=True)
    wanted = {said: verdict(own, said).wanted for said in ("CANCELLED", None, "FAILED", "COMPLETED", "NODE_FAIL")}
    assert [said for said, each in wanted.items() if each] == ["CANCELLED", None]
    assert verdict(OwnRecord(begun=True), "CANCELLED").wanted
    assert not verdict(OwnRecord(begun=True), "FAILED").wanted


@pytest.mark.parametrize(
    "text",
    [
        "slurmstepd: error: StepId=1.0 exceeded memory limit (538042368 > 209715200), being killed",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1.0",
    ],
)
def test_memory_that_ran_out_is_read_from_the_output_where_slurm_says_failed(text: str) -> None:
    for said in ("FAILED", None):
        assert verdict(None, said, last_words=f"step 7\n{text}\n").state == "oom"
    assert verdict(None, "CANCELLED", last_words=text).state == "cancelled"
    assert verdict(None, "FAILED", last_words="the kill of a bloom").state == "failed"


@pytest.mark.parametrize(
    ("printed", "code", "told"),
    [
        ("srun: error: n1: task 0: Exited with exit code 3\n", 3, 3),
        ("srun: error: n1: task 0: Killed\nsrun: Force Terminated StepId=16.0\n", 9, -9),
        ("srun: error: n1: task 0: Segmentation fault (core dumped)\n", 139, -11),
        ("", 137, -9),
        ("", 9, 9),
        # of several tasks, the first; of several starts, the last
        ("srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n", 137, -9),
        ("srun: error: n[1-2]: tasks 0,2-3: Exited with exit code 3\nsrun: error: n1: task 1: Terminated\n", 3, 3),
        (
            "now 7_0 on n1, start 1\nsrun: error: n2: task 1: Killed\n"
            "now 7_0 on n1, start 2\nsrun: error: n1: task 0: Exited with exit code 3\n",
            3,
            3,
        ),
    ],
)
def test_how_a_process_ended_is_sruns_word_first(printed: str, code: int, told: int) -> None:
    assert exit_told(printed, code) == told
    assert verdict(None, Report("FAILED", "", code), last_words=printed).message == describe_exit(told)


def test_last_words_are_the_processs_own() -> None:
    printed = "epoch 1\n  no luck  \n\nslurmstepd-n1: error: *** STEP 4.0 CANCELLED ***\nsrun: got SIGCONT\n"
    assert words_of_its_own(printed) == "no luck"
    assert words_of_its_own("srun: got SIGCONT\n") == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os._exit(3)", "worker left with exit code 3"),
        ("pass", "worker left with exit code 0"),
        ("os.kill(os.getpid(), 9)", "worker killed by signal 9 SIGKILL (out of memory?)"),
        ("os.kill(os.getpid(), 11)", "worker killed by signal 11 SIGSEGV"),
        ("os.kill(os.getpid(), 40)", "worker killed by signal 40 unnamed"),
    ],
)
def test_each_death_has_its_words(code: str, said: str) -> None:
    died = subprocess.run([sys.executable, "-c", f"import os; {code}"])
    assert describe_exit(died.returncode) == said
