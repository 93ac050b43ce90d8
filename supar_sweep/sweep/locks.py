"""Locks that end with their process: one worker a cell, one `run` an experiment. No torch.

flock on a file beside the records: the kernel lets go of it however the process ends, on this
machine and over NFS. The file's text (who holds it) is for people and for `cancel`; whether it is
held is asked of the kernel alone. The file is never deleted: a waiter might hold the deleted one,
and a third process a new one.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from supar_sweep.errors import BusyError, RecordError

ATTEMPTS = 10
PAUSE_S = 0.02


class Holder(NamedTuple):
    """Who holds a lock: process id, host name, and since when (Unix time)."""

    pid: int
    host: str
    since_s: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
        return f"pid {self.pid} on {self.host}, since {since}"


def hold(path: Path, what: str) -> IO[str]:
    """Return the lock file, open and held until it is closed or the process ends, however it ends.

    Args:
        path: the file; it and its folder are made where they are missing.
        what: what is held, for the error: "experiment fig6".

    Raises:
        BusyError: another process holds the lock; the text says which.
        RecordError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except IsADirectoryError as error:
        raise _no_file(path) from error
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror}") from error
    try:
        for attempt in range(ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # `is_held` takes it for microseconds: somebody's `status` must not turn a worker
                # away
                if attempt + 1 == ATTEMPTS:
                    who = holder(path) or "who has not said its name yet"
                    raise BusyError(f"{what} is held by another process: {who}") from None
                time.sleep(PAUSE_S)
        file.truncate(0)
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since_s": time.time()}
        file.write(json.dumps(mine) + "\n")
        file.flush()
    except OSError as error:
        with suppress(OSError):  # on a full disk it fails again, and lets go of the lock all the same
            file.close()
        raise RecordError(f"cannot lock {path}: {error.strerror}") from error
    except BusyError:
        file.close()
        raise
    return file


def is_held(path: Path) -> bool:
    """Return whether a live process holds the lock. Needs to read the file only, and makes none.

    Raises:
        RecordError: the file may not be read.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    except IsADirectoryError as error:
        raise _no_file(path) from error
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    return False


def _no_file(path: Path) -> RecordError:
    return RecordError(f"{path} is a folder, where a file must be: remove it, and `run` goes on")


def holder(path: Path) -> Holder | None:
    """Return who took the lock last, or None where the file does not say. Ask `is_held` whether it
    still does.
    """
    try:
        said = json.loads(path.read_bytes())
        return Holder(int(said["pid"]), str(said["host"]), float(said["since_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
