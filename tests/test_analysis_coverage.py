"""Coverage of the 95% interval, simulated: the truth is the argmin of the noise-free curve.

Basins of three shapes, curvatures over a factor of four, three lines per panel, offsets shared by a
seed's runs over all lines and along each, errors independent or correlated along a line.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from analysis.fit import Observed, fit_panel

N_PANELS = 28  # per shape and grid; 3 lines each
SHAPES: dict[str, Callable[[Any, float, float], Any]] = {
    "quadratic": lambda d, a, k: a * d**2,
    "skewed": lambda d, a, k: 2 * a * (np.exp(k * d) - 1 - k * d) / k**2,
    "flat": lambda d, a, k: a * (np.abs(d) ** 3 / 1.5 + 0.05 * d**2),
}
SIGMA_NATS = 0.008
OFFSET_NATS = 0.03


def simulate(n_seeds: int, rho: float) -> tuple[int, int, int, list[float]]:
    """Return how many intervals held the truth, how many there were, lines, and their widths."""
    rng = np.random.default_rng(n_seeds)
    held = given = lines = 0
    widths = []
    for shape in SHAPES.values():
        for step in (0.5, 1.0):
            grid = np.arange(-11.0, -2.0 + 1e-9, step)
            correlation = np.where(np.eye(len(grid)) > 0, 1.0, rho ** np.abs(grid[:, None] - grid))
            for _ in range(N_PANELS):
                shared = rng.normal(0, OFFSET_NATS, n_seeds)
                truths, panel = [], []
                for _ in range(3):
                    truth, k = rng.uniform(-8.5, -4.5), rng.uniform(0.3, 0.8)
                    curve = 2.4 + shape(grid - truth, np.exp(rng.uniform(*np.log([0.015, 0.06]))), k)
                    error = rng.multivariate_normal(np.zeros(len(grid)), SIGMA_NATS**2 * correlation, n_seeds)
                    own = rng.normal(0, 0.01, n_seeds)
                    loss = curve + (shared + own)[:, None] + error
                    panel.append([Observed(float(x), dict(enumerate(loss[:, i]))) for i, x in enumerate(grid)])
                    truths.append(truth)
                for fit, truth in zip(fit_panel(panel), truths, strict=True):
                    lines += 1
                    if fit.optimum.ci is not None:
                        given += 1
                        held += fit.optimum.ci[0] <= truth <= fit.optimum.ci[1]
                        widths.append(fit.optimum.ci[1] - fit.optimum.ci[0])
    return held, given, lines, widths


@pytest.mark.parametrize("rho", [0.0, 0.6])
@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_the_interval_covers_the_true_optimum(n_seeds: int, rho: float) -> None:
    held, given, lines, widths = simulate(n_seeds, rho)
    print(f"{n_seeds} seeds, rho {rho}: {held / given:.3f} of {given} intervals, {lines} lines")
    assert given > 0.97 * lines  # an interval that is not given cannot be wrong
    assert held / given >= 0.90
    assert np.median(widths) < 0.5  # nor may it be bought by saying nothing
