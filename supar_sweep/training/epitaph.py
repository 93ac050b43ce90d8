"""How a process that trained died without a word, in words. No torch."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

LAST_WORDS_CHARS = 200


def epitaph(code: int, log: Path, since_bytes: int) -> str:
    """Return how a process died, with the last line that it printed and where to read the rest.

    Args:
        code: as for `describe_exit`.
        log: the file that it printed to.
        since_bytes: where in this file its last work begins.
    """
    text = describe_exit(code)
    if last := _last_line(log, since_bytes):
        text += f"; its last words: {last} (all of them: {log})"
    return text


def describe_exit(code: int) -> str:
    """Return in words how a worker process died.

    Args:
        code: as subprocess gives it: an exit code, or minus the signal's number.
    """
    if code >= 0:
        return f"worker left with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = "unnamed"
    # only the kernel's log knows whether a SIGKILL was its out-of-memory killer: say so, and no
    # more
    guess = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"worker killed by signal {-code} {name}{guess}"


def _last_line(path: Path, since_bytes: int) -> str:
    """Return the last line that says something, "" where there is none."""
    lines: list[str] = []
    with suppress(OSError), path.open("rb") as log:
        log.seek(max(since_bytes, log.seek(0, os.SEEK_END) - 4096))
        lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:LAST_WORDS_CHARS]
