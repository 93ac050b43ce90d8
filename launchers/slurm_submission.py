"""sbatch, asked without standing still for its answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from supar_sweep.errors import SuparError

ANSWER_S = 120.0
"""A controller under load may take so long; one that is being restarted does not answer at all."""

UNSURE = re.compile(
    r"unable to contact|timed out|connection (refused|reset|timed)|did not answer|unable to load", re.IGNORECASE
)
"""What it says where the controller was not reached, or its answer was lost: the array may be there all the same."""

FULL = re.compile(r"(Max|Grp)SubmitJobs?|temporarily (un(able|available)|disabled)|job queue full", re.IGNORECASE)
"""What sbatch says where the queue takes no more now, and may later."""

SLEEPS = re.compile(r"\bretrying\.?$", re.MULTILINE)
"""What it says before it tries again by itself, fifteen times in two minutes, where the controller has MaxJobCount jobs."""

WITH_PARENT = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
except (OSError, AttributeError):  # no Linux
    pass
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Runs a command that the kernel kills when the thread that started it is gone. By a Python of its own, since a fork of a
process with threads may do no more than start a program.
"""


class Refused(SuparError):
    """sbatch did not take an array; the text is its own.

    Args:
        text: what it said.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.full = bool(FULL.search(text))
        self.unsure = bool(UNSURE.search(text))


class Submission:
    """An sbatch at work. It ends with this process, also with one that is killed: nobody would know of what it submits later.

    Args:
        script: what it submits.
        environment: of the command.
    """

    def __init__(self, script: Path, environment: Mapping[str, str]) -> None:
        self._until_s = time.monotonic() + ANSWER_S
        self._out = self._err = b""
        own = [sys.executable, "-I", "-S", "-c", WITH_PARENT, str(os.getpid())]
        self._process = subprocess.Popen(
            [*own, "sbatch", "--parsable", str(script)],
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is ours alone
        )
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def answer(self) -> str | None:
        """Return the id of the array that SLURM made of the script; None = no answer yet. Not to be asked again after one.

        Raises:
            Refused: it made none. Where it is `full` or `unsure`, it may have made one all the same, which the queue tells.
        """
        code = self._process.poll()
        self._read()
        sleeps = code is None and SLEEPS.search(self._err.decode(errors="replace"))
        late = code is None and time.monotonic() >= self._until_s
        if code is None and not sleeps and not late:
            return None
        self.end()
        if code in (0, None) and (job_id := self._out.decode().strip().split(";")[0]):
            return job_id
        if late:
            raise Refused(f"sbatch did not answer in {ANSWER_S:g} s")
        if code is not None and code < 0:
            raise Refused(f"sbatch was killed by signal {-code}, and did not answer")
        raise Refused(one_line(self._err.decode(errors="replace")))

    def end(self) -> None:
        """Kill it, should it still be at work."""
        self._process.kill()
        self._process.wait()
        self._read()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out += self._process.stdout.read() or b""
        self._err += self._process.stderr.read() or b""


def one_line(text: str) -> str:
    """Return an error's text in one line, without SLURM's prefixes."""
    return (
        "; ".join(re.sub(r"^\w+: (error|fatal): ", "", line) for line in text.splitlines() if line.strip()) or "no word"
    )
