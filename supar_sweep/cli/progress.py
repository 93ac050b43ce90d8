"""How far a grid is, on stderr: a bar with an ETA on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from supar_sweep.sweep.records import COMPLETE_ENDS

PLAIN_LINE_EVERY_S = 15.0
"""Off a terminal (a log file), no more than one line in so many seconds, and one at the end."""


class Live:
    """A `sweep.complete.Progress` for people.

    Args:
        title: what is under way, in a word or two.
        stream: where to show it; default: stderr.
    """

    def __init__(self, title: str, stream: Any = None) -> None:
        self.title = title
        self.stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._said_s = float("-inf")
        self._last = ""

    def __enter__(self) -> Self:
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                console=Console(file=self.stream),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None, detail="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last:
            self._say(self._last)

    def update(self, counts: Mapping[str, int], eta_s: float | None) -> None:
        """Show the cells by state (n = all) and the seconds left, None = unknown."""
        n_complete = sum(counts.get(end, 0) for end in COMPLETE_ENDS)
        parts = [f"{n} {state}" for state, n in counts.items() if n and state not in ("n", "done")]
        left = counts["n"] > n_complete
        parts += [f"{duration(eta_s)} left"] if eta_s is not None and left else []
        self.show(n_complete, counts["n"], ", ".join(parts))

    def show(self, done: int, total: int, detail: str = "") -> None:
        """Show `done` of `total`, with a few words beside them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
            return
        text = f"{self.title}: {done}/{total}" + (f" ({detail})" if detail else "")
        if time.monotonic() - self._said_s >= PLAIN_LINE_EVERY_S:
            self._say(text)
        elif text != self._last:
            self._last = text

    def message(self, text: str) -> None:
        """Show one line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to somebody else for the block."""
        if self._bar is not None:
            self._bar.stop()
        yield
        if self._bar is not None:
            self._bar.start()

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
        self._said_s, self._last = time.monotonic(), ""


def duration(seconds: float) -> str:
    """Return a duration in the two units that matter: "45 s", "3 min 20 s", "2 h 5 min".

    >>> duration(200)
    '3 min 20 s'
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
