"""plan, calibrate, logs, cancel and status on a real cluster, as a person types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import Cluster, cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

GRID = (
    *("experiment.name=t", "experiment.axes.density=[1,0.5]", "experiment.axes.seed=[0,1,2]", "train.steps=6"),
    *("model.width=32", "model.d_head=16", "model.context_tokens=16", "base.width=16", "train.eval_seqs=4"),
    *("runtime.device=cpu", "runtime.cohort=1", "launcher=dev_cluster", "launcher.mem_gb=0.5"),
)
NAME = "experiment.name=t"
MAX_ARRAY_SIZE = 4


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=1, cpus=4, mem_mb=4000, max_array_size=MAX_ARRAY_SIZE) as made,
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def cli(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command in a folder of its own."""
    command = [sys.executable, "-m", "supar_sweep", *words]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert said.returncode == code, said.stderr
    return said


def json_of(folder: Path, *words: str) -> Any:
    return json.loads(cli(folder, *words, "format=json").stdout)


def test_the_plan_is_what_is_submitted(slurm: Cluster, tmp_path: Path) -> None:
    held = "launcher.sbatch.hold=true"
    planned = json_of(tmp_path, "plan", *GRID, held, "test_only=true")
    assert not (tmp_path / "runs").exists()
    assert [array["elements"] for array in planned["submission"]] == [MAX_ARRAY_SIZE, 6 - MAX_ARRAY_SIZE]
    for array in planned["submission"]:
        assert re.search(r"to start at .* using 1 processors on nodes n1 in partition gpu", array["test_only"])
    wrong = json_of(tmp_path, "plan", *GRID, "launcher.partition=nosuch", "test_only=true")
    assert "invalid partition" in wrong["submission"][0]["test_only"].lower()

    cli(tmp_path, "run", *GRID, held)
    folders = sorted((tmp_path / "runs" / "slurm").iterdir())
    submitted = [(path / "submission.sh").read_text().replace(path.name, "ARRAY") for path in folders]
    assert sorted(array["script"] for array in planned["submission"]) == sorted(submitted)
    again = json_of(tmp_path, "plan", *GRID, held)
    assert (again["states"], again["to_start"], again["arrays"]) == ({"held": 6}, 0, 0)

    cell = next(iter(json.loads((tmp_path / "runs/experiments/t/plan.json").read_text())["cells"]))
    assert json_of(tmp_path, "logs", cell)["state"] == "held"
    assert "1 elements cancelled" in cli(tmp_path, "cancel", NAME, f"cell={cell}").stderr
    assert json_of(tmp_path, "status", NAME)["total"]["held"] == 5
    assert "is not in SLURM's queue" in cli(tmp_path, "cancel", NAME, f"cell={cell}", code=2).stderr
    assert "5 elements cancelled" in cli(tmp_path, "cancel", NAME).stderr
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))


def test_calibrate_measures_in_elements_and_logs_show_what_they_printed(slurm: Cluster, tmp_path: Path) -> None:
    rows = json_of(tmp_path, "calibrate", *GRID)
    assert [(row["density"], row["threads"], row["cells"]) for row in rows] == [(1, 1, 3), (0.5, 1, 3)]
    (path,) = (tmp_path / "runs" / "calibration").iterdir()
    assert path.name.startswith("slurm-")
    planned = json_of(tmp_path, "plan", *GRID)
    runs_s = [row["setup_s"] + 6 * row["step_s"] + 4 * row["eval_seq_s"] for row in rows]
    assert planned["wall_s"] == pytest.approx(max(runs_s))  # six of launcher.array_parallelism=8
    assert planned["device_hours_left"] == pytest.approx(3 * sum(runs_s) / 3600)
    assert planned["device_hours_unit"] == "core-hours"

    # one whose set-up fails before Python starts: it never began an attempt
    broken = (
        *GRID,
        "experiment.axes.seed=[0]",
        "experiment.axes.density=[1]",
        'launcher.setup=["echo so sad; exit 3"]',
    )
    cli(tmp_path, "run", *broken)
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    cell = next(iter(json.loads((tmp_path / "runs/experiments/t/plan.json").read_text())["cells"]))
    story = json_of(tmp_path, "logs", cell)
    assert story["attempts"] == []
    assert ["so sad"] in story["logs"].values()

    cli(tmp_path, "run", *GRID)
    watched = cli(tmp_path, "status", NAME, "watch=true")
    assert "6 done" in watched.stdout
    assert "core-hours used" in watched.stdout
    story = json_of(tmp_path, "logs", cell)
    (attempt,) = story["attempts"]
    assert (attempt["end"], attempt["host"]) == ("done", "n1")
    (printed,) = story["logs"].values()
    assert any(attempt["element"] in line for line in printed)
