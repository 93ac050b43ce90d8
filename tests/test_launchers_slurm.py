"""The launcher on a real SLURM: every way that an element can end, read back from the cells' records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm import SlurmLauncher
from launchers.slurm_config import SlurmConfig
from supar_sweep.config.decode import decode
from supar_sweep.sweep.jobs import Event, folder_of, make_job
from supar_sweep.sweep.records import Store
from supar_sweep.sweep.status import cell_state
from tests import cluster_cells
from tests.clusters import PATIENCE_S, Cluster, cluster
from tests.fake_cells import loss
from tests.tiny import tiny_cell, tiny_runtime

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

Jobs = Sequence[Mapping[str, Any]]


# without accounting the ends differ, and nothing else
once = pytest.mark.parametrize("slurm", [True], ids=["sacct"], indirect=True)


@pytest.fixture(scope="module", params=[True, False], ids=["sacct", "no-accounting"])
def slurm(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=2, cpus=8, mem_mb=4000, max_array_size=5, grace_s=5, accounting=request.param) as made,
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


def config(**changes: Any) -> SlurmConfig:
    settings: dict[str, Any] = {
        **dict.fromkeys(("partition", "account", "qos", "constraint", "gpus_per_node", "gpu_memory_gb")),
        **{
            "wait": True,
            "cpus": 1,
            "processes_per_gpu": None,
            "mem_gb": 0.25,
            "timeout_min": 10,
            "array_parallelism": 16,
            "max_elements": 1000,
        },
        **{"signal_delay_s": 30, "poll_s": 0.5, "grace_s": 2.0, "setup": (), "sbatch": {}, "larger": ()},
        **{"nodes": 1, "tasks_per_node": None},
    }
    return decode(SlurmConfig, {"name": "slurm", **settings, **changes})


def launcher(runs: Path, **changes: Any) -> SlurmLauncher:
    return SlurmLauncher(config(**changes), threads=1, folder=runs / "slurm", function=cluster_cells.RUN)


def job_of(runs: Path, seed: int, steps: int = 6) -> dict[str, Any]:
    cell = tiny_cell(**{"seed": seed, "train.steps": steps, "train.summary_last_steps": 1})
    return make_job(Store(runs / "cells"), cell, tiny_runtime(), "data", {})


def until(made: SlurmLauncher, jobs: Jobs) -> dict[str, Event]:
    """The ends of the jobs: one event each, and no other."""
    ends: dict[str, Event] = {}
    deadline_s = time.monotonic() + PATIENCE_S
    while len(ends) < len(jobs):
        assert time.monotonic() < deadline_s, ends
        for event in made.events(1):
            assert event.cell_id not in ends, "one event a job"
            ends[event.cell_id] = event
    assert set(ends) == {job["cell_id"] for job in jobs}
    assert made.events(0) == []
    return ends


def element_of(job: Mapping[str, Any]) -> str:
    """The element that SLURM knows the newest attempt at a cell by."""
    info = json.loads((folder_of(job).attempts()[-1] / "attempt.json").read_text())
    return str(info["provenance"]["slurm"]["element"])


def begun(job: Mapping[str, Any], steps: int = 1) -> bool:
    return len(folder_of(job).metrics()) >= steps


def assert_whole_curve(job: Mapping[str, Any], steps: int) -> None:
    cell = tiny_cell(**{"seed": job["cell"]["seed"], "train.steps": steps})
    assert [(line["step"], line["loss"]) for line in folder_of(job).metrics()] == [
        (step, loss(cell, step)) for step in range(1, steps + 1)
    ]


@once
def test_groups_are_trained_in_arrays_no_larger_than_slurm_takes(slurm: Cluster, runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in range(14)]
    groups = [jobs[0:3], *([job] for job in jobs[3:])]  # 12 groups, at most 5 elements an array
    with launcher(runs_dir) as made:
        for group in groups:
            made.submit(group)
        ends = until(made, jobs)
    assert {event.end for event in ends.values()} == {"done"}
    arrays = sorted((runs_dir / "slurm").iterdir())
    assert sorted(len((array / "groups.jsonl").read_text().splitlines()) for array in arrays) == [2, 5, 5]
    for job in jobs:
        assert_whole_curve(job, 6)
    assert len({element_of(job) for job in jobs}) == len(groups)
    assert len({element_of(job) for job in groups[0]}) == 1


def test_each_kind_of_end_is_typed_and_changes_no_others(slurm: Cluster, runs_dir: Path) -> None:
    raises, exits, killed, hungry, diverges, good = jobs = [
        job_of(runs_dir, seed)
        for seed in (
            cluster_cells.RAISES,
            cluster_cells.EXITS,
            cluster_cells.KILLED,
            cluster_cells.HUNGRY,
            cluster_cells.DIVERGES,
            0,
        )
    ]
    with launcher(runs_dir) as made:
        made.submit([raises, good])
        for job in (exits, killed, hungry, diverges):
            made.submit([job])
        ends = until(made, jobs)
    expected = {
        raises["cell_id"]: ("failed", False, "RuntimeError: no luck"),
        exits["cell_id"]: ("failed", True, "exit code 3; its last words: leaving without a word"),
        killed["cell_id"]: ("failed", True, "signal 9 SIGKILL"),
        hungry["cell_id"]: ("oom", False, "more memory than it asked for"),
        diverges["cell_id"]: ("diverged", False, ""),
        good["cell_id"]: ("done", False, ""),
    }
    for job in jobs:
        end, died, message = expected[job["cell_id"]]
        event, state = ends[job["cell_id"]], cell_state(folder_of(job))
        assert (event.end, event.died, state.state) == (end, died, end), (event, state)
        assert message in event.message
        assert state.message == event.message
        assert state.attempts == 1


def test_scancel_saves_and_ends_as_cancelled(slurm: Cluster, runs_dir: Path) -> None:
    slow, other = job_of(runs_dir, 1, steps=1000), job_of(runs_dir, 2)
    with launcher(runs_dir) as made:
        made.submit([slow])
        made.submit([other])
        made.events(0)
        slurm.wait_for(lambda: begun(slow))
        slurm.ask("scancel", element_of(slow))
        ends = until(made, [slow, other])
    assert ends[slow["cell_id"]].end == cell_state(folder_of(slow)).state == "cancelled"
    assert ends[slow["cell_id"]].wanted
    assert not ends[slow["cell_id"]].lost, "nobody tries it again unasked"
    assert "cancelled after" in cell_state(folder_of(slow)).message
    assert ends[other["cell_id"]].end == "done"


@once
def test_cancel_ends_what_runs_what_waits_and_what_was_not_submitted(slurm: Cluster, runs_dir: Path) -> None:
    slow, waiting, gathered = jobs = [job_of(runs_dir, seed, steps=1000) for seed in range(3)]
    with launcher(runs_dir, array_parallelism=1) as made:
        made.submit([slow])
        made.submit([waiting])
        made.events(0)
        slurm.wait_for(lambda: begun(slow))
        made.submit([gathered])
        made.cancel()
        ends = until(made, jobs)
    assert {event.end for event in ends.values()} == {"cancelled"}
    assert not any(event.died for event in ends.values())
    assert cell_state(folder_of(slow)).state == "cancelled"
    assert [cell_state(folder_of(job)).state for job in (waiting, gathered)] == ["missing", "missing"]


@once
def test_sbatchs_refusal_is_told_in_its_own_words(slurm: Cluster, runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in range(2)]
    with launcher(runs_dir, partition="nowhere") as made:
        made.submit(jobs)
        ends = until(made, jobs)
    for event in ends.values():
        assert (event.end, event.died) == ("failed", False)
        assert event.message.startswith("sbatch refused: ")
        assert "invalid partition" in event.message
