"""A worker process: takes groups of jobs from its parent one after another, and leaves when the parent does.

    python -m supar_sweep.training.worker <fd> <function>

Parent and worker talk over one socket, a JSON mapping a line:

    parent -> worker   {"jobs": [{...}, ...]}                              to be trained together
    parent -> worker   {"stop": true}                                     save at the next step, end as cancelled, take no more
    worker -> parent   {"cell_id": ..., "end": ..., "message": ...}       each cell, as soon as it has ended
    worker -> parent   {"leaving": false}                                 all of them have; true: and take no more

The end of the stream means that the parent is gone (killed, too): as good as a stop. Nothing is
pickled, so either side can be read in a log. A signal meant for the terminal's whole group (Ctrl-C,
a hang-up) is the parent's to interpret; SIGTERM is a stop.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from supar_sweep.errors import SuparError
from supar_sweep.training.environment import prepare_process

RUN_CELLS = "supar_sweep.training.run_cell:run_cells"
"""The function that a worker calls when it is told no other: (jobs, *, should_stop, ended)."""

GUARDED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""Signals that whoever starts a worker blocks meanwhile: they must not end it before it has said
what they mean to it.
"""

RunCells = Callable[..., None]
Jobs = Sequence[Mapping[str, Any]]


def find(name: str) -> RunCells:
    """Return the function called "package.module:name"."""
    module, _, attribute = name.partition(":")
    found: RunCells = getattr(importlib.import_module(module), attribute)
    return found


class Inbox:
    """What the parent says, read by a thread of its own: a stop is heard in the middle of a cell.

    Args:
        channel: the socket to the parent.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.stopping = threading.Event()
        self._channel = channel
        self._jobs: queue.SimpleQueue[Jobs | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_jobs(self) -> Jobs | None:
        """Return the next group of jobs, waiting for it; None = there will be no more."""
        return self._jobs.get()

    def stop(self) -> None:
        """End the cells at work at their next step, and take no further ones."""
        self.stopping.set()
        self._jobs.put(None)

    def _read(self) -> None:
        # whatever goes wrong here, the worker must hear "stop" and not run on unattended
        try:
            with self._channel.makefile("rb") as lines:
                for line in lines:
                    said = json.loads(line)
                    if "jobs" in said:
                        self._jobs.put(said["jobs"])
                    else:
                        break
        finally:
            self.stop()


def work(jobs: Jobs, run: RunCells, should_stop: Callable[[], bool], tell: Callable[[str, str, str], None]) -> set[str]:
    """Return the ends of a group of jobs, each told as soon as it is known. No exception of theirs gets out.

    Args:
        jobs: see sweep.jobs.Job.
        run: the function to call.
        should_stop: polled by it before each step.
        tell: called with (cell_id, end, message).
    """
    left = {job["cell_id"] for job in jobs}
    ends = set()

    def ended(cell_id: str, end: str, message: str = "") -> None:
        left.discard(cell_id)
        ends.add(end)
        tell(cell_id, end, message)

    try:
        run(jobs, should_stop=should_stop, ended=ended)
        end, message = "failed", "the training function did not say how it ended"
    except MemoryError as error:
        end, message = "oom", str(error) or "out of memory"
    except SuparError as error:
        end, message = "failed", str(error)
    except BaseException as error:  # SystemExit from a user's function is a failure of the cell
        traceback.print_exc()
        end, message = "failed", f"{type(error).__name__}: {error}"
    for cell_id in sorted(left):
        ended(cell_id, end, message)
    return ends


def main(arguments: list[str]) -> int:
    """Work until the parent has no more jobs, and return the exit code.

    Args:
        arguments: the socket's file descriptor, and the function to call ("module:name").
    """
    faulthandler.enable()  # a segfault leaves its stack in the worker's log
    channel = socket.socket(fileno=int(arguments[0]))
    inbox = Inbox(channel)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: inbox.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GUARDED)
    run: RunCells | None = None

    def say(**message: Any) -> None:
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # the parent is gone: the records say it all, and a stop is on its way
            channel.sendall((json.dumps(message) + "\n").encode())

    while not inbox.stopping.is_set() and (jobs := inbox.next_jobs()) is not None:
        if run is None:
            if arguments[1] == RUN_CELLS:
                prepare_process(int(jobs[0]["runtime"]["threads"] or 1))
            run = find(arguments[1])
        ends = work(
            jobs, run, inbox.stopping.is_set, lambda this, end, message: say(cell_id=this, end=end, message=message)
        )
        unfinished = not ends.isdisjoint(("failed", "oom", "cancelled"))
        leaving = inbox.stopping.is_set() or (unfinished and holds_gpu())
        say(leaving=leaving)
        if leaving:
            return 0
    return 0


def holds_gpu() -> bool:
    """Return whether this process has a CUDA context: after an error in it every later cell would fail too."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
