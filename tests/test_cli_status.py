"""`status` and `logs` on the command line: pace, watching, one cell's story."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supar_sweep.sweep.records import Attempt
from supar_sweep.sweep.status import MOST_ROWS, folded_counts, folders, states, status_counts
from supar_sweep.sweep.submission import Experiment
from tests.clusters import PATIENCE_S
from tests.command_line import GRID, ROOT, call, here, refused
from tests.grids import plan_of, seeds

__all__ = ["here"]

NAME = ("experiment.name=test",)


def begin(n: int) -> list[Attempt]:
    """Attempts at the cells of a frozen grid of n."""
    plan = seeds(*range(n))
    place = Experiment(Path("runs"), "test")
    place.write(plan)
    return [Attempt(folder, plan.cells[this].cell, {}) for this, folder in folders(place.store, plan).items()]


def publish(attempt: Attempt, train_s: float) -> None:
    with attempt:
        result = {"end": "done", "train_s": train_s, "wall_s": 1.0, "device": "cuda"}
        attempt.publish(result, keep_checkpoints=False)


def test_status_tells_what_was_used_and_how_fast_it_goes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, at_work = begin(3)
    publish(one, 1800.0)
    publish(two, 900.0)
    with at_work:
        time.sleep(1)
        found = json.loads(call(capsys, "status", *NAME, "format=json")[1])
        assert found["used"] == {"GPU-hours": 0.75}
        assert found["total"]["running"] == 1
        assert found["eta_s"] > 0
        assert found["cells_per_hour"] == pytest.approx(3600 / found["eta_s"])  # one left, as dear as the others
        shown = call(capsys, "status", *NAME)[1]
        assert "0.75 GPU-hours used" in shown
        assert re.search(r"cells an hour; .* left", shown)
    over = json.loads(call(capsys, "status", *NAME, "format=json")[1])
    assert (over["eta_s"], over["cells_per_hour"]) == (None, None)  # nobody is at work


def test_watching_ends_when_nothing_is_under_way(here: Path) -> None:
    one, two = begin(2)
    publish(one, 1.0)
    command = [sys.executable, "-m", "supar_sweep", "status", *NAME, "watch=true"]
    with two:
        watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert watching.stdout is not None
        assert "1 done, 1 running" in watching.stdout.readline()
        two.publish({"end": "done", "device": "cuda"}, keep_checkpoints=False)
    out, err = watching.communicate(timeout=PATIENCE_S)
    assert (watching.returncode, err) == (0, "")
    assert "test: 2 cells: 2 done" in out


def test_ctrl_c_leaves_the_watch_quietly(here: Path) -> None:
    (attempt,) = begin(1)
    with attempt:
        watching = subprocess.Popen(
            [sys.executable, "-m", "supar_sweep", "status", *NAME, "watch=true"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background jobs are born deaf to it, and so are their children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert watching.stdout is not None
        assert "1 running" in watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=PATIENCE_S)
    assert (watching.returncode, err) == (0, "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("status", *NAME, "watch=true", "format=json"), "watch: has no effect with format=json"),
        (("status", *NAME, "watch=often"), "watch: must be true or false (got 'often')"),
        (("logs",), "cell: must be set"),
        (("logs", "x", "lines=0"), "lines: must be a whole number (got 0); allowed: >= 1"),
        (("logs", "x"), "cell: is none of the 0 cells of runs (got 'x')"),
    ],
)
def test_wrong_requests_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert says in refused(capsys, *words)


def test_logs_find_a_cell_by_any_unambiguous_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = begin(2)
    with one:
        one.end("failed", "ValueError: no", "\n".join(f"line {n}" for n in range(30)))
    two.close()
    folder = one.cell.path
    label = folder.name.removesuffix(f"-{one.cell.cell_id}")
    for name in (one.cell.cell_id, one.cell.cell_id[:6], folder.name, label, str(folder), f"cell={label}"):
        code, out, err = call(capsys, "logs", name, "lines=3")
        assert code == 0, err
        assert out.startswith(f"{folder}\nfailed: ValueError: no\n")
        assert out.endswith("log.txt (the last 3 of 30 lines; lines=N shows more)\nline 27\nline 28\nline 29\n")
    common = label.rpartition("-s")[0]
    said = refused(capsys, "logs", common)
    assert f"cell: is the beginning of 2 (got '{common}')" in said
    assert folder.name in said
    assert two.cell.path.name in said
    assert f"did you mean '{folder.name}'" in refused(capsys, "logs", folder.name[:-1] + "x")


def test_logs_show_each_attempt_and_what_its_worker_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("noisy.py").write_text(
        "def train(cell, runtime, corpus, *, sink, resume, should_stop):\n"
        "    sink.begin(0)\n"
        "    print('on stdout', flush=True)\n"
        "    raise ValueError('no luck')\n"
    )
    words = (*GRID, "train.target=noisy.train", "experiment.name=noisy")
    command = [sys.executable, "-m", "supar_sweep", "run", *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path.cwd()}"}
    for _ in range(2):
        assert subprocess.run(command, env=environment, capture_output=True, text=True).returncode == 1
    (folder,) = Path("runs/cells").glob("*/*")
    found = json.loads(call(capsys, "logs", folder.name, "format=json")[1])
    assert (found["state"], found["message"]) == ("failed", "ValueError: no luck")
    assert [(row["attempt"], row["end"]) for row in found["attempts"]] == [(1, "failed"), (2, "failed")]
    trace, printed = found["logs"].values()
    assert trace[-1] == "ValueError: no luck"
    assert "on stdout" in printed
    first = json.loads(call(capsys, "logs", folder.name, "format=json", "attempt=1")[1])
    assert first["logs"].keys().isdisjoint(found["logs"])
    assert "attempt: " in refused(capsys, "logs", folder.name, "attempt=3")


def test_one_cell_is_cancelled_in_a_queue_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = begin(2)
    for attempt in (one, two):
        attempt.close()
    said = refused(capsys, "cancel", *NAME, f"cell={one.cell.cell_id}")
    assert "cell: one cell can be cancelled in SLURM's queue only" in said
    Experiment(Path("runs"), "other").write(seeds(7))
    assert "cell: is not a cell of other" in refused(
        capsys, "cancel", "experiment.name=other", f"cell={one.cell.cell_id}"
    )


def test_a_table_of_very_many_rows_is_folded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lrs = [0.001 * n for n in range(1, MOST_ROWS + 2)]
    plan = plan_of([{"density": density, "hparams.lr": lr, "seed": 0} for density in (1.0, 0.5) for lr in lrs])
    Experiment(Path("runs"), "test").write(plan)
    shown = call(capsys, "status", *NAME)[1].splitlines()
    folded = f"{len(lrs)} values, {lrs[0]:g} to {lrs[-1]:g}"
    assert [line.split()[0] for line in shown if folded in line] == ["1", "0.5"]
    assert len(shown) < 10
    # whoever asks for every row gets it
    whole = 2 * len(lrs)
    assert len(call(capsys, "status", *NAME, "format=csv")[1].splitlines()) == whole + 1
    assert len(json.loads(call(capsys, "status", *NAME, "format=json")[1])["groups"]) == whole
    assert len(call(capsys, "status", *NAME, "by=lr")[1].splitlines()) > len(lrs)


def test_no_axis_is_folded_where_few_rows_say_all(here: Path) -> None:
    plan = plan_of([{"hparams.lr": 0.001 * n, "seed": 0} for n in range(1, MOST_ROWS + 1)])
    found = states(Experiment(Path("runs"), "test"), plan)
    assert folded_counts(plan, found, ["lr"]) == status_counts(plan, found, ["lr"])
    assert folded_counts(plan, found, []) == status_counts(plan, found)
