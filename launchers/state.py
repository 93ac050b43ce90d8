"""What became of a job, in typed words: pure functions of what its cells, SLURM's queue and its accounting say. What a run says
of itself is in supar_sweep.sweep.status.
"""

from __future__ import annotations

import re
import signal
from typing import NamedTuple

from supar_sweep.sweep.arrays import OwnRecord
from supar_sweep.sweep.records import COMPLETE_ENDS
from supar_sweep.training.epitaph import describe_exit

STATES = (
    *COMPLETE_ENDS,
    *("running", "pending", "held"),
    *("oom", "timeout", "preempted", "node-failed", "cancelled", "failed", "stale", "missing", "unknown"),
)
"""Every state of a cell in an array: data, under way, ended without data."""

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "RESV_DEL_HOLD"})
HELD = frozenset({"REQUEUE_HOLD", "SPECIAL_EXIT"})
AT_WORK = frozenset(
    {"RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
)
ENDED = {
    "OUT_OF_MEMORY": "oom",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node-failed",
    "BOOT_FAIL": "node-failed",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "FAILED": "failed",
    "COMPLETED": "failed",  # without a record of the cell, which would have been asked first
}
OOM_TEXT = re.compile(r"exceeded (job )?memory limit|oom[-_ ]kill", re.IGNORECASE)
"""What SLURM writes into a job's own output: where memory is polled, its state is FAILED and no more."""

START = re.compile(r", start \d+$", re.MULTILINE)
"""The end of the first line that a start of an element prints (training.slurm_job)."""

TASK_END = re.compile(r"^srun: error: \S+: tasks? [\d,-]+: (.+)$", re.MULTILINE)
SLURM_LINE = re.compile(r"(srun|slurmstepd\S*): ")


class Report(NamedTuple):
    """What SLURM tells of an element.

    Args:
        state: its word: RUNNING, NODE_FAIL, ...
        reason: why it waits; "" or "None" where it does not.
        code: exit code, or minus a signal's number.
        restarts: how often it was requeued.
    """

    state: str
    reason: str = ""
    code: int = 0
    restarts: int = 0

    @property
    def live(self) -> bool:
        """Whether the element is still to run, or runs."""
        return self.state in WAITING | HELD | AT_WORK

    @property
    def to_begin(self) -> bool:
        """Whether the element is in the queue and no process of it has run."""
        return self.state in WAITING | HELD and not self.restarts

    @property
    def launch_failed(self) -> bool:
        """Whether SLURM holds the element because a node could not start it, and not because somebody wanted that."""
        return self.state in WAITING | HELD and "launch failed" in self.reason.lower().replace("_", " ")


class Verdict(NamedTuple):
    """Where a cell of an element stands.

    Args:
        state: one of STATES.
        message: one line on the cause; "" where the state says it all.
        settled: nothing further will come of it.
        died: its process was lost without a word of its own.
        wanted: somebody cancelled it.
    """

    state: str
    message: str = ""
    settled: bool = False
    died: bool = False
    wanted: bool = False


def judge(
    own: OwnRecord,
    queue: Report | None,
    account: Report | None,
    *,
    since_gone_s: float,
    grace_s: float,
    last_words: str = "",
) -> Verdict:
    """Return where a cell stands: by its own files first, then the queue, then the accounting, then what it means that an
    element once seen is gone.

    Args:
        own: what the cell's files say, read now.
        queue: what the queue tells of its element; None = nothing.
        account: what the accounting tells; None = nothing, or there is none.
        since_gone_s: how long ago the element was first seen to be neither waiting nor running, >= 0.
        grace_s: how long a file, or a requeue, may take to be seen: nothing is called lost before.
        last_words: the end of what the element printed.
    """
    if own.end in COMPLETE_ENDS:
        return Verdict(own.end, settled=True)
    if own.end in ("failed", "oom"):  # a requeued element leaves these alone
        return Verdict(own.end, own.message, settled=True, died=own.died)
    if queue is not None and queue.live:
        state = live_state(queue)
        return Verdict(state, "" if state == "running" or queue.reason == "None" else queue.reason)
    said = account or queue
    if account is not None and account.live:  # it lags behind the queue
        said = queue
    if since_gone_s < grace_s:
        return Verdict("unknown", "has left the queue, or is about to be requeued")
    if own.locked:
        return Verdict("running", "SLURM has given it up, and its process still holds the cell")
    return _ended(own, said, last_words)


def live_state(queue: Report) -> str:
    """Return running, held or pending.

    Args:
        queue: what the queue tells of an element that is live.
    """
    if queue.state in AT_WORK:
        return "running"
    return "held" if queue.state in HELD or "held" in queue.reason.lower() else "pending"


def _ended(own: OwnRecord, said: Report | None, last_words: str) -> Verdict:
    state = ENDED.get(said.state, "unknown") if said else ("stale" if own.begun else "missing")
    if own.end is not None:  # it saved and left, and SLURM did not start it again
        if state not in ("preempted", "node-failed", "timeout", "cancelled"):
            # a process that hears of a preemption says so: no other record tells it from a scancel
            state = "preempted" if own.message.startswith("preempted") else own.end
        # where SLURM knows of no scancel, the process was told to stop by something else
        wanted = state == "cancelled" and (said is None or ENDED.get(said.state) == "cancelled")
        return Verdict(state, own.message, settled=True, wanted=wanted)
    if state in ("failed", "stale", "unknown") and OOM_TEXT.search(last_words):
        state = "oom"
    if state == "oom":
        return Verdict("oom", "killed by SLURM: more memory than it asked for", settled=True)
    if state == "timeout":
        return Verdict("timeout", "killed at the time limit", settled=True)
    if state == "cancelled":
        return Verdict("cancelled", "cancelled (scancel)", settled=True, wanted=True)
    if state == "preempted":
        return Verdict("preempted", "preempted, and not requeued", settled=True, died=True)
    if state == "node-failed":
        return Verdict("node-failed", "its node failed", settled=True, died=True)
    if state == "stale":
        return Verdict("stale", "its process is gone, and SLURM has forgotten why", settled=True, died=True)
    if state == "missing":
        return Verdict("missing", "its job is no longer in the queue and never began", settled=True, died=True)
    if state == "unknown" or said is None:
        return Verdict("unknown", f"SLURM says {said.state if said else 'nothing'}", settled=True, died=True)
    return Verdict("failed", describe_exit(exit_told(last_words, said.code)), settled=True, died=True)


def exit_told(last_words: str, code: int) -> int:
    """Return the exit code of an element's process, or minus the signal that killed it: srun's own word for it, since the
    element's code is 9 or 137 after a SIGKILL, and also after sys.exit(9). Of several tasks, the first to go took the others
    with it.

    Args:
        last_words: the end of what the element printed, srun's lines among it.
        code: the element's, where srun said nothing.

    >>> exit_told("srun: error: n1: task 0: Killed\\nsrun: Force Terminated StepId=7.0\\n", 9)
    -9
    """
    said = TASK_END.findall(START.split(last_words)[-1])
    if not said:
        return 128 - code if code > 128 else code
    if left := re.match(r"Exited with exit code (\d+)", said[0]):
        return int(left[1])
    words = {signal.strsignal(each) or "": each for each in signal.valid_signals()}
    return -words.get(said[0].removesuffix(" (core dumped)").strip(), -code)


def words_of_its_own(last_words: str) -> str:
    """Return the last line that an element's own process printed, "" where SLURM's are all there are.

    Args:
        last_words: the end of what the element printed.
    """
    own = (line.strip() for line in reversed(last_words.splitlines()) if not SLURM_LINE.match(line))
    return next((line for line in own if line), "")
