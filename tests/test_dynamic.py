"""Which positions are dropped and grown, against plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from supar_sweep.sparse.dynamic import drop_smallest, grow_largest, grow_random

ROWS, COLS = 7, 11


def case(seed: int, levels: int) -> tuple[Tensor, Tensor]:
    """A mask, and scores of so many levels (few: many ties)."""
    noise = np.random.default_rng(seed)
    mask = torch.from_numpy(noise.random((ROWS, COLS)) < 0.4)
    score = torch.from_numpy(noise.integers(-levels, levels + 1, (ROWS, COLS)).astype(np.float32))
    return mask, score


def positions(mask: Tensor) -> set[tuple[int, int]]:
    return {(int(row), int(col)) for row, col in mask.nonzero()}


@given(seed=st.integers(0, 1000), levels=st.sampled_from([1, 3, 1000]), data=st.data())
def test_the_smallest_live_weights_are_dropped(seed: int, levels: int, data: st.DataObject) -> None:
    mask, weight = case(seed, levels)
    live = sorted(positions(mask))
    n_drop = data.draw(st.integers(0, len(live)))
    before = mask.clone()
    kept = drop_smallest(mask, weight, n_drop)
    # sorted is stable: of equals the first in row-major order goes
    dropped = sorted(live, key=lambda at: abs(float(weight[at])))[:n_drop]
    assert positions(kept) == set(live) - set(dropped)
    assert torch.equal(mask, before)


@given(seed=st.integers(0, 1000), levels=st.sampled_from([1, 3, 1000]), data=st.data())
def test_the_dead_positions_of_largest_score_are_grown(seed: int, levels: int, data: st.DataObject) -> None:
    mask, score = case(seed, levels)
    dead = sorted(positions(~mask))
    n_grow = data.draw(st.integers(0, len(dead)))
    grown = grow_largest(mask, score, n_grow)
    wanted = sorted(dead, key=lambda at: -float(score[at]))[:n_grow]
    assert positions(grown) == positions(mask) | set(wanted)


@given(seed=st.integers(0, 1000), data=st.data())
def test_random_growth_adds_so_many_dead_positions_whatever_else_there_is(seed: int, data: st.DataObject) -> None:
    mask, _ = case(seed, 1)
    n_grow = data.draw(st.integers(0, int((~mask).sum())))
    torch.manual_seed(data.draw(st.integers(0, 5)))  # the global state has no say
    grown = grow_random(mask, n_grow, seed=seed, step=3, name="w")
    assert int(grown.sum()) == int(mask.sum()) + n_grow
    assert not (mask & ~grown).any()
    assert torch.equal(grown, grow_random(mask, n_grow, seed=seed, step=3, name="w"))


def test_random_growth_goes_by_seed_step_and_name() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    keys: list[dict[str, Any]] = [
        *({"seed": seed, "step": step, "name": name} for seed in (0, 1) for step in (5, 6) for name in ("a", "b"))
    ]
    grown = [grow_random(mask, 1024, **key) for key in keys]
    for index, one in enumerate(grown):
        for other in grown[index + 1 :]:
            # a quarter of the positions each: by chance they share a sixteenth, 256 with a standard deviation of 12
            assert abs(int((one & other).sum()) - 256) < 6 * 12


def test_random_growth_prefers_no_place() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    counts = sum(grow_random(mask, 1024, seed=0, step=step, name="a").int() for step in range(64))
    assert isinstance(counts, Tensor)
    # a row gets 64 * 1024 / 64 = 1024 of them, with a standard deviation of about sqrt(1024)
    for sums in (counts.sum(0), counts.sum(1)):
        assert (sums - 1024).abs().max() < 6 * 1024**0.5


@pytest.mark.parametrize("n_grow", [0, 1])
def test_nan_counts_as_the_largest_and_counts_stay(n_grow: int) -> None:
    mask, score = torch.tensor([[True, False, False]]), torch.tensor([[1.0, 2.0, torch.nan]])
    grown = grow_largest(mask, score, n_grow)
    assert grown.tolist() == [[True, False, bool(n_grow)]]
