"""What waits to be submitted: gathered groups of cells, arrays that the queue did not take yet, the sbatch at work."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from supar_sweep.sweep.arrays import ArrayFolder, Group
from supar_sweep.sweep.files import write_file
from supar_sweep.sweep.jobs import Event, Job

from .slurm_arrays import Batch, Size, batches, parts
from .slurm_config import SlurmConfig
from .slurm_queue import Slurm
from .slurm_script import submission_script
from .slurm_submission import Refused, Submission

SBATCH_TICK_S = 0.05
SETTLE_S = 5.0
"""An sbatch at work is given so long for its answer where no more is to be submitted."""


class Outbox:
    """Submits what it is given, one array at a time, and never waits for sbatch.

    Args:
        slurm: is asked.
        config: conf/launcher/slurm.yaml.
        threads: of each process; None = its share of the element's cores.
        folder: of the arrays' files.
        function: what an element calls with its group, "module:name".
        size: of a job's cell.
        code: the folder that holds the package as it is now.

    Raises:
        SuparError: SLURM's controller does not answer.
    """

    def __init__(
        self,
        slurm: Slurm,
        config: SlurmConfig,
        *,
        threads: int | None,
        folder: Path,
        function: str,
        size: Callable[[Job], Size],
        code: Path,
    ) -> None:
        self._slurm, self._config, self._threads = slurm, config, threads
        self._folder, self._function, self._size, self._code = folder, function, size, code
        self._max_array_size = slurm.max_array_size()
        self._gathered: list[Group] = []
        self._batches: list[Batch] = []
        self._sbatch: Submission | None = None
        self._next_s = 0.0

    def add(self, group: Group) -> None:
        """Take the jobs that one process trains together."""
        self._gathered.append(group)

    def __bool__(self) -> bool:
        return bool(self._gathered or self._batches)

    @property
    def tick_s(self) -> float | None:
        """How soon to call `submitted` again; None = no sbatch is at work."""
        return SBATCH_TICK_S if self._sbatch else None

    def jobs(self) -> list[Job]:
        """Return what is not known to be in the queue."""
        return [*chain.from_iterable(self._gathered), *(job for batch in self._batches for job in batch.jobs)]

    def submitted(self) -> tuple[dict[str, Batch], list[Event]]:
        """Take the submission as far as it goes without waiting: arrays as large as SLURM takes them, smaller ones where the
        queue is nearly full, later where it is full or its controller away.

        Returns:
            The arrays that are in the queue since the last call, by job id; what sbatch refused for good.
        """
        arrays: dict[str, Batch] = {}
        refusals: list[Event] = []
        while self._sbatch or time.monotonic() >= self._next_s:
            if self._gathered:
                self._batches += batches(
                    self._gathered,
                    self._config,
                    size=self._size,
                    threads=self._threads,
                    max_array_size=self._max_array_size,
                )
                self._gathered.clear()
            if not self._batches or not self._answered(arrays, refusals):
                break
        return arrays, refusals

    def settled(self) -> tuple[dict[str, Batch], list[Event]]:
        """Wait for the sbatch at work, but not for long, and submit no more. Return as `submitted` does."""
        arrays: dict[str, Batch] = {}
        refusals: list[Event] = []
        deadline_s = time.monotonic() + SETTLE_S
        while self._sbatch is not None and not self._answered(arrays, refusals):
            if time.monotonic() >= deadline_s:
                self._sbatch.end()
                self._sbatch = None
            else:
                time.sleep(SBATCH_TICK_S)
        return arrays, refusals

    def drop(self) -> list[Job]:
        """Forget what is not in the queue yet, and return it: after `settled`."""
        dropped = self.jobs()
        for batch in self._batches:
            if batch.array is not None:  # sbatch did not answer: it may be there all the same
                self._slurm.cancel_name(batch.array.job_name)
        self._gathered.clear()
        self._batches.clear()
        return dropped

    def _answered(self, arrays: dict[str, Batch], refusals: list[Event]) -> bool:
        """Add what became of the first batch to one of both, and return whether anything is known of it yet."""
        try:
            job_id = self._job_of(self._batches[0])
        except Refused as refused:
            refusals += self._refused(self._batches.pop(0), refused)
            return True
        if job_id is None:
            return False
        batch = arrays[job_id] = self._batches.pop(0)
        assert batch.array is not None
        batch.array.note_submitted(job_id)
        return True

    def _job_of(self, batch: Batch) -> str | None:
        """Return the id of the array that SLURM made of a batch; None = sbatch has not answered yet.

        Raises:
            Refused: it made none, or nobody knows.
        """
        if self._sbatch is None:
            if batch.array is not None and (job_id := self._in_queue(batch.array)):  # a lost answer was a yes
                return job_id
            batch.array = batch.array or ArrayFolder.new(self._folder, batch.elements)
            text = submission_script(
                batch.config,
                batch.array,
                n=len(batch.elements),
                at_once=batch.at_once,
                threads=self._threads or batch.config.threads,
                function=self._function,
                code=self._code,
            )
            self._sbatch = self._slurm.sbatch(write_file(batch.array.path / "submission.sh", text))
        try:
            job_id = self._sbatch.answer()
        except Refused as refused:
            self._sbatch = None
            # ended between two tries of its own, the second of which may just have been taken
            if refused.full and batch.array is not None and (job_id := self._in_queue(batch.array)):
                return job_id
            raise
        if job_id is not None:
            self._sbatch = None
        return job_id

    def _in_queue(self, array: ArrayFolder) -> str | None:
        """Return the id of an array that may have been submitted; None = it was not.

        Raises:
            Refused: the queue does not say.
        """
        known = self._slurm.arrays()
        if known is None:
            raise Refused("squeue did not answer")
        return known.get(array.job_name)

    def _refused(self, batch: Batch, refused: Refused) -> Sequence[Event]:
        """Take back what sbatch refused, in halves where the queue is full; return the ends of cells that it refused for good."""
        if refused.unsure:
            self._batches.insert(0, batch)
            self._next_s = time.monotonic() + self._config.poll_s
            return []
        if batch.array is not None:
            shutil.rmtree(batch.array.path, ignore_errors=True)
        if not refused.full:
            return [Event(job["cell_id"], "failed", f"sbatch refused: {refused}") for job in batch.jobs]
        half = -(-len(batch.elements) // 2)
        self._batches[:0] = [replace(batch, elements=some, array=None) for some in parts(batch.elements, half)]
        if len(batch.elements) == 1:
            self._next_s = time.monotonic() + self._config.poll_s
        return []
