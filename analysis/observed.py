"""A line's runs at each x, and how many x are pooled where a line has more of them than a fit needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

MOST_X = 64
"""A line with more values of x than these is fitted on its bins: time grows with the cube of their number, memory with the
square.
"""

BIN_OCTAVES = 1 / 16
"""Width of a bin. What pooling costs: the ends of the grid, and a value at which runs diverge, move by at most half of it; a
curve's height moves by its second derivative times the square of the width / 24, which is the same all along a parabola.
"""


@dataclass(frozen=True)
class Observed:
    """A line's runs at one x = log2 of the swept value: loss by seed, number of diverged seeds."""

    x: float
    losses: Mapping[int, float]
    n_diverged: int = 0

    @property
    def eligible(self) -> bool:
        """Whether the optimum may lie here: some seed has a loss, none diverged."""
        return self.n_diverged == 0 and len(self.losses) > 0


def binned(line: Sequence[Observed]) -> Sequence[Observed]:
    """Return the line as it is up to MOST_X values of x, else with one point a bin: at the mean of its x, the mean loss of each
    seed there. A bin in which a run diverged is one point at which runs diverge.

    Args:
        line: points in ascending x.
    """
    points = [point for point in line if point.losses or point.n_diverged]
    if len(points) <= MOST_X:
        return line
    # the same bins for every line of a panel, so that runs of one seed and bin can be paired
    return [_pooled(list(members)) for _, members in groupby(points, key=lambda point: round(point.x / BIN_OCTAVES))]


def _pooled(points: Sequence[Observed]) -> Observed:
    """Return the points of a bin as one."""
    x = float(np.mean([point.x for point in points]))
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        for seed, loss in point.losses.items():
            by_seed.setdefault(seed, []).append((point.x, loss))
    means = {seed: np.mean(runs, axis=0) for seed, runs in by_seed.items()}
    # a seed without a run at some x has another mean x: its loss there is moved along the slope that all seeds have in the bin
    off = np.array([np.array(run) - means[seed] for seed, runs in by_seed.items() for run in runs]).reshape(-1, 2)
    spread = float(off[:, 0] @ off[:, 0])
    slope = float(off[:, 0] @ off[:, 1]) / spread if spread else 0.0
    losses = {seed: float(loss + slope * (x - its_x)) for seed, (its_x, loss) in means.items()}
    return Observed(x, losses, sum(point.n_diverged for point in points))
