"""What the launcher makes of SLURM's answers in an order that no cluster gives on request: the commands are scripts here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launchers.slurm import SlurmLauncher
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.records import Attempt
from tests.test_launchers_slurm import config, job_of

ANSWERS = {
    "sbatch": "echo 7",
    "squeue": 'case "$*" in *--me*) ;; *) [ ! -f {folder}/queue ] || /bin/cat {folder}/queue ;; esac',
    "scancel": 'echo "$@" >>{folder}/cancelled',
    "scontrol": "echo 'MaxArraySize = 1001'",
    "srun": "exit 0",
}


class Paper(NamedTuple):
    """A SLURM that says what it is told to say, and a launcher that asks it."""

    folder: Path
    launcher: SlurmLauncher

    def says(self, state: str) -> None:
        """Have the queue hold the first element in this state."""
        (self.folder / "queue").write_text(f"7_0|{state}|None|0|0|\n")

    def submitted(self, job: Mapping[str, Any]) -> None:
        self.launcher.submit([job])
        assert self.launcher.flush() == set()


@pytest.fixture
def slurm(tmp_path: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Paper:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in ANSWERS.items():
        script = folder / name
        script.write_text(f"#!/bin/sh\n{text.format(folder=folder)}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    settings = config(poll_s=0.1, grace_s=0.0)
    return Paper(folder, SlurmLauncher(settings, threads=1, folder=runs_dir / "slurm"))


@pytest.mark.parametrize("seen_first", [True, False])
def test_what_was_withdrawn_and_not_told_ends_where_all_is_cancelled(
    slurm: Paper, runs_dir: Path, seen_first: bool
) -> None:
    job = job_of(runs_dir, 0)
    slurm.submitted(job)
    slurm.says("PENDING")
    assert slurm.launcher.withdraw() == set(), "the queue still has it"
    assert (slurm.folder / "cancelled").read_text() == "7_0\n"
    slurm.says("CANCELLED")
    if seen_first:
        assert slurm.launcher.events(5) == [], "a withdrawal is told by the next call of `withdraw`"
    slurm.launcher.cancel()
    (event,) = slurm.launcher.events(5)
    assert (event.cell_id, event.end) == (job["cell_id"], "cancelled")
    assert slurm.launcher.withdraw() == set(), "told once"


def test_what_was_withdrawn_is_told_by_a_later_call(slurm: Paper, runs_dir: Path) -> None:
    job = job_of(runs_dir, 0)
    slurm.submitted(job)
    slurm.says("PENDING")
    assert slurm.launcher.withdraw() == set()
    slurm.says("CANCELLED")
    assert slurm.launcher.events(5) == []
    assert slurm.launcher.withdraw() == {job["cell_id"]}


def test_a_cell_that_fails_at_once_was_not_refused(slurm: Paper, runs_dir: Path) -> None:
    job = job_of(runs_dir, 0)
    slurm.submitted(job)
    (array,) = (runs_dir / "slurm").iterdir()
    with Attempt(folder_of(job), job["cell"], {"provenance": {"slurm": {"array": array.name}}}) as attempt:
        attempt.end("failed", "no luck")
    slurm.says("RUNNING")
    assert slurm.launcher.flush() == set()
    assert slurm.launcher.events(0) == [], "after `flush`, what sbatch said and no more"
    (event,) = slurm.launcher.events(5)
    assert (event.end, event.message) == ("failed", "no luck")
