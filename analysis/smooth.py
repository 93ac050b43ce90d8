"""The model of a loss curve under seed noise, and what a panel of lines says about it.

One line is `loss(x, seed) = f(x) + offset(seed) + error(x, seed)`, x = log2 of the swept value.

- The seed's offset is shared along a line, so it is a fixed effect and drops out of every slope and
  difference: that is what pairs the seeds, also where some runs are missing.
- `error` has one variance for the panel and correlation rho^|octaves| along a line: seeds disagree
  about slopes too; taking such errors for independent ones covered as little as 82 %.
- `f` is a polynomial (cubic; quadratic on fewer than five points) plus a smooth deviation, an
  integrated Wiener process of intensity q. A bare quadratic covers 0 to 25 % of skewed basins and
  a bare cubic 20 to 65 % of flat ones, because their misfit, not the noise, is then the error of
  the optimum.
- rho and q are not known. They are averaged over a grid by their likelihood, pooled over the lines.

The percentages were measured on simulated basins like those of tests/test_analysis_coverage.py.

Source: Wahba, J. R. Stat. Soc. B 40 (1978) 364 (the prior); Patterson and Thompson, Biometrika 58
(1971) 545 (the restricted likelihood).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from .wiener import Array, Order, kernel, kernel_slope, kernel_slope_variance, powers, slopes

CONFIDENCE = 0.95
"""Of every interval and bound."""

REACH_OCTAVES = 2.0
"""How far beyond a line's window the model is evaluated."""

_RHO_PER_OCTAVE = (0.0, 0.25, 0.5, 0.7, 0.85)
_INTENSITIES = np.concatenate([[0.0], 4.0 ** np.arange(-7, 4)])  # in units of scale^2
_NOISE_ALONE = tuple(float(v) for v in 4.0 ** np.arange(-9, 0))  # one seed only; of scale^2
_LEAST_WEIGHT = 1e-3
_LEAST_DF = 3
_MOST_RUNS_AT_ONCE = 512
"""Below, the sums over runs are taken in one order, so that known grids keep their numbers to the last bit."""


@dataclass(frozen=True)
class Samples:
    """The runs of a line inside its window: `loss[i]` is of `x[at[i]]` and `seed[i]`."""

    x: Array
    at: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    loss: Array

    @property
    def order(self) -> Order:
        """Number of polynomial coefficients: a cubic needs a point to spare."""
        return 4 if len(self.x) > 4 else 3

    def design(self) -> Array:
        """Return [n_runs, n_x + n_seeds - 1]: a column per x, then seeds coded to sum to zero."""
        per_x = (self.at[:, None] == np.arange(len(self.x))).astype(float)
        names = np.unique(self.seed)
        per_seed = (self.seed[:, None] == names[:-1]).astype(float)
        per_seed -= (self.seed[:, None] == names[-1]).astype(float)
        both = np.hstack([per_x, per_seed])
        # Seeds that share no x cannot be paired: then the plain means are all there is.
        return both if np.linalg.matrix_rank(both) == both.shape[1] else per_x

    def correlation(self, rho: float, runs: npt.NDArray[np.int64]) -> Array:
        """Return [n, n] for so many of the runs: rho^octaves between those of one seed, 0 between seeds."""
        x, seed = self.x[self.at[runs]], self.seed[runs]
        gap = np.abs(x[:, None] - x[None])
        near: Array = np.where(gap == 0, 1.0, rho**gap)
        return np.where(seed[:, None] == seed[None], near, 0.0)

    def blocks(self) -> list[npt.NDArray[np.int64]]:
        """Return the runs in parts that are independent of each other: few in one part, very many seed by seed."""
        if len(self.loss) <= _MOST_RUNS_AT_ONCE:
            return [np.arange(len(self.loss))]
        return [np.flatnonzero(self.seed == seed) for seed in np.unique(self.seed)]


def paired_means(samples: Samples) -> Array:
    """Return the mean loss at each x, [n_x], with the seeds' offsets taken out.

    With every seed at every x these are the plain means.
    """
    solution: Array = np.linalg.lstsq(samples.design(), samples.loss, rcond=None)[0]
    means: Array = solution[: len(samples.x)]
    return means


@dataclass(frozen=True)
class _Means:
    """Generalised least squares of one line: its means, their covariance per unit variance."""

    mean: Array
    covariance: Array
    square_sum: float
    df: int
    log_det: float


def _means(samples: Samples, rho: float) -> _Means:
    design = samples.design()
    information = np.zeros((design.shape[1], design.shape[1]))
    log_det = 0.0
    parts = []
    for runs in samples.blocks():
        correlation = samples.correlation(rho, runs)
        inverse = np.linalg.inv(correlation)
        information += design[runs].T @ inverse @ design[runs]
        log_det += _log_det(correlation)
        parts.append((runs, inverse))
    covariance = np.linalg.inv(information)
    solution = sum(
        (covariance @ design[runs].T @ inverse @ samples.loss[runs] for runs, inverse in parts),
        np.zeros(design.shape[1]),
    )
    residual = samples.loss - design @ solution
    n_x = len(samples.x)
    return _Means(
        mean=solution[:n_x],
        covariance=covariance[:n_x, :n_x],
        square_sum=sum(float(residual[runs] @ inverse @ residual[runs]) for runs, inverse in parts),
        df=len(samples.loss) - design.shape[1],
        log_det=log_det + _log_det(information),
    )


def _log_det(matrix: Array) -> float:
    return float(np.linalg.slogdet(matrix)[1])


@dataclass(frozen=True)
class _Part:
    """One hypothesis (rho, q) about one line: weight and the matrices of its posterior."""

    weight: float
    intensity: float
    inverse: Array
    spread: Array
    beta: Array
    alpha: Array


@dataclass(frozen=True)
class Curve:
    """Posterior of one line's noise-free loss curve; `t` is None where the noise is unknown."""

    x: Array
    order: Order
    level: float
    scale: float
    noise: float
    """Standard error of one point's mean, in the loss's units."""
    t: float | None
    """Student quantile of the 95 % interval, for the pooled degrees of freedom."""
    parts: tuple[_Part, ...]
    rho: float
    """Posterior mean of the errors' correlation an octave apart."""
    residuals: Mapping[tuple[float, int], float]
    """(x, seed) -> what is left of a run's loss without its x' mean and its seed's offset."""

    def loss(self, at: Array) -> Array:
        """Return the posterior mean of the loss at `at` (log2), in the loss's units."""
        mean, _ = self._posterior(
            powers(at - self._centre, self.order),
            kernel(self._shift(at)[:, None], self._knots[None], self.order),
            np.zeros_like(at),
        )
        return self.level + mean

    def slope(self, at: Array) -> tuple[Array, Array]:
        """Return the slope's posterior mean and standard deviation at `at`, per octave."""
        return self._posterior(
            slopes(at - self._centre, self.order),
            kernel_slope(self._shift(at)[:, None], self._knots[None], self.order),
            kernel_slope_variance(self._shift(at), self.order),
        )

    def rise(self, at: Array, above: float) -> tuple[Array, Array]:
        """Return loss(at) - loss(above): posterior mean and standard deviation."""
        there = np.full_like(at, above)
        here_, there_ = self._shift(at), self._shift(there)
        knots = self._knots[None]
        return self._posterior(
            powers(at - self._centre, self.order) - powers(there - self._centre, self.order),
            kernel(here_[:, None], knots, self.order) - kernel(there_[:, None], knots, self.order),
            kernel(here_, here_, self.order)
            + kernel(there_, there_, self.order)
            - 2 * kernel(here_, there_, self.order),
        )

    def weights(self, at: float) -> Array:
        """Return [n_x]: what each mean counts in the slope at `at`, slope = weights @ means."""
        design = powers(self.x - self._centre, self.order)
        basis = slopes(np.array([at - self._centre]), self.order)[0]
        cross = kernel_slope(self._shift(np.array(at)), self._knots, self.order)
        total = np.zeros(len(self.x))
        for part in self.parts:
            to_beta = part.spread @ design.T @ part.inverse
            rest = np.eye(len(self.x)) - design @ to_beta
            total += part.weight * (basis @ to_beta + part.intensity * cross @ part.inverse @ rest)
        return total

    @property
    def _centre(self) -> float:
        return float(self.x.mean())

    @property
    def _knots(self) -> Array:
        return self._shift(self.x)

    def _shift(self, at: Array) -> Array:
        # The process starts left of everything that is asked; its start is free (the polynomial).
        shifted: Array = at - (self.x[0] - REACH_OCTAVES)
        return shifted

    def _posterior(self, basis: Array, cross: Array, prior: Array) -> tuple[Array, Array]:
        """Mix the hypotheses; `basis` [k, order], `cross` [k, n_x], `prior` [k]: of intensity 1."""
        design = powers(self.x - self._centre, self.order)
        first = np.zeros(len(basis))
        second = np.zeros(len(basis))
        for part in self.parts:
            q = part.intensity
            mean = basis @ part.beta + q * cross @ part.alpha
            rest = basis - q * cross @ part.inverse @ design
            variance = q * prior - q * q * ((cross @ part.inverse) * cross).sum(1)
            variance += ((rest @ part.spread) * rest).sum(1)
            first += part.weight * mean
            second += part.weight * (np.maximum(variance, 0.0) + mean**2)
        return first * self.scale, np.sqrt(np.maximum(second - first**2, 0.0)) * self.scale


def pool(lines: Sequence[Samples]) -> list[Curve]:
    """Return the posterior curve of each line; noise and smoothness are pooled over all of them.

    Args:
        lines: the windows of a panel's lines, each of at least three x.
    """
    if not lines:
        return []
    levels = [float(line.loss.mean()) for line in lines]
    ranges = [float(np.ptp(paired_means(line))) for line in lines]
    scale = float(np.median(ranges)) or 1.0
    scaled = [
        Samples(line.x, line.at, line.seed, (line.loss - level) / scale)
        for line, level in zip(lines, levels, strict=True)
    ]
    hypotheses = _hypotheses(scaled)
    df = sum(means.df for means in hypotheses[0].means)
    if df < 1:  # one seed: what is left is the scatter around the curves
        df = sum(len(line.x) - line.order for line in lines)
        t = float(stdtrit(df, 0.5 + CONFIDENCE / 2)) if df >= _LEAST_DF else None
    else:
        t = float(stdtrit(df, 0.5 + CONFIDENCE / 2))
    parts, noise, rho = _weigh(scaled, hypotheses)
    return [
        Curve(line.x, line.order, level, scale, scale * noise[index], t, parts[index], rho[index], _residuals(line))
        for index, (line, level) in enumerate(zip(lines, levels, strict=True))
    ]


def _residuals(samples: Samples) -> dict[tuple[float, int], float]:
    design = samples.design()
    left = samples.loss - design @ np.linalg.lstsq(design, samples.loss, rcond=None)[0]
    keys = zip(samples.x[samples.at].tolist(), samples.seed.tolist(), strict=True)
    return dict(zip(keys, left.tolist(), strict=True))


@dataclass(frozen=True)
class _Hypothesis:
    rho: float
    variance: float
    log_likelihood: float
    means: tuple[_Means, ...]


def _hypotheses(lines: Sequence[Samples]) -> list[_Hypothesis]:
    """Return what the noise may be: a grid over rho, or, with one seed, over the variance."""
    single = sum(len(line.loss) - line.design().shape[1] for line in lines) < 1
    if single:
        means = tuple(_means(line, 0.0) for line in lines)
        return [_Hypothesis(0.0, variance, 0.0, means) for variance in _NOISE_ALONE]
    found = []
    for rho in _RHO_PER_OCTAVE:
        means = tuple(_means(line, rho) for line in lines)
        df = sum(each.df for each in means)
        # The floor keeps noise-free input (tests, one deterministic seed repeated) invertible.
        variance = max(sum(each.square_sum for each in means) / df, 1e-10)
        likelihood = -0.5 * df * np.log(variance) - 0.5 * sum(each.log_det for each in means)
        found.append(_Hypothesis(rho, variance, float(likelihood), means))
    return found


def _weigh(
    lines: Sequence[Samples], hypotheses: Sequence[_Hypothesis]
) -> tuple[list[tuple[_Part, ...]], list[float], list[float]]:
    """Return each line's weighted hypotheses, the standard error of one of its points, and its mean rho.

    Lines of one polynomial order share the weights: their deviations have the same meaning.
    """
    shape = (len(hypotheses), len(_INTENSITIES))
    total = {line.order: np.zeros(shape) for line in lines}
    solved: list[list[tuple[Array, Array, Array, Array]]] = []
    for index, line in enumerate(lines):
        design = powers(line.x - line.x.mean(), line.order)
        knots = line.x - (line.x[0] - REACH_OCTAVES)
        deviation = kernel(knots[:, None], knots[None], line.order)
        rows = []
        for h, hypothesis in enumerate(hypotheses):
            means = hypothesis.means[index]
            noise = hypothesis.variance * means.covariance
            inverse = np.linalg.inv(noise + _INTENSITIES[:, None, None] * deviation)
            information = design.T @ inverse @ design
            spread = np.linalg.inv(information)
            beta = spread @ design.T @ inverse @ means.mean
            residual = means.mean - beta @ design.T
            alpha = np.einsum("qij,qj->qi", inverse, residual)
            total[line.order][h] += 0.5 * (
                np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(information)[1] - (residual * alpha).sum(1)
            )
            rows.append((inverse, spread, beta, alpha))
        solved.append(rows)
    weights = {}
    for order, likelihood in total.items():
        likelihood += np.array([each.log_likelihood for each in hypotheses])[:, None]
        raw = np.exp(likelihood - likelihood.max())
        raw[raw < _LEAST_WEIGHT * raw.sum()] = 0.0
        weights[order] = raw / raw.sum()
    parts, noise_sd, rho = [], [], []
    for index, line in enumerate(lines):
        weight = weights[line.order]
        parts.append(
            tuple(
                _Part(
                    float(weight[h, q]),
                    float(_INTENSITIES[q]),
                    inverse[q],
                    spread[q],
                    beta[q],
                    alpha[q],
                )
                for h, (inverse, spread, beta, alpha) in enumerate(solved[index])
                for q in np.flatnonzero(weight[h])
            )
        )
        variance = sum(
            float(weight[h].sum()) * each.variance * float(np.diag(each.means[index].covariance).mean())
            for h, each in enumerate(hypotheses)
        )
        noise_sd.append(float(np.sqrt(variance)))
        rho.append(sum(float(weight[h].sum()) * each.rho for h, each in enumerate(hypotheses)))
    return parts, noise_sd, rho


def crossings(x: Array, y: Array) -> list[float]:
    """Return where y, linear between the points x, goes from below zero to zero or above."""
    found = []
    for (x0, y0), (x1, y1) in pairwise(zip(x.tolist(), y.tolist(), strict=True)):
        if y0 < 0 <= y1:
            found.append(x0 - y0 * (x1 - x0) / (y1 - y0))
    return found
