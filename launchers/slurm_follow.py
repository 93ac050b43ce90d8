"""Which cells are in SLURM's queue, whoever submitted them: asked of the queue, and of the arrays' own files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from supar_sweep.errors import RecordError, SuparError
from supar_sweep.sweep.arrays import NAME_PREFIX, ArrayFolder, own_record
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.training.slurm_job import SETTLED

from .slurm_queue import Slurm
from .state import Report, live_state


class Queued(NamedTuple):
    """The element that will train a cell, or trains it.

    Args:
        element: "<job id>_<index>".
        array: its array's folder.
        report: what the queue tells of it; it is live.
    """

    element: str
    array: ArrayFolder
    report: Report


def in_queue(slurm: Slurm, folder: Path) -> dict[str, Queued] | None:
    """Return the element of each cell that arrays of a runs folder have in the queue, by cell_id; None = the controller does not
    answer.

    An array whose submitter died before it noted the job's id gets that note here.

    Args:
        slurm: is asked.
        folder: of the arrays' files.
    """
    names = slurm.arrays(_owners(folder))
    if names is None:
        return None
    arrays = {
        job_id: ArrayFolder(folder / name.removeprefix(NAME_PREFIX))
        for name, job_id in names.items()
        if name.startswith(NAME_PREFIX) and (folder / name.removeprefix(NAME_PREFIX)).is_dir()
    }
    reports = slurm.queue([array.job_name for array in arrays.values()]) if arrays else {}
    if reports is None:
        return None
    found: dict[str, Queued] = {}
    for job_id, array in arrays.items():
        with suppress(RecordError):
            if array.job_id() is None:
                with suppress(RecordError):  # another user's folder
                    array.note_submitted(job_id)
            for index, groups in enumerate(array.elements()):
                report = reports.get(f"{job_id}_{index}")
                if report is None or not report.live:
                    continue
                queued = Queued(f"{job_id}_{index}", array, report)
                # of one that has begun, some cells may be through
                found |= {
                    job["cell_id"]: queued
                    for job in chain.from_iterable(groups)
                    if report.to_begin or own_record(folder_of(job), array.key).end not in SETTLED
                }
    return found


def _owners(folder: Path) -> set[int]:
    """Return the ids of the users who submitted arrays of a runs folder, and of this one: several may work on it."""
    owners = {os.getuid()}
    with suppress(OSError):
        owners |= {entry.stat().st_uid for entry in os.scandir(folder)}
    return owners


def states_in_queue(folder: Path) -> dict[str, str]:
    """Return pending, held or running of each cell that is in the queue, by cell_id; {} where nothing was ever submitted, or on
    a machine without SLURM.

    Args:
        folder: of the arrays' files.
    """
    if not folder.is_dir() or shutil.which("squeue") is None:
        return {}
    return {this: live_state(queued.report) for this, queued in (in_queue(Slurm(), folder) or {}).items()}


def cancel(folder: Path, cells: Collection[str]) -> int:
    """Ask SLURM to end the elements of these cells, those at work after they have saved; return how many there were.

    Args:
        folder: of the arrays' files.
        cells: cell_ids.

    Raises:
        SuparError: some of them are another user's.
    """
    if not folder.is_dir() or shutil.which("squeue") is None:
        return 0
    slurm = Slurm()
    elements = {queued.element for this, queued in (in_queue(slurm, folder) or {}).items() if this in cells}
    if denied := slurm.cancel(sorted(elements), now=False):
        raise SuparError(f"{len(denied)} of {len(elements)} elements are another user's, and go on ({denied[0]})")
    return len(elements)
