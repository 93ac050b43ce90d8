"""Torn records, full disks, two at once, Ctrl-C and kill, from the command line: nothing lost, and a line that says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from supar_sweep.sweep import locks
from supar_sweep.training.checkpoint import Checkpoints
from tests.command_line import GRID, QUICK, ROOT, STUDY, call, here, losses, only_cell, refused, result
from tests.full_disk import files_up_to

__all__ = ["here"]

# -- records ---------------------------------------------------------------------------------------


def test_torn_records_are_said_and_made_whole(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert call(capsys, "run", *GRID, "runtime.keep_checkpoints=true")[0] == 0
    whole, folder = losses(), only_cell().path

    (folder / "result.json").write_text('{"end": "do')
    code, out, err = call(capsys, "status", "format=json")
    assert (code, json.loads(out)["total"]["corrupt"]) == (0, 1)
    assert "result.json is torn" in json.loads(out)["errors"][0]["message"]
    code, out, err = call(capsys, "run", *GRID, "format=json")
    assert (code, json.loads(out)["done"]) == (0, 1)
    assert "a torn result, which is set aside: trained again" in err
    assert (folder / "result.json.corrupt").exists()
    assert losses() == whole

    Path("runs/experiments/single/plan.json").write_text('{"plan')
    assert "plan.json is torn" in (said := refused(capsys, "status"))
    assert "`run` writes it anew" in said
    assert call(capsys, "run", *GRID)[0] == 0
    assert call(capsys, "status")[0] == 0
    assert losses() == whole

    Path("runs/experiments/single/plan.json").unlink()
    Path(
        "runs/experiments/single/plan.json"
    ).mkdir()  # as one that another user must not read: `run` could not write it
    assert "writes it anew" not in refused(capsys, "status")


def begun_again(capsys: pytest.CaptureFixture[str], state: dict[str, Any] | None = None) -> list[Path]:
    """Train the grid, take its result away, and return the checkpoints from which the next `run` goes on."""
    assert call(capsys, "run", *GRID, "runtime.keep_checkpoints=true")[0] == 0
    (only_cell().path / "result.json").unlink()
    return sorted((only_cell().path / "checkpoints").glob("*.pt"))


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    *_, newest = begun_again(capsys)
    whole = only_cell().metrics()
    with newest.open("r+b") as file:
        file.truncate(100)
    assert call(capsys, "run", *GRID)[0] == 0
    assert result()["resumed_from_step"] == 2
    assert f"{newest.name} is torn or altered" in result()["warnings"][0]
    assert only_cell().metrics() == whole


def test_a_mask_that_does_not_match_is_refused_and_kept(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    checkpoints = begun_again(capsys)
    saved = Checkpoints(checkpoints[0].parent, only_cell().cell_id)
    state = saved.newest()
    assert state is not None
    step = state.pop("step")
    assert saved.save(step, {**state, "first_mask_hash": "0" * 64})
    code, _, err = call(capsys, "run", *GRID)
    assert code == 1
    assert "has other masks (hash" in err
    assert [path for path in checkpoints if path.exists()] == checkpoints
    assert not (only_cell().path / "result.json").exists()


def test_checkpoints_left_by_a_kill_after_publication_are_swept(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert call(capsys, "run", *GRID)[0] == 0
    left = only_cell().path / "checkpoints"
    assert not left.exists()
    left.mkdir()
    (left / "step-00000002.pt").write_bytes(b"x")
    assert call(capsys, "run", *GRID)[0] == 0
    assert not left.exists()
    shutil.rmtree("runs")
    assert call(capsys, "run", *GRID, "runtime.keep_checkpoints=true")[0] == 0
    assert call(capsys, "run", *GRID)[0] == 0
    assert sorted((only_cell().path / "checkpoints").glob("*.pt"))  # asked for, so they stay


def test_an_attempt_that_died_before_it_began_hides_no_curve(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert call(capsys, "run", *GRID)[0] == 0
    whole = only_cell().metrics()
    (only_cell().path / "attempts" / "0002").mkdir()
    assert only_cell().metrics() == whole
    assert [row["step"] for row in whole if "loss" in row or "train_loss" in row][-1] >= 3


# -- disks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room_bytes", [0, 200, 1000])
def test_a_full_disk_stops_a_study_in_one_line(capsys: pytest.CaptureFixture[str], here: Path, room_bytes: int) -> None:
    with files_up_to(room_bytes):
        code, out, err = call(capsys, "tune", *STUDY)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("supar-sweep: ")
    assert "File too large" in err.splitlines()[-1]
    assert call(capsys, "tune", *STUDY)[0] == 0


def test_a_full_disk_stops_a_grid_and_a_figure_and_loses_nothing(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    with files_up_to(500):
        code, out, err = call(capsys, "run", *GRID)
    assert (code, out) == (2, "")
    assert "cannot write runs/experiments/single/plan.json: File too large" in err
    assert call(capsys, "run", *GRID)[0] == 0
    assert call(capsys, "plot")[0] == 0
    folder = Path("runs/experiments/single")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with files_up_to(2000):
        code, out, err = call(capsys, "plot")
    assert (code, out) == (2, "")
    assert "cannot write runs/experiments/single/lr_basins.png: File too large" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("words", [("run", *GRID), ("tune", *STUDY), QUICK], ids=["run", "tune", "quickstart"])
def test_a_runs_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], here: Path, words: tuple[str, ...]
) -> None:
    if os.geteuid():
        (here / "runs").mkdir(mode=0o555)
    else:  # the superuser may write anywhere but into a file
        (here / "runs").write_text("")
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert "cannot write" in err.splitlines()[-1]
    assert "runs/" in err.splitlines()[-1]
    assert "Traceback" not in err


# -- at once ---------------------------------------------------------------------------------------


def test_two_at_once_of_the_same_grid_or_study(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for lock, words in (
        ("experiments/single", ("run", *GRID)),
        ("studies/proxy", ("tune", *STUDY)),
    ):
        with locks.hold(Path("runs", lock, "lock"), "the first"):
            code, out, err = call(capsys, *words)
        assert (code, out) == (2, "")
        assert f"is held by another process: pid {os.getpid()} on" in err.splitlines()[-1]
    assert not Path("runs/cells").exists()


# -- the tuner, again and again --------------------------------------------------------------------


def attempts() -> int:
    return len(list(Path("runs").glob("cells/*/*/attempts/*")))


def test_a_study_tunes_once_tops_up_and_says_json(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    code, first, _ = call(capsys, "tune", *STUDY, "format=json")
    assert code == 0
    assert {row["hyperparameter"] for row in json.loads(first)} >= {"lr", "init_std", "alpha_in", "alpha_out"}
    assert attempts() == 1
    code, again, _ = call(capsys, "tune", *STUDY, "format=json")
    assert (code, again, attempts()) == (0, first, 1)
    code, out, _ = call(capsys, "tune", *STUDY, "study.n_trials=2", "format=csv")
    assert (code, attempts()) == (0, 2)
    assert out.startswith("hyperparameter,value,log2\n")

    journal = Path("runs/studies/proxy/journal.log")
    whole = journal.read_text()
    first_line, _, rest = whole.partition("\n")
    for line in ('{"x', "{}"):
        journal.write_text(f"{first_line}\n{line}\n{rest}")
        for words in (("tune", *STUDY), ("plot", "figure=study")):
            said = refused(capsys, *words)
            assert "journal.log is torn at line 2" in said
            assert "move it away" in said
    journal.unlink()
    # the trials that are asked again find their cells done
    assert call(capsys, "tune", *STUDY, "format=json")[:2] == (0, first)
    assert attempts() == 2
    journal.write_text(whole[:-20])  # a writer killed in mid-write, which is mended
    assert call(capsys, "tune", *STUDY, "study.n_trials=2")[0] == 0
    assert attempts() == 2


@pytest.mark.slow
def test_a_quickstart_that_was_interrupted_goes_on_and_says_json(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words = (*QUICK, "train.steps=300", "format=json")  # long enough that there is something left to interrupt
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a test run in the background of a shell has SIGINT ignored, and so would its children
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    program += "from supar_sweep.cli.main import main; sys.exit(main())"
    for phase, stop in (("1/4", signal.SIGINT), ("3/4", signal.SIGINT), ("3/4", signal.SIGKILL)):
        done = attempts()
        with (here / "err.txt").open("w") as err:
            command = [sys.executable, "-c", program, *words]
            child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=err)
        deadline_s = time.monotonic() + 120
        while phase not in (here / "err.txt").read_text() or attempts() == done:
            assert child.poll() is None, (here / "err.txt").read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        child.send_signal(stop)
        assert child.communicate(timeout=120)[0] == b""
        assert child.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        assert "Traceback" not in (here / "err.txt").read_text()
    code, out, err_text = call(capsys, *words)
    assert code == 0, err_text
    assert {row["parameterization"] for row in json.loads(out)} == {"sp", "mup", "supar"}
    trained = attempts()
    assert call(capsys, *words)[:2] == (0, out)
    assert attempts() == trained  # all done: only drawn again
