"""Several processes side by side in one element of a job array: each its own group of cells, its own result, failure and TMPDIR.

    the element's process     starts the others, hands SLURM's signals on, writes down how one died that could not say so itself
    each of the others        trains its group as an element of its own would, but asks SLURM for nothing

What one of them does, the others do not notice: an exit, an exception, a crash. Memory is shared, and SLURM ends an element as a
whole where it looks at memory itself; so the hungriest process is ended before that. Where the kernel does it, it takes one
process, and never the one that watches. No torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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

LOOK_S = 0.25
FULL = 0.9
"""The part of the element's memory at which one is ended. Counted is what a process has of its own; SLURM counts its libraries
too.
"""

FIRST_TO_GO = 500
"""Added to a process's badness (/proc/<pid>/oom_score_adj): the kernel takes one of them before the one that watches them."""

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
                self._members.append(_Member(number, jobs, self._command, self._array.log(self._element, number)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        limit_gb = FULL * int(os.environ.get(SLURM_MEMORY, "0")) * 2**20 / 1e9
        while self._members:
            for member in [member for member in self._members if member.process.poll() is not None]:
                self._members.remove(member)
                self._bury(member)
            if limit_gb:
                self._make_room(limit_gb)
            time.sleep(LOOK_S)

    def _make_room(self, limit_gb: float) -> None:
        """End the hungriest process where all together have too much."""
        held_gb = {member: memory_gb(member.process.pid) for member in self._members if not member.too_much}
        if sum(held_gb.values()) > limit_gb and len(self._members) > 1:
            hungriest = max(held_gb, key=lambda member: held_gb[member])
            hungriest.too_much = (
                f"had {held_gb[hungriest]:.2g} GB of the {limit_gb / FULL:.2g} GB that the element's {len(self._members)} "
                "processes share: launcher.mem_gb is too little, or launcher.processes_per_gpu too many"
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

    def __init__(self, number: int, jobs: Sequence[Job], command: Sequence[str], log: Path) -> None:
        self.number, self.jobs, self.log = number, jobs, log
        self.too_much = ""
        self.scratch = Path(tempfile.mkdtemp(prefix="supar-"))
        environment = {**os.environ, "TMPDIR": str(self.scratch)}
        if gpus := os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","):
            environment |= {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus[0] else {}
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


def memory_gb(pid: int) -> float:
    """Return the memory that a process has of its own, in units of 1e9 bytes: without files that it maps, which others share and
    the kernel can take back. 0 where it is gone.

    Args:
        pid: its id.
    """
    with suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return sum(int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem")) * 1024 / 1e9
    return 0.0


def kernel_ooms(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many processes of this one's control group the kernel has killed for want of memory; 0 where it does not say.

    Args:
        groups: the kernel's list of the process's groups, "<number>:<controllers>:<path>" a line.
        mounted: where they are to be seen.
    """
    with suppress(OSError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            file = Path(controllers, path.lstrip("/"), "memory.oom_control" if controllers else "memory.events")
            with suppress(OSError):
                words = (row.split() for row in (mounted / file).read_text(encoding="ascii").splitlines())
                return next((int(count) for name, count in words if name == "oom_kill"), 0)
    return 0
