"""One process that has everything imported, and runs each command line in a fork of itself, under bounds of memory and CPU.

    python -m tests.fuzz_server FOLDER

reads a JSON list of words a line from stdin and answers with an `Answer` as JSON a line. FOLDER is the runs folder that
the commands find; a command that would train stops where the first cell would start.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

CPU_S = 10
WALL_S = 120
"""A machine may be busy, so seconds of CPU are what is bounded; these end a case that sleeps."""
MORE_MEMORY_BYTES = 1_000_000_000
"""What a command may take beside what its process had at the start."""

READ_RECORDS = ("status", "logs", "cancel", "plot", "report", "plan", "run")


@dataclass(frozen=True)
class Answer:
    """What came of one command line.

    Args:
        code: exit code; None where an exception or a signal ended it.
        out, err: what it printed; a traceback is part of `err`.
        ended_by: signal, 0 = none.
        cpu_s: of the fork.
        began: the cells' jobs at which it was stopped, encoded; None where it came to its end by itself.
    """

    code: int | None
    out: str
    err: str
    ended_by: int
    cpu_s: float
    began: list[Any] | None


class Began(BaseException):
    """The first cells would start now. No `except Exception` may hold it."""

    def __init__(self, jobs: Sequence[Any]) -> None:
        self.jobs = list(jobs)
        super().__init__()


def stop_where_cells_start() -> None:
    """Make what trains a cell raise `Began` instead: the launchers' `submit`, and the check's own loop."""
    from launchers.local import LocalLauncher
    from launchers.slurm import SlurmLauncher
    from supar_sweep.training import probes

    def submit(launcher: Any, jobs: Sequence[Any]) -> NoReturn:
        raise Began(jobs)

    def cell_coordinates(cell: Any, corpus: Any, device: str) -> NoReturn:
        from supar_sweep.config.decode import encode

        raise Began([{"cell": encode(cell)}])

    for owner, name, function in (
        (LocalLauncher, "submit", submit),
        (SlurmLauncher, "submit", submit),
        (probes, "cell_coordinates", cell_coordinates),
    ):
        assert hasattr(owner, name)
        setattr(owner, name, function)


def bound() -> None:
    """Bound the CPU and the memory of this process."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_S, int(used) + CPU_S + 1))
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(WALL_S)


@contextmanager
def scratch(records: Path, word: str) -> Iterator[Path]:
    """Give an empty folder, with the records in `runs` for a command that reads them."""
    with tempfile.TemporaryDirectory(prefix="supar-fuzz-", ignore_cleanup_errors=True) as name:
        if word in READ_RECORDS and records.is_dir():
            shutil.copytree(records, Path(name, "runs"))
        yield Path(name)


def answer(words: Sequence[str], records: Path) -> Answer:
    """Return what came of one command line, run in a fork."""
    with scratch(records, words[0]) as folder, scratch(records, "") as beside:
        pid = os.fork()
        if not pid:
            in_fork(words, folder, beside)
        _, status, usage = os.wait4(pid, 0)
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        began = beside / "began.json"
        return Answer(
            code=None if code == 70 else code,
            out=(beside / "out").read_text(encoding="utf-8", errors="replace"),
            err=(beside / "err").read_text(encoding="utf-8", errors="replace"),
            ended_by=ended_by,
            cpu_s=usage.ru_utime + usage.ru_stime,
            began=json.loads(began.read_text()) if began.exists() else None,
        )


def in_fork(words: Sequence[str], folder: Path, beside: Path) -> NoReturn:
    """Run the command line and leave the process: 70 = a traceback."""
    from supar_sweep.cli.main import main

    code = 70
    try:
        os.setsid()  # what it starts ends with it
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(beside / name, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        bound()
        try:
            code = main(words)
        except Began as began:
            (beside / "began.json").write_text(json.dumps(began.jobs))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(records: Path) -> None:
    """Answer until stdin ends."""
    from supar_sweep.cli.main import main as command

    # all that commands import on the way, and the fingerprint of the text, once and for all forks
    for name in ("analysis.frames", "analysis.report", "supar_sweep.training.calibrate", "supar_sweep.training.export"):
        import_module(name)

    told = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with scratch(records, "") as folder:
        os.chdir(folder)
        assert command(["plan"]) == 0
        assert command(["transfer"]) == 0
        os.chdir("/")
    stop_where_cells_start()
    with os.fdopen(told, "w") as answers:
        for line in sys.stdin:
            answers.write(json.dumps(asdict(answer(json.loads(line), records))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
