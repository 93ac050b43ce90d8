"""A runs folder of the first version opens, resumes, plots and reports the same for ever.

tests/guard/make_runs.py says what is in it.
"""

from __future__ import annotations

import json
import math
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from tests.guard.golden import (
    FILES,
    GOLDEN,
    VIEWS,
    differences,
    metrics,
    said,
    table,
    trials,
    under_way,
    unpacked,
    view,
)
from tests.guard.make_runs import EXTENDED, HALF, MAIN, OWN, QUEUED

pytestmark = pytest.mark.xdist_group("guard")  # they share the folder below

WAS = json.loads(GOLDEN.read_text())
ROUNDING_OF_TRAINING = 1e-4
"""Of losses, between machines."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("old"))


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def files(folder: Path) -> dict[str, str]:
    """The contents of all cells' files."""
    cells = folder / "runs" / "cells"
    return {
        str(path.relative_to(cells)): sha256(path.read_bytes()).hexdigest()
        for path in cells.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", VIEWS)
def test_every_command_says_what_it_said(packed: Path, name: str) -> None:
    before = files(packed)
    found = differences(WAS["views"][name], view(packed, name))
    assert not found, "\n".join(found)
    assert files(packed) == before


@pytest.mark.parametrize("name", FILES)
def test_figures_and_verdicts_hold_the_same_numbers(folder: Path, name: str) -> None:
    assert said(folder, "plot", f"experiment.name={name}")[0] == 0
    for file in FILES[name]:
        found = differences(WAS["files"][f"{name}/{file}"], table(folder / "runs/experiments" / name / file))
        assert not found, "\n".join([file, *found])


def test_the_report_is_written(folder: Path) -> None:
    code, _, err = said(folder, "report", "experiment.name=main")
    assert code == 0, err
    page = (folder / "runs/experiments/main/report.html").read_text()
    assert "main" in page
    # every value of the axes is in a table of the page, and the cell that is not done is counted
    for word in ("mup", "supar", "0.25", "diverged", "30"):
        assert word in page, word


def test_a_cells_records_are_read(folder: Path) -> None:
    code, out, err = said(folder, "logs", WAS["under_way"]["cell"], "format=json")
    assert code == 0, err
    assert not differences(WAS["logs"], json.loads(out))


def test_run_resumes_the_cell_that_was_killed_and_leaves_the_others_alone(folder: Path) -> None:
    cell, others = under_way(folder), files(folder)
    assert cell.name == WAS["under_way"]["cell"]
    step = max(int(path.stem.partition("-")[2]) for path in (cell / "checkpoints").glob("step-*.pt"))
    first = cell / "attempts" / "0001"
    known = [line for line in metrics(first) if json.loads(line)["step"] <= step]
    assert 0 < step < 24
    assert len(known) >= step

    code, out, err = said(folder, "run", *MAIN, "format=json")
    assert code == 0, err
    [row] = json.loads(out) if isinstance(json.loads(out), list) else [json.loads(out)]
    assert (row["n"], row["skipped"]) == (30, 29)

    second = cell / "attempts" / "0002"
    assert json.loads((second / "attempt.json").read_text())["resumed_from_step"] == step
    assert metrics(second)[: len(known)] == known
    result = json.loads((cell / "result.json").read_text())
    assert not differences(WAS["under_way"]["summary"], result["summary"], rel=ROUNDING_OF_TRAINING)
    assert [json.loads(line)["step"] for line in metrics(second) if "loss" in json.loads(line)] == list(range(1, 25))
    name = str(cell.relative_to(folder / "runs" / "cells"))
    after = files(folder)
    assert {k: v for k, v in after.items() if not k.startswith(name)} == {
        k: v for k, v in others.items() if not k.startswith(name)
    }


@pytest.mark.parametrize("words", [OWN, EXTENDED], ids=["own", "extended"])
def test_run_finds_all_done(folder: Path, words: tuple[str, ...]) -> None:
    before = files(folder)
    code, out, err = said(folder, "run", *words, "format=json")
    assert code == 0, err
    row = json.loads(out)
    row = row[0] if isinstance(row, list) else row
    assert row["skipped"] == row["n"]
    assert files(folder) == before


def test_a_study_goes_on_where_its_coordinator_was_killed(folder: Path) -> None:
    before = WAS["half"]["before"]
    told = [trial for trial in before if trial["state"] == "COMPLETE"]
    assert 0 < len(told) < 6
    old = files(folder)
    code, out, err = said(folder, "tune", *HALF, "format=json")
    assert code == 0, err
    assert not differences(WAS["uninterrupted tune"], json.loads(out), rel=ROUNDING_OF_TRAINING)
    after = trials(folder, "half")
    assert after[: len(told)] == told, "trials that were told are told again, or otherwise"
    assert len(after) == 6, "a trial was asked for twice"
    assert not differences(WAS["half"]["after"], after, rel=ROUNDING_OF_TRAINING)
    new = files(folder)
    assert all(new[path] == old[path] for path in old if path.endswith("result.json"))


def test_without_slurm_the_queued_grid_is_missing_and_run_says_why_it_cannot(folder: Path) -> None:
    arrays = list((folder / "runs" / "slurm").iterdir())
    assert [len((array / "groups.jsonl").read_text().splitlines()) for array in arrays] == [4]
    before = files(folder)
    code, out, err = said(folder, "run", *QUEUED)
    assert (code, out) == (2, ""), err
    assert err.splitlines()[-1].startswith("supar-sweep: ")
    assert "SLURM" in err or "sbatch" in err
    # whether there is nothing to cancel or nobody to ask, records stay as they are
    code, _, err = said(folder, "cancel", "experiment.name=queued")
    assert code in (0, 2)
    assert err
    assert files(folder) == before


def test_the_folder_holds_what_it_is_to_guard(packed: Path) -> None:
    status = {name: WAS["views"][f"status {name}"]["total"] for name in ("main", "own", "extended", "queued")}
    assert status["main"]["diverged"] >= 2
    assert status["main"]["done"] + status["main"]["diverged"] == status["main"]["n"] - 1 == 29
    assert status["own"]["done"] == status["own"]["n"]
    assert status["queued"]["n"] == 4
    assert WAS["views"]["plan extended"]["extended"] > 0
    more, own = WAS["views"]["plan extended, a third seed"], WAS["views"]["plan extended"]
    assert math.isclose(more["cells"], own["cells"] * 3 / 2)  # what was added is added to a new seed too
    assert under_way(packed).name == WAS["under_way"]["cell"]
