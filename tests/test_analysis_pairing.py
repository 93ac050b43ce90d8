"""Errors that the same seeds share: estimated with caution, and taken out of the shift."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.basins import Line, Panel
from analysis.fit import LineFit, fit_panel
from analysis.observed import Observed
from analysis.pairing import correlation, shared_part
from analysis.smooth import Curve
from analysis.verdict import shift

GRID = np.arange(-10.0, -2.9, 1.0)
OPTIMA = (-6.4, -6.5, -6.6)


def panel(
    shared: float, n_seeds: int = 3, sigma: float = 0.006, seed: int = 0, optima: tuple[float, ...] = OPTIMA
) -> list[LineFit]:
    rng = np.random.default_rng(seed)
    common = rng.normal(0, sigma, (n_seeds, len(GRID)))
    lines = []
    for optimum in optima:
        error = np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal(0, sigma, (n_seeds, len(GRID)))
        loss = 2.4 + 0.03 * (GRID - optimum) ** 2 + error
        lines.append([Observed(float(x), dict(enumerate(loss[:, i]))) for i, x in enumerate(GRID)])
    return fit_panel(lines)


def curves(fits: list[LineFit]) -> list[Curve]:
    return [fit.curve for fit in fits if fit.curve is not None]


def test_the_slope_is_the_weighted_sum_of_the_means() -> None:
    fit = panel(0.0)[0]
    assert fit.curve is not None
    window = [mean for x, mean in zip(fit.x, fit.means, strict=True) if x in fit.curve.x]
    for at in (-7.3, -6.5, -5.0):
        assert fit.curve.weights(at) @ window == pytest.approx(float(fit.curve.slope(np.array([at]))[0][0]), rel=1e-6)


def test_the_shared_part_is_found_from_below() -> None:
    def typical(shared: float) -> float:
        return float(np.median([shared_part(curves(panel(shared, seed=seed))) for seed in range(30)]))

    assert typical(0.0) == 0.0
    assert 0.3 < typical(0.6) < 0.6
    assert 0.75 < typical(0.95) < 0.95


def test_lines_without_common_runs_share_nothing() -> None:
    fits = panel(0.9)
    assert shared_part(curves(fits)[:1]) == 0.0
    assert shared_part(curves(panel(0.9, n_seeds=1))) == 0.0
    assert shared_part([]) == 0.0


def test_optima_far_apart_share_less() -> None:
    def typical(optima: tuple[float, ...], shared: float = 0.9) -> float:
        found = []
        for seed in range(8):
            first, second, _ = curves(panel(0.95, seed=seed, optima=optima))
            found.append(correlation(first, optima[0], second, optima[1], shared))
        return float(np.median(found))

    assert 0.3 < typical(OPTIMA) < 0.95
    assert typical((-8.0, -4.5, -4.5)) < 0.1
    assert typical(OPTIMA, shared=0.0) == 0.0


def test_pairing_narrows_the_shift_where_errors_are_shared_and_only_there() -> None:
    def narrowing(shared: float) -> float:
        """Return the shift's interval relative to that of independent lines."""
        found = []
        for seed in range(20):
            lines = tuple(Line(float(i), (), fit) for i, fit in enumerate(panel(shared, seed=seed)))
            moved = shift(Panel("", lines, 0.0), lines[1])
            a, b = lines[0].optimum.ci, lines[1].optimum.ci
            assert moved.ci is not None
            assert a is not None
            assert b is not None
            found.append((moved.ci[1] - moved.ci[0]) / np.hypot(a[1] - a[0], b[1] - b[0]))
        return float(np.median(found))

    assert narrowing(0.0) == pytest.approx(1.0, abs=0.05)
    assert narrowing(0.95) < 0.75
