"""The one contract between training and analysis: cell folders, attempts, metrics, results.

No torch.

    <store>/<first 2 hex of id>/<label>-<id>/   one cell; the id is the truth, the label for people
        cell.json                      what was asked for, frozen at submission
        lock                           held (flock) by the one process that works on the cell
        attempts/<n>/attempt.json      who, where, since when; resumed from which step
        attempts/<n>/metrics.jsonl     one writer; one line a logged step
        attempts/<n>/end.json          how the attempt ended (typed), with the error's text
        attempts/<n>/log.txt           traceback of a failure
        checkpoints/step-<n>.pt        the last two while running, none after publication unless asked
        result.json                    published once, by atomic rename: the cell is complete
        result.json.corrupt            a torn one that `run` moved aside

Nothing inside a folder holds its path, so run folders can be moved.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from supar_sweep.errors import RecordError
from supar_sweep.sweep import locks
from supar_sweep.sweep.files import cannot_write, read_json, write_json

RECORD_VERSION = 1
End = Literal["done", "diverged", "oom", "timeout", "failed", "cancelled"]
COMPLETE_ENDS: tuple[End, ...] = ("done", "diverged")
"""Ends that are data: they publish a result. The others leave an end.json in their attempt and are
tried again by `run`.
"""


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is NaN, infinite or missing: what JSON can hold."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Store:
    """All cells of one runs folder.

    Args:
        root: folder of the cells, e.g. runs/cells.
    """

    root: Path

    def folder(self, cell_id: str, label: str) -> CellFolder:
        """Return the folder of a cell (made at the first write).

        An existing one of this id wins, whatever its label.

        One look into a shard; for many cells take `index` once.
        """
        shard = self.root / cell_id[:2]
        for name in _names(shard):
            if name.endswith(f"-{cell_id}"):
                return CellFolder(shard / name)
        return CellFolder(shard / f"{label}-{cell_id}")

    def index(self) -> dict[str, CellFolder]:
        """Return every cell folder by id, in one walk (20,000 cells: well under a second)."""
        found: dict[str, CellFolder] = {}
        for shard in _names(self.root):
            folder = self.root / shard
            for name in _names(folder):
                _, dash, cell_id = name.rpartition("-")
                if dash and cell_id[:2] == shard:
                    found[cell_id] = CellFolder(folder / name)
        return found


def _names(folder: Path) -> list[str]:
    """Return what a folder holds; nothing where it is missing or no folder."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RecordError(f"cannot read {folder}: {error.strerror}") from error


@dataclass(frozen=True)
class CellFolder:
    """One cell's folder: what is known of it, and the way in for one attempt at a time."""

    path: Path

    @property
    def cell_id(self) -> str:
        """The id at the end of the folder's name."""
        return self.path.name.rpartition("-")[2]

    @property
    def checkpoints(self) -> Path:
        """Folder of the cell's checkpoints."""
        return self.path / "checkpoints"

    def result(self) -> dict[str, Any] | None:
        """Return the published result, or None.

        Raises:
            RecordError: the file is torn, or its end is none that completes a cell.
        """
        path = self.path / "result.json"
        result = read_json(path)
        if result is not None and result.get("end") not in COMPLETE_ENDS:
            raise RecordError(f"{path} is torn: its end is {result.get('end')!r}")
        return result

    def set_aside_result(self) -> Path:
        """Move a torn result aside, so that the cell can be trained again; return where it lies now.

        Raises:
            RecordError: the folder cannot be written; or the file cannot be read, so that nobody knows it to be torn.
        """
        path = self.path / "result.json"
        aside = self.path / "result.json.corrupt"
        try:
            path.read_bytes()
        except OSError as error:
            raise RecordError(f"cannot read {path}: {error.strerror}") from error
        try:
            path.replace(aside)
        except OSError as error:
            raise cannot_write(aside, error) from error
        return aside

    def attempts(self) -> list[Path]:
        """Return the attempts' folders, oldest first."""
        folder = self.path / "attempts"
        return [folder / name for name in sorted(filter(str.isdecimal, _names(folder)), key=int)]

    def last_end(self) -> dict[str, Any] | None:
        """Return the end of the newest attempt, or None where it has not ended (or none began)."""
        attempts = self.attempts()
        return read_json(attempts[-1] / "end.json") if attempts else None

    def begun_at(self) -> int:
        """Return the step that the newest attempt went on from; 0 where none has begun, or it cannot be read."""
        with suppress(RecordError, IndexError):
            return int((read_json(self.attempts()[-1] / "attempt.json") or {}).get("resumed_from_step", 0))
        return 0

    def is_locked(self) -> bool:
        """Return whether a live process works on the cell now, here or wherever the file system is
        shared.
        """
        return locks.is_held(self.path / "lock")

    def close_dead_attempt(self, pid: int, end: End, message: str) -> bool:
        """Write the end of an attempt whose process died without a word.

        Returns whether there was one to write.

        Args:
            pid: the process that died, on this host: an attempt of any other is left alone.
            end: how it ended.
            message: what is known of the cause.
        """
        here = socket.gethostname()
        attempts = self.attempts()
        if not attempts or (attempts[-1] / "end.json").exists():
            return False
        return self.close_attempt(end, message, lambda info: info.get("pid") == pid and info.get("host") == here)

    def close_attempt(
        self, end: End, message: str, ours: Callable[[Mapping[str, Any]], bool], *, died: bool = False
    ) -> bool:
        """Write how the newest attempt ended, in the place of its process, or over what that had to say.

        Returns whether it was written: never while a live process holds the cell.

        Args:
            end: how it ended.
            message: what is known of the cause.
            ours: whether the attempt's facts (attempt.json) are those of the process that is meant.
            died: note that its process was lost without a word, for who decides on another try.
        """
        attempts = self.attempts()
        if not attempts or self.is_locked():
            return False
        with suppress(RecordError):
            if ours(read_json(attempts[-1] / "attempt.json") or {}):
                said = read_json(attempts[-1] / "end.json") or {}
                noted = {"died": True} if died else {}
                write_json(attempts[-1] / "end.json", {**said, "end": end, "message": message, **noted})
                return True
        return False

    def metrics(self) -> list[dict[str, Any]]:
        """Return the cell's curve: the newest attempt's metrics, which a resumed attempt begins
        with a copy of its past. One that died before it began any hides none.
        """
        files = (attempt / "metrics.jsonl" for attempt in reversed(self.attempts()))
        newest = next((path for path in files if path.exists()), None)
        return list(_read_lines(newest)) if newest else []

    def sweep(self) -> None:
        """Delete the checkpoints of a complete cell that a kill right after its publication left
        behind; those that were asked for stay.
        """
        checkpoints = self.path / "checkpoints"
        if not checkpoints.is_dir() or self.is_locked():
            return
        if (self.result() or {}).get("keep_checkpoints") is False:
            shutil.rmtree(checkpoints, ignore_errors=True)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines from the top: a killed writer leaves half a line, a power cut a tail of
    zeros. A line that is no step's ends the file, too.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except IsADirectoryError as error:
        raise RecordError(f"{path} is a folder, where a file must be: remove it, and `run` goes on") from error
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
            except ValueError:
                return
            if not isinstance(values, dict) or not isinstance(values.get("step"), int | float):
                return
            yield values


class Attempt:
    """The right to work on a cell: holds its lock, writes its own folder, publishes at most once.

    Args:
        cell: the cell's folder.
        cell_plain: the cell as plain dict, written to cell.json.
        info: further facts for attempt.json (versions, host, device, route, provenance).

    Raises:
        BusyError: another live process holds the cell.
        RecordError: the folder cannot be written.
    """

    def __init__(self, cell: CellFolder, cell_plain: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        self.cell = cell
        self._metrics: IO[str] | None = None
        self.n_lines = 0
        self._lock = locks.hold(cell.path / "lock", f"cell {cell.path.name}")
        try:
            self._begin_attempt(cell_plain, info)
        except BaseException:
            self.close()
            raise

    def _begin_attempt(self, cell_plain: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        number = 1 + max((int(path.name) for path in self.cell.attempts()), default=0)
        self.path = self.cell.path / "attempts" / f"{number:04d}"
        try:
            self.path.mkdir(parents=True)
            for leftover in self.cell.path.glob(".*.tmp"):  # of a writer killed between its two steps
                leftover.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if not (self.cell.path / "cell.json").exists():
            write_json(self.cell.path / "cell.json", cell_plain)
        self._started_s = time.time()
        self.info = {
            "attempt": number,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_s": self._started_s,
            **info,
        }
        write_json(self.path / "attempt.json", self.info)

    @property
    def checkpoints(self) -> Path:
        """Folder of the cell's checkpoints, shared by its attempts."""
        return self.cell.checkpoints

    def has_past(self, n_lines: int) -> bool:
        """Return whether the metrics of an earlier attempt still hold what a checkpoint builds on.

        Args:
            n_lines: that stood in them when the checkpoint was written.
        """
        return any(sum(1 for _ in _read_lines(path / "metrics.jsonl")) >= n_lines for path in self.cell.attempts())

    def _past(self, step: int) -> list[dict[str, Any]]:
        """Return the metrics up to `step` of the attempt that has most of them, the newest of equals.

        Not always the last one's: an attempt may have begun again at 0 and died below the
        checkpoint.
        """
        best: list[dict[str, Any]] = []
        if step > 0:
            for path in reversed(self.cell.attempts()):
                lines = [line for line in _read_lines(path / "metrics.jsonl") if line["step"] <= step]
                if len(lines) > len(best):
                    best = lines
        return best

    def begin(self, step: int, **info: Any) -> None:
        """Open the metrics file, beginning with the cell's past, and note the resume.

        Args:
            step: last step of the past (0 = from scratch).
            info: further facts for attempt.json.

        Raises:
            RecordError: the folder cannot be written.
        """
        self.info = {**self.info, "resumed_from_step": step, **info}
        write_json(self.path / "attempt.json", self.info)
        past = self._past(step)
        self.n_lines = len(past)
        temporary = self.path / ".metrics.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, sort_keys=True) + "\n" for line in past)
            temporary.replace(self.path / "metrics.jsonl")
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def log(self, **values: Any) -> None:
        """Append one line of metrics; non-finite numbers become null. Call `flush` (checkpoints do)
        to make it durable.
        """
        assert self._metrics is not None, "begin() opens the metrics"
        clean = {k: finite(v) if isinstance(v, float) else v for k, v in values.items()}
        try:
            self._metrics.write(json.dumps(clean, sort_keys=True, allow_nan=False) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.n_lines += 1

    def flush(self) -> None:
        """Make the metrics durable: called before each checkpoint, so that a checkpoint never knows
        more than the metrics.
        """
        if self._metrics is not None:
            try:
                self._metrics.flush()
                os.fsync(self._metrics.fileno())
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def end(self, end: End, message: str = "", traceback: str = "") -> None:
        """Write how the attempt ended. A full disk must not hide the first error: it is swallowed.

        Args:
            end: how.
            message: one line for `status`.
            traceback: for log.txt.
        """
        if traceback:
            with suppress(OSError):
                (self.path / "log.txt").write_text(traceback, encoding="utf-8")
        with suppress(RecordError):
            wall_s = time.time() - self._started_s
            write_json(self.path / "end.json", {"end": end, "message": message, "wall_s": wall_s})

    def publish(self, result: Mapping[str, Any], *, keep_checkpoints: bool) -> None:
        """Publish the result: from here on the cell is complete. Checkpoints go unless kept.

        Args:
            result: plain values, with `end` one of COMPLETE_ENDS.
            keep_checkpoints: leave them.

        Raises:
            RecordError: the result cannot be written; the checkpoints stay, so that nothing is
            lost.
        """
        self.flush()
        write_json(
            self.cell.path / "result.json",
            {
                "record_version": RECORD_VERSION,
                "keep_checkpoints": keep_checkpoints,
                **self.info,
                **result,
            },
        )
        self.end(result["end"])
        if not keep_checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Give the cell back. What a full disk keeps from the metrics here was never promised:
        `flush` is what promises.
        """
        if self._metrics is not None:
            with suppress(OSError):
                self._metrics.close()
            self._metrics = None
        self._lock.close()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
