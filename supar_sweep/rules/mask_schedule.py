"""When masks change in training, and by how much: SET, RigL and GMP as arithmetic on steps. No torch.

Times are given as shares of the run, so that a short run updates its masks as often as a long one. "After step t" is after t
optimizer steps: the step's own loss and gradients are those of the masks before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

DynamicMethod = Literal["set", "rigl", "gmp"]
DYNAMIC_METHODS: tuple[DynamicMethod, ...] = get_args(DynamicMethod)


@dataclass(frozen=True, kw_only=True)
class MaskSchedule:
    """The updates of the masks in one run.

    Args:
        method: set and rigl drop and grow, gmp prunes from dense to the final density.
        interval_steps: steps between two updates, >= 1.
        start_steps: gmp: steps before the pruning begins; 0 for the others.
        stop_steps: set, rigl: no update from here on; gmp: the last one is here or before.
        drop_fraction: set, rigl: share of a layer's live weights that an update at step 0 would replace.
    """

    method: DynamicMethod
    interval_steps: int
    start_steps: int
    stop_steps: int
    drop_fraction: float = 0.0

    @property
    def n_updates(self) -> int:
        """How many updates a whole run makes; 0 where the interval is too long for it."""
        if self.method == "gmp":
            return max(0, (self.stop_steps - self.start_steps) // self.interval_steps)
        return max(0, (self.stop_steps - 1) // self.interval_steps)

    def updates_done(self, steps_done: int) -> int:
        """Return how many updates lie in the first `steps_done` steps, the one after the last of them included."""
        return min(max(0, (steps_done - self.start_steps) // self.interval_steps), self.n_updates)

    def is_update(self, steps_done: int) -> bool:
        """Return whether the masks change after step `steps_done`.

        Args:
            steps_done: optimizer steps taken, >= 1.
        """
        return self.updates_done(steps_done) > self.updates_done(steps_done - 1)

    def drop_share(self, steps_done: int) -> float:
        """Return the share of a layer's live weights that the update after step t replaces.

            f(t) = drop_fraction / 2 * (1 + cos(pi t / stop_steps))

        Args:
            steps_done: t.

        Source: RigL (arXiv:1911.11134), section 3, eq. for f_decay. ASSUMPTION: SET, whose paper keeps the share constant, decays
        alike, so that the two differ in where they grow and in nothing else.
        """
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * steps_done / self.stop_steps))

    def excess(self, steps_done: int) -> float:
        """Return the share of the weights to be pruned that GMP still has after step t: 1 at the start, 0 at the end.

            (1 - (t - t_0) / (n dT))^3, held between updates

        Args:
            steps_done: t.

        Source: Zhu and Gupta 2017 (arXiv:1710.01878), eq. 1, from s_i = 0:
        s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dT))^3, so density_t = density_f + (1 - density_f) (...)^3.
        """
        if self.method != "gmp":
            return 0.0
        return (1 - self.updates_done(steps_done) / self.n_updates) ** 3

    def mean_excess(self, steps: int) -> float:
        """Return the mean of `excess` over the first `steps` steps, each with the masks that it is computed with.

        Args:
            steps: >= 1.
        """
        if self.method != "gmp":
            return 0.0
        n, interval = self.n_updates, self.interval_steps
        # (n - k)^3 / n^3 after k updates: for start + interval steps at first, then for `interval` each, then 0
        at_first = min(steps, self.start_steps)
        whole, part = divmod(min(steps - at_first, n * interval), interval)
        cubes = _sum_of_cubes(n) - _sum_of_cubes(n - whole)
        return float(Fraction(at_first * n**3 + interval * cubes + part * (n - whole) ** 3, n**3 * steps))

    def density(self, final: float, steps_done: int) -> float:
        """Return a layer's density after step t, before it is rounded to a whole number of weights.

        Args:
            final: the layer's density at the end, in (0, 1].
            steps_done: t.
        """
        return final + (1 - final) * self.excess(steps_done)

    def live(self, size: int, final: int, steps_done: int) -> int:
        """Return how many weights of a layer are live after step t, never more than after an earlier one.

        Args:
            size: all weights of the layer.
            final: live ones at the end.
            steps_done: t.
        """
        return final + round((size - final) * self.excess(steps_done))


def _sum_of_cubes(n: int) -> int:
    """Return 1^3 + ... + n^3."""
    return (n * (n + 1) // 2) ** 2


def mask_schedule(
    method: DynamicMethod,
    steps: int,
    *,
    update_fraction: float,
    stop_fraction: float,
    start_fraction: float = 0.0,
    drop_fraction: float = 0.0,
) -> MaskSchedule:
    """Return the updates of a run, its shares rounded to whole steps.

    Args:
        method: set, rigl or gmp.
        steps: of the whole run, >= 1.
        update_fraction: share of the run between two updates; at least one step.
        stop_fraction, start_fraction: shares of the run, see `MaskSchedule`.
        drop_fraction: see `MaskSchedule`.
    """
    return MaskSchedule(
        method=method,
        interval_steps=max(1, round(update_fraction * steps)),
        start_steps=round(start_fraction * steps),
        stop_steps=round(stop_fraction * steps),
        drop_fraction=drop_fraction,
    )
