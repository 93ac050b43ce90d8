"""What was spent, and how fast a grid goes on."""

from __future__ import annotations

from typing import Any

import pytest

from supar_sweep.sweep.pace import WINDOW_S, Spent, pace, spent, used_hours

NOW_S = 1e6


def took(begun_s: float, finished_s: float) -> Spent:
    return Spent(begun_s, finished_s, finished_s - begun_s, "cpu", 1)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"device": "cpu", "threads": 3, "train_s": 7200.0}, {"core-hours": 6.0}),
        ({"device": "cuda", "threads": 8, "train_s": 7200.0}, {"GPU-hours": 2.0}),
        ({"device": "cuda", "threads": 8, "train_s": 7200.0, "ranks": 4}, {"GPU-hours": 8.0}),
        (
            {"device": "cuda", "train_s": 7200.0, "provenance": {"slurm": {"process": 1, "on_gpu": 4}}},
            {"GPU-hours": 2.0 / 4},
        ),
        ({"device": "cpu", "wall_s": 1800.0}, {"core-hours": 0.5}),
        ({}, {}),
    ],
)
def test_hours_are_those_of_the_devices_at_work(result: dict[str, Any], expected: dict[str, float]) -> None:
    assert used_hours([spent({"started_s": 1.0, **result})]) == expected


def test_hours_add_up_by_their_unit() -> None:
    costs = [Spent(0, 1, 3600.0, device, 2) for device in ("cpu", "cuda", "cpu")]
    assert used_hours(costs) == {"core-hours": 4.0, "GPU-hours": 2.0}


def test_the_pace_is_that_of_what_was_finished_since_the_run_began() -> None:
    costs = {"old": took(NOW_S - 900, NOW_S - 800), "a": took(NOW_S - 500, NOW_S - 250), "b": took(NOW_S - 250, NOW_S)}
    weights = dict.fromkeys((*costs, "left"), 1.0)
    found = pace(costs, weights, ["left"], since_s=NOW_S - 500, now_s=NOW_S)
    assert found is not None
    assert found.cells_per_hour == pytest.approx(2 * 3600 / 500)
    assert found.eta_s == pytest.approx(250)
    dear = pace(costs, {**weights, "left": 4.0}, ["left"], since_s=NOW_S - 500, now_s=NOW_S)
    assert dear is not None
    assert dear.eta_s == pytest.approx(4 * found.eta_s)


def test_nothing_is_said_where_nothing_was_finished_lately() -> None:
    costs = {"a": took(NOW_S - WINDOW_S - 100, NOW_S - WINDOW_S - 10)}
    assert pace(costs, {"a": 1.0}, [], since_s=0, now_s=NOW_S) is None
    assert pace({}, {}, [], since_s=0, now_s=NOW_S) is None
