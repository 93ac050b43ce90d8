"""Elements of several tasks on a real SLURM, each on a node of its own: how they find one another, go on, and are lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm import SlurmLauncher
from supar_sweep.sweep.status import cell_state
from tests import rank_cells
from tests.clusters import Cluster, cluster
from tests.test_launchers_slurm import begun, config, element_of, until
from tests.test_ranks import alone, assert_same_curve
from tests.tiny import folder_of, result_of, tiny_job

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, cluster(nodes=2, cpus=8, mem_mb=6000, accounting=False) as made:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def job_of(runs: Path, seed: int, steps: int) -> Any:
    long = {"train.steps": steps, "train.precision": "float64"}
    return tiny_job(runs / "cells", runtime={"checkpoint_every_steps": 10}, seed=seed, **long)


def test_two_nodes_train_a_cell_together_through_a_requeue_and_a_dead_rank_is_told(
    slurm: Cluster, runs_dir: Path, tmp_path: Path
) -> None:
    good, killed = jobs = [job_of(runs_dir, 0, steps=300), job_of(runs_dir, rank_cells.KILLED, steps=20)]
    settings = config(nodes=2, mem_gb=1.5, timeout_min=10)
    with SlurmLauncher(settings, threads=1, folder=runs_dir / "slurm", function=rank_cells.RUN) as made:
        for job in jobs:
            made.submit([job])
        made.events(0)
        slurm.wait_for(lambda: begun(good, 10), timeout_s=120)
        element = element_of(good)
        slurm.ask("scontrol", "requeue", element)
        slurm.wait_for(lambda: slurm.field(element, "Restarts") == "1", 120)
        slurm.wait_for_state(element, "PENDING")
        slurm.start_now(element)
        ends = until(made, jobs)

    assert ends[good["cell_id"]].end == "done"
    assert result_of(good)["ranks"] == 2
    assert len(folder_of(good).attempts()) == 2
    assert_same_curve(good, alone(good, tmp_path / "alone"), rel=1e-9)
    logs = sorted(path.name for path in (runs_dir / "slurm").glob(f"*/{element}_*_log.out"))
    assert logs == [f"{element}_{rank}_log.out" for rank in (0, 1)]

    end, state = ends[killed["cell_id"]], cell_state(folder_of(killed))
    assert (end.end, end.died) == ("failed", True), end
    assert state.state == "failed"
    assert "signal 9 SIGKILL" in state.message
