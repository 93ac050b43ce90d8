"""A job array as files: what each element trains, frozen before it is submitted, and what its cells say of it. No torch.

    <runs>/slurm/<key>/groups.jsonl     a line an element: its groups of jobs, a process each, trained side by side
    <runs>/slurm/<key>/submission.sh    as it went to sbatch
    <runs>/slurm/<key>/submitted.json   {"job_id": ...}: written when sbatch had answered
    <runs>/slurm/<key>/<job>_<element>_0_log.out    what an element printed, all its starts one after another
    <runs>/slurm/<key>/<job>_<element>_2_log.out    what its second process printed, where it has several

The key is in the array's name, so an array whose submitter died before it could write submitted.json is found in the queue.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from supar_sweep.errors import RecordError
from supar_sweep.sweep.files import read_json, write_file, write_json
from supar_sweep.sweep.jobs import Job
from supar_sweep.sweep.records import COMPLETE_ENDS, CellFolder

NAME_PREFIX = "supar-"
LAST_WORDS_BYTES = 4096

Group = Sequence[Job]
"""The jobs that one process trains together."""


@dataclass(frozen=True)
class ArrayFolder:
    """The folder of one array.

    Args:
        path: <runs>/slurm/<key>.
    """

    path: Path

    @staticmethod
    def new(parent: Path, elements: Sequence[Sequence[Group]]) -> ArrayFolder:
        """Return a new array's folder, its groups written.

        Args:
            parent: the folder of all arrays of a runs folder.
            elements: the groups of each element, in order.

        Raises:
            RecordError: the folder cannot be written.
        """
        folder = ArrayFolder(parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")
        plain = ([[dict(job) for job in group] for group in element] for element in elements)
        lines = (json.dumps(element, sort_keys=True, allow_nan=False) + "\n" for element in plain)
        write_file(folder.path / "groups.jsonl", "".join(lines))
        return folder

    @property
    def key(self) -> str:
        """What the array is known by, here and in SLURM's queue."""
        return self.path.name

    @property
    def job_name(self) -> str:
        """Its name in the queue."""
        return NAME_PREFIX + self.key

    def elements(self) -> list[list[list[Job]]]:
        """Return the groups of each element.

        Raises:
            RecordError: the file is missing or torn.
        """
        path = self.path / "groups.jsonl"
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise RecordError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise RecordError(f"{path} is torn: {error}") from error

    def note_submitted(self, job_id: str) -> None:
        """Note which job SLURM made of it. Raises RecordError where the folder cannot be written."""
        write_json(self.path / "submitted.json", {"job_id": job_id, "time_s": time.time()})

    def job_id(self) -> str | None:
        """Return SLURM's id of the array; None = its submitter did not live to write it down, or sbatch refused it."""
        noted = read_json(self.path / "submitted.json")
        return str(noted["job_id"]) if noted else None

    def log(self, element: str, process: int = 0) -> Path:
        """Return the file that an element, or one of its processes, prints to.

        Args:
            element: as SLURM calls it, "<job id>_<index>".
            process: which of several, from 1; 0 = the element's own.
        """
        return self.path / f"{element}_{process}_log.out"

    def last_words(self, element: str) -> str:
        """Return the end of what an element printed, "" where it printed nothing.

        Args:
            element: as for `log`.
        """
        try:
            with self.log(element).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LAST_WORDS_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""


def elements_of(parent: Path, cell_id: str) -> list[tuple[ArrayFolder, str]]:
    """Return the elements of the last submitted array that was to train a cell; [] where there is none.

    Args:
        parent: the folder of all arrays of a runs folder.
        cell_id: whose.
    """
    for path in sorted(parent.glob("*/groups.jsonl"), reverse=True):
        array = ArrayFolder(path.parent)
        with suppress(RecordError):
            job_id = array.job_id()
            elements = enumerate(array.elements()) if job_id else ()
            found = [index for index, groups in elements if any(job["cell_id"] == cell_id for job in chain(*groups))]
            if found:
                return [(array, f"{job_id}_{index}") for index in found]
    return []


def stamped(job: Job, array: str, element: str, **facts: Any) -> dict[str, Any]:
    """Return the job with the array that runs it in its provenance: each attempt's record then tells whose it is.

    Args:
        job: the job.
        array: key of the array.
        element: "<job id>_<index>".
        facts: further ones: node, restarts, process, on_gpu.
    """
    return {**job, "provenance": {**job["provenance"], "slurm": {"array": array, "element": element, **facts}}}


class OwnRecord(NamedTuple):
    """What a cell's files say of its training in one array.

    Args:
        end: a typed end, of the array's own newest attempt, or of whoever completed the cell; None = none yet.
        message: one line on the cause.
        begun: the newest attempt is the array's.
        locked: a live process holds the cell.
        died: its process was lost without a word, and another one wrote the end.
    """

    end: str | None = None
    message: str = ""
    begun: bool = False
    locked: bool = False
    died: bool = False


def own_record(folder: CellFolder, array: str) -> OwnRecord:
    """Return what the cell's files say now. A record that cannot be read says nothing.

    Args:
        folder: of the cell.
        array: key of the array.
    """
    try:
        if (result := folder.result()) is not None:
            return OwnRecord(result["end"], begun=True)
        locked = folder.is_locked()
        attempts = folder.attempts()
        if not attempts or not is_of(read_json(attempts[-1] / "attempt.json"), array):
            return OwnRecord(locked=locked)
        said = read_json(attempts[-1] / "end.json") or {}
        if said.get("end") in COMPLETE_ENDS and (result := folder.result()) is None:
            return OwnRecord(None, "its result.json is gone", begun=True, locked=locked)
        message, died = str(said.get("message", "")), bool(said.get("died"))
        return OwnRecord(said.get("end"), message, begun=True, locked=locked, died=died)
    except RecordError as error:
        return OwnRecord(None, str(error))


def is_of(attempt: Mapping[str, Any] | None, array: str) -> bool:
    """Return whether an attempt's facts (attempt.json) say that the array runs it."""
    slurm = ((attempt or {}).get("provenance") or {}).get("slurm") or {}
    return bool(slurm.get("array") == array)
