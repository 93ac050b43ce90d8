"""Cells without torch, for tests of what stands around training: real records, a made-up curve.

A cell's seed says how it behaves (EXIT, KILLED, ...); the flag files it looks at lie in the runs folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import BusyError
from supar_sweep.sweep.files import write_json
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.records import Attempt

RUN = "tests.fake_cells:run"
STEPS = 12
EXIT, KILLED, RAISES, DIES_ONCE, SLOW, DIVERGES, SAYS_DONE, SEGFAULTS, GPU_FAILS, CROWDED = range(1000, 1010)


def loss(cell: CellConfig, step: int) -> float:
    """Return the made-up curve: a function of cell and step only."""
    return 5 / step + cell.hparams.lr * cell.model.width + cell.seed * 1e-6


def run(
    jobs: Sequence[Mapping[str, Any]], *, should_stop: Callable[[], bool], ended: Callable[[str, str, str], None]
) -> None:
    """Train made-up cells one after another."""
    for job in jobs:
        if job["cell"]["seed"] >= CROWDED and len(jobs) > 1:
            ended(job["cell_id"], "oom", "no room for all of us")
            continue
        end = run_one(job, should_stop=should_stop)
        ended(job["cell_id"], end, (folder_of(job).last_end() or {}).get("message", "") if end == "failed" else "")


def run_one(job: Mapping[str, Any], *, should_stop: Callable[[], bool]) -> str:
    """Train a made-up cell as its seed says: the worker's side of the records, with checkpoints
    every step.
    """
    cell = decode(CellConfig, job["cell"])
    if cell.seed == SAYS_DONE:
        return "done"
    try:
        attempt = Attempt(folder_of(job), job["cell"], {"provenance": job["provenance"]})
    except BusyError:
        return "busy"
    with attempt:
        checkpoint = attempt.checkpoints / "last.json"
        start = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
        attempt.begin(start)
        try:
            for step in range(start + 1, STEPS + 1):
                if should_stop():
                    attempt.end("cancelled", f"after {step - 1} of {STEPS} steps")
                    return "cancelled"
                attempt.log(step=step, loss=loss(cell, step))
                attempt.flush()
                attempt.checkpoints.mkdir(exist_ok=True)
                write_json(checkpoint, {"step": step})
                if step >= STEPS // 2:
                    misbehave(cell.seed, Path(job["store"]).parent)
                time.sleep(0.1 if cell.seed == SLOW else 0)
        except RuntimeError as error:
            attempt.end("failed", f"RuntimeError: {error}", "a traceback")
            return "failed"
        end = "diverged" if cell.seed == DIVERGES else "done"
        final = loss(cell, STEPS)
        summary = {"train_loss": final, "val_loss": final + 1, "last_finite_loss": final}
        attempt.publish({"end": end, "summary": summary}, keep_checkpoints=False)
        return end


def misbehave(seed: int, runs: Path) -> None:
    """End this process, or the cell, in the way that the seed stands for."""
    if seed == EXIT:
        print("leaving without a word", file=sys.stderr, flush=True)
        os._exit(3)
    if seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == SEGFAULTS:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == GPU_FAILS:  # what the worker asks torch, where a CUDA error has just ended a cell
        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))  # type: ignore[assignment]
        raise RuntimeError("CUDA error: device-side assert triggered")
    if seed == RAISES:
        raise RuntimeError(f"no luck at {hex(id(runs))}")
    if seed == DIES_ONCE and not (runs / "died").exists():
        (runs / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
