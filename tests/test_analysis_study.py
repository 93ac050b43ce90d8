"""The figure of a study: history, winner, slices; and the rows of a real journal."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.study import draw, save, study
from supar_sweep.errors import ConfigError

LOSSES = [3.0, 2.8, None, 2.9, 2.5, 2.6]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "end": "diverged" if loss is None else "done",
            "loss": loss,
            "params": {"lr": 2.0 ** (-8 + number), "init_std": 2.0**-4},
        }
        for number, loss in enumerate(LOSSES)
    ]


def test_the_best_so_far_never_rises_and_skips_what_diverged() -> None:
    found = study(rows()[::-1], "mine", "train_loss")
    assert found.best == ((0, 3.0), (1, 2.8), (3, 2.8), (4, 2.5), (5, 2.5))
    assert found.winner == 4
    assert found.names == ("init_std", "lr")


def test_the_winner_is_the_best_on_fresh_seeds() -> None:
    found = study(rows(), "mine", "train_loss", {4: [2.9, 2.8], 5: [2.6, 2.7]})
    assert found.winner == 5


def test_what_diverged_is_no_winner_and_is_drawn_as_diverged(tmp_path: Path) -> None:
    # trial 4 diverged on one fresh seed; trial 2 itself diverged, and an early version took it for confirmed
    found = study(rows(), "mine", "train_loss", {4: [2.4, None], 1: [2.8, 2.7], 2: [0.1, 0.1]})
    assert found.winner == 1
    axes = draw(found).axes[0]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert sorted(float(np.asarray(line.get_xdata())[0]) for line in crosses) == [2.0, 4.0]
    ticks = [line for line in axes.lines if line.get_marker() == "_"]
    assert sorted(len(np.asarray(line.get_ydata())) for line in ticks) == [1, 2, 2]
    _, _, table = save(draw(found), found, tmp_path / "study")
    with table.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert listed[4]["confirmed"] == "2.4 diverged"
    assert study(rows(), "mine", "train_loss", {4: [2.4, None]}).winner is None


def test_a_study_without_a_trial_is_an_error_and_one_without_a_loss_is_drawn() -> None:
    with pytest.raises(ConfigError, match="no trial yet"):
        study([], "mine", "train_loss")
    found = study([{**row, "end": "failed", "loss": None} for row in rows()], "mine", "train_loss")
    assert found.winner is None
    draw(found)


def test_a_panel_for_the_history_and_one_a_hyperparameter(tmp_path: Path) -> None:
    found = study(rows(), "mine", "train_loss", {4: [2.4, 2.45]})
    drawn = draw(found)
    assert [axes.get_xlabel() for axes in drawn.axes] == ["Trial", "Init std", "Learning rate"]
    of_lr = [
        (float(np.asarray(line.get_xdata())[0]), float(np.asarray(line.get_ydata())[0]))
        for line in drawn.axes[2].lines
        if line.get_marker() == "o" and line.get_markersize() == 4
    ]
    assert of_lr == [(-8 + n, loss) for n, loss in enumerate(LOSSES) if loss is not None]
    assert [line.get_marker() for line in drawn.axes[2].lines].count("x") == 1
    ring = [line for line in drawn.axes[2].lines if line.get_markerfacecolor() == "none"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in ring] == [-4.0]
    _, _, table = save(drawn, found, tmp_path / "study")
    with table.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["winner"] for row in listed].count("True") == 1
    assert math.log2(float(listed[2]["lr"])) == -6
