"""Several processes side by side in one element of a job array: each its own group of cells, its own result, failure and TMPDIR.

    the element's process     starts the others, hands SLURM's signals on, writes down how one died that could not say so itself
    each of the others        trains its group as an element of its own would, but asks SLURM for nothing

What one of them does, the others do not notice: an exit, an exception, a crash. Memory is shared. Where the kernel holds the
element to what it asked for (control groups), it takes one process, and never the one that watches; where SLURM polls, it
ends the element as a whole, so the hungriest process is ended before that. No torch.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from supar_sweep.errors import RecordError
from supar_sweep.sweep.arrays import ArrayFolder, is_of, own_record
from supar_sweep.sweep.jobs import Job, folder_of
from supar_sweep.sweep.records import End
from supar_sweep.training.epitaph import epitaph

log = logging.getLogger(__name__)

HEARD = (signal.SIGTERM, signal.SIGUSR2)
"""SLURM's signals: held back while a process is born, which they would end before it can tell what they mean."""

LOOK_S = 0.2
"""SLURM polls memory every 30 s, unless a site says otherwise."""

FULL = 0.9
"""The part of the element's memory at which one is ended, where the kernel does not do it."""

FIRST_TO_GO = 500
"""Added to a process's badness (/proc/<pid>/oom_score_adj): the kernel takes one of them before the one that watches them."""

ON_GPU = "SUPAR_PROCESSES_ON_GPU"
"""Tells a process how many, itself included, were started on its GPU."""

SLURM_MEMORY = "SLURM_MEM_PER_NODE"
"""The element's memory in MiB, where it asked for some."""


class SideBySide:
    """The processes of one element.

    Args:
        array: whose element it is.
        element: as SLURM calls it.
        command: starts a process, its number (from 1) being added as the last word.
    """

    def __init__(self, array: ArrayFolder, element: str, command: Sequence[str]) -> None:
        self._array, self._element, self._command = array, element, command
        self._members: list[_Member] = []
        self._ooms = kernel_ooms()

    def hand_on(self, number: int) -> None:
        """Send a signal to all of them; those that SLURM sent it to hear it twice."""
        for member in self._members:
            with suppress(ProcessLookupError):
                member.process.send_signal(number)

    def train(self, groups: Mapping[int, Sequence[Job]], should_stop: Callable[[], object]) -> None:
        """Train each group in a process of its own, and return when the last has ended.

        Args:
            groups: the jobs of each by number, from 1.
            should_stop: whether a signal came before there was anybody to hand it on to.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            for number, jobs in groups.items() if not should_stop() else ():
                own_log = self._array.log(self._element, number)
                self._members.append(_Member(number, jobs, self._command, own_log, surroundings(number, groups)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        asked_gb = int(os.environ.get(SLURM_MEMORY, "0")) * 2**20 / 1e9
        polled = kernel_limit_gb() > asked_gb > 0
        while self._members:
            for member in [member for member in self._members if member.process.poll() is not None]:
                self._members.remove(member)
                self._bury(member)
            if polled:
                self._make_room(asked_gb)
            time.sleep(LOOK_S)

    def _make_room(self, asked_gb: float) -> None:
        """End the hungriest process where all together have nearly what the element asked for."""
        held_gb = {member: memory_gb(member.process.pid) for member in self._members if not member.too_much}
        if sum(held_gb.values()) > FULL * asked_gb and len(self._members) > 1:
            hungriest = max(held_gb, key=lambda member: held_gb[member])
            hungriest.too_much = (
                f"had {held_gb[hungriest]:.2g} GB of the {asked_gb:.2g} GB that the element's {len(self._members)} processes "
                "share: launcher.mem_gb is too little, or launcher.processes_per_gpu too many"
            )
            hungriest.process.kill()

    def _bury(self, member: _Member) -> None:
        """Write down how the cells ended that the process had no word about."""
        shutil.rmtree(member.scratch, ignore_errors=True)
        code = member.process.returncode
        end: End = "failed"
        message = epitaph(code, member.log, member.log_bytes)
        if member.too_much:
            end, message = "oom", member.too_much
        elif code == -signal.SIGKILL and kernel_ooms() > self._ooms:
            end, message = "oom", "killed by the kernel: more memory than the element asked for"
            self._ooms += 1
        log.info("process %d left with %d", member.number, code)
        for job in member.jobs:
            folder = folder_of(job)
            with suppress(RecordError):
                own = own_record(folder, self._array.key)
                if own.end is None and folder.close_attempt(
                    end, message, lambda info: is_of(info, self._array.key), died=end == "failed"
                ):
                    log.info("%s: %s: %s", job["cell_id"], end, message)


class _Member:
    """One process, as the one that started it sees it."""

    def __init__(
        self, number: int, jobs: Sequence[Job], command: Sequence[str], log: Path, surroundings: Mapping[str, str]
    ) -> None:
        self.number, self.jobs, self.log = number, jobs, log
        self.too_much = ""
        self.scratch = Path(tempfile.mkdtemp(prefix="supar-"))
        environment = {**os.environ, "TMPDIR": str(self.scratch), **surroundings}
        with log.open("ab") as output:
            self.log_bytes = output.tell()
            self.process = subprocess.Popen(
                [*command, str(number)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        with suppress(OSError):
            Path(f"/proc/{self.process.pid}/oom_score_adj").write_text(str(FIRST_TO_GO), encoding="ascii")


def surroundings(number: int, numbers: Collection[int]) -> dict[str, str]:
    """Return what a process is told of its GPU; {} where the element has none.

    Args:
        number: of the process, from 1.
        numbers: of all that are started.
    """
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not gpus[0]:
        return {}
    beside = sum((other - number) % len(gpus) == 0 for other in numbers)
    return {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)], ON_GPU: str(beside)}


def memory_gb(pid: int) -> float:
    """Return the memory that a process has, as SLURM counts it, in units of 1e9 bytes; 0 where it is gone.

    Args:
        pid: its id.
    """
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    return 0.0


PROCESS_GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def kernel_limit_gb(groups: Path = PROCESS_GROUPS, mounted: Path = MOUNTED) -> float:
    """Return the memory that the kernel holds this process and its like to, in units of 1e9 bytes; infinite where it does not.

    Args:
        groups: the kernel's list of the process's control groups, "<number>:<controllers>:<path>" a line.
        mounted: where they are to be seen.
    """
    limits = [math.inf]
    for folder in _memory_groups(groups, mounted):
        for name in ("memory.max", "memory.limit_in_bytes"):  # the second of version 1
            with suppress(OSError, ValueError):  # "max": none
                limits.append(int((folder / name).read_text(encoding="ascii")) / 1e9)
    return min(limits)


def kernel_ooms(groups: Path = PROCESS_GROUPS, mounted: Path = MOUNTED) -> int:
    """Return how many processes of this one's control group the kernel has killed for want of memory; 0 where it does not say.

    Args:
        groups, mounted: as for `kernel_limit_gb`.
    """
    for folder in _memory_groups(groups, mounted)[:1]:
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                words = (line.split() for line in (folder / name).read_text(encoding="ascii").splitlines())
                return next((int(count) for key, count in words if key == "oom_kill"), 0)
    return 0


def _memory_groups(groups: Path, mounted: Path) -> list[Path]:
    """Return the folders of the control group that memory is counted in, and of those above it."""
    lines: list[str] = []
    with suppress(OSError):
        lines = groups.read_text(encoding="utf-8").splitlines()
    for controller in ("memory", ""):  # version 1, and 2, which has no name
        for _, controllers, path in (line.split(":", 2) for line in lines):
            if controllers == controller:
                own = Path(path.lstrip("/"))
                return [mounted / controller / each for each in (own, *own.parents)]
    return []
