"""Cells one by one, as the tuner asks for them, through real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from supar_sweep.sweep.records import Attempt
from supar_sweep.sweep.trainer import CellEnd, CellTrainer
from tests import fake_cells, timed_cells
from tests.grids import experiment, plan_of, pool, wait_for, worker_pids
from tests.tiny import tiny_cell, tiny_runtime


def trainer(runs: Path, launcher: Any) -> CellTrainer:
    return CellTrainer(experiment(runs).store, launcher, tiny_runtime(), fingerprint="data", provenance={})


def test_the_trainer_tells_each_end_once_with_its_result(runs_dir: Path) -> None:
    values = (0, fake_cells.DIVERGES, fake_cells.RAISES, fake_cells.DIES_ONCE)
    with pool(runs_dir) as launcher:
        training = trainer(runs_dir, launcher)
        ids = {training.submit(tiny_cell(seed=seed)): seed for seed in values}
        ends: dict[int, CellEnd] = {}
        while len(ends) < len(ids):
            ends |= {ids[each.cell_id]: each for each in training.ends(30)}
        assert training.ends(30) == []
        # asked again: told at once where it is complete, whatever the launcher does
        again = training.submit(tiny_cell(seed=0))
        (end,) = training.ends(0)
    assert {seed: each.end for seed, each in ends.items()} == {
        0: "done",
        fake_cells.DIVERGES: "diverged",
        fake_cells.RAISES: "failed",
        fake_cells.DIES_ONCE: "done",
    }
    assert ends[fake_cells.RAISES].result is None
    assert end.cell_id == again == ends[0].cell_id
    assert end.result == ends[0].result
    assert end.result is not None


def test_a_cell_whose_worker_was_told_to_leave_is_tried_again(runs_dir: Path) -> None:
    with pool(runs_dir, processes=1) as launcher:
        training = trainer(runs_dir, launcher)
        training.submit(tiny_cell(seed=fake_cells.SLOW))
        assert training.ends(0) == []
        wait_for(lambda: list(runs_dir.glob("cells/*/*/checkpoints/last.json")))
        (pid,) = worker_pids(runs_dir)
        os.kill(pid, signal.SIGTERM)
        (end,) = training.ends(60)
    assert end.end == "done"
    assert len(worker_pids(runs_dir)) > 1


def test_the_trainer_waits_for_a_cell_that_another_process_trains(runs_dir: Path) -> None:
    with pool(runs_dir) as launcher:
        training = trainer(runs_dir, launcher)
        folder = experiment(runs_dir).store.folder(plan_of([{"seed": 5}]).points[0]["cell_id"], "elsewhere")
        with Attempt(folder, {}, {}) as attempt:
            training.submit(tiny_cell(seed=5))
            assert training.ends(1.0) == []
            attempt.begin(0)
            attempt.publish({"end": "done", "summary": {}}, keep_checkpoints=False)
        (end,) = training.ends(30)
    assert end.end == "done"


def test_a_cell_out_of_time_is_tried_again_as_long_as_it_gets_further(runs_dir: Path) -> None:
    with pool(runs_dir, processes=1, function=timed_cells.RUN) as launcher:
        training = trainer(runs_dir, launcher)
        slow, stuck = (training.submit(tiny_cell(seed=steps)) for steps in (3, 0))
        ends: dict[str, CellEnd] = {}
        while len(ends) < 2:
            ends |= {end.cell_id: end for end in training.ends(30)}
    assert ends[slow].end == "done"
    assert (ends[stuck].end, ends[stuck].message) == ("timeout", f"timeout after 0 of {timed_cells.STEPS} steps")
    index = experiment(runs_dir).store.index()
    assert len(index[slow].attempts()) == timed_cells.STEPS // 3
    assert len(index[stuck].attempts()) == 2


def test_a_cell_that_says_done_without_a_record_has_failed(runs_dir: Path) -> None:
    with pool(runs_dir, processes=1) as launcher:
        training = trainer(runs_dir, launcher)
        training.submit(tiny_cell(seed=fake_cells.SAYS_DONE))
        (end,) = training.ends(30)
    assert (end.end, end.message) == ("failed", "said done, but its record is missing")
