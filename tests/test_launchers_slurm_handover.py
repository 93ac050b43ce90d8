"""`run` with wait=false: it submits and returns, the queue does the rest, and the next `run` goes on from there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.handover import Handover, hand_over
from supar_sweep.sweep.status import states
from supar_sweep.sweep.submission import Experiment, Plan, make_plan
from tests import cluster_cells
from tests.clusters import PATIENCE_S, Cluster, cluster
from tests.test_launchers_slurm import launcher
from tests.tiny import tiny_cell, tiny_runtime

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

MAX_SUBMIT_JOBS = 4


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=1, cpus=8, mem_mb=6000, max_submit_jobs=MAX_SUBMIT_JOBS) as made,
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def seeds(*values: int, steps: int = 30) -> Plan:
    axes = [{"seed": value} for value in values]
    points = [GridPoint(axes=each, cell=tiny_cell(**each, **{"train.steps": steps})) for each in axes]
    return make_plan("test", points, runtime=tiny_runtime(), fingerprint=lambda data: "data", provenance={})


def handed_over(runs: Path, plan: Plan) -> Handover:
    with launcher(runs) as made:
        return hand_over(Experiment(runs, "test"), plan, made)


def counts(runs: Path, plan: Plan) -> dict[str, int]:
    found = [state.state for state in states(Experiment(runs, "test"), plan).values()]
    return {state: found.count(state) for state in set(found)}


def cli(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command as a person types it, in a folder of its own."""
    command = [sys.executable, "-m", "supar_sweep", *words]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert said.returncode == 0, said.stderr
    return said


def test_what_is_there_is_not_submitted_again_and_what_failed_is(slurm: Cluster, runs_dir: Path) -> None:
    plan = seeds(1, 2, cluster_cells.RAISES)
    assert handed_over(runs_dir, plan) == Handover(0, 0, 3, 0, {})
    assert handed_over(runs_dir, plan) == Handover(0, 3, 0, 0, {})
    slurm.wait_for(lambda: counts(runs_dir, plan) == {"done": 2, "failed": 1})
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    assert handed_over(runs_dir, plan) == Handover(2, 0, 1, 0, {})
    assert len(list((runs_dir / "slurm").iterdir())) == 2


def test_what_a_full_queue_does_not_take_is_held_for_the_next_call(slurm: Cluster, runs_dir: Path) -> None:
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    plan = seeds(*range(MAX_SUBMIT_JOBS + 2))
    assert handed_over(runs_dir, plan)[2:4] == (MAX_SUBMIT_JOBS, 2)
    slurm.wait_for(lambda: counts(runs_dir, plan).get("done") == MAX_SUBMIT_JOBS)
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    assert handed_over(runs_dir, plan) == Handover(MAX_SUBMIT_JOBS, 0, 2, 0, {})
    slurm.wait_for(lambda: counts(runs_dir, plan) == {"done": len(plan.cells)})


def test_run_status_cancel_and_run_again_on_the_command_line(slurm: Cluster, tmp_path: Path) -> None:
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    words = (
        *("experiment.name=t", "experiment.axes.seed=[0,1,2]", "train.steps=40", "runtime.device=cpu"),
        *("model.width=32", "model.d_head=16", "format=json", "launcher=dev_cluster"),
    )
    held = "launcher.sbatch.hold=true"

    def status() -> dict[str, int]:
        total = json.loads(cli(tmp_path, "status", "experiment.name=t", "format=json").stdout)["total"]
        return {state: n for state, n in total.items() if n and state != "n"}

    submitted = json.loads(cli(tmp_path, "run", *words, held).stdout)
    assert (submitted["submitted"], submitted["held"], submitted["refused"]) == (3, 0, 0)
    assert status() == {"held": 3}
    assert json.loads(cli(tmp_path, "run", *words, held).stdout)["in_queue"] == 3
    assert "3 elements cancelled" in cli(tmp_path, "cancel", "experiment.name=t").stderr
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    assert status() == {"missing": 3}
    assert json.loads(cli(tmp_path, "run", *words, "launcher.wait=true").stdout)["done"] == 3
    assert status() == {"done": 3}
