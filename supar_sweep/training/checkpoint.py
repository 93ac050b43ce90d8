"""Checkpoints of one cell: written atomically, verified by sha256, the last two kept; a torn one
falls back to the one before.

    checkpoints/step-00000100.pt        torch.save of tensors and plain containers (weights_only)
    checkpoints/step-00000100.sha256    its digest, as `sha256sum -c` reads it

A checkpoint that cannot be written (a full disk) costs the run nothing but the work since the last
one, so it is a warning, not an end. What cannot be recovered from is a checkpoint of another cell
or mask: that is an error, and nothing is touched.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supar_sweep.errors import CheckpointError

log = logging.getLogger(__name__)

CHECKPOINT_VERSION = 1
KEPT = 2


@dataclass
class Checkpoints:
    """The checkpoints of one cell.

    Args:
        folder: where they are; made at the first save.
        cell_id: the cell they must belong to.
        warnings: what went wrong without ending the run, in words; grows.
    """

    folder: Path
    cell_id: str
    warnings: list[str] = field(default_factory=list)

    def save(self, step: int, state: Mapping[str, Any]) -> bool:
        """Write one checkpoint, drop all but the last two, and return whether it was written.

        Args:
            step: optimizer steps done.
            state: tensors, numbers, text, and lists and dicts of these.
        """
        import torch

        path = self._path(step)
        temporary = self.folder / f".{path.name}.{os.getpid()}.tmp"
        content = {
            "version": CHECKPOINT_VERSION,
            "cell_id": self.cell_id,
            "step": step,
            "state": dict(state),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            digest = _digest(temporary)
            # The digest goes first: killed in between, the old file of this step fails its check,
            # and the step before it is used
            self._write_digest(path, digest)
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            # torch turns a failed write into a RuntimeError of its zip writer
            self.warn(f"checkpoint at step {step} not written: {_reason(error)}")
            self._discard(temporary)
            return False
        self._prune()
        return True

    def newest(self, has_past: Callable[[Mapping[str, Any]], bool] = lambda state: True) -> dict[str, Any] | None:
        """Return the state of the newest whole checkpoint, with its "step", or None where there is
        none.

        A torn or altered file is put aside (`.torn`), said in `warnings`, and the one before it is
        used. So is one whose past is lost (`.no-past`).

        Args:
            has_past: whether the metrics reach a checkpoint's state: what went before it is in them alone.

        Raises:
            CheckpointError: a whole checkpoint that belongs to another cell or another version of
                this program.
        """
        for path in sorted(self.folder.glob("step-*.pt"), reverse=True):
            try:
                content = _read(path)
            except CheckpointError as error:
                self.warn(f"{error}; using the one before it, or step 0")
                self._put_aside(path, ".torn")
                continue
            state = self._checked(path, content)
            if has_past(state):
                return state
            self.warn(
                f"the metrics before step {state['step']} are lost, so {path.name} is not gone on from; "
                "using the one before it, or step 0"
            )
            self._put_aside(path, ".no-past")
        return None

    def at(self, step: int) -> dict[str, Any]:
        """Return the state of the checkpoint at a step, as `read`.

        Args:
            step: one that has a checkpoint.
        """
        return self.read(self._path(step))

    def read(self, path: Path) -> dict[str, Any]:
        """Return the state of one checkpoint, with its "step"; nothing is touched.

        Args:
            path: the file; its digest lies beside it.

        Raises:
            CheckpointError: it is torn, or belongs to another cell or another version of this program.
        """
        return self._checked(path, _read(path))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def _checked(self, path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
        if content.get("version") != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"{path} has format {content.get('version')}, this program reads "
                f"{CHECKPOINT_VERSION}; finish the run with the program that began it, or "
                "delete the folder to start again"
            )
        if content["cell_id"] != self.cell_id:
            raise CheckpointError(
                f"{path} belongs to cell {content['cell_id']}, not to {self.cell_id}; "
                "move it back to its own folder, or delete it to start again"
            )
        return {**content["state"], "step": int(content["step"])}

    def warn(self, message: str) -> None:
        """Note something that went wrong without ending the run: for the log and the cell's
        record.
        """
        self.warnings.append(message)
        log.warning("%s: %s", self.cell_id, message)

    def _write_digest(self, path: Path, digest: str) -> None:
        target = path.with_suffix(".sha256")
        temporary = self.folder / f".{target.name}.{os.getpid()}.tmp"
        try:
            with temporary.open("w", encoding="ascii") as file:
                file.write(f"{digest}  {path.name}\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError:
            self._discard(temporary)
            raise

    def _prune(self) -> None:
        steps = sorted(self.folder.glob("step-*.pt"))
        for path in steps[:-KEPT]:
            self._discard(path)
        kept = {path.stem for path in steps[-KEPT:]}
        for path in self.folder.glob("step-*.sha256"):
            if path.stem not in kept:
                self._discard(path)
        for path in self.folder.glob(".step-*.tmp"):  # of writers that were killed: the lock is ours
            self._discard(path)

    def _put_aside(self, path: Path, suffix: str) -> None:
        try:
            path.replace(path.with_suffix(suffix))
        except OSError:
            return  # a read-only folder: the next save says so

    @staticmethod
    def _discard(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        want = path.with_suffix(".sha256").read_text(encoding="ascii").split()
        if not want or _digest(path) != want[0]:
            raise CheckpointError(f"{path} is torn or altered: its sha256 is not the recorded one")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no digest beside it") from error
    except CheckpointError:
        raise
    except Exception as error:  # unpickling can raise nearly anything
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no checkpoint")
    return content


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__
