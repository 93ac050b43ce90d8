"""One element of a job array: trains its cells, and leaves so that SLURM does the right thing next.

    python -m supar_sweep.training.slurm_job <array folder> <function> <timeout_s> <signal_delay_s> <ranks> [<process>]

Several groups of cells are trained by a process each (packing.py); such a process is told its number, from 1.

    SIGUSR2 near the time limit           timeout: save at the next step, ask SLURM for a requeue, leave with 143
    SIGTERM or SIGUSR2 while the job is   preempted: as above. SLURM has announced a preemption, and would take a process
    still RUNNING for SLURM               that leaves before its grace is over for one that has failed
    SIGTERM at any other time             cancelled: save and leave with 143. SLURM knows what it wants to do next (scancel,
                                          scontrol requeue, a preemption without a grace)

Where an element is several tasks, they train each cell together (ranks.py): what one of them hears holds for all, and rank 0
alone speaks with SLURM and leaves last.

What the cells' own records say is the truth; the exit code (0, 1 = a cell failed, 143) is for people who read sacct.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

from supar_sweep.errors import BusyError, RecordError
from supar_sweep.sweep.arrays import ArrayFolder, own_record, stamped
from supar_sweep.sweep.code import code_problem, code_version
from supar_sweep.sweep.files import read_json, write_json
from supar_sweep.sweep.jobs import Job, folder_of
from supar_sweep.sweep.records import Attempt
from supar_sweep.training.environment import prepare_process
from supar_sweep.training.member import Stop
from supar_sweep.training.packing import HEARD, ON_GPU, SideBySide
from supar_sweep.training.ranks import Ranks, join
from supar_sweep.training.worker import RUN_CELLS, RunCells, find, work

log = logging.getLogger(__name__)

EARLY_S = 65.0
"""SLURM may send the time limit's signal up to a minute early."""

BUSY_POLL_S = 2.0
ANSWER_S = 20.0
LEFT = 128 + signal.SIGTERM
OPTION_PREFIXES = ("SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SACCT_", "SCONTROL_")
"""Variables by which a shell gives options to SLURM's commands; those that we call get ours alone."""

RUNS_ON = ("RUNNING", "SIGNALING")
"""What SLURM calls a job that it means to let run on for now: the second, while the signal is on its way."""

SETTLED = ("done", "diverged", "failed", "oom")
"""Ends that a requeued element does not try again: data, and what would only fail once more."""


class Signals:
    """Hears what SLURM says to the process, and tells the training why to stop.

    Args:
        timeout_s: the job's time limit.
        signal_delay_s: how long before it SIGUSR2 is asked for.
        led: the parent is the element's process, whose end is this one's.
    """

    def __init__(self, timeout_s: float, signal_delay_s: float, *, led: bool = False) -> None:
        self._why: Stop | None = None
        self._parent = os.getppid() if led else None
        self._begun_s = time.monotonic()
        self._limit_near_s = timeout_s - signal_delay_s - EARLY_S
        self.hand_on: Callable[[int], None] = lambda number: None
        for number in HEARD:
            signal.signal(number, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)

    @property
    def why(self) -> Stop | None:
        """Why to stop; None = go on."""
        if self._why is None and self._parent not in (None, os.getppid()):
            self._why = "cancelled"
        return self._why

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.hand_on(number)
        if self._why is None:
            self._why = self._meaning(number)
            os.write(2, f"{signal.Signals(number).name}: {self._why}, saving\n".encode())

    def _meaning(self, number: int) -> Stop:
        if number == signal.SIGUSR2 and time.monotonic() - self._begun_s >= self._limit_near_s:
            return "timeout"
        if number == signal.SIGUSR2:
            return "preempted"
        state = state_now()
        os.write(2, f"SLURM calls the job {state or 'nothing'}\n".encode())
        return "preempted" if state in RUNS_ON else "cancelled"


def command(*arguments: str) -> list[str]:
    """Return the words that start an element, or one of its processes.

    Args:
        arguments: see `main`.
    """
    # -P: the working folder is not where modules come from, unless PYTHONPATH says so
    return [sys.executable, "-P", "-u", "-m", "supar_sweep.training.slurm_job", *arguments]


def main(arguments: Sequence[str]) -> int:
    """Train the element's cells, or those of one of its processes, and return the exit code.

    Args:
        arguments: the array's folder, the function to call ("module:name"), timeout_s, signal_delay_s, how many tasks train a
            cell together; a process's number.
    """
    number = int(arguments[5]) if len(arguments) > 5 else None
    signals = Signals(float(arguments[2]), float(arguments[3]), led=number is not None)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    folder, function = ArrayFolder(Path(arguments[0])), arguments[1]
    index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    element = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{index}"
    restarts, node = int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ.get("SLURMD_NODENAME", "")
    log.info("%s on %s, start %d", element, node, restarts + 1)
    groups = dict(enumerate(folder.elements()[index], 1))
    code = code_version()
    facts: dict[str, Any] = {"node": node, "restarts": restarts, "code": code}
    if number:
        facts |= {"process": number, "on_gpu": int(os.environ.get(ON_GPU, "1"))}
    jobs = [
        [stamped(job, folder.key, element, **facts) for job in group]
        for this, group in groups.items()
        if number in (None, this)
    ]
    ranks = join(lambda: signals.why, world_size=int(arguments[4]), device=str(jobs[0][0]["runtime"]["device"]))
    ends = ranks.from_first(lambda: ends_of(chain.from_iterable(jobs), folder))
    left = {this: [job for job in group if ends[job["cell_id"]] not in SETTLED] for this, group in enumerate(jobs, 1)}
    if unsettled := [*chain.from_iterable(left.values())]:
        before = {job["cell_id"]: steps_done(job) for job in unsettled}
        if problem := ranks.from_first(lambda: code_problem(code)):
            ends |= refused(unsettled if ranks.is_first else (), problem)
        elif len(jobs) > 1:
            processes = SideBySide(folder, element, command(*arguments))
            signals.hand_on = processes.hand_on
            processes.train({this: group for this, group in left.items() if group}, lambda: signals.why)
            ends = ends_of(chain.from_iterable(jobs), folder)
        else:
            if function == RUN_CELLS:
                prepare_process(int(unsettled[0]["runtime"]["threads"]))
            ends |= train(unsettled, find(function), ranks)
        stopped = [job for job in unsettled if ends[job["cell_id"]] not in SETTLED]
        if stopped and number is None and ranks.is_first and not ranks.lost:
            go_on(element, stopped, before, ranks.why())
    why = ranks.why()
    ranks.leave()
    exit_code = _exit_code(why, ends)
    if ranks.world_size > 1:
        # torch's threads may abort an interpreter that ends; and to tidy up is to wait for a rank that is gone, on a GPU
        # without end
        sys.stdout.flush()
        os._exit(int(ranks.lost) if ranks.lost or not ranks.is_first else exit_code)
    return exit_code


def _exit_code(why: Stop | None, ends: Mapping[str, str]) -> int:
    if why is not None and any(end not in SETTLED for end in ends.values()):
        return LEFT
    return int(any(end not in ("done", "diverged") for end in ends.values()))


def refused(jobs: Sequence[Job], problem: str) -> dict[str, str]:
    """Return the ends of cells that are not to be trained, "failed", each written into an attempt.

    Args:
        jobs: of the cells.
        problem: one line on the cause.
    """
    for job in jobs:
        log.error("%s: %s", job["cell_id"], problem)
        with (
            suppress(BusyError, RecordError),
            Attempt(folder_of(job), job["cell"], {"provenance": job["provenance"]}) as attempt,
        ):
            attempt.end("failed", problem)
    return {job["cell_id"]: "failed" for job in jobs}


def ends_of(jobs: Iterable[Job], array: ArrayFolder) -> dict[str, str]:
    """Return how each cell has ended as far as its record says, "" = not yet, by cell_id.

    Args:
        jobs: of the cells.
        array: that trains them.
    """
    return {job["cell_id"]: own_record(folder_of(job), array.key).end or "" for job in jobs}


def train(jobs: Sequence[Job], run: RunCells, ranks: Ranks) -> dict[str, str]:
    """Return how each cell ended.

    A cell that another process holds is waited for: it may be this element's own earlier start, on a node that SLURM has
    given up.

    Args:
        jobs: of the cells.
        run: trains them; told of its ranks where there are several.
        ranks: say when to stop.
    """
    ends: dict[str, str] = {}

    def tell(cell_id: str, end: str, message: str) -> None:
        if ends.get(cell_id) != end:
            log.info("%s: %s%s%s", cell_id, end, ": " if message else "", message)
        ends[cell_id] = end

    if ranks.world_size > 1:
        run = partial(run, ranks=ranks)
    while jobs:
        work(jobs, run, ranks.why, tell)  # type: ignore[arg-type]
        jobs = [job for job in jobs if ends[job["cell_id"]] == "busy"]
        if jobs and ranks.why() is None:
            time.sleep(BUSY_POLL_S)
        elif jobs:
            break
    return ends


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(OPTION_PREFIXES)}
    return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, env=own)


def state_now() -> str:
    """Return what SLURM calls this job now, "" where it does not answer."""
    with suppress(OSError, subprocess.TimeoutExpired):
        return _ask("squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "--Format=State:|").stdout.strip().strip("|")
    return ""


def go_on(element: str, stopped: Sequence[Job], before: Mapping[str, int], why: Stop | None) -> None:
    """Ask SLURM to start the element once more where it would not do that by itself, and should.

    Args:
        element: "<job id>_<index>".
        stopped: jobs of the cells that were not at their end.
        before: steps that each had when the element started.
        why: they were stopped.
    """
    if why == "preempted" or (why == "timeout" and got_further(stopped, before)):
        again(element, stopped)


def got_further(stopped: Sequence[Job], before: Mapping[str, int]) -> bool:
    """Return whether any cell has more steps than it had; note in the records that there will be no requeue where none has.

    Args:
        stopped: jobs of the cells that the time limit ended.
        before: steps that each had when the element started.
    """
    if any(steps_done(job) > before[job["cell_id"]] for job in stopped):
        return True
    note(stopped, "not requeued: no step was saved since this start")
    return False


def again(element: str, stopped: Sequence[Job]) -> None:
    """Ask SLURM to start the element once more; note in the records where it refuses.

    Args:
        element: "<job id>_<index>".
        stopped: jobs of the cells that were not at their end.
    """
    try:
        asked = _ask("scontrol", "requeue", element)
        refusal = " ".join(asked.stderr.split()) if asked.returncode != 0 else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        refusal = str(error)
    if refusal:
        note(stopped, f"not requeued: {refusal}")


def note(jobs: Sequence[Job], text: str) -> None:
    """Add to the message of each cell's last end."""
    log.info(text)
    for job in jobs:
        with suppress(RecordError, IndexError):
            path = folder_of(job).attempts()[-1] / "end.json"
            said: dict[str, Any] = read_json(path) or {}
            write_json(path, {**said, "message": f"{said.get('message', '')}; {text}".removeprefix("; ")})


def steps_done(job: Job) -> int:
    """Return how many steps the cell's curve holds."""
    with suppress(RecordError):
        return max((int(line["step"]) for line in folder_of(job).metrics()), default=0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
