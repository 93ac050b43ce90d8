"""`plan` shows what would be submitted, away from any cluster; on one: tests/test_launchers_slurm_commands.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import CELL, call, here, refused

__all__ = ["here"]

GRID = (
    *CELL,
    *("model.width=16", "experiment.name=g", "runtime.cohort=2", "launcher=dev_cluster"),
    "experiment.axes.seed={log2: [0, 5], step: 1}",
)


def test_without_a_cluster_it_shows_arrays_and_says_what_it_does_not_know(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PATH", str(here)
    )  # no SLURM; where one is without its configuration, it looks for that for a minute
    code, out, err = call(capsys, "plan", *GRID, "launcher.array_parallelism=1", "format=json")
    assert code == 0, err
    found = json.loads(out)
    # 6 cells in groups of at most 2, smaller ones last
    (array,) = found["submission"]
    assert (found["to_start"], found["arrays"], found["held"]) == (6, 1, 0)
    assert array["elements"] == found["elements"] == found["groups"]
    assert array == {"elements": found["groups"], "cells": 6, "at_once": 1, "script": None}
    assert found["together"] == 2
    assert "sbatch text only on the cluster" in err
    assert not Path("runs").exists()
    held = json.loads(call(capsys, "plan", *GRID, "launcher.max_elements=2", "format=json")[1])
    assert held["elements"] == 2
    assert held["held"] == 6 - held["submission"][0]["cells"] > 0
    refused(capsys, "plan", *GRID, "test_only=true")


def test_test_only_asks_sbatch_and_nobody_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "plan", *CELL, "model.width=16", "test_only=true")
    assert "test_only: has no effect with launcher=local" in said
    assert "test_only: must be true or false (got 'maybe')" in refused(capsys, "plan", *CELL, "test_only=maybe")
