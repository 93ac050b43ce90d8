"""A controller that knows as many jobs as it may (MaxJobCount), and a shell full of options for SLURM's commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from supar_sweep.sweep.complete import complete
from supar_sweep.sweep.submission import Experiment
from tests.clusters import Cluster, cluster
from tests.grids import Told
from tests.test_launchers_slurm import element_of, job_of, launcher, until
from tests.test_launchers_slurm_handover import counts, handed_over, seeds

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

MAX_JOB_COUNT = 10
N_CELLS = 24


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=1, cpus=8, mem_mb=6000, accounting=False, max_job_count=MAX_JOB_COUNT, min_job_age_s=2) as made,
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def test_an_array_larger_than_the_controller_takes_is_submitted_in_parts(slurm: Cluster, runs_dir: Path) -> None:
    plan = seeds(*range(N_CELLS), steps=6)
    first = handed_over(runs_dir, plan)
    assert MAX_JOB_COUNT / 2 <= first.submitted <= MAX_JOB_COUNT
    assert (first.held, first.refused) == (N_CELLS - first.submitted, {})
    with launcher(runs_dir) as made:
        summary = complete(Experiment(runs_dir, "test"), plan, made, progress=Told())
    assert summary.complete
    assert counts(runs_dir, plan) == {"done": N_CELLS}


def test_the_shells_options_change_nothing(slurm: Cluster, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h", "-t", "all"))
    options = {
        **{"SBATCH_PARTITION": "urgent", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_ARRAY_INX": "0-3"},
        **{"SBATCH_WAIT": "1", "SBATCH_JOB_NAME": "other", "SQUEUE_PARTITION": "urgent", "SQUEUE_USERS": "nobody"},
        **{"SQUEUE_NAMES": "other", "SQUEUE_STATES": "CG", "SCANCEL_NAME": "other", "SLURM_CLUSTERS": "other"},
    }
    jobs = [job_of(runs_dir / "p%j%a", seed, steps=30) for seed in range(2)]
    with monkeypatch.context() as shell:
        for name, value in options.items():
            shell.setenv(name, value)
        with launcher(runs_dir / "p%j%a") as made:
            for job in jobs:
                made.submit([job])
            assert made.flush() == set()
            for name in options:
                shell.delenv(name)
            (job_id,) = {line.partition("_")[0] for line in slurm.ask("squeue", "-h", "-r", "-o", "%i").splitlines()}
            asked = [slurm.field(job_id, field) for field in ("Partition", "TimeLimit", "Requeue")]
            assert asked == ["gpu", "00:10:00", "1"]
            ends = until(made, jobs)
    assert [ends[job["cell_id"]].end for job in jobs] == ["done", "done"]
    (log,) = (runs_dir / "p%j%a" / "slurm").glob(f"*/{element_of(jobs[0])}_0_log.out")
    assert element_of(jobs[0]) in log.read_text(), "a percent sign in the folder's name is no pattern of SLURM's"
