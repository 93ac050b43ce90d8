"""Cells that are given to one process together: how a grid is cut, and what one cell's end means to the others."""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from launchers.local import LocalLauncher
from supar_sweep.sweep.cohorts import SHARES, Price, split, take
from supar_sweep.sweep.complete import complete
from supar_sweep.sweep.status import folders
from supar_sweep.sweep.trainer import CellTrainer
from supar_sweep.training.run_cell import run_cells
from tests import fake_cells
from tests.grids import Told, experiment, pool, run, seeds
from tests.tiny import folder_of, result_of, tiny_cell, tiny_job, tiny_runtime

EIGHT = Price(together=8)


def cut(todo: list[str], prices: dict[str, Price], slots: int, alone: Any = ()) -> list[list[str]]:
    left, groups = deque(todo), []
    while left:
        groups.append(take(left, prices, slots, alone))
    return groups


def test_groups_are_full_at_first_and_single_at_the_end() -> None:
    cells = [str(n) for n in range(100)]
    groups = cut(cells, dict.fromkeys(cells, EIGHT), slots=2)
    assert [this for group in groups for this in group] == cells  # in order, each once
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 8
    assert sizes[-2:] == [1, 1]
    left = 100
    for size in sizes:
        assert size == 1 or size <= -(-left // (SHARES * 2))
        left -= size


def test_a_grid_of_few_cells_keeps_every_process_busy() -> None:
    cells = ["a", "b", "c", "d"]
    assert cut(cells, dict.fromkeys(cells, EIGHT), slots=4) == [["a"], ["b"], ["c"], ["d"]]


def test_only_cells_of_one_shape_are_given_together() -> None:
    prices = {
        "a": Price(4, "wide", 8),
        "b": Price(2, "narrow", 8),
        "c": Price(4, "wide", 8),
        "d": Price(2, "narrow", 8),
    }
    assert cut(list("acbd") * 1, prices, slots=1) == [["a", "c"], ["b"], ["d"]]
    assert cut(list("abcd"), prices, slots=1)[0] == ["a", "c"]


def test_who_must_be_alone_is() -> None:
    cells = list("abcdefgh") * 1
    groups = cut(cells, dict.fromkeys(cells, Price(together=4)), slots=1, alone={"a", "d"})
    assert ["a"] in groups
    assert ["d"] in groups
    assert max(map(len, groups)) > 1
    assert cut(cells, dict.fromkeys(cells, Price()), slots=1) == [[this] for this in cells]


def test_the_neediest_says_how_many_a_group_may_be() -> None:
    prices = dict.fromkeys("abcdefgh", EIGHT) | {"c": Price(together=2), "d": Price(together=1)}
    groups = cut(list("abcdefgh"), prices, slots=1)
    assert all(len(group) <= prices[this].together for group in groups for this in group)
    assert sorted(this for group in groups for this in group) == list("abcdefgh")
    assert [len(each) for each in split(["x"] * 4, [8, 8, 2, 8], slots=1)] == [2, 2]


def test_a_batch_is_split_evenly_by_shape() -> None:
    assert split(["x"] * 8, [8] * 8, slots=2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert split(["x"] * 3, [8] * 3, slots=4) == [[0], [1], [2]]
    assert split(["x", "y", "x"], [8] * 3, slots=1) == [[0, 2], [1]]
    assert split(["x"] * 5, [2] * 5, slots=1) == [[0, 3], [1, 4], [2]]
    assert split([], [], slots=2) == []


def attempts_of(runs: Path, plan: Any) -> dict[int, list[dict[str, Any]]]:
    """Each seed's attempts."""
    found = {}
    for point, folder in zip(plan.points, folders(experiment(runs).store, plan).values(), strict=True):
        found[point["seed"]] = [json.loads((path / "attempt.json").read_text()) for path in folder.attempts()]
    return found


def group_sizes(launcher: LocalLauncher) -> list[int]:
    """The sizes of the groups that the launcher is given from now on; grows."""
    sizes: list[int] = []
    submit = launcher.submit

    def counted(jobs: Any) -> None:
        sizes.append(len(jobs))
        submit(jobs)

    launcher.submit = counted  # type: ignore[method-assign]
    return sizes


def trainer_of(runs: Path, launcher: LocalLauncher) -> CellTrainer:
    """A trainer that may put eight cells together."""
    store = experiment(runs).store
    return CellTrainer(store, launcher, tiny_runtime(), fingerprint="data", provenance={}, price=lambda cell: EIGHT)


def test_a_grid_is_trained_in_groups(runs_dir: Path) -> None:
    with pool(runs_dir, processes=1) as launcher:
        submitted = group_sizes(launcher)
        summary = complete(experiment(runs_dir), seeds(*range(10)), launcher, price=lambda cell: Price(together=4))
    assert summary.complete
    assert submitted[0] == 4
    assert sum(submitted) == 10
    assert len(submitted) < 10


def test_what_dies_in_company_is_tried_again_alone(runs_dir: Path) -> None:
    plan, told = seeds(fake_cells.EXIT, *range(14)), Told()
    summary = run(runs_dir, plan, told, processes=1, price=lambda cell: Price(together=8), alike=2)
    assert dict(summary.counts) == {"n": 15, "done": 14, "failed": 1}
    assert summary.held == 0  # one death is one failure, however many it took along
    tries = {seed: len(each) for seed, each in attempts_of(runs_dir, plan).items()}
    assert tries.pop(fake_cells.EXIT) == 3
    assert all("alone" in text or "try" in text for text in told.messages)
    (trouble,) = summary.troubles
    assert trouble.n == 1


def test_what_finds_no_room_in_company_is_tried_again_alone(runs_dir: Path) -> None:
    crowded = range(fake_cells.CROWDED, fake_cells.CROWDED + 6)
    plan, told = seeds(*crowded, 0, 1, 2, 3, 4, 5, 6), Told()
    summary = run(runs_dir, plan, told, processes=1, price=lambda cell: Price(together=6), alike=2)
    assert summary.complete
    assert any("no room for all of us; again, alone" in text for text in told.messages)


def test_the_trainer_hands_over_a_batch_in_groups(runs_dir: Path) -> None:
    with pool(runs_dir, processes=2) as launcher:
        groups = group_sizes(launcher)
        trainer = trainer_of(runs_dir, launcher)
        wanted = {trainer.submit(tiny_cell(seed=seed)) for seed in range(6)}
        ended: set[str] = set()
        while ended != wanted:
            ended |= {end.cell_id for end in trainer.ends(30)}
    assert groups == [3, 3]


def test_a_trial_that_finds_no_room_in_company_is_tried_again_alone(runs_dir: Path) -> None:
    with pool(runs_dir, processes=1) as launcher:
        trainer = trainer_of(runs_dir, launcher)
        wanted = {trainer.submit(tiny_cell(seed=fake_cells.CROWDED + n)) for n in range(3)}
        ends: dict[str, str] = {}
        while set(ends) != wanted:
            ends |= {end.cell_id: end.end for end in trainer.ends(30)}
    assert set(ends.values()) == {"done"}


def test_cells_of_one_process_are_published_one_by_one(tmp_path: Path) -> None:
    jobs = [tiny_job(tmp_path, seed=seed, **{"train.steps": steps}) for seed, steps in ((0, 12), (1, 6), (2, 12))]
    told: list[tuple[str, str]] = []
    run_cells(jobs, ended=lambda this, end, message: told.append((this, end)))
    assert sorted(told) == sorted((job["cell_id"], "done") for job in jobs)
    for job, steps in zip(jobs, (12, 6, 12), strict=True):
        assert result_of(job)["together"] == 3
        assert result_of(job)["summary"]["steps_done"] == steps
    run_cells(jobs, ended=lambda this, end, message: told.append((this, end)))
    assert all(end == "done" for _, end in told)
    assert [len(folder_of(job).attempts()) for job in jobs] == [1, 1, 1]


def test_a_cell_that_cannot_begin_leaves_the_others_alone(tmp_path: Path) -> None:
    good, changed, impossible = (tiny_job(tmp_path, seed=seed) for seed in range(3))
    changed["fingerprint"] = "of another corpus"
    impossible["cell"]["model"]["d_head"] = 7
    ends = {}
    run_cells([impossible, good, changed], ended=lambda this, end, message: ends.update({this: (end, message)}))
    assert ends[good["cell_id"]] == ("done", "")
    assert ends[changed["cell_id"]][0] == ends[impossible["cell_id"]][0] == "failed"
    assert "corpus has changed" in ends[changed["cell_id"]][1]
    assert "d_head" in ends[impossible["cell_id"]][1]


@pytest.mark.parametrize("slots", [1, 2, 5, 16])
def test_no_process_is_idle_for_longer_than_the_dearest_cell_takes(slots: int) -> None:
    rng = random.Random(slots)
    cells = [str(n) for n in range(150)]
    shapes = {"small": 1.0, "middle": 4.0, "big": 9.0}
    prices = {}
    for this in cells:
        shape = rng.choice(sorted(shapes))
        prices[this] = Price(shapes[shape], shape, rng.choice([1, 8, 32]) if shape == "big" else 8)
    todo = deque(sorted(cells, key=lambda this: -prices[this].cost))
    free_at = [0.0] * slots
    while todo:
        # the process that is free first takes the next group, as `complete` hands them out
        now = min(free_at)
        group = take(todo, prices, slots)
        free_at[free_at.index(now)] = now + sum(prices[this].cost for this in group)
    assert max(free_at) - min(free_at) <= max(shapes.values())
