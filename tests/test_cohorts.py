"""Cells that are given to one process together: how a grid is cut, and what one cell's end means to the others."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import pytest

from launchers.local import LocalLauncher
from supar_sweep.sweep.cohorts import SHARES, Price, Queue, groups, split
from supar_sweep.sweep.complete import complete
from supar_sweep.sweep.status import folders
from supar_sweep.sweep.trainer import CellTrainer
from supar_sweep.training.run_cell import run_cells
from tests import fake_cells
from tests.grids import Told, experiment, pool, run, seeds
from tests.tiny import folder_of, result_of, tiny_cell, tiny_job, tiny_runtime

EIGHT = Price(together=8)


def cut(todo: list[str], prices: dict[str, Price], slots: int, alone: Any = ()) -> list[list[str]]:
    queue, taken = Queue(todo, prices, alone), []
    while queue:
        taken.append(queue.take(slots))
    return taken


def first_and_others_of_its_shape(
    todo: deque[str], prices: Mapping[str, Price], slots: int, alone: Container[str]
) -> list[str]:
    """The next group by its definition, looked for among all that wait: a queue takes the same, without looking at all."""
    first = todo[0]
    price = prices[first]
    group = [first]
    if first not in alone and price.together > 1:
        share = sum(prices[other].cost for other in todo) / (SHARES * slots * price.cost)
        size = min(price.together, max(1, math.ceil(share)))
        for other in todo:
            if len(group) == size:
                break
            if other != first and prices[other].shape == price.shape and other not in alone:
                if len(group) >= prices[other].together:
                    continue
                size = min(size, prices[other].together)
                group.append(other)
    for member in group:
        todo.remove(member)
    return group


@pytest.mark.parametrize("seed", range(60))
def test_a_queue_takes_the_groups_of_the_definition_in_its_order(seed: int) -> None:
    rng = random.Random(seed)
    cells = [f"{n}" for n in range(rng.choice([1, 7, 40, 150]))]
    most = rng.choice([1, 2, 8, 32])
    # whole numbers, so that their sum is exact in any order
    prices = {
        cell_id: Price(float(rng.choice([1, 1, 3, 50])), rng.choice("xyz"), rng.choice([1, 2, most, most]))
        for cell_id in cells
    }
    alone = {cell_id for cell_id in cells if rng.random() < 0.1}
    slots = rng.choice([1, 2, 5, 64])
    queue = Queue(cells, prices, alone)
    todo = deque(sorted(cells, key=lambda cell_id: -prices[cell_id].cost))
    out: list[str] = []
    while todo:
        assert list(queue) == list(todo)
        group = queue.take(slots)
        assert group == first_and_others_of_its_shape(todo, prices, slots, alone)
        out += group
        if rng.random() < 0.3:  # some are tried again, by themselves or not
            cell_id, apart = out.pop(rng.randrange(len(out))), rng.random() < 0.5
            alone |= {cell_id} if apart else set()
            queue.put_back(cell_id, alone=apart)
            todo.append(cell_id)
    assert not queue


def test_a_queue_that_was_cleared_can_be_filled_again() -> None:
    cells = list("abcdefgh")
    queue = Queue(cells, dict.fromkeys(cells, EIGHT), {"c"})
    queue.clear()
    assert len(queue) == 0
    for cell_id in "bcd":
        queue.put_back(cell_id)
    assert [queue.take(1) for _ in range(2)] == [["b", "d"], ["c"]]


def test_a_queue_does_not_look_at_all_that_wait_for_each_group() -> None:
    looks = 0

    class Counted(dict[str, Price]):
        def __getitem__(self, cell_id: str) -> Price:
            nonlocal looks
            looks += 1
            return super().__getitem__(cell_id)

    cells = [f"{n}" for n in range(3000)]
    prices = Counted({cell_id: Price(together=8) for cell_id in cells})
    assert sum(map(len, groups(cells, prices, 4))) == len(cells)
    assert looks < 10 * len(cells)


def test_groups_are_full_at_first_and_single_at_the_end() -> None:
    cells = [str(n) for n in range(100)]
    taken = cut(cells, dict.fromkeys(cells, EIGHT), slots=2)
    assert [this for group in taken for this in group] == cells  # in order, each once
    sizes = [len(group) for group in taken]
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
    taken = cut(cells, dict.fromkeys(cells, Price(together=4)), slots=1, alone={"a", "d"})
    assert ["a"] in taken
    assert ["d"] in taken
    assert max(map(len, taken)) > 1
    assert cut(cells, dict.fromkeys(cells, Price()), slots=1) == [[this] for this in cells]


def test_the_neediest_says_how_many_a_group_may_be() -> None:
    prices = dict.fromkeys("abcdefgh", EIGHT) | {"c": Price(together=2), "d": Price(together=1)}
    taken = cut(list("abcdefgh"), prices, slots=1)
    assert all(len(group) <= prices[this].together for group in taken for this in group)
    assert sorted(this for group in taken for this in group) == list("abcdefgh")
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
        sizes = group_sizes(launcher)
        trainer = trainer_of(runs_dir, launcher)
        wanted = {trainer.submit(tiny_cell(seed=seed)) for seed in range(6)}
        ended: set[str] = set()
        while ended != wanted:
            ended |= {end.cell_id for end in trainer.ends(30)}
    assert sizes == [3, 3]


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
    queue = Queue(cells, prices)
    free_at = [0.0] * slots
    while queue:
        # the process that is free first takes the next group, as `complete` hands them out
        now = min(free_at)
        group = queue.take(slots)
        free_at[free_at.index(now)] = now + sum(prices[this].cost for this in group)
    assert max(free_at) - min(free_at) <= max(shapes.values())
