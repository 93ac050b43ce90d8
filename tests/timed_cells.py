"""Cells without torch that run out of time: real records, a few steps a try.

A cell's seed says how far each try gets beyond its checkpoint: 0 = nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.sweep.files import write_json
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.records import Attempt

RUN = "tests.timed_cells:run"
STEPS = 12


def run(
    jobs: Sequence[Mapping[str, Any]], *, should_stop: Callable[[], bool], ended: Callable[[str, str, str], None]
) -> None:
    """Train made-up cells for the steps that each try has time for."""
    for job in jobs:
        cell = decode(CellConfig, job["cell"])
        with Attempt(folder_of(job), job["cell"], {}) as attempt:
            checkpoint = attempt.checkpoints / "last.json"
            start = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
            attempt.begin(start)
            step = min(start + cell.seed, STEPS)
            attempt.log(step=step, loss=5 / STEPS)
            attempt.checkpoints.mkdir(exist_ok=True)
            write_json(checkpoint, {"step": step})
            end, message = ("done", "") if step == STEPS else ("timeout", f"timeout after {step} of {STEPS} steps")
            if end == "done":
                attempt.publish({"end": end, "summary": {"train_loss": 5 / STEPS}}, keep_checkpoints=False)
            else:
                attempt.end("timeout", message)
        ended(job["cell_id"], end, message)
