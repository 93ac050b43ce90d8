"""What follows the arrays may die, and so may SLURM's controller: nothing is submitted twice, nothing forgotten."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import Cluster, cluster
from tests.test_launchers_slurm import assert_whole_curve, begun, element_of, job_of, launcher, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

MAX_SUBMIT_JOBS = 6


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=1, cpus=8, mem_mb=4000, max_submit_jobs=MAX_SUBMIT_JOBS) as made,
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def arrays(runs: Path) -> list[Path]:
    return sorted((runs / "slurm").iterdir())


def test_a_new_launcher_follows_what_an_old_one_left(slurm: Cluster, runs_dir: Path) -> None:
    slow, waiting, new = jobs = [job_of(runs_dir, seed, steps=40) for seed in range(3)]
    with launcher(runs_dir, array_parallelism=1) as old:
        old.submit([slow])
        old.submit([waiting])
        old.events(0)
        slurm.wait_for(lambda: begun(slow))
    before = arrays(runs_dir)
    with launcher(runs_dir) as made:
        for job in jobs:
            made.submit([job])
        ends = until(made, jobs)
    assert {event.end for event in ends.values()} == {"done"}
    assert len(arrays(runs_dir)) == len(before) + 1
    assert {element_of(slow).partition("_")[0], element_of(waiting).partition("_")[0]} == {element_of(slow)[:-2]}
    assert element_of(new).partition("_")[0] != element_of(slow).partition("_")[0]
    for job in jobs:
        assert_whole_curve(job, 40)


KILLED_AT_THE_WORST_MOMENT = """
import os, pathlib, signal, sys
from supar_sweep.sweep.arrays import ArrayFolder
from tests.test_launchers_slurm import job_of, launcher
ArrayFolder.note_submitted = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runs = pathlib.Path(sys.argv[1])
made = launcher(runs)
for seed in (1, 2):
    made.submit([job_of(runs, seed, steps=40)])
made.flush()
"""


def test_an_array_whose_submitter_was_killed_before_it_noted_it_is_found(slurm: Cluster, runs_dir: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_THE_WORST_MOMENT, str(runs_dir)])
    assert killed.returncode == -signal.SIGKILL
    (array,) = arrays(runs_dir)
    assert not (array / "submitted.json").exists()
    jobs = [job_of(runs_dir, seed, steps=40) for seed in (1, 2)]
    with launcher(runs_dir) as made:
        for job in jobs:
            made.submit([job])
        ends = until(made, jobs)
    assert {event.end for event in ends.values()} == {"done"}
    assert arrays(runs_dir) == [array]
    assert [len(list(job_folder.iterdir())) for job_folder in runs_dir.glob("cells/*/*/attempts")] == [1, 1]


def test_a_full_queue_is_fed_as_it_drains(slurm: Cluster, runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed, steps=20) for seed in range(2 * MAX_SUBMIT_JOBS)]
    with launcher(runs_dir) as made:
        for job in jobs:
            made.submit([job])
        made.events(0)
        queued = int(slurm.ask("bash", "-c", "squeue -h -r | wc -l"))
        assert queued <= MAX_SUBMIT_JOBS
        ends = until(made, jobs)
    assert {event.end for event in ends.values()} == {"done"}
    for job in jobs:
        assert len(list((Path(job["store"]) / job["folder"] / "attempts").iterdir())) == 1


def test_the_controller_may_be_away(slurm: Cluster, runs_dir: Path) -> None:
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    slow, later = job_of(runs_dir, 1, steps=250), job_of(runs_dir, 2)
    with launcher(runs_dir) as made:
        made.submit([slow])
        made.events(0)
        # It comes back with its last save, some seconds old: jobs that had ended since would count against the user's limit,
        # and one that had begun since would be started twice, for which the node is drained.
        slurm.wait_for(lambda: begun(slow, steps=80))
        slurm.kill_controller()
        assert made.events(1) == []
        made.submit([later])
        assert made.events(1) == []
        slurm.start_controller()
        ends = until(made, [slow, later])
    assert {event.end for event in ends.values()} == {"done"}
    assert_whole_curve(slow, 250)
    assert len(arrays(runs_dir)) == 2
