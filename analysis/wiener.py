"""The polynomial and the integrated Wiener process of a smooth curve: bases, covariances, their slopes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Order = Literal[3, 4]
"""Number of polynomial coefficients, and of integrations plus one."""


def powers(x: Array, order: Order) -> Array:
    """Return [..., order]: the powers of x, from 0."""
    return np.stack([x**power for power in range(order)], axis=-1)


def slopes(x: Array, order: Order) -> Array:
    """Return [..., order]: the derivatives of `powers` in x."""
    return np.stack([power * x ** max(power - 1, 0) for power in range(order)], axis=-1)


def kernel(s: Array, t: Array, order: Order) -> Array:
    """Return the covariance at s and t of a Wiener process integrated order - 1 times.

    Source: Wahba (1978): integral_0^min (s-u)^(m-1) (t-u)^(m-1) / ((m-1)!)^2 du, m =
    order, expanded in v = min - u and d = |s - t|.
    """
    v, d = np.minimum(s, t), np.abs(s - t)
    if order == 3:
        quadratic: Array = v**5 / 20 + d * v**4 / 8 + d**2 * v**3 / 12
        return quadratic
    cubic: Array = (v**7 / 7 + d * v**6 / 2 + 3 * d**2 * v**5 / 5 + d**3 * v**4 / 4) / 36
    return cubic


def kernel_slope(s: Array, t: Array, order: Order) -> Array:
    """Return the derivative of `kernel` in s."""
    v, d = np.minimum(s, t), np.abs(s - t)
    if order == 3:
        right = v**4 / 8 + d * v**3 / 6
        left = v**4 / 8 + d * v**3 / 3 + d**2 * v**2 / 4
    else:
        right = (v**6 / 6 + 2 * d * v**5 / 5 + d**2 * v**4 / 4) / 12
        left = (v**6 / 6 + 3 * d * v**5 / 5 + 3 * d**2 * v**4 / 4 + d**3 * v**3 / 3) / 12
    slope: Array = np.where(s >= t, right, left)
    return slope


def kernel_slope_variance(s: Array, order: Order) -> Array:
    """Return the prior variance of the slope at s: integral_0^s (s-u)^(2m-4) / ((m-2)!)^2 du."""
    variance: Array = s**3 / 3 if order == 3 else s**5 / 20
    return variance
