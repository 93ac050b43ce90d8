"""When masks change: SET's, RigL's and GMP's formulas, in steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from supar_sweep.errors import ConfigError
from supar_sweep.rules.mask_schedule import DynamicMethod, mask_schedule
from tests.tiny import tiny_cell

SWAPS = {"update_fraction": 0.1, "stop_fraction": 0.75, "drop_fraction": 0.3}
RIGL: dict[str, Any] = {"method": "rigl", **SWAPS}
GMP: dict[str, Any] = {
    **{
        "method": "gmp",
        "update_fraction": 0.1,
        "start_fraction": 0.1,
        "stop_fraction": 0.75,
        "hparams_density": "final",
    }
}


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_swaps_come_every_interval_until_the_stop(method: DynamicMethod) -> None:
    schedule = mask_schedule(method, 1169, update_fraction=100 / 1169, stop_fraction=0.75, drop_fraction=0.3)
    # T_end = .75 * 1169 = 877: the paper's every 100 steps, until then
    assert [step for step in range(1, 1170) if schedule.is_update(step)] == list(range(100, 877, 100))
    assert schedule.n_updates == 8
    assert schedule.excess(0) == schedule.excess(500) == 0


def test_no_swap_at_the_stop_itself() -> None:
    schedule = mask_schedule("rigl", 100, update_fraction=0.25, stop_fraction=0.75, drop_fraction=0.3)
    assert [step for step in range(1, 101) if schedule.is_update(step)] == [25, 50]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_that_is_dropped_decays_by_half_a_cosine(share: float) -> None:
    schedule = mask_schedule("rigl", 400, update_fraction=0.01, stop_fraction=0.5, drop_fraction=0.3)
    assert schedule.drop_share(round(share * 200)) == pytest.approx(0.3 * math.cos(math.pi * share / 2) ** 2, abs=1e-15)


def test_gmp_is_the_cubic_of_its_paper() -> None:
    schedule = mask_schedule("gmp", 1000, update_fraction=0.1, start_fraction=0.05, stop_fraction=0.77)
    t_0, interval, n = 50, 100, 7  # 50 + 7 * 100 <= 770
    steps = [step for step in range(1, 1001) if schedule.is_update(step)]
    assert steps == [t_0 + j * interval for j in range(1, n + 1)]
    s_i, s_f = 0.0, 1 - 1 / 16
    for step in (t_0, *steps):
        sparsity = s_f + (s_i - s_f) * (1 - (step - t_0) / (n * interval)) ** 3
        assert 1 - schedule.density(1 / 16, step) == pytest.approx(sparsity, abs=1e-15)
    assert schedule.density(1 / 16, 0) == 1
    assert schedule.density(1 / 16, 149) == 1  # held until the first update
    assert schedule.density(1 / 16, 1000) == 1 / 16


@given(
    steps=st.integers(20, 2000),
    update=st.floats(0.001, 0.2),
    start=st.floats(0, 0.3),
    size=st.integers(1, 10**9),
    data=st.data(),
)
def test_gmps_counts_fall_from_all_to_the_final_one(
    steps: int, update: float, start: float, size: int, data: st.DataObject
) -> None:
    final = data.draw(st.integers(1, size))
    schedule = mask_schedule("gmp", steps, update_fraction=update, start_fraction=start, stop_fraction=0.75)
    counts = [schedule.live(size, final, step) for step in range(steps + 1)]
    assert counts[0] == size
    assert counts == sorted(counts, reverse=True)
    assert counts[schedule.stop_steps :] == [final] * (steps + 1 - schedule.stop_steps)
    changes = [step for step in range(1, steps + 1) if counts[step] != counts[step - 1]]
    assert all(schedule.is_update(step) for step in changes)
    assert schedule.updates_done(steps) == schedule.n_updates


def test_the_mean_excess_is_over_the_masks_of_each_step() -> None:
    schedule = mask_schedule("gmp", 10, update_fraction=0.2, stop_fraction=0.8)
    # two steps each with 1, (3/4)^3, (1/2)^3, (1/4)^3, 0
    assert schedule.mean_excess(10) == pytest.approx(2 * (1 + 0.75**3 + 0.5**3 + 0.25**3) / 10)
    assert schedule.mean_excess(2) == 1


def test_short_runs_update_as_often_as_long_ones() -> None:
    counts = {
        steps: mask_schedule("rigl", steps, update_fraction=0.05, stop_fraction=0.76, drop_fraction=0.3).n_updates
        for steps in (100, 1000, 10000)
    }
    assert set(counts.values()) == {15}


@pytest.mark.parametrize(
    ("sparsity", "key", "says"),
    [
        ({"method": "rigle"}, "sparsity.method", "did you mean"),
        ({"method": "static", "drop_fraction": 0.3}, "sparsity.drop_fraction", "no effect"),
        ({"method": "static", "dynamic_lr_exponent": 0.5}, "sparsity.dynamic_lr_exponent", "no effect"),
        ({**RIGL, "drop_fraction": None}, "sparsity.drop_fraction", "must be set"),
        ({**RIGL, "drop_fraction": 1.5}, "sparsity.drop_fraction", "out of range"),
        ({**RIGL, "start_fraction": 0.1}, "sparsity.start_fraction", "no effect"),
        ({**RIGL, "hparams_density": "final"}, "sparsity.hparams_density", "no effect"),
        ({**RIGL, "update_fraction": 0.0}, "sparsity.update_fraction", "out of range"),
        ({**RIGL, "update_fraction": 0.9}, "sparsity.update_fraction", "no update"),
        ({**GMP, "drop_fraction": 0.3}, "sparsity.drop_fraction", "no effect"),
        ({**GMP, "hparams_density": None}, "sparsity.hparams_density", "must be set"),
        ({**GMP, "start_fraction": 0.8}, "sparsity.start_fraction", "before stop_fraction"),
        ({**GMP, "start_fraction": 0.74}, "sparsity.update_fraction", "no update"),
        ({**GMP, "hparams_density": "initial"}, "sparsity.hparams_density", "unknown choice"),
    ],
)
def test_what_cannot_be_or_would_have_no_effect_is_an_error(sparsity: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        tiny_cell(sparsity=sparsity)
    assert caught.value.key == key


def test_a_dense_cell_has_no_masks_to_change() -> None:
    assert tiny_cell(density=1.0, sparsity={**RIGL, "update_fraction": 0.9}).mask_schedule() is None
    assert tiny_cell(sparsity=RIGL).mask_schedule() is not None
    assert tiny_cell().mask_schedule() is None


@given(
    steps=st.integers(1, 300),
    over=st.integers(1, 300),
    update=st.floats(0.001, 0.5),
    start=st.floats(0, 0.4),
    stop=st.floats(0.5, 1),
)
def test_the_mean_excess_is_that_of_its_steps(steps: int, over: int, update: float, start: float, stop: float) -> None:
    schedule = mask_schedule("gmp", steps, update_fraction=update, start_fraction=start, stop_fraction=stop)
    assume(schedule.n_updates > 0)
    of_steps = [schedule.excess(done) for done in range(over)]
    assert schedule.mean_excess(over) == pytest.approx(math.fsum(of_steps) / over, rel=1e-12)


def test_the_mean_excess_of_a_long_run_is_no_loop() -> None:
    schedule = mask_schedule("gmp", 10**12, update_fraction=1e-12, stop_fraction=1.0)
    # sum of ((n - k) / n)^3 over k < n is n/4 + 1/2 + 1/(4 n)
    assert schedule.mean_excess(10**12) == pytest.approx(0.25, rel=1e-9)
