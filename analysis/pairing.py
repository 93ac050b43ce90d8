"""How far the errors of two lines' optima go together, because the same seeds trained both.

Runs of one seed see the same batches and start from the same noise at every density, so part of their error is the
same and drops out of a shift. How large that part is differs (measured on quick starts: .5 to .9 between densities
under SuPar, about 0 under SP, whose optima lie far apart), so it is estimated: the correlation of the residuals of
runs that share seed and x, pooled over a panel, less one standard error (Fisher's z), and never below 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from .smooth import Curve

_MOST = 0.95


def shared_part(curves: Sequence[Curve]) -> float:
    """Return the correlation between lines of the errors of runs with the same seed and x, in [0, .95], cautiously.

    Args:
        curves: of a panel's lines.
    """
    products = first = second = 0.0
    freedom = 0
    for a, b in combinations(curves, 2):
        both = a.residuals.keys() & b.residuals.keys()
        df = len(both) - len({x for x, _ in both}) - len({seed for _, seed in both}) + 1
        if df < 1:
            continue
        freedom += df
        products += sum(a.residuals[key] * b.residuals[key] for key in both)
        first += sum(a.residuals[key] ** 2 for key in both)
        second += sum(b.residuals[key] ** 2 for key in both)
    if not freedom or first * second <= 0:
        return 0.0
    found = products / math.sqrt(first * second)
    # n lines make n (n - 1) / 2 pairs, but only n - 1 that are independent
    freedom = round(freedom * 2 / max(len(curves), 2))
    z = math.atanh(min(found, 0.999)) - 1 / math.sqrt(max(freedom, 1))
    return min(max(math.tanh(z), 0.0), _MOST)


def correlation(a: Curve, at_a: float, b: Curve, at_b: float, shared: float) -> float:
    """Return the correlation of the errors of two fitted optima, in [0, .95].

    An optimum's error is that of the slope at it, a weighted sum of the line's means plus what the model does not know
    of the curve's shape; only the means' noise is shared, and less so further apart.

    Args:
        a, b: the lines' curves.
        at_a, at_b: their optima, log2.
        shared: from `shared_part`.
    """
    if shared <= 0:
        return 0.0
    rho = min(a.rho, b.rho)
    near = np.where((gap := np.abs(a.x[:, None] - b.x[None])) == 0, 1.0, rho**gap)
    covariance = shared * a.noise * b.noise * float(a.weights(at_a) @ near @ b.weights(at_b))
    spread = float(a.slope(np.array([at_a]))[1][0] * b.slope(np.array([at_b]))[1][0])
    return min(max(covariance / spread, 0.0), _MOST) if spread > 0 else 0.0
