"""A grid of real cells on a real SLURM while everything goes wrong: at the end it is as if nothing had."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launchers.local import LocalLauncher
from launchers.slurm import SlurmLauncher
from supar_sweep.sweep.complete import Summary, complete
from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.jobs import Launcher
from supar_sweep.sweep.status import folders
from supar_sweep.sweep.submission import Experiment, Plan, make_plan
from supar_sweep.training.corpus import fingerprint
from tests.clusters import PATIENCE_S, Cluster, cluster
from tests.test_launchers_slurm import config
from tests.tiny import tiny_cell, tiny_runtime

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

STEPS = 300
AXES = [
    {"hparams.lr": lr, "density": density, "seed": seed}
    for lr in (0.001, 0.002, 0.004, 0.008, 0.016)
    for density in (1.0, 0.25)
    for seed in range(6)
]
RUNTIME = {"cohort": 1, "checkpoint_every_steps": 25}  # route and compute are pinned in tests.tiny


def plan() -> Plan:
    changes = {"train.steps": STEPS}
    points = [GridPoint(axes=each, cell=tiny_cell(**each, **changes)) for each in AXES]
    return make_plan("chaos", points, runtime=tiny_runtime(**RUNTIME), fingerprint=fingerprint, provenance={})


def coordinate(runs: Path) -> Summary:
    """What a `run` does, in a process that will be killed."""
    with SlurmLauncher(config(mem_gb=0.9, grace_s=3.0), threads=1, folder=runs / "slurm") as launcher:
        return train(runs, launcher)


def train(runs: Path, launcher: Launcher) -> Summary:
    return complete(Experiment(runs, "chaos"), plan(), launcher, retries=5)


COORDINATOR = """
import pathlib, sys
from tests.test_launchers_slurm_chaos import coordinate
summary = coordinate(pathlib.Path(sys.argv[1]))
print(dict(summary.counts), summary.troubles, flush=True)
sys.exit(0 if summary.complete else 1)
"""


def start(runs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COORDINATOR, str(runs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(coordinator: subprocess.Popen[str]) -> None:
    coordinator.kill()
    coordinator.communicate()


def elements(slurm: Cluster, state: str) -> list[str]:
    """The elements in a state, with the node that each is on: "<element> <node>"."""
    return slurm.ask("squeue", "-h", "-r", "-t", state, "--Format=JobArrayID: ,NodeList:").splitlines()


@contextmanager
def hurrying(slurm: Cluster) -> Iterator[None]:
    """Meanwhile a requeued element waits no two minutes."""
    over = threading.Event()

    def hurry() -> None:
        while not over.wait(0.5):
            waiting = slurm.ask("squeue", "-h", "-r", "-t", "PENDING", "--Format=JobArrayID: ,Reason:", check=False)
            if held := [line.split()[0] for line in waiting.splitlines() if line.endswith("BeginTime")]:
                slurm.start_now(*held)

    thread = threading.Thread(target=hurry)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_disturbed_grid_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=5, cpus=2, mem_mb=2000, grace_s=5, max_array_size=41) as slurm,
        hurrying(slurm),
    ):
        for name, value in slurm.environment.items():
            patch.setenv(name, value)

        def done() -> int:
            return len(list(disturbed.glob("cells/*/*/result.json")))

        def at_work(n: int) -> None:
            """Wait until at least so many cells are done, and others are being trained."""
            slurm.wait_for(lambda: done() >= n, 2 * PATIENCE_S)

        coordinator = start(disturbed)
        try:
            at_work(1)
            slurm.batch("sleep 2", "-p", "urgent", "--nodelist=n1", "--exclusive")
            for running in elements(slurm, "RUNNING")[:2]:
                slurm.ask("scontrol", "requeue", running.split()[0], check=False)
            at_work(8)
            slurm.kill_node("n4", with_jobs=True)
            slurm.kill_node("n5", with_jobs=False)
            at_work(14)
            kill(coordinator)
            coordinator = start(disturbed)
            at_work(20)
            slurm.kill_controller()
            kill(coordinator)
            slurm.start_controller()
            coordinator = start(disturbed)
            slurm.start_node("n4")
            slurm.start_node("n5")
            at_work(30)
            slurm.batch("sleep 2", "-p", "urgent", "--nodelist=n2", "--exclusive")
            slurm.batch("sleep 2", "-p", "urgent", "--nodelist=n4", "--exclusive")
            said, _ = coordinator.communicate(timeout=3 * PATIENCE_S)
            assert coordinator.returncode == 0, said
        finally:
            kill(coordinator)
    with LocalLauncher(processes=2, threads=1, log_folder=calm / "logs", grace_s=30) as launcher:
        assert train(calm, launcher).complete
    grid = plan()
    n_attempts = 0
    for this, folder in folders(Experiment(disturbed, "chaos").store, grid).items():
        result = folder.result()
        assert result is not None, this
        assert result["end"] == "done"
        for file in folder.path.rglob("*.json"):
            json.loads(file.read_text())
        assert not list(folder.path.glob("**/*.tmp"))
        assert not (folder.path / "checkpoints").exists()
        same = folders(Experiment(calm, "chaos").store, grid)[this]
        assert folder.metrics() == same.metrics(), this
        expected = same.result()
        assert expected is not None
        assert result["summary"] == expected["summary"]
        n_attempts += len(folder.attempts())
    assert n_attempts > len(grid.cells), "nothing was disturbed"
    shards = list((disturbed / "cells").glob("*/*"))
    assert len(shards) == len(grid.cells)
