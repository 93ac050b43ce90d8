"""What arrays are made of, on a real SLURM: elements of several processes, unequal resources, the code of the submission."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm import SlurmLauncher
from launchers.slurm_arrays import Size
from supar_sweep.sweep.arrays import ArrayFolder
from supar_sweep.sweep.code import PACKAGE, code_version
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.status import cell_state
from tests import cluster_cells
from tests.clusters import Cluster, cluster
from tests.test_launchers_slurm import assert_whole_curve, config, element_of, job_of, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, cluster(nodes=2, cpus=8, mem_mb=4000, grace_s=5) as made:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def launcher(runs: Path, **changes: Any) -> SlurmLauncher:
    """One whose cells are as large as their seed says."""
    return SlurmLauncher(
        config(**changes),
        threads=None,
        folder=runs / "slurm",
        function=cluster_cells.RUN,
        size=lambda job: Size(job["cell"]["seed"], 1),
    )


def process_of(job: Any) -> int:
    info = json.loads((folder_of(job).attempts()[-1] / "attempt.json").read_text())
    return int(info["provenance"]["slurm"]["process"])


def test_processes_of_an_element_end_apart_and_go_on_together_after_a_preemption(
    slurm: Cluster, runs_dir: Path
) -> None:
    slow = [job_of(runs_dir, seed, steps=400) for seed in range(2)]
    seeds = (cluster_cells.RAISES, cluster_cells.EXITS, cluster_cells.KILLED, cluster_cells.GROWS)
    bad = [job_of(runs_dir, seed, steps=20) for seed in seeds]
    jobs = [*slow, *bad]
    with launcher(runs_dir, processes_per_gpu=6, cpus=6, mem_gb=0.8) as made:
        for job in jobs:
            made.submit([job])
        made.events(0)
        slurm.wait_for(lambda: all((folder_of(job).last_end() or {}).get("end") for job in bad))
        assert len({element_of(job) for job in jobs}) == 1
        assert sorted(map(process_of, jobs)) == [1, 2, 3, 4, 5, 6]
        element = element_of(slow[0])
        urgent = slurm.batch("sleep 2", "--partition=urgent", "--nodes=2", "--exclusive")
        slurm.wait_for(lambda: slurm.field(element, "JobState") == "PENDING")
        slurm.wait_for_state(urgent, "COMPLETED")
        slurm.start_now(element)
        ends = until(made, jobs)
    expected = [("done", False), ("done", False), ("failed", False), ("failed", True), ("failed", True), ("oom", False)]
    assert [(ends[job["cell_id"]].end, ends[job["cell_id"]].died) for job in jobs] == expected
    assert [cell_state(folder_of(job)).state for job in jobs] == [end for end, _ in expected]
    for job in slow:
        assert_whole_curve(job, 400)
        assert [path.name for path in folder_of(job).attempts()] == ["0001", "0002"]
    assert slurm.field(element, "Restarts") == "1"
    for job in bad:
        assert len(folder_of(job).attempts()) == 1


def test_cells_that_need_more_are_in_an_array_of_their_own(slurm: Cluster, runs_dir: Path) -> None:
    small, large = [job_of(runs_dir, seed) for seed in range(3)], [job_of(runs_dir, seed) for seed in (30, 31)]
    with launcher(
        runs_dir,
        processes_per_gpu=2,
        array_parallelism=2,
        larger=[{"above_gb": 20, "mem_gb": 0.5, "cpus": 4, "timeout_min": 20, "partition": "cancelling"}],
    ) as made:
        for job in (small[0], large[0], *small[1:], large[1]):
            made.submit([job])
        ends = until(made, [*small, *large])
    assert {event.end for event in ends.values()} == {"done"}
    found = {}
    for array in (runs_dir / "slurm").iterdir():
        job_id = json.loads((array / "submitted.json").read_text())["job_id"]
        asked = {field: slurm.field(job_id, field) for field in ("Partition", "MinMemoryNode", "NumCPUs", "TimeLimit")}
        elements = ArrayFolder(array).elements()
        found[tuple(asked.values())] = [
            [(job["cell"]["seed"], job["runtime"]["threads"]) for job in chain(*groups)] for groups in elements
        ]
    assert found == {
        ("gpu", "256M", "1", "00:10:00"): [[(0, 1), (1, 1)], [(2, 1)]],
        ("cancelling", "512M", "4", "00:20:00"): [[(30, 2), (31, 2)]],  # its four cores shared by two
    }


SUBMIT = """
import pathlib, sys
from tests.test_launchers_slurm import job_of, launcher
runs = pathlib.Path(sys.argv[1])
with launcher(runs, sbatch={"hold": True}) as made:
    made.submit([job_of(runs, 1)])
    made.flush()
"""


def test_a_job_runs_the_code_that_it_was_submitted_with(slurm: Cluster, runs_dir: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in (PACKAGE, *(PACKAGE.parent / name for name in ("launchers", "tests"))):
        shutil.copytree(folder, checkout / folder.name)
    here = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-P", "-c", SUBMIT, str(runs_dir)], env=here, cwd=tmp_path, check=True)
    (checkout / PACKAGE.name / "sweep" / "records.py").write_text("raise SystemExit('edited')\n")
    [array] = (runs_dir / "slurm").iterdir()
    slurm.ask("scontrol", "release", json.loads((array / "submitted.json").read_text())["job_id"])
    job = job_of(runs_dir, 1)
    slurm.wait_for(lambda: cell_state(folder_of(job)).complete)
    result = folder_of(job).result() or {}
    assert result["provenance"]["slurm"]["code"] == code_version()
    assert_whole_curve(job, 6)
