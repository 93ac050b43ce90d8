"""`run extend=true`: optima beyond a grid are found, within a budget, and what was added belongs to the experiment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import pytest

from supar_sweep.cli.main import main
from supar_sweep.sweep.extension import n_added
from supar_sweep.sweep.status import states
from supar_sweep.sweep.submission import Experiment
from tests import known_basin
from tests.clusters import Cluster, cluster
from tests.command_line import CELL, ROOT, call, refused
from tests.grids import wait_for

pytestmark = pytest.mark.xdist_group("extend")  # they share the records below

KNOWN = (
    *("experiment.name=known", f"train.target={known_basin.TARGET}", "launcher.processes=1", "train.steps=4"),
    *("model.width=16", "model.d_head=8", "base.width=16"),
)
AXES = (
    "experiment.axes.parameterization=[supar]",
    "experiment.axes.density=[1,0.25,0.0625]",
    "experiment.axes.lr={log2: [-9, -5]}",
    "experiment.axes.seed=[0,1]",
)
N_OWN = 3 * 5 * 2
BOUNDLESS = "budget.max_flops_mult=100"


def run(capsys: pytest.CaptureFixture[str], runs: Path, *words: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    code, out, err = call(capsys, "run", *KNOWN, *AXES, f"runs_dir={runs}", *words, "format=json")
    assert code == 0, err
    return json.loads(out), err


def entries(capsys: pytest.CaptureFixture[str], runs: Path) -> list[dict[str, Any]]:
    assert call(capsys, "plot", "experiment.name=known", f"runs_dir={runs}")[0] == 0
    found: list[dict[str, Any]] = json.loads((runs / "experiments" / "known" / "verdict.json").read_text())
    return found


def added(runs: Path) -> list[tuple[int, float, float]]:
    """Round, density and log2 of the lr of each value that the plan says was added."""
    return [
        (each["round"], float(each["line"].split()[-1]), log2(each["value"]))
        for each in Experiment(runs, "known").plan().extended
    ]


@dataclass(frozen=True)
class Whole:
    """A grid before it was extended and after."""

    runs: Path
    before: list[dict[str, Any]]
    done: dict[str, Any]
    err: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    runs = tmp_path_factory.mktemp("extended") / "runs"

    def called(*words: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-m", "supar_sweep", *words, f"runs_dir={runs}", "format=json"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout), said.stderr

    called("run", *KNOWN, *AXES)
    called("plot", "experiment.name=known")
    before = json.loads((runs / "experiments" / "known" / "verdict.json").read_text())
    return Whole(runs, before, *called("run", *KNOWN, *AXES, "extend=true", BOUNDLESS))


def test_an_optimum_beyond_the_grid_is_found(capsys: pytest.CaptureFixture[str], whole: Whole) -> None:
    # density 1/4 is best at the last value, 1/16 two octaves beyond it
    assert {entry["density"]: entry["censored"] for entry in whole.before} == {1: False, 1 / 4: True, 1 / 16: True}
    # two octaves a round: 1/4 is settled by the first, 1/16 by the second
    assert added(whole.runs) == [
        *((1, 0.25, -4.0), (1, 0.0625, -4.0), (1, 0.25, -3.0), (1, 0.0625, -3.0)),
        *((2, 0.0625, -2.0), (2, 0.0625, -1.0)),
    ]
    done = whole.done
    assert (done["extended"], done["n"], done["skipped"], done["complete"]) == (6 * 2, N_OWN + 6 * 2, N_OWN, True)
    assert "extend, round 1: 8 cells more" in whole.err
    assert (
        "density 0.0625: lr 0.0625, 0.125; the lowest mean lies at the high end of the grid, 0.03125; the optimum is above 2^-5"
        in whole.err
    )
    assert "extend: no optimum is censored" in whole.err

    for entry in entries(capsys, whole.runs):
        assert not entry["censored"]
        assert entry["n_seeds"] == 2
        low, high = entry["ci"]
        assert low <= known_basin.optimum(entry["density"]) <= high
    assert json.loads((whole.runs / "experiments/known/summary.json").read_text())["proposed"] == []

    assert call(capsys, "report", "experiment.name=known", f"runs_dir={whole.runs}")[0] == 0
    page = (whole.runs / "experiments/known/report.html").read_text()
    assert "<dt>added by extend</dt><dd>12 cells</dd>" in page
    assert "Added to the grid because optima lay beyond it" in page
    assert "<td>supar density 0.0625</td><td>lr 0.25, 0.5</td>" in page

    again, err = run(capsys, whole.runs, "extend=true", BOUNDLESS)
    assert (again["skipped"], again["extended"]) == (N_OWN + 12, 12)
    assert "round" not in err


def test_what_was_added_stays_with_the_experiment(
    capsys: pytest.CaptureFixture[str], whole: Whole, runs_dir: Path
) -> None:
    shutil.copytree(whole.runs, runs_dir)
    n, points = N_OWN + 12, Experiment(runs_dir, "known").plan().points
    plain, err = run(capsys, runs_dir)
    assert (plain["n"], plain["skipped"]) == (n, n)
    assert "note" not in err
    assert Experiment(runs_dir, "known").plan().points == points
    _, out, _ = call(capsys, "plan", *KNOWN, *AXES, f"runs_dir={runs_dir}")
    assert "42 cells, 12 of them by extend (42 done)" in out
    _, out, _ = call(capsys, "status", "experiment.name=known", f"runs_dir={runs_dir}")
    assert "42 cells (12 by extend): 42 done" in out

    # a seed more: it is run at the added values too, so that no line mixes numbers of seeds
    more, _ = run(capsys, runs_dir, "experiment.axes.seed=[0,1,2]")
    assert (more["n"], more["skipped"]) == (n * 3 // 2, n)
    # the axis now holds what was added: the same cells, each once
    wider, _ = run(capsys, runs_dir, "experiment.axes.lr={log2: [-9, -1]}")
    assert (wider["n"], n_added(Experiment(runs_dir, "known").plan())) == (3 * 9 * 2, 0)
    # another grid of the same name: nothing is mixed into it, what is left out is said, and nothing is forgotten
    other, err = run(capsys, runs_dir, "train.steps=5")
    assert other["n"] == N_OWN
    assert "note: 6 values that extend=true added are of lines that this grid has not: supar density 0.25" in err
    assert run(capsys, runs_dir)[0]["n"] == n
    assert Experiment(runs_dir, "known").plan().points == points


def test_the_budget_holds_over_all_calls(capsys: pytest.CaptureFixture[str], runs_dir: Path) -> None:
    for _ in range(2):
        done, err = run(capsys, runs_dir, "extend=true", "budget.max_cells=5", "budget.max_flops_mult=null")
        # two values of two seeds each: the third would be the sixth cell
        assert (done["extended"], done["n"]) == (4, N_OWN + 4)
        # the nearest of each line first, not all of one line's
        assert added(runs_dir) == [(1, 0.25, -4.0), (1, 0.0625, -4.0)]
        assert "extend: the budget is spent: 4 cells" in err
        assert "extend: still censored: supar density 0.0625" in err
    # a smaller one takes nothing back
    assert run(capsys, runs_dir, "extend=true", "budget.max_flops_mult=0.001")[0]["extended"] == 4


def test_divergence_beyond_the_grid_settles_it_too(capsys: pytest.CaptureFixture[str], runs_dir: Path) -> None:
    """The best lr of density 2^-7 is that from which runs diverge."""
    words = ("experiment.axes.density=[1,0.0078125]", "experiment.axes.lr={log2: [-9, -4]}")
    done, _ = run(capsys, runs_dir, *words, "extend=true", BOUNDLESS)
    assert done["diverged"] > 0
    sparse = entries(capsys, runs_dir)[-1]
    assert not sparse["censored"]
    assert sparse["ci"][1] == known_basin.WALL


def test_a_run_killed_in_a_round_continues(capsys: pytest.CaptureFixture[str], whole: Whole, tmp_path: Path) -> None:
    slow = f"train.steps={known_basin.SLOW_STEPS}"
    words = ("run", *KNOWN, *AXES, f"runs_dir={tmp_path}", slow, "extend=true", BOUNDLESS)
    process = subprocess.Popen([sys.executable, "-m", "supar_sweep", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    experiment = Experiment(tmp_path, "known")

    def in_a_round() -> bool:
        if not (experiment.folder / "plan.json").exists():
            return False
        counted = [state.complete for state in states(experiment, experiment.plan()).values()]
        return N_OWN < sum(counted) < len(counted)

    wait_for(in_a_round)
    process.kill()
    process.wait()
    run(capsys, tmp_path, slow, "extend=true", BOUNDLESS)
    assert added(tmp_path) == added(whole.runs)
    assert all(state.complete for state in states(experiment, experiment.plan()).values())


def test_real_cells_are_added_with_all_else_the_same(capsys: pytest.CaptureFixture[str], runs_dir: Path) -> None:
    """Rates far too low for the untrained model to learn: the optimum is above them."""
    words = (
        *CELL, f"runs_dir={runs_dir}", "experiment.name=real", "launcher.processes=1", "model.width=16",
        "experiment.axes.density=[1,0.5]", "experiment.axes.lr={log2: [-16, -14]}", "experiment.axes.seed=[0,1]",
    )  # fmt: skip
    assert main(["run", *words, "extend=true", "budget.max_cells=8", "budget.max_flops_mult=null"]) == 0
    plan = Experiment(runs_dir, "real").plan()
    rows = [row for row in plan.points if row["lr"] > 2**-14]
    assert {(row["density"], row["lr"], row["seed"]) for row in rows} == {
        (density, 2.0**log2, seed) for density in (1.0, 0.5) for log2 in (-13, -12) for seed in (0, 1)
    }
    for row in rows:
        like = next(
            other for other in plan.points
            if (other["density"], other["seed"], other["lr"]) == (row["density"], row["seed"], 2**-14)
        )  # fmt: skip
        cell, own = (dict(plan.cells[each["cell_id"]].cell) for each in (row, like))
        assert cell.pop("hparams") == {**own.pop("hparams"), "lr": row["lr"]}
        assert cell == own


def test_lines_with_failed_cells_wait(capsys: pytest.CaptureFixture[str], runs_dir: Path) -> None:
    words = (*KNOWN, *AXES, f"runs_dir={runs_dir}", "extend=true", "train.target=json.no_such_function")
    code, _, err = call(capsys, "run", *words)
    assert code == 1
    assert "extend: 3 lines have runs without a result and are not looked at" in err
    assert not Experiment(runs_dir, "known").plan().extended


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("extend=maybe", "extend: must be true or false (got 'maybe')"),
        ("budget.max_cells=3", "budget.max_cells: has no effect without extend=true"),
        ("metric=val_loss", "metric: has no effect without extend=true"),
        ("extend=true metric=loss", "metric: unknown choice (got 'loss')"),
        ("extend=true budget.max_cells=0", "budget.max_cells: out of range"),
        ("extend=true budget.max_flops_mult=null", "budget.max_cells: and max_flops_mult are both null"),
        ("extend=true budget.max_cell=3", "did you mean 'budget.max_cells'?"),
        ("extend=true launcher=slurm", "extend: looks at results, and launcher.wait=false leaves before there are any"),
    ],
)
def test_wrong_requests_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], runs_dir: Path, words: str, says: str
) -> None:
    grid = [word for word in KNOWN if not word.startswith("launcher")]
    assert says in refused(capsys, "run", *grid, *AXES, f"runs_dir={runs_dir}", *words.split(" "))
    assert not runs_dir.exists()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, cluster(nodes=1, cpus=8, mem_mb=6000) as made:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_rounds_are_arrays_on_slurm(slurm: Cluster, capsys: pytest.CaptureFixture[str], runs_dir: Path) -> None:
    grid = [word for word in (*KNOWN, *AXES) if not word.startswith("launcher") and "density" not in word]
    few = ("experiment.axes.density=[0.25]", "launcher=dev_cluster", "launcher.wait=true", "runtime.device=cpu")
    capsys.readouterr()
    code, out, err = call(capsys, "run", *grid, *few, f"runs_dir={runs_dir}", "extend=true", "format=json")
    assert code == 0, err
    done = json.loads(out)
    assert (done["done"], done["extended"]) == (5 * 2 + 4, 4)
    assert "extend: no optimum is censored" in err
