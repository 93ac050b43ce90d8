"""argv -> a command word -> Hydra -> the command. `--help` and `--version` load no other package.

Everything after the command word is Hydra's: groups, overrides, --cfg job, --help, tab completion.
Errors that are meant for people are one line on stderr. Exit codes: 0 done, 1 some cells failed,
2 the request was wrong or could not be carried out, 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from supar_sweep.errors import ConfigError, SuparError

PROGRAM = "supar-sweep"
WRONG_REQUEST, INTERRUPTED = 2, 130
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
"""The machine's no, wherever it is met (in Optuna's journal, say): no bug, so no traceback."""
WRONG_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What a path that was typed meets: no bug either."""
SHORT = ("plan", "status")
"""Commands that read a grid and end."""
COLLECT_EVERY = 200_000
"""New objects between two collections; Python's own value is 700."""


@dataclass(frozen=True)
class Command:
    """`supar_sweep.cli.<module>.<word>(settings) -> exit code` (its hyphens as underscores), with conf/<word>.yaml."""

    module: str
    does: str


COMMANDS = {
    "quickstart": Command("quickstart", "tune, transfer, sweep and draw on this machine's CPU, in minutes"),
    "reproduce": Command("reproduce", "tune, sweep, draw and report a figure of the paper: reproduce fig6 scale=cpu"),
    "tune": Command("tune", "find the base hyperparameters on a small dense proxy"),
    "transfer": Command("transfer", "remap base hyperparameters to a target's width, density and depth"),
    "rules": Command("rules", "show the rule table, or what each parameter of a model gets"),
    "plan": Command("plan", "show which cells a grid has, what they cost, what is done and what would be submitted"),
    "calibrate": Command("calibrate", "measure a step of each shape of a grid, so that plan tells hours"),
    "run": Command("grid", "make a grid complete: skip what is done, resume, retry what failed"),
    "status": Command("status", "count a grid's cells by state, with the first errors"),
    "logs": Command("logs", "show one cell's attempts, how they ended, and what was printed: logs CELL"),
    "cancel": Command("grid", "stop a running grid, or one cell of it on SLURM; `run` continues it"),
    "plot": Command("plot", "draw any figure of a grid, a study or a check, and the verdict on transfer"),
    "report": Command("report", "write one HTML file of a grid: verdict, figures, tables, lineage, cost"),
    "export": Command("export", "write a checkpoint as a Hugging Face model folder"),
    "coord-check": Command("coord_check", "test in a few steps that activations and updates keep their size"),
}

_USAGE = f"""usage: {PROGRAM} COMMAND [group=option ...] [key=value ...] [--cfg job] [--help]

commands:
{{commands}}

{PROGRAM} COMMAND --help shows a command's groups and settings; {PROGRAM} --version the version.
tab completion: eval "$({PROGRAM} -sc install=bash)"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of one command line.

    Args:
        argv: the words after the program's name; default: sys.argv.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except SuparError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of a pipe (head) has left; keep the interpreter's last flush from saying so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in WRONG_PATHS:
            return _fail(f"{error.filename or 'a path'}: {error.strerror}")
        if error.errno not in REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else "cannot write: "
        return _fail(f"{where}{error.strerror}; nothing that was recorded is lost, the same command continues")


def usage() -> str:
    """Return the text of `--help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {word:<{width}}  {command.does}" for word, command in COMMANDS.items()]
    return _USAGE.format(commands="\n".join(lines))


def _fail(text: str) -> int:
    print(f"{PROGRAM}: {text}", file=sys.stderr)
    return WRONG_REQUEST


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"{PROGRAM} {version(PROGRAM)}")
        except PackageNotFoundError:
            print(f"{PROGRAM} (not installed: running from a checkout)")
        return 0
    if words[0] in ("-sc", "--shell-completion"):
        return _complete_line(words)
    word, rest = words[0], words[1:]
    if word not in COMMANDS:
        near = get_close_matches(word, COMMANDS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return _fail(f"no command '{word}'{hint}; commands: {', '.join(COMMANDS)}")
    if {"-m", "--multirun"} & set(rest):
        raise ConfigError(
            "--multirun",
            "is not how grids are run here",
            allowed="axes in one grid: experiment.axes.lr=[...], or an experiment file",
        )
    return _run(word, rest)


def _run(word: str, overrides: Sequence[str]) -> int:
    from supar_sweep.cli.compose import from_hydra, hydra_words

    command = COMMANDS[word]

    def task(settings: Any) -> int:
        from importlib import import_module

        call: Callable[[Any], int] = getattr(import_module(f"supar_sweep.cli.{command.module}"), word.replace("-", "_"))
        with _collecting_seldom() if word in SHORT else nullcontext():
            return call(settings)

    with _argv(f"{PROGRAM} {word}", hydra_words(word, command.does, overrides)):
        return from_hydra(word, task)


def _complete_line(words: list[str]) -> int:
    """Answer bash: its script calls `supar-sweep -sc query=bash` with the whole line in COMP_LINE.

    The command word is taken out of the line, because Hydra's completion knows nothing of it.
    """
    word = "run"
    if any(other.startswith("query=") for other in words):
        line = os.environ.get("COMP_LINE", "")
        typed = line.split()
        if len(typed) < 2 or (len(typed) == 2 and not line.endswith(" ")):
            print(" ".join(COMMANDS))
            return 0
        if typed[1] not in COMMANDS:
            return 0
        word = typed[1]
        program, _, rest = line.split(None, 2) if len(typed) > 2 else (*typed, "")
        os.environ["COMP_LINE"] = f"{program} {rest}"
    from supar_sweep.cli.compose import from_hydra

    with _argv(PROGRAM, words):
        return from_hydra(word, lambda settings: 0)


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """A grid is millions of objects that all stay: garbage collection, which walks them, takes a fifth of `plan`."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _argv(program: str, words: Sequence[str]) -> Iterator[None]:
    """Hydra reads sys.argv and nothing else."""
    before = sys.argv
    sys.argv = [program, *words]
    try:
        yield
    finally:
        sys.argv = before
