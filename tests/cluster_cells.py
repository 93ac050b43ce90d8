"""Made-up cells for elements of real arrays: real records and checkpoints, and ends of every kind.

A cell's seed says how it behaves, its train.steps how long it runs: a step takes STEP_S.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import BusyError
from supar_sweep.sweep.files import write_json
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.records import Attempt
from tests.fake_cells import loss

RUN = "tests.cluster_cells:run"
STEP_S = 0.1
RAISES, EXITS, KILLED, HUNGRY, STUCK, DIVERGES, GROWS = range(1000, 1007)


def run(
    jobs: Sequence[Mapping[str, Any]], *, should_stop: Callable[[], Any], ended: Callable[[str, str, str], None]
) -> None:
    """Train made-up cells side by side, a step of each in turn, as a cohort does."""
    entered = []
    for job in jobs:
        if result := folder_of(job).result():
            ended(job["cell_id"], result["end"], "")
            continue
        try:
            cell = _Cell(job)
        except BusyError as error:
            ended(job["cell_id"], "busy", str(error))
            continue
        if result := folder_of(job).result():  # published between the look above and the lock
            shutil.rmtree(cell.attempt.path)
            cell.attempt.close()
            ended(job["cell_id"], result["end"], "")
            continue
        entered.append(cell)
    while entered:
        for cell in list(entered):
            if said := cell.step(should_stop()):
                entered.remove(cell)
                ended(cell.job["cell_id"], *said)
        time.sleep(STEP_S)


class _Cell:
    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job, self.cell = job, decode(CellConfig, job["cell"])
        self.attempt = Attempt(folder_of(job), job["cell"], {"provenance": job["provenance"]})
        self.file = self.attempt.checkpoints / "last.json"
        self.done = json.loads(self.file.read_text())["step"] if self.file.exists() else 0
        self.attempt.begin(self.done)

    def step(self, stop: Any) -> tuple[str, str] | None:
        """Train one step; how it ended, where it did."""
        steps = self.cell.train.steps
        if stop:
            end = "timeout" if stop == "timeout" else "cancelled"
            return self._end(end, f"{stop} after {self.done} of {steps} steps")
        if self.cell.seed == STUCK:
            return None
        self.done += 1
        self.attempt.log(step=self.done, loss=loss(self.cell, self.done))
        self.attempt.flush()
        write_json(self.file, {"step": self.done})
        if self.done == steps // 2:
            if self.cell.seed == RAISES:
                return self._end("failed", "RuntimeError: no luck")
            misbehave(self.cell.seed)
        if self.done < steps:
            return None
        final = loss(self.cell, steps)
        summary = {"train_loss": final, "val_loss": final, "last_finite_loss": final}
        end = "diverged" if self.cell.seed == DIVERGES else "done"
        self.attempt.publish({"end": end, "summary": summary}, keep_checkpoints=False)
        self.attempt.close()
        return end, ""

    def _end(self, end: Any, message: str) -> tuple[str, str]:
        self.attempt.end(end, message)
        self.attempt.close()
        return end, message


def misbehave(seed: int) -> None:
    """End this process in the way that the seed stands for."""
    if seed == EXITS:
        print("leaving without a word", flush=True)
        os._exit(3)
    if seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    kept = []
    while seed == GROWS:
        kept.append(os.urandom(10 << 20))
        time.sleep(0.1)
    if seed == HUNGRY:
        held = bytearray(os.urandom(1 << 20) * 600)
        time.sleep(60)
        print(len(held))
