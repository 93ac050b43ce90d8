"""A worker process: takes jobs from its parent one after another, and leaves when the parent does.

    python -m supar_sweep.training.worker <fd> <function>

Parent and worker talk over one socket, a JSON mapping a line:

    parent -> worker   {"job": {...}}
    parent -> worker   {"stop": true}    save at the next step, end as cancelled, take no more
    worker -> parent   {"cell_id": ..., "end": ..., "message": ...}

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
from collections.abc import Callable, Mapping
from typing import Any

from supar_sweep.errors import BusyError, SuparError
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.training.environment import prepare_process

RUN_CELL = "supar_sweep.training.run_cell:run_cell"
"""The function that a worker calls when it is told no other: (job, *, should_stop) -> end."""

GUARDED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""Signals that whoever starts a worker blocks meanwhile: they must not end it before it has said
what they mean to it.
"""

RunCell = Callable[..., str]


def find(name: str) -> RunCell:
    """Return the function called "package.module:name"."""
    module, _, attribute = name.partition(":")
    found: RunCell = getattr(importlib.import_module(module), attribute)
    return found


class Inbox:
    """What the parent says, read by a thread of its own: a stop is heard in the middle of a cell.

    Args:
        channel: the socket to the parent.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.stopping = threading.Event()
        self._channel = channel
        self._jobs: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_job(self) -> Mapping[str, Any] | None:
        """Return the next job, waiting for it; None = there will be no more."""
        return self._jobs.get()

    def stop(self) -> None:
        """End the cell at work at its next step, and take no further one."""
        self.stopping.set()
        self._jobs.put(None)

    def _read(self) -> None:
        # whatever goes wrong here, the worker must hear "stop" and not run on unattended
        try:
            with self._channel.makefile("rb") as lines:
                for line in lines:
                    said = json.loads(line)
                    if "job" in said:
                        self._jobs.put(said["job"])
                    else:
                        break
        finally:
            self.stop()


def work(job: Mapping[str, Any], run: RunCell, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Return how a job ended, as the parent is told it. No exception gets out.

    Args:
        job: see sweep.jobs.Job.
        run: the function to call.
        should_stop: polled by it before each step.
    """
    try:
        end = run(job, should_stop=should_stop)
        message = "" if end in ("done", "diverged") else _message_of(job)
    except BusyError as error:
        end, message = "busy", str(error)
    except MemoryError as error:
        end, message = "oom", str(error) or "out of memory"
    except SuparError as error:
        end, message = "failed", str(error)
    except BaseException as error:  # SystemExit from a user's function is a failure of the cell
        traceback.print_exc()
        end, message = "failed", f"{type(error).__name__}: {error}"
    return {"cell_id": job["cell_id"], "end": end, "message": message}


def _message_of(job: Mapping[str, Any]) -> str:
    with contextlib.suppress(SuparError):
        return str((folder_of(job).last_end() or {}).get("message", ""))
    return ""


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
    run: RunCell | None = None
    while not inbox.stopping.is_set() and (job := inbox.next_job()) is not None:
        if run is None:
            if arguments[1] == RUN_CELL:
                prepare_process(int(job["runtime"]["threads"]))
            run = find(arguments[1])
        answer = work(job, run, inbox.stopping.is_set)
        answer["leaving"] = answer["end"] in ("failed", "oom") and holds_gpu()
        sys.stdout.flush()
        try:
            channel.sendall((json.dumps(answer) + "\n").encode())
        except OSError:  # the parent is gone: the record says it all
            return 0
        if answer["leaving"]:
            return 0
    return 0


def holds_gpu() -> bool:
    """Return whether this process has a CUDA context: after an error in it every later cell would fail too."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
