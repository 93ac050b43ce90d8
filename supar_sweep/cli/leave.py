"""Ctrl-C in a `run` that follows the jobs of a queue: are they to end, too? Asked on a terminal."""

from __future__ import annotations

import os
import select
import signal
import sys

from supar_sweep.cli.progress import Live
from supar_sweep.sweep.interrupt import CANCEL, Interrupts

QUESTION = "cancel the jobs, too? They save first, and `run` continues them. [y/N] "
LOOK_S = 0.2


def leaves_jobs(interrupts: Interrupts, live: Live) -> bool:
    """Return whether the jobs are left in the queue, where the next `run` follows them.

    `supar-sweep cancel` ends them. Ctrl-C on a terminal asks: any answer but yes leaves them, and so does a second Ctrl-C. Off
    a terminal nobody can be asked; and that a terminal closes, or that this process is itself a job and is stopped, is no
    reason to end others: they are left.

    Args:
        interrupts: what was heard.
        live: steps aside for the question.
    """
    if interrupts.last == CANCEL:
        return False
    if interrupts.last != signal.SIGINT or not _somebody_there():
        return True
    with live.paused():
        return not _says_yes(interrupts)


def _somebody_there() -> bool:
    try:
        return sys.stderr.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):  # no terminal there; a closed stdin
        return False


def _says_yes(interrupts: Interrupts) -> bool:
    heard = interrupts.count
    print(QUESTION, end="", file=sys.stderr, flush=True)
    while interrupts.count == heard:
        if select.select([sys.stdin], [], [], LOOK_S)[0]:
            return sys.stdin.readline().strip().lower() in ("y", "yes")
    print(file=sys.stderr)
    return False
