"""`run` means make complete: with real worker processes, killed ones too. Made-up cells
(fake_cells) but for the last tests.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import supar_sweep.sweep.complete as complete_module
from supar_sweep.errors import BusyError, RecordError, SuparError
from supar_sweep.sweep.cohorts import Price
from supar_sweep.sweep.complete import Summary, complete
from supar_sweep.sweep.files import read_json
from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.status import (
    cell_state,
    first_errors,
    folders,
    rows,
    states,
    status_counts,
)
from supar_sweep.sweep.submission import Plan, make_plan
from supar_sweep.training.worker import RUN_CELLS
from tests import fake_cells
from tests.grids import Told, alive, curves, experiment, plan_of, pool, run, seeds, start, wait_for, worker_pids
from tests.tiny import tiny_cell, tiny_runtime

# -- a grid that goes well -------------------------------------------------------------------------


def test_a_grid_is_completed_and_then_there_is_nothing_to_do(runs_dir: Path) -> None:
    plan, told = seeds(0, 1, 2, fake_cells.DIVERGES), Told()
    summary = run(runs_dir, plan, told)
    assert summary.complete
    assert dict(summary.counts) == {"n": 4, "done": 3, "diverged": 1}
    assert (summary.skipped, summary.held, summary.troubles) == (0, 0, ())
    assert told.counts[0] == {"n": 4, "pending": 4}
    assert told.counts[-1] == summary.counts
    assert told.etas[0] is None
    assert told.etas[-1] == 0
    before = {p: p.stat().st_mtime_ns for p in (runs_dir / "cells").rglob("*")}
    again = run(runs_dir, plan)
    assert (again.complete, again.skipped) == (True, 4)
    assert {p: p.stat().st_mtime_ns for p in (runs_dir / "cells").rglob("*")} == before


def test_the_count_of_all_cells_is_not_taken_after_every_end(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete_module, "SHOW_EVERY_S", math.inf)
    told = Told()
    summary = run(runs_dir, seeds(0, 1, 2, 3), told, processes=1)
    assert told.counts == [{"n": 4, "pending": 4}, summary.counts]


def test_points_that_train_the_same_way_share_a_cell_and_have_a_row_each(runs_dir: Path) -> None:
    plan = plan_of(
        [{"parameterization": rule, "density": density} for rule in ("sp", "mup", "supar") for density in (1.0, 0.5)]
    )
    assert (len(plan.points), len(plan.cells)) == (6, 5)
    summary = run(runs_dir, plan)
    assert summary.counts["n"] == 5
    table = rows(experiment(runs_dir), plan)
    assert [(row["parameterization"], row["density"]) for row in table] == [
        (point["parameterization"], point["density"]) for point in plan.points
    ]
    dense = [row for row in table if row["density"] == 1 and row["parameterization"] != "sp"]
    assert dense[0]["cell_id"] == dense[1]["cell_id"]
    assert {row["end"] for row in table} == {"done"}
    final = fake_cells.loss(tiny_cell(), fake_cells.STEPS)
    first = table[0]
    assert (first["train_loss"], first["val_loss"], first["last_finite_loss"]) == (
        final,
        final + 1,
        final,
    )
    assert (first["width"], first["n_layer"], first["lr"], first["seed"]) == (32, 2, 0.01, 0)


def test_the_dear_cells_go_first(runs_dir: Path) -> None:
    plan = plan_of([{"model.width": width} for width in (32, 128, 64)])
    run(runs_dir, plan, processes=1, price=lambda planned: Price(planned.cell["model"]["width"]))
    started = {
        point["width"]: read_json(folder.attempts()[0] / "attempt.json")
        for point, folder in zip(plan.points, folders(experiment(runs_dir).store, plan).values(), strict=True)
    }
    assert sorted(started, key=lambda width: (started[width] or {})["started_s"]) == [128, 64, 32]


# -- cells that go wrong ---------------------------------------------------------------------------


def test_a_killed_worker_costs_a_retry_and_the_curve_is_whole(runs_dir: Path) -> None:
    plan, told = seeds(0, fake_cells.DIES_ONCE, 1), Told()
    summary = run(runs_dir, plan, told)
    assert summary.complete
    assert any("signal 9" in text and "try 2 of 3" in text for text in told.messages)
    this = plan.points[1]["cell_id"]
    cell = tiny_cell(seed=fake_cells.DIES_ONCE)
    assert curves(runs_dir, plan)[this] == [
        {"step": step, "loss": fake_cells.loss(cell, step)} for step in range(1, fake_cells.STEPS + 1)
    ]
    assert len(folders(experiment(runs_dir).store, plan)[this].attempts()) == 2


def test_bad_cells_are_reported_and_the_others_complete(runs_dir: Path) -> None:
    plan = seeds(0, fake_cells.RAISES, fake_cells.EXIT, 1, 2, fake_cells.SAYS_DONE)
    summary = run(runs_dir, plan, retries=1)
    assert not summary.complete
    assert dict(summary.counts) == {"n": 6, "done": 3, "failed": 3}
    (trouble,) = summary.troubles
    assert (trouble.end, trouble.n) == ("failed", 3)
    attempts = {
        point["seed"]: len(folder.attempts())
        for point, folder in zip(plan.points, folders(experiment(runs_dir).store, plan).values(), strict=True)
    }
    # a failure is tried once by each call; a death again within it
    assert attempts[fake_cells.RAISES] == 1
    assert attempts[fake_cells.EXIT] == 2
    found = states(experiment(runs_dir), plan)
    (count,) = status_counts(plan, found)
    assert (count["n"], count["done"], count["failed"], count["missing"]) == (6, 3, 2, 1)
    by_seed = {row["seed"]: row for row in status_counts(plan, found, by=["seed"])}
    assert by_seed[0]["done"] == by_seed[fake_cells.RAISES]["failed"] == 1
    (error,) = first_errors(plan, found)
    assert (error["state"], error["n"]) == ("failed", 2)
    assert "RuntimeError: no luck" in error["message"]
    assert error["attempts"] == attempts[fake_cells.RAISES]
    assert error["log"].endswith("log.txt")
    again = run(runs_dir, plan, retries=0)
    assert (again.skipped, again.counts["failed"]) == (3, 3)
    (error,) = first_errors(plan, states(experiment(runs_dir), plan))
    assert error["message"].endswith("; begun 2 times")


def test_when_the_first_fail_alike_the_rest_is_held_and_said_once(runs_dir: Path) -> None:
    plan = plan_of([{"seed": fake_cells.RAISES, "hparams.lr": 0.01 * (n + 1)} for n in range(12)])
    told = Told()
    summary = run(runs_dir, plan, told, alike=3, processes=1)
    assert summary.held == 9
    assert summary.counts["failed"] == 3
    assert summary.counts["missing"] == 9
    (text,) = told.messages
    assert "first 3 cells all failed alike" in text
    assert "RuntimeError: no luck" in text
    assert "log.txt" in text


def test_a_few_bad_cells_among_good_ones_hold_nothing(runs_dir: Path) -> None:
    bad = [{"seed": fake_cells.RAISES, "hparams.lr": 0.01 * (n + 1)} for n in range(4)]
    plan = plan_of([bad[0], {"seed": 0}, *bad[1:], {"seed": 1}])
    summary = run(runs_dir, plan, alike=3, processes=1)
    assert summary.held == 0
    assert (summary.counts["done"], summary.counts["failed"]) == (2, 4)


# -- records that went wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", '{"end": "do', "[]"])
def test_a_torn_record_is_set_aside_and_trained_again(runs_dir: Path, content: str) -> None:
    plan, told = seeds(0, 1), Told()
    run(runs_dir, plan)
    torn = folders(experiment(runs_dir).store, plan)[plan.points[0]["cell_id"]]
    (torn.path / "result.json").write_text(content)
    found = states(experiment(runs_dir), plan)
    assert sorted(state.state for state in found.values()) == ["corrupt", "done"]
    assert [row["end"] for row in rows(experiment(runs_dir), plan)] == ["corrupt", "done"]
    summary = run(runs_dir, plan, told)
    assert (summary.complete, summary.skipped) == (True, 1)
    assert "1 cell had a torn result, which is set aside" in told.messages[0]
    assert (torn.path / "result.json.corrupt").read_text() == content


def test_a_record_that_cannot_be_read_is_not_taken_to_be_torn(runs_dir: Path) -> None:
    plan = seeds(0, 1)
    run(runs_dir, plan)
    unread = folders(experiment(runs_dir).store, plan)[plan.points[0]["cell_id"]].path / "result.json"
    unread.unlink()
    unread.mkdir()  # the superuser may read any file, but no folder
    summary = run(runs_dir, plan)
    assert dict(summary.counts) == {"n": 2, "failed": 1, "done": 1}
    assert "cannot read" in summary.troubles[0].message
    assert unread.is_dir()


def test_a_runs_folder_that_cannot_be_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RecordError, match=r"cannot write .*(Not a directory|exists)"):
        run(tmp_path / "runs", seeds(0))


# -- others at work --------------------------------------------------------------------------------


def test_two_runs_of_one_experiment_at_once(runs_dir: Path) -> None:
    plan = seeds(fake_cells.SLOW, 0)
    with start(runs_dir, fake_cells.SLOW, 0) as first:
        with pytest.raises(BusyError, match=f"experiment test is held .* pid {first.pid} on"):
            run(runs_dir, plan)
        runner = experiment(runs_dir).runner()
        assert runner is not None
        assert runner.pid == first.pid
        assert {state.state for state in states(experiment(runs_dir), plan).values()} <= {
            *("running", "pending", "done")
        }
        out, _ = first.communicate()
    assert "'done': 2" in out
    assert experiment(runs_dir).runner() is None


def test_a_cell_shared_with_another_experiment_is_waited_for(runs_dir: Path) -> None:
    told = Told()
    with start(runs_dir, fake_cells.SLOW) as first, pool(runs_dir) as launcher:
        summary = complete(experiment(runs_dir, "other"), seeds(fake_cells.SLOW, 0), launcher, progress=told)
        first.communicate()
    assert summary.complete
    assert "1 cell being trained by another process" in told.messages[0]
    assert len(list(runs_dir.glob("cells/*/*/attempts/*"))) == 2


def test_a_cell_left_by_another_process_is_taken_up(runs_dir: Path) -> None:
    plan = seeds(fake_cells.SLOW, 0)
    with start(runs_dir, fake_cells.SLOW) as first, pool(runs_dir) as launcher:
        told = Told()
        os.kill(first.pid, signal.SIGINT)
        summary = complete(experiment(runs_dir, "other"), plan, launcher, progress=told)
        first.communicate()
    assert summary.complete


def assert_undisturbed(runs: Path, plan: Plan, tmp_path: Path) -> None:
    assert run(runs, plan).complete
    assert run(tmp_path / "calm", plan).complete
    assert curves(runs, plan) == curves(tmp_path / "calm", plan)


def test_a_killed_run_leaves_no_worker_and_the_next_completes_it(runs_dir: Path, tmp_path: Path) -> None:
    grid = (fake_cells.SLOW, 0, 1, 2)
    process = start(runs_dir, *grid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, worker_pids(runs_dir))))
    slow = folders(experiment(runs_dir).store, seeds(*grid))[seeds(*grid).points[0]["cell_id"]]
    assert cell_state(slow).state == "cancelled"
    assert_undisturbed(runs_dir, seeds(*grid), tmp_path)
    assert len(slow.attempts()) == 2


def test_ctrl_c_stops_cleanly_and_the_next_completes_it(runs_dir: Path, tmp_path: Path) -> None:
    grid = (fake_cells.SLOW, 0, 1, 2)
    process = start(runs_dir, *grid)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers, too
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "'cancelled': " in out
    assert "True ['stopping" in out
    assert not any(map(alive, worker_pids(runs_dir)))
    assert_undisturbed(runs_dir, seeds(*grid), tmp_path)


def test_a_second_ctrl_c_kills(runs_dir: Path) -> None:
    process = start(runs_dir, fake_cells.SLOW)
    (worker,) = worker_pids(runs_dir)
    os.kill(worker, signal.SIGSTOP)  # a cell that does not come to its next step
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "True ['stopping" in out
    assert not alive(worker)


def test_cancel_reaches_the_run_even_where_sigint_is_ignored(runs_dir: Path) -> None:
    # a script's background job starts with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(runs_dir, fake_cells.SLOW, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert experiment(runs_dir).cancel().pid == process.pid
    out, _ = process.communicate()
    assert "True ['stopping" in out
    with pytest.raises(SuparError, match="experiment test is not running"):
        experiment(runs_dir).cancel()


# -- the real thing --------------------------------------------------------------------------------

REAL = """
import sys, pathlib
from tests.test_complete import real_run
real_run(pathlib.Path(sys.argv[1]))
"""


def real_plan(runs: Path) -> Plan:
    from supar_sweep.training.corpus import fingerprint

    text = runs.parent / "text.txt"
    data = {"name": "text", "val_fraction": 0.1, "paths": [str(text)]}
    points = [
        GridPoint(axes={"seed": seed}, cell=tiny_cell(data=data, seed=seed, **{"train.steps": 150})) for seed in (0, 1)
    ]
    runtime = tiny_runtime(checkpoint_every_steps=10)
    return make_plan("test", points, runtime=runtime, fingerprint=fingerprint, provenance={})


def real_run(runs: Path) -> Summary:
    return run(runs, real_plan(runs), processes=1, function=RUN_CELLS)


@pytest.mark.slow
def test_a_real_grid_whose_run_is_killed_ends_with_the_curves_of_a_calm_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(Path(fake_cells.__file__).read_text() * 20)
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    process = subprocess.Popen([sys.executable, "-c", REAL, str(disturbed)])
    wait_for(lambda: list(disturbed.glob("cells/*/*/checkpoints/step-*")))
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, worker_pids(disturbed))))
    for runs in (disturbed, calm):
        assert real_run(runs).complete
    plan = real_plan(calm)
    assert len(list(disturbed.glob("cells/*/*/attempts/*"))) == 3
    assert curves(disturbed, plan) == curves(calm, plan)
    losses = [{**row, "cell_id": ""} for row in rows(experiment(disturbed), plan)]
    assert losses == [{**row, "cell_id": ""} for row in rows(experiment(calm), plan)]
