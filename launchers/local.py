"""A pool of worker processes on this machine, each with a fixed number of threads.

Workers stay (torch is imported once), take one group of cells at a time, and are replaced when they die; the
cells that died with one get their end, the others go on. The pool is the project's own because the
standard ones break as a whole when one member is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from supar_sweep.errors import RecordError
from supar_sweep.sweep.jobs import Event, Job, folder_of
from supar_sweep.sweep.records import End
from supar_sweep.training.environment import LAUNCH_ENV
from supar_sweep.training.epitaph import epitaph
from supar_sweep.training.worker import GUARDED, RUN_CELLS

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LEAVE_S = 10.0
"""How long a worker that has hung up may take to end: a thread or a driver may keep it for ever."""


class LocalLauncher:
    """Trains jobs in worker processes on this machine.

    Args:
        processes: workers, >= 1; None = as many as cores // threads, at least 1.
        threads: threads of each, >= 1.
        gpus: each worker sees one of these, the one with the fewest workers (CUDA_VISIBLE_DEVICES); none = what is there.
        log_folder: gets what the workers print, a file each; empty ones are removed at the end.
        grace_s: how long `close` waits for cells to save before it kills, >= 0.
        function: what a worker calls with a group of jobs, "module:name".
    """

    name = "local"

    def __init__(
        self,
        *,
        processes: int | None,
        threads: int,
        gpus: Sequence[str] = (),
        log_folder: Path,
        grace_s: float,
        function: str = RUN_CELLS,
    ) -> None:
        self.slots = self.processes = processes or max(1, len(os.sched_getaffinity(0)) // threads)
        self._threads, self._gpus, self._log_folder = threads, gpus, log_folder
        self._grace_s, self._function = grace_s, function
        self._queue: deque[Sequence[Job]] = deque()
        self._events: list[Event] = []
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._n_started = 0
        self._cancelled = False

    # -- the protocol ------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs that one worker trains together, and return at once."""
        self._queue.append(jobs)
        self._dispatch()

    def events(self, timeout_s: float) -> list[Event]:
        """Return the ends since the last call, waiting up to `timeout_s` for the first; [] at once
        when nothing is under way.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._events and (self._queue or any(worker.jobs for worker in self._workers)):
            self._listen(max(0.0, deadline_s - time.monotonic()))
            self._dispatch()
            if time.monotonic() >= deadline_s:
                break
        found, self._events = self._events, []
        return found

    def known(self) -> dict[str, str]:
        """Return {}: nothing outlives a pool."""
        return {}

    def waiting(self) -> set[str]:
        """Return the cells that no worker has."""
        return {job["cell_id"] for group in self._queue for job in group}

    def withdraw(self) -> set[str]:
        """Take back the groups that no worker has, and return their cells."""
        waiting = self.waiting()
        self._queue.clear()
        return waiting

    def cancel(self, *, now: bool = False) -> None:
        """Drop what waits; ask what runs to save and end as `cancelled`, or kill it `now`."""
        self._cancelled = True
        self._dispatch()
        for worker in self._workers:
            worker.kill() if now else worker.stop()

    def close(self) -> None:
        """Stop every worker: those at work save first, and are killed where that takes longer than
        the grace.
        """
        deadline_s = time.monotonic() + self._grace_s
        try:
            self.cancel()
            while self._workers and time.monotonic() < deadline_s:
                self._listen(min(1.0, max(0.0, deadline_s - time.monotonic())))
        finally:  # out of patience, or interrupted again
            for worker in self._workers:
                worker.kill()
            while self._workers:
                self._listen(1.0)
            self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- the pool ----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give waiting groups to idle workers, and start workers while there are groups for them."""
        while self._queue:
            if self._cancelled:
                self._events.extend(Event(job["cell_id"], "cancelled") for job in self._queue.popleft())
                continue
            idle = next((worker for worker in self._workers if worker.idle), None)
            if idle is None:
                if len(self._workers) >= self.slots:
                    return
                idle = self._start()
            idle.give(self._queue.popleft())

    def _start(self) -> _Worker:
        self._n_started += 1
        log = self._log_folder / f"{socket.gethostname()}-{os.getpid()}-{self._n_started:03d}.log"
        environment = {
            **os.environ,
            **LAUNCH_ENV,
            **dict.fromkeys(THREAD_VARIABLES, str(self._threads)),
            "PYTHONPATH": search_path(),
            "PYTHONUNBUFFERED": "1",
        }
        gpu = None
        if self._gpus:
            taken = Counter(worker.gpu for worker in self._workers)
            gpu = min(self._gpus, key=lambda name: taken[name])
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            self._log_folder.mkdir(parents=True, exist_ok=True)
            worker = _Worker(self._function, environment, log, gpu)
        except OSError as error:
            raise RecordError(f"cannot start a worker that logs to {log}: {error}") from error
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        if worker.death_fd is not None:
            self._selector.register(worker.death_fd, selectors.EVENT_READ, worker)
        return worker

    def _listen(self, timeout_s: float) -> None:
        """Take in what workers say, and bury those that died."""
        for worker in {id(key.data): key.data for key, _ in self._selector.select(timeout_s)}.values():
            self._events.extend(worker.read())
            if worker.is_dead():
                self._bury(worker)

    def _bury(self, worker: _Worker) -> None:
        self._events.extend(worker.read())  # what it said between our reading and its end
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        if worker.death_fd is not None:
            self._selector.unregister(worker.death_fd)
        for job in worker.close():
            end: End = "cancelled" if self._cancelled else "failed"
            message = worker.epitaph()
            with contextlib.suppress(RecordError):
                folder_of(job).close_dead_attempt(worker.process.pid, end, message)
            self._events.append(Event(job["cell_id"], end, message, died=not self._cancelled))


class _Worker:
    """One worker process as its parent sees it."""

    def __init__(self, function: str, environment: Mapping[str, str], log: Path, gpu: str | None) -> None:
        self.jobs: dict[str, Job] = {}  # those that have not ended, by cell_id
        self.log, self.gpu = log, gpu
        self._busy = False
        self._job_log_bytes = 0
        self._stopping = False
        self._unread = b""
        self.channel, theirs = socket.socketpair()
        # -P: the working folder is not where modules come from, unless sys.path says so
        command = [sys.executable, "-P", "-m", "supar_sweep.training.worker"]
        # Held back while the child is born, and inherited so: a Ctrl-C can neither kill it
        # unprepared nor get lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, GUARDED)
        try:
            with theirs, log.open("ab") as output:
                self.process: subprocess.Popen[bytes] = subprocess.Popen(
                    [*command, str(theirs.fileno()), function],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                )
        except BaseException:
            self.channel.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.channel.setblocking(False)
        # A grandchild may keep the socket open, so its end alone does not tell of the death.
        self.death_fd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self.death_fd = os.pidfd_open(self.process.pid)

    @property
    def idle(self) -> bool:
        return not self._busy and not self._stopping

    def give(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job["cell_id"]: job for job in jobs}
        self._busy = True
        with contextlib.suppress(OSError):
            self._job_log_bytes = self.log.stat().st_size
        log = {"worker_log": self.log.name}
        self._say({"jobs": [{**job, "provenance": {**job["provenance"], **log}} for job in jobs]})

    def stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._say({"stop": True})

    def kill(self) -> None:
        self._stopping = True
        self.process.kill()

    def _say(self, message: Mapping[str, Any]) -> None:
        # a dead worker cannot listen: its end is found, and told, by whoever waits for it
        self.channel.setblocking(True)
        with contextlib.suppress(OSError):
            self.channel.sendall(json.dumps(message).encode() + b"\n")
        self.channel.setblocking(False)

    def read(self) -> list[Event]:
        """Return the ends it has told of since the last call."""
        with contextlib.suppress(OSError):  # nothing there now, or a reset by its death
            while chunk := self.channel.recv(1 << 16):
                self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        told = []
        for line in lines:
            answer = json.loads(line)
            if "leaving" in answer:
                self._busy = False
                self._stopping |= answer["leaving"]  # its GPU context may be broken: no further job for it
            elif self.jobs.pop(answer["cell_id"], None):
                told.append(Event(answer["cell_id"], answer["end"], answer["message"]))
        return told

    def is_dead(self) -> bool:
        """Return whether the process has ended. A closed socket means that it is about to: then
        this waits for it, and kills one that does not come to its end.
        """
        if self.process.poll() is not None:
            return True
        try:
            closed = self.channel.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            closed = True
        if closed:
            try:
                self.process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return closed

    def close(self) -> list[Job]:
        """Let go of the dead process, and return the jobs that died with it."""
        self.process.wait()
        self.channel.close()
        if self.death_fd is not None:
            os.close(self.death_fd)
        with contextlib.suppress(OSError):
            if self.log.stat().st_size == 0:
                self.log.unlink()
        return list(self.jobs.values())

    def epitaph(self) -> str:
        """Return how it died, with the last line that it printed while at this job and where to
        read the rest.
        """
        return epitaph(self.process.returncode, self.log, self._job_log_bytes)


def search_path() -> str:
    """Return where this process finds modules, so that a worker finds a user's training function in
    the same place.
    """
    own = sysconfig.get_path("stdlib")  # another Python, started by a user's code, has its own
    return os.pathsep.join(os.path.abspath(entry) for entry in sys.path if not entry.startswith(own))
