"""The optimum of a line: formulas with a known minimum, and every way in which there is none."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from analysis.fit import WINDOW_OCTAVES, LineFit, fit_panel
from analysis.observed import BIN_OCTAVES, MOST_X, Observed, binned

GRID = np.arange(-10.0, -3.0 + 1e-9, 1.0)
SEED_OFFSETS = {0: -0.05, 1: 0.02, 2: 0.03}


def line(
    loss: Callable[[float], float],
    grid: Any = GRID,
    n_seeds: int = 2,
    noise: float = 0.0,
    diverged: tuple[float, ...] = (),
    seed: int = 0,
) -> list[Observed]:
    """One line: loss(x) + the seed's offset + noise; `diverged` x have no loss for seed 0."""
    rng = np.random.default_rng(seed)
    return [
        Observed(
            float(x),
            {
                s: float(loss(x)) + SEED_OFFSETS[s] + float(rng.normal(0, noise))
                for s in range(n_seeds)
                if x not in diverged or s > 0
            },
            n_diverged=int(x in diverged),
        )
        for x in grid
    ]


def bowl(optimum: float, curvature: float = 0.03, floor: float = 2.4) -> Callable[[float], float]:
    return lambda x: floor + curvature * (x - optimum) ** 2


def fit_one(observed: list[Observed]) -> LineFit:
    return fit_panel([observed])[0]


@pytest.mark.parametrize("optimum", [-8.3, -7.0, -6.55, -5.1])
@pytest.mark.parametrize("skew", [0.0, 0.004])
def test_a_noise_free_cubic_is_found_exactly(optimum: float, skew: float) -> None:
    fit = fit_one(line(lambda x: bowl(optimum)(x) + skew * (x - optimum) ** 3))
    assert fit.optimum.status == "fitted"
    assert fit.optimum.x == pytest.approx(optimum, abs=0.01)
    assert fit.optimum.loss == pytest.approx(2.4 + np.mean([-0.05, 0.02]), abs=1e-3)


def test_seed_offsets_cancel_even_where_runs_are_missing() -> None:
    whole = line(bowl(-6.4), n_seeds=3)
    holes = [Observed(o.x, {s: v for s, v in o.losses.items() if (int(o.x) + s) % 4}) for o in whole]
    assert fit_one(holes).optimum.x == pytest.approx(-6.4, abs=0.01)


def test_scaling_the_loss_changes_nothing_but_the_loss() -> None:
    small = line(bowl(-6.4), noise=0.004)
    big = [Observed(o.x, {s: 1000 * v for s, v in o.losses.items()}) for o in small]
    a, b = fit_one(small).optimum, fit_one(big).optimum
    assert a.x is not None
    assert a.loss is not None
    assert a.ci == pytest.approx(b.ci, abs=1e-3)
    assert b.x == pytest.approx(a.x, abs=1e-3)
    assert b.loss == pytest.approx(1000 * a.loss, rel=1e-6)


def test_more_seeds_and_less_noise_give_a_narrower_interval() -> None:
    def width(n_seeds: int, noise: float) -> float:
        widths = []
        for seed in range(10):
            found = fit_one(line(bowl(-6.4), n_seeds=n_seeds, noise=noise, seed=seed)).optimum.ci
            assert found is not None
            widths.append(found[1] - found[0])
        return float(np.median(widths))

    assert width(2, 0.002) < width(2, 0.01)
    assert width(3, 0.01) < width(2, 0.01)


@pytest.mark.parametrize(("optimum", "side", "edge", "inner"), [(-12.0, "low", -10, -9), (-1.0, "high", -3, -4)])
def test_an_optimum_beyond_the_grid_is_censored(optimum: float, side: str, edge: int, inner: int) -> None:
    found = fit_one(line(bowl(optimum), noise=0.002)).optimum
    assert [found.status, found.side] == ["censored", side]
    assert [found.x, found.ci, found.loss] == [None, None, None]
    assert found.bound is not None
    assert min(edge, inner) <= found.bound <= max(edge, inner)
    step = 1 if side == "high" else -1
    assert list(found.proposals) == [edge + step, edge + 2 * step]
    assert found.lowest_loss == pytest.approx(bowl(optimum)(edge), abs=0.05)


def test_the_bound_of_an_optimum_censored_by_noise_is_rarely_beyond_it() -> None:
    truth = -3.45  # inside the grid, but the noise often puts the lowest mean at its end, -3
    bounds = [
        found.bound
        for seed in range(200)
        if (found := fit_one(line(bowl(truth), noise=0.01, seed=seed)).optimum).censored
    ]
    assert len(bounds) > 40
    given = [bound for bound in bounds if bound is not None]
    assert len(given) > 0.9 * len(bounds)
    assert np.mean([bound <= truth for bound in given]) > 0.9


def test_divergence_beside_the_lowest_mean_brackets_the_optimum() -> None:
    found = fit_one(line(bowl(-4.0), diverged=(-4.0, -3.0))).optimum
    assert (found.status, found.x, found.ci) == ("bracketed", -5.0, (-6.0, -4.0))
    assert not found.censored
    assert "diverge" in found.reason


def test_a_bracket_ends_at_the_first_mean_clearly_above_the_lowest() -> None:
    # beside a wall the loss climbs so slowly that no neighbours can be told apart, but those further on can
    slope, wall = 0.008, -13.0
    reach = []
    for seed in range(20):
        climbing = line(lambda x: 2.4 + slope * (x - wall), np.arange(wall, -1.9), 3, 0.01, (wall,), seed)
        found = fit_one(climbing).optimum
        if found.status == "bracketed" and found.ci is not None and found.x is not None:
            reach.append(found.ci[1] - found.x)
    assert len(reach) >= 10
    assert np.median(reach) <= 4


def test_a_flat_line_beside_a_wall_has_no_interval_rather_than_a_wrong_one() -> None:
    flat = fit_one(line(lambda x: 2.4, np.arange(-10.0, -5.9), 1, 0.0, (-10.0,))).optimum
    assert (flat.status, flat.x, flat.ci) == ("bracketed", -9.0, None)
    assert "too flat" in flat.reason


def test_an_x_at_which_one_of_the_seeds_diverged_is_not_eligible() -> None:
    # The survivor's loss at -6 would be the lowest by far.
    points = line(bowl(-7.2), noise=0.002)
    points = [Observed(o.x, {1: 1.0} if o.x == -6 else o.losses, n_diverged=int(o.x == -6)) for o in points]
    found = fit_one(points).optimum
    assert found.x == pytest.approx(-7.2, abs=0.6)
    assert found.ci is not None
    assert found.ci[1] <= -6.0


def test_a_cliff_beside_the_lowest_mean_brackets_too() -> None:
    found = fit_one(line(lambda x: 7.0 if x > -5.5 else bowl(-5.0)(x))).optimum
    assert (found.status, found.x) == ("bracketed", -6.0)
    assert found.ci == (-7.0, -5.0)


def test_far_points_have_no_say() -> None:
    def distorted(x: float) -> float:
        return bowl(-6.4)(x) + (0.3 if abs(x + 6.4) > WINDOW_OCTAVES + 1 else 0.0)

    near = fit_one(line(bowl(-6.4), grid=np.arange(-13.0, 0.1))).optimum
    far = fit_one(line(distorted, grid=np.arange(-13.0, 0.1))).optimum
    assert near.x == far.x


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_points_are_not_fitted(n: int) -> None:
    found = fit_one(line(bowl(-6.4), grid=GRID[:n])).optimum
    assert (found.status, found.x, found.ci, found.censored) == ("no_fit", None, None, False)
    assert str(n) in found.reason


def test_one_seed_pools_the_scatter_around_the_curves() -> None:
    panel = [line(bowl(o), n_seeds=1, noise=0.004, seed=i) for i, o in enumerate((-7.4, -6.5, -5.6))]
    for fit, truth in zip(fit_panel(panel), (-7.4, -6.5, -5.6), strict=True):
        assert fit.optimum.ci is not None
        assert fit.optimum.ci[0] < truth < fit.optimum.ci[1]


def test_one_seed_and_few_points_give_no_interval() -> None:
    found = fit_one(line(bowl(-6.4), grid=np.arange(-8.0, -4.9), n_seeds=1)).optimum
    assert found.x == pytest.approx(-6.4, abs=0.2)
    assert found.ci is None
    assert "noise" in found.reason


def test_regret_is_the_height_of_the_curve_above_its_minimum() -> None:
    fit = fit_one(line(bowl(-6.4)))
    for at in (-7.4, -6.4, -5.0, -9.8):
        assert fit.regret(at, (at, at)).value == pytest.approx(0.03 * (at + 6.4) ** 2, abs=4e-3)


def test_regret_has_an_upper_bound_that_grows_with_the_transferred_interval() -> None:
    fit = fit_one(line(bowl(-6.4), noise=0.002))
    sharp, vague = fit.regret(-6.9, (-6.95, -6.85)), fit.regret(-6.9, (-7.4, -6.4))
    assert sharp.value is not None
    assert sharp.upper is not None
    assert vague.upper is not None
    assert sharp.value < sharp.upper < vague.upper
    assert vague.upper >= 0.03 * (7.4 - 6.4) ** 2 * 0.8


def test_regret_outside_the_measured_values_is_unknown_and_says_why() -> None:
    fit = fit_one(line(bowl(-7.0), diverged=(-4.0, -3.0)))
    assert fit.regret(-3.5, None).value is None
    assert "diverge" in fit.regret(-3.5, None).reason
    assert "outside" in fit.regret(-11.0, None).reason


def test_regret_on_a_censored_line_is_a_lower_bound() -> None:
    regret = fit_one(line(bowl(-1.0))).regret(-7.0, (-7.1, -6.9))
    assert regret.lower_bound_only
    assert regret.value == pytest.approx(0.03 * (6.0**2 - 2.0**2), abs=1e-3)
    assert regret.upper is None


def test_nothing_is_ever_nan() -> None:
    fits = fit_panel([line(bowl(o), noise=0.01, seed=i) for i, o in enumerate(range(-12, 0))])
    for fit in fits:
        numbers = [fit.optimum.x, fit.optimum.loss, fit.optimum.bound, *(fit.optimum.ci or ())]
        assert all(math.isfinite(number) for number in numbers if number is not None)


def test_few_values_are_fitted_as_they_are() -> None:
    observed = line(bowl(-6.4), np.linspace(-9, -4, MOST_X))
    assert binned(observed) is observed


def test_very_many_values_are_fitted_on_bins() -> None:
    step, optimum = 0.005, -6.4
    whole = line(bowl(optimum), np.arange(-9, -4 + 1e-9, step), n_seeds=3, noise=0.01)
    rng = np.random.default_rng(1)
    holes = [Observed(o.x, {s: v for s, v in o.losses.items() if rng.random() > 0.05}) for o in whole]
    for points in (whole, holes):
        bins = binned(points)
        assert len(bins) == round(5 / BIN_OCTAVES) + 1
        assert bins[0].x - points[0].x <= BIN_OCTAVES / 2
        fit = fit_one(points)
        assert fit.optimum.ci is not None
        assert fit.optimum.ci[0] < optimum < fit.optimum.ci[1]
        assert np.ptp(fit.optimum.ci) < 0.1
        assert fit.curve is not None
        # a point's error is that of the mean over a bin
        per_bin = BIN_OCTAVES / step * 3
        assert fit.curve.noise == pytest.approx(0.01 / math.sqrt(per_bin), rel=0.35)


def test_a_bin_holds_each_seeds_own_mean_moved_along_their_common_slope() -> None:
    x = [-6.02, -6.01, -6.0, -5.99]
    far = [Observed(float(n), {0: 9.0}) for n in range(1, MOST_X + 1)]
    points = [Observed(at, {0: 2 + 3 * at, **({1: 5 + 3 * at} if at >= -6.0 else {})}) for at in x]
    first = binned([*points, *far])[0]
    assert first.x == pytest.approx(np.mean(x))
    assert first.losses == pytest.approx({0: 2 + 3 * first.x, 1: 5 + 3 * first.x})


def test_a_bin_in_which_a_run_diverged_is_a_wall() -> None:
    grid = np.arange(-9, -4 + 1e-9, 0.01)
    walls = tuple(float(x) for x in grid if x > -5)
    fit = fit_one(line(bowl(-4.5), grid, diverged=walls))
    assert fit.optimum.status == "bracketed"
    assert fit.optimum.ci is not None
    assert fit.optimum.ci[1] == pytest.approx(-5, abs=BIN_OCTAVES)
    assert not any(point.eligible for point in binned(line(bowl(-4.5), grid, diverged=walls)) if point.x > -5)


def test_bins_change_an_optimum_by_far_less_than_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = np.arange(-8, -5 + 1e-9, 3 / MOST_X)  # a few more than fit as they are
    panel = [
        line(lambda x, o=o: bowl(o)(x) + 0.01 * (x - o) ** 3, grid, noise=0.01, seed=k)  # type: ignore[misc]
        for k, o in enumerate((-6.9, -6.3))
    ]
    on_bins = fit_panel(panel)
    monkeypatch.setattr("analysis.observed.MOST_X", 10_000)
    for exact, coarse in zip(fit_panel(panel), on_bins, strict=True):
        assert exact.optimum.x is not None
        assert exact.optimum.ci is not None
        assert len(coarse.x) < len(exact.x)
        assert coarse.optimum.x == pytest.approx(exact.optimum.x, abs=0.2 * np.ptp(exact.optimum.ci))


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_runs_taken_seed_by_seed_give_the_same_fit(n_seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = [line(bowl(o), noise=0.01, n_seeds=n_seeds, seed=k) for k, o in enumerate((-7.2, -6.1, -5.4))]
    panel[0] = [Observed(o.x, {s: v for s, v in o.losses.items() if (int(o.x) + s) % 4}) for o in panel[0]]
    at_once = fit_panel(panel)
    monkeypatch.setattr("analysis.smooth._MOST_RUNS_AT_ONCE", 0)
    for a, b in zip(at_once, fit_panel(panel), strict=True):
        assert a.optimum.status == b.optimum.status
        assert a.optimum.x == pytest.approx(b.optimum.x, abs=1e-7)
        assert a.optimum.ci == pytest.approx(b.optimum.ci, abs=1e-6)
