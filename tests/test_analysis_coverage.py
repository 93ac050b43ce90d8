"""Coverage of the 95% intervals, simulated: the truth is the argmin of the noise-free curve.

Basins of three shapes, curvatures over a factor of four, little and much noise, three lines a panel. A seed's offset is
shared by its runs over all lines and along each; its further errors are independent or correlated along a line, and
partly the same on every line of the panel.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from analysis.basins import Line, Panel
from analysis.fit import fit_panel
from analysis.observed import Observed
from analysis.verdict import shift

SHAPES: dict[str, Callable[[Any, float, float], Any]] = {
    "quadratic": lambda d, a, k: a * d**2,
    "skewed": lambda d, a, k: 2 * a * (np.exp(k * d) - 1 - k * d) / k**2,
    "flat": lambda d, a, k: a * (np.abs(d) ** 3 / 1.5 + 0.05 * d**2),
}
SIGMAS_NATS = (0.008, 0.025)
OFFSET_NATS = 0.03
FLOOR_NATS = 2.4
N_PANELS = 14  # per shape, grid and noise; 3 lines each

Curve = Callable[[Any], Any]

pytestmark = pytest.mark.xdist_group("coverage")  # the simulations are shared through a cache


class Tally:
    """How many intervals there were, and how many held the truth."""

    def __init__(self) -> None:
        self.n: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.widths: list[float] = []

    def add(self, what: str, held: bool) -> None:
        self.n[what] += 1
        self.held[what] += held

    def share(self, what: str) -> float:
        return self.held[what] / self.n[what]


@cache
def simulate(n_seeds: int, rho: float, shared: float, optima: tuple[float, float] = (-8.5, -4.5)) -> Tally:
    """Return what held over all shapes, grids and noises; `shared`: the part of the errors that the lines have in common."""
    rng = np.random.default_rng(n_seeds)
    tally = Tally()
    for name, shape in SHAPES.items():
        for step in (0.5, 1.0):
            grid = np.arange(-11.0, -2.0 + 1e-9, step)
            near = np.where(np.eye(len(grid)) > 0, 1.0, rho ** np.abs(grid[:, None] - grid))
            for sigma in SIGMAS_NATS:
                for _ in range(N_PANELS):

                    def errors(sigma: float = sigma, near: Any = near) -> Any:
                        return rng.multivariate_normal(np.zeros(len(near)), sigma**2 * near, n_seeds)

                    offsets, common = rng.normal(0, OFFSET_NATS, n_seeds), errors()
                    truths, curves, panel = [], [], []
                    for _ in range(3):
                        truth, k = rng.uniform(*optima), rng.uniform(0.3, 0.8)
                        a = np.exp(rng.uniform(*np.log([0.015, 0.06])))

                        def curve(x: Any, truth: float = truth, a: float = a, k: float = k, f: Any = shape) -> Any:
                            return FLOOR_NATS + f(x - truth, a, k)

                        own = offsets + rng.normal(0, 0.01, n_seeds)
                        error = np.sqrt(shared) * common + np.sqrt(1 - shared) * errors()
                        loss = curve(grid) + own[:, None] + error
                        panel.append([Observed(float(x), dict(enumerate(loss[:, i]))) for i, x in enumerate(grid)])
                        truths.append(truth)
                        curves.append(curve)
                    count(tally, name, panel, truths, curves)
    return tally


def count(tally: Tally, shape: str, panel: Any, truths: Sequence[float], curves: Sequence[Curve]) -> None:
    lines = tuple(Line(float(i), (), fit) for i, fit in enumerate(fit_panel(panel)))
    whole = Panel("", lines, 0.0)
    for line, truth, curve in zip(lines, truths, curves, strict=True):
        best = line.optimum
        tally.n["lines"] += 1
        tally.n[best.status] += 1
        if best.ci is not None:
            tally.add("optimum", best.ci[0] <= truth <= best.ci[1])
            tally.add(f"optimum, {shape}", best.ci[0] <= truth <= best.ci[1])
            tally.widths.append(best.ci[1] - best.ci[0])
        elif best.bound is not None:
            tally.add("bound", truth >= best.bound if best.side == "high" else truth <= best.bound)
        if line is lines[0]:
            continue
        moved, regret = shift(whole, line), whole.regret(line)
        if moved.ci is not None:
            tally.add("shift", moved.ci[0] <= truth - truths[0] <= moved.ci[1])
        if regret.upper is not None:
            tally.add("regret", float(curve(truths[0])) - FLOOR_NATS <= regret.upper)


NOISES = ((0.0, 0.0), (0.6, 0.5))
SEEDS = (2, 3, 5)


@pytest.mark.parametrize(("rho", "shared"), NOISES)
@pytest.mark.parametrize("n_seeds", SEEDS)
def test_the_intervals_cover_the_truth(n_seeds: int, rho: float, shared: float) -> None:
    found = simulate(n_seeds, rho, shared)
    print(f"{n_seeds} seeds, rho {rho}, shared {shared}:", {what: round(found.share(what), 3) for what in found.held})
    assert found.n["lines"] == 504
    assert found.n["optimum"] > 0.97 * found.n["lines"]  # an interval that is not given cannot be wrong
    assert found.share("optimum") >= 0.90
    assert found.share("shift") >= 0.90
    assert found.share("regret") >= 0.95  # one-sided
    for shape in SHAPES:
        assert found.share(f"optimum, {shape}") >= 0.90
    assert np.median(found.widths) < 0.6  # nor may it be bought by saying nothing


@pytest.mark.parametrize("n_seeds", SEEDS)
@pytest.mark.parametrize("what", ["optimum", "shift"])
def test_at_each_number_of_seeds_the_coverage_is_90_to_98_percent(what: str, n_seeds: int) -> None:
    cases = [simulate(n_seeds, rho, shared) for rho, shared in NOISES]
    held, n = sum(case.held[what] for case in cases), sum(case.n[what] for case in cases)
    share = held / n
    print(f"{n_seeds} seeds, {what}: {share:.3f} of {n}")
    assert n > 600
    error = np.sqrt(0.98 * 0.02 / n)  # of a share that is 98% in truth
    assert 0.90 <= share <= 0.98 + 2 * error


@pytest.mark.parametrize("what", ["optimum", "shift"])
def test_over_all_noises_the_intervals_are_no_wider_than_they_must(what: str) -> None:
    cases = [simulate(n_seeds, rho, shared) for n_seeds in SEEDS for rho, shared in NOISES]
    held, n = sum(case.held[what] for case in cases), sum(case.n[what] for case in cases)
    print(f"{what}: {held / n:.3f} of {n}")
    assert n > 1900
    assert 0.94 <= held / n <= 0.98


@pytest.mark.parametrize("n_seeds", [2, 5])
def test_optima_in_and_beyond_the_grid_are_covered_or_bounded(n_seeds: int) -> None:
    found = simulate(n_seeds, 0.6, 0.5, optima=(-13.0, 0.0))
    print(f"{n_seeds} seeds, censored:", dict(found.n), {what: round(found.share(what), 3) for what in found.held})
    assert found.n["censored"] > 100
    assert found.share("bound") >= 0.95
    assert found.share("optimum") >= 0.90
    assert found.share("regret") >= 0.90
