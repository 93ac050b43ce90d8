"""A panel's lines -> the optimum of each with an honest confidence interval, or why there is none.

How an optimum is found:

1. An x at which any seed diverged is not eligible. The start is the lowest paired mean over the
   eligible x.
2. If the start is the first or last x of the grid, the optimum is *censored*: it is never reported;
   its bound is (the last x at which the fitted curve still clearly falls outwards, or whose mean
   is clearly above the end's), and the x that would settle it are proposed.
3. If the next x beside the start diverged, or is a cliff, the optimum is *bracketed*: it lies
   between the nearest x that it cannot be at, is reported at the start, and its interval is the
   bracket.
4. Otherwise it is *fitted*: the points within 3 octaves and 25 % of the lowest loss, up to the
   first gap, go into smooth.pool; the optimum is where the slope's posterior mean crosses zero,
   the interval is every x around it at which the slope cannot be told from zero (Fieller's set). A
   crossing outside the eligible x is censored as in 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.interpolate import PchipInterpolator

from .observed import Observed, binned
from .smooth import REACH_OCTAVES, Curve, Samples, crossings, paired_means, pool
from .wiener import Array

WINDOW_OCTAVES = 3.0
MAX_EXCESS = 0.25
"""ASSUMPTION: a point this far above the lowest loss (relative) is no part of the basin's floor."""
MIN_POINTS = 3
PROPOSED_OCTAVES = 2.0
_STEPS_PER_OCTAVE = 40

Status = Literal["fitted", "bracketed", "censored", "no_fit"]
Side = Literal["low", "high"]
Stop = Literal["open", "grid", "diverged", "cliff"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Optimum:
    """Where a line is lowest; every x is a log2.

    `x`, `loss`: None if censored or not fitted. `ci`: 95 %, None where the data do not bound it.
    `side`, `bound`: what is known where there is no `ci`, of a censored optimum and of one whose interval has only one
    end; "high" says that the optimum is above `bound`. `proposals`: x that would settle a censored one.
    `lowest_loss`: the lowest paired mean that was measured (an upper bound of the best loss).
    """

    status: Status
    x: float | None = None
    ci: Interval | None = None
    loss: float | None = None
    lowest_loss: float | None = None
    side: Side | None = None
    bound: float | None = None
    proposals: tuple[float, ...] = ()
    reason: str = ""

    @property
    def censored(self) -> bool:
        """Whether the optimum lies beyond the grid."""
        return self.status == "censored"

    @property
    def best_loss(self) -> float | None:
        """The loss at the optimum; the lowest measured one where there is no optimum."""
        return self.lowest_loss if self.loss is None else self.loss


@dataclass(frozen=True)
class Regret:
    """What using another x costs, in the loss's units; `upper`: 95 % bound, None if unknown."""

    value: float | None
    upper: float | None
    lower_bound_only: bool = False
    reason: str = ""


@dataclass(frozen=True)
class LineFit:
    """A line's optimum and the curve behind it (None where nothing was fitted)."""

    optimum: Optimum
    x: tuple[float, ...] = ()
    """The eligible x."""
    means: tuple[float, ...] = ()
    diverged: tuple[float, ...] = ()
    curve: Curve | None = field(default=None, compare=False, repr=False)

    def regret(self, at: float, ci: Interval | None) -> Regret:
        """Return the regret of using `at` (log2; `ci` its interval) instead of this line's optimum.

        Inside the fit's window it is a difference on the fitted curve, in which the seeds' offsets
        cancel; outside, the paired means are interpolated (monotone cubic).
        """
        if self.optimum.best_loss is None or len(self.x) < 2:
            return Regret(None, None, reason=self.optimum.reason or "too few points to interpolate")
        if not self.x[0] <= at <= self.x[-1]:
            above = [x for x in self.diverged if x > self.x[-1]]
            if above and at > self.x[-1]:
                return Regret(None, None, reason=f"runs diverge at log2 {above[0]:g}")
            return Regret(None, None, reason="the transferred value lies outside the grid")
        value, sd = self._excess(at)
        value = max(value, 0.0)
        if self.optimum.x is None:
            return Regret(value, None, lower_bound_only=True, reason="no optimum inside the grid")
        if ci is None:
            return Regret(value, None, reason="the interval of the transferred value is not known")
        if self.curve is None or self.curve.t is None:
            return Regret(value, None, reason="the noise of the losses is not known")
        low, high = max(ci[0], self.x[0]), min(ci[1], self.x[-1])
        if (low, high) != ci:
            return Regret(value, None, reason="the transferred value may lie outside the grid")
        worst = max(self._excess(float(x))[0] for x in np.linspace(low, high, 17))
        # Two independent errors, of the transferred value and of this line, added in quadrature.
        return Regret(value, value + math.hypot(max(worst - value, 0.0), self.curve.t * sd))

    def _excess(self, at: float) -> tuple[float, float]:
        """Return loss(at) minus the best loss, and its standard deviation."""
        best, curve = self.optimum.x, self.curve
        fitted = self.optimum.status == "fitted"
        if fitted and curve is not None and best is not None and curve.x[0] <= at <= curve.x[-1]:
            mean, sd = curve.rise(np.array([at]), best)
            return float(mean[0]), float(sd[0])
        assert self.optimum.best_loss is not None
        interpolated = float(PchipInterpolator(np.array(self.x), np.array(self.means))(at))
        noise = 0.0 if curve is None else math.sqrt(2.0) * curve.noise
        return interpolated - self.optimum.best_loss, noise


@dataclass(frozen=True)
class _Start:
    """A line before the fit: its eligible points, the start, its window and what stops it."""

    x: Array
    means: Array
    start: int
    left: Stop
    right: Stop
    window: Samples
    diverged: tuple[float, ...]
    above: float | None
    below: float | None


def fit_panel(lines: Sequence[Sequence[Observed]]) -> list[LineFit]:
    """Return the fit of each line of a panel; the noise is pooled over the panel. Lines of very many x are fitted on bins of
    them (observed.binned).

    Args:
        lines: each line's points in ascending x; points without any run (missing) may be left out.
    """
    starts = [_start(binned(line)) for line in lines]
    usable = {
        index: start.window
        for index, start in enumerate(starts)
        if isinstance(start, _Start) and len(start.window.x) >= MIN_POINTS
    }
    curves = dict(zip(usable.keys(), pool([*usable.values()]), strict=True))
    noises = [curve.noise for curve in curves.values() if curve.t is not None]
    noise = float(np.mean(noises)) if noises else None
    fits = []
    for index, start in enumerate(starts):
        if isinstance(start, Optimum):
            fits.append(LineFit(start))
            continue
        curve = curves.get(index)
        fits.append(
            LineFit(
                _optimum(start, curve, noise),
                tuple(start.x.tolist()),
                tuple(start.means.tolist()),
                start.diverged,
                curve,
            )
        )
    return fits


def _start(line: Sequence[Observed]) -> _Start | Optimum:
    points = [point for point in line if point.losses or point.n_diverged]
    eligible = [point for point in points if point.eligible]
    if len(eligible) < MIN_POINTS:
        lowest = min((float(np.mean([*point.losses.values()])) for point in eligible), default=None)
        return Optimum(
            "no_fit",
            lowest_loss=lowest,
            reason=f"no seed diverged at only {len(eligible)} values; a fit needs {MIN_POINTS}",
        )
    samples = _samples(eligible)
    means = paired_means(samples)
    start = int(np.argmin(means))  # eligible means are finite
    limit = means[start] + MAX_EXCESS * abs(means[start])
    order = {point.x: index for index, point in enumerate(points)}
    rank = order[eligible[start].x]

    def walk(step: int) -> tuple[int, Stop]:
        """Return how many points the window takes on this side, and what is beside the start."""
        taken, index = 0, start
        while True:
            there = rank + step * (taken + 1)
            if not 0 <= there < len(points):
                return taken, "open" if taken else "grid"
            if not points[there].eligible:
                return taken, "open" if taken else "diverged"
            index += step
            if means[index] > limit:
                return taken, "open" if taken else "cliff"
            if taken and abs(points[there].x - points[rank].x) > WINDOW_OCTAVES + 1e-9:
                return taken, "open"
            taken += 1

    n_left, left = walk(-1)
    n_right, right = walk(1)
    return _Start(
        x=samples.x,
        means=means,
        start=start,
        left=left,
        right=right,
        window=_samples(eligible[start - n_left : start + n_right + 1]),
        diverged=tuple(point.x for point in points if point.n_diverged),
        above=points[rank + 1].x if rank + 1 < len(points) else None,
        below=points[rank - 1].x if rank else None,
    )


def _samples(points: Sequence[Observed]) -> Samples:
    runs = [(index, seed, loss) for index, point in enumerate(points) for seed, loss in sorted(point.losses.items())]
    return Samples(
        np.array([point.x for point in points], dtype=float),
        np.array([run[0] for run in runs], dtype=np.int64),
        np.array([run[1] for run in runs], dtype=np.int64),
        np.array([run[2] for run in runs], dtype=float),
    )


def _optimum(start: _Start, curve: Curve | None, noise: float | None) -> Optimum:
    if start.left == "grid":
        return _censored(start, curve, "low")
    if start.right == "grid":
        return _censored(start, curve, "high")
    if curve is None or start.left != "open" or start.right != "open":
        return _bracketed(start, curve, noise)
    grid = _theta(curve)
    mean, sd = curve.slope(grid)
    inside = [x for x in crossings(grid, mean) if curve.x[0] <= x <= curve.x[-1]]
    if not inside:
        return _outside(start, curve, noise)
    found = min(inside, key=lambda x: abs(x - start.x[start.start]))
    low, high = _ends(grid, mean, sd, found, curve.t)
    # The optimum cannot lie at or beyond a value at which runs diverge.
    low = max([low, *(x for x in start.diverged if x < found)])
    high = min([high, *(x for x in start.diverged if x > found)])
    ci, side, bound = _known(low, high)
    reason = ""
    if curve.t is None and ci is None:
        reason = "the noise cannot be estimated from one seed and so few points"
    elif ci is None:
        reason = "the basin is too flat for the noise: its interval has no end"
    return Optimum(
        "fitted",
        x=found,
        ci=ci,
        side=side,
        bound=bound,
        loss=float(curve.loss(np.array([found]))[0]),
        lowest_loss=float(start.means[start.start]),
        reason=reason,
    )


def _theta(curve: Curve) -> Array:
    low, high = curve.x[0] - REACH_OCTAVES, curve.x[-1] + REACH_OCTAVES
    return np.linspace(low, high, round((high - low) * _STEPS_PER_OCTAVE) + 1)


def _ends(grid: Array, mean: Array, sd: Array, found: float, t: float | None) -> Interval:
    """Return the ends of Fieller's set around `found`: where |slope| <= t sd; an end may be infinite."""
    if t is None:
        return -math.inf, math.inf
    low = [x for x in crossings(grid, mean + t * sd) if x <= found]
    high = [x for x in crossings(grid, mean - t * sd) if x >= found]
    return max(low, default=-math.inf), min(high, default=math.inf)


def _known(low: float, high: float) -> tuple[Interval | None, Side | None, float | None]:
    """Return what an interval with infinite ends says, as `Optimum` holds it: ci, side, bound."""
    if math.isfinite(low) and math.isfinite(high):
        return (low, high), None, None
    if math.isfinite(low):
        return None, "high", low
    return (None, "low", high) if math.isfinite(high) else (None, None, None)


def _outside(start: _Start, curve: Curve, noise: float | None) -> Optimum:
    """The fitted slope has one sign over the whole window although the lowest mean is inside it."""
    slope = float(curve.slope(start.x[start.start : start.start + 1])[0][0])
    side: Side = "high" if slope < 0 else "low"
    edge = curve.x[-1] if side == "high" else curve.x[0]
    if edge == (start.x[-1] if side == "high" else start.x[0]):
        beyond = [x for x in start.diverged if (x > edge) == (side == "high")]
        return _bracketed(start, curve, noise) if beyond else _censored(start, curve, side)
    return Optimum(
        "no_fit",
        lowest_loss=float(start.means[start.start]),
        reason="the fitted curve has no minimum among the points around the lowest mean",
    )


def _bracketed(start: _Start, curve: Curve | None, noise: float | None) -> Optimum:
    """Between the nearest x on either side that the optimum cannot be at: runs diverge there, or the mean is clearly
    above the lowest.
    """
    t = None if curve is None else curve.t
    slack = 0.0 if noise is None else (t or 2.0) * math.sqrt(2.0) * noise
    x, lowest = float(start.x[start.start]), float(start.means[start.start])
    ends = [*start.x[start.means > lowest + slack].tolist(), *start.diverged]
    ci, side, bound = _known(
        max((end for end in ends if end < x), default=-math.inf),
        min((end for end in ends if end > x), default=math.inf),
    )
    walls = {"diverged": "runs diverge", "cliff": "the loss jumps"}
    unfitted = "there are too few points" if curve is None else "the fitted curve has no minimum"
    why = walls.get(start.right) or walls.get(start.left) or unfitted
    of_ci = "has no end, the basin is too flat for the noise" if ci is None else "is the bracket around it"
    return Optimum(
        "bracketed",
        x=x,
        ci=ci,
        side=side,
        bound=bound,
        loss=lowest,
        lowest_loss=lowest,
        reason=f"{why} next to the lowest mean: the interval {of_ci}",
    )


def _censored(start: _Start, curve: Curve | None, side: Side) -> Optimum:
    """The optimum is beyond the first or last x: say what is known about where."""
    sign = 1.0 if side == "high" else -1.0
    edge = start.x[-1] if side == "high" else start.x[0]
    neighbour = start.below if side == "high" else start.above
    bound: float | None = None
    if curve is None or curve.t is None:
        # Without an estimate of the noise: true of the curve if it is true of the means.
        bound = edge if neighbour is None else neighbour
    else:
        grid = np.linspace(curve.x[0], curve.x[-1], round(np.ptp(curve.x) * _STEPS_PER_OCTAVE) + 1)
        mean, sd = curve.slope(grid)
        falling = grid[sign * mean + curve.t * sd < 0]  # the loss clearly falls outwards here
        # One basin, and clearly higher than at the end: the optimum is further out than this, too.
        slack = curve.t * math.sqrt(2.0) * curve.noise
        higher = start.x[start.means > start.means[start.start] + slack]
        known = np.concatenate([falling, higher])
        if len(known):
            bound = float(known.max() if side == "high" else known.min())
    step = float(np.median(np.diff(start.x)))
    n_more = max(2, math.ceil(PROPOSED_OCTAVES / step - 1e-9))
    return Optimum(
        "censored",
        lowest_loss=float(start.means[start.start]),
        side=side,
        bound=None if bound is None else float(bound),
        proposals=tuple(float(edge + sign * step * k) for k in range(1, n_more + 1)),
        reason=f"the lowest mean lies at the {side} end of the grid",
    )
