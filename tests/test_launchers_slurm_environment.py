"""Which variables of the user's shell reach SLURM's commands: no SLURM needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launchers.slurm_environment import commands_environment, ignored, notes, taken
from supar_sweep.training.slurm_job import again, state_now
from tests.command_line import CELL, call, here, refused

__all__ = ["here"]

NULL = dict.fromkeys(("partition", "account", "qos"))
OPTIONS = (
    *(
        "SBATCH_TIMELIMIT",
        "SBATCH_NO_REQUEUE",
        "SBATCH_ARRAY_INX",
        "SBATCH_WAIT",
        "SBATCH_EXCLUSIVE",
        "SBATCH_CLUSTERS",
    ),
    *(
        "SQUEUE_PARTITION",
        "SQUEUE_USERS",
        "SQUEUE_ACCOUNT",
        "SQUEUE_NAMES",
        "SQUEUE_FORMAT",
        "SQUEUE_STATES",
        "SQUEUE_SORT",
    ),
    *("SACCT_FORMAT", "SCANCEL_USER", "SCANCEL_NAME", "SCANCEL_STATE", "SCONTROL_ALL", "SRUN_EXPORT_ENV"),
    *("SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN", "SLURM_CLUSTERS", "SLURM_HINT"),
)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_the_shells_is_dropped_and_named(name: str) -> None:
    shell = {"HOME": "/home/me", name: "1"}
    assert commands_environment(shell) == {"HOME": "/home/me"}
    assert ignored(NULL, shell) == [name]
    [note] = notes(NULL, shell)
    assert note.startswith(f"ignored: {name};")


@pytest.mark.parametrize("name", ["SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "PATH", "SLURMISH", "SBATCHES"])
def test_where_the_cluster_is_and_what_is_not_slurms_stays(name: str) -> None:
    assert commands_environment({name: "1"}) == {name: "1"}
    assert notes(NULL, {name: "1"}) == []


@pytest.mark.parametrize("key", NULL)
def test_partition_account_and_qos_stand_in_for_a_setting_that_is_null(key: str) -> None:
    variable = f"SBATCH_{key.upper()}"
    shell = {variable: "mine"}
    assert taken(NULL, shell) == {key: "mine"}
    assert notes(NULL, shell) == [f"launcher.{key}=mine, from {variable}"]
    assert commands_environment(shell) == {}, "it reaches sbatch in the script, and in no other way"
    typed = {**NULL, key: "typed"}
    assert taken(typed, shell) == {}
    assert ignored(typed, shell) == [variable]
    assert ignored({**NULL, key: "mine"}, shell) == []
    assert taken(NULL, {variable: ""}) == {}


def test_a_jobs_own_variables_are_dropped_and_not_named() -> None:
    shell = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURMD_NODENAME": "n1", "SBATCH_TIMELIMIT": "1"}
    assert commands_environment(shell) == {}
    assert ignored(NULL, shell) == ["SBATCH_TIMELIMIT"]


def test_an_element_asks_slurm_without_the_options_of_its_own_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("squeue", "scontrol"):
        script = tmp_path / command
        script.write_text(f'#!/bin/sh\nenv >{tmp_path}/{command}.env\necho "RUNNING|"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    own = {"SLURM_JOB_ID": "7", "SQUEUE_STATES": "CG", "SCONTROL_FUTURE": "1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert state_now() == "RUNNING"
    again("7_0", [])
    for command in ("squeue", "scontrol"):
        heard = (tmp_path / f"{command}.env").read_text().splitlines()
        assert [name for name in own if any(line.startswith(f"{name}=") for line in heard)] == ["SLURM_JOB_ID"]


def test_plan_shows_what_came_from_the_environment(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(here))
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SQUEUE_SORT"):
        monkeypatch.setenv(name, "mine")
    small = ("model.width=16", "experiment.name=g", "launcher=dev_cluster")
    code, _, err = call(capsys, "plan", *CELL, *small)
    assert code == 0, err
    said = err.splitlines()
    assert "launcher.account=mine, from SBATCH_ACCOUNT" in said
    assert any(line.startswith("ignored: SBATCH_PARTITION, SQUEUE_SORT;") for line in said), (
        "dev_cluster has a partition"
    )
    monkeypatch.setenv("SBATCH_ACCOUNT", "a\tb")  # checked as what is typed
    assert refused(capsys, "plan", *CELL, *small).startswith(
        "supar-sweep: launcher.account: has a line break or another"
    )
