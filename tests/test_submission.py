"""A grid as it was submitted: frozen, named, held by one, and what `status` makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from supar_sweep.config.decode import encode
from supar_sweep.errors import ConfigError, RecordError, SuparError
from supar_sweep.rules.parameterization import PARAMETERIZATIONS
from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.identity import cell_id
from supar_sweep.sweep.status import (
    CellState,
    folders,
    states,
    status_counts,
)
from supar_sweep.sweep.submission import make_plan, provenance
from tests import fake_cells
from tests.grids import experiment, run, seeds
from tests.tiny import tiny_cell, tiny_runtime


def test_the_plan_is_frozen_and_read_back(runs_dir: Path) -> None:
    plan = seeds(3, 1, 2)
    run(runs_dir, plan)
    read = experiment(runs_dir).plan()
    assert read == plan
    assert list(read.cells) == list(plan.cells)  # in the grid's order, not in that of the ids
    result = folders(experiment(runs_dir).store, read)[read.points[0]["cell_id"]].result()
    assert result is not None
    assert result["provenance"].pop("worker_log").endswith(".log")  # the launcher's word
    assert result["provenance"] == {"v": 1}


def test_cells_that_share_sections_are_what_they_are_alone() -> None:
    base = tiny_cell()
    decays = (replace(base, hparams=replace(base.hparams, weight_decay=decay)) for decay in (0.0, 0.1))
    cells = [
        replace(cell, parameterization=rules, density=density)
        for cell in decays
        for rules in PARAMETERIZATIONS
        for density in (1.0, 0.5)
    ]
    points = [GridPoint(axes={}, cell=cell) for cell in cells]
    plan = make_plan("test", points, runtime=tiny_runtime(), fingerprint=lambda data: "data", provenance={})
    assert [row["cell_id"] for row in plan.points] == [cell_id(cell, "data") for cell in cells]
    of_id = {cell_id(cell, "data"): encode(cell) for cell in reversed(cells)}  # the first of those that are one
    assert {planned.cell_id: planned.cell for planned in plan.cells.values()} == of_id


def test_whether_a_plan_was_extended_is_told_from_its_text(runs_dir: Path) -> None:
    place, plan = experiment(runs_dir), seeds(0)
    assert not place.may_be_extended()
    text_alike = replace(plan, provenance={"argv": ['"extended": [], "plan_version": 1, ']})
    for frozen in (plan, text_alike):
        place.write(frozen)
        assert not place.may_be_extended()
        place.write(replace(frozen, extended=({"line": "a"},)))
        assert place.may_be_extended()
    path = place.folder / "plan.json"
    path.write_text(path.read_text().replace('"extended": [{"line": "a"}], ', ""))
    assert place.may_be_extended()  # of a release without the word
    path.unlink()
    path.mkdir()
    assert place.may_be_extended()  # `plan` says what is wrong


def test_provenance_names_the_code(tmp_path: Path) -> None:
    here = provenance(Path(fake_cells.__file__).parent, {"torch": "2"})
    assert here["versions"] == {"torch": "2"}
    assert here["argv"] == sys.argv
    assert provenance(tmp_path, {})["git_sha"] is None
    repository = tmp_path / "code"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    (repository / "a.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = provenance(repository, {})
    assert len(clean["git_sha"]) == 40
    assert clean["git_dirty"] is None
    (repository / "a.py").write_text("2")
    dirty = provenance(repository, {})
    assert dirty["git_sha"] == clean["git_sha"]
    assert dirty["git_dirty"] is not None


def test_a_torn_plan_is_written_anew(runs_dir: Path) -> None:
    plan = seeds(0)
    run(runs_dir, plan)
    path = experiment(runs_dir).folder / "plan.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(RecordError, match=r"plan\.json is torn"):
        experiment(runs_dir).plan()
    run(runs_dir, plan)
    assert experiment(runs_dir).plan() == plan


def test_an_unknown_experiment_names_those_that_are_there(runs_dir: Path) -> None:
    run(runs_dir, seeds(0))
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        experiment(runs_dir, "tset").plan()
    for name in ("", "a/b", "../x", ".hidden"):
        with pytest.raises(ConfigError, match=r"experiment\.name"):
            experiment(runs_dir, name)


def test_cancel_says_where_a_run_on_another_machine_is(runs_dir: Path) -> None:
    with experiment(runs_dir).hold() as lock:
        lock.truncate(0)
        lock.write(json.dumps({"pid": 1, "host": "node7", "since_s": 0.0}))
        lock.flush()
        with pytest.raises(SuparError, match=r"pid 1 on node7, .*cancel it there"):
            experiment(runs_dir).cancel()


def test_status_of_a_large_grid(runs_dir: Path) -> None:
    base = tiny_cell()
    points = [GridPoint(axes={"seed": seed}, cell=replace(base, seed=seed)) for seed in range(2000)]
    plan = make_plan("test", points, runtime=tiny_runtime(), fingerprint=lambda data: "data", provenance={})
    experiment(runs_dir).write(plan)
    read = experiment(runs_dir).plan()
    found = states(experiment(runs_dir), read)
    assert status_counts(read, found)[0]["missing"] == 2000
    with experiment(runs_dir).hold():
        found = states(experiment(runs_dir), read)
    assert set(found.values()) == {CellState("pending")}
