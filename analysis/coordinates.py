"""Rows of coordinate checks -> CoordinateSet: each statistic against width or density, and a test of its slope.

A statistic is the mean absolute value of a site's activation, of the loss's gradient to it, or of its change by one
update. Under a right parameterization none of them moves with width or density, except for gradients, which carry the
logits multiplier. The check fits the slope of log2(statistic) in log2(width or density) for each seed and step,
averages each seed's over the steps, and asks whether the mean's distance from the expected slope lies within a
threshold. What passes is evidence: a check of ten steps sees neither weight decay nor the end of training.

Source: SuPar sections 3.1 to 3.3 (what must not move) and fig. 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import Method, formula

from .fit import Interval
from .frames import in_rule_table, rounded, values_of
from .smooth import CONFIDENCE
from .wiener import Array

STATISTICS = ("activation", "gradient", "change")
KINDS = ("embedding", "attention", "mlp", "logits")
"""Rows of the figure: a block's sites are averaged over the blocks."""
VARIED = ("density", "width")

MAX_SLOPE = 0.25
"""Largest distance from the expected slope that passes: a factor of 2^(1/4) an octave."""

REQUIRED = ("parameterization", "width", "density", "seed", "step", "site", *STATISTICS)

Answer = Literal["pass", "fail", "undecided"]

CAVEAT = "a check that passes is evidence, not a proof, that hyperparameters transfer"

RULE = (
    "a seed's slope is its mean over the steps; pass: the 95% CI (Student's t over seeds) of slope minus expected slope lies "
    "within +-threshold; fail: it lies wholly outside; undecided: anything else. A parameterization fails with any failing "
    f"statistic and passes when all pass. {CAVEAT[:1].upper()}{CAVEAT[1:]}"
)


def expected_slope(statistic: str, axis: str, kind: str, parameterization: str) -> float | None:
    """Return the slope that a right parameterization has, or None where nothing is claimed.

    Gradients to everything below the logits fall as the logits multiplier: as 1/m_d in width, where it has one. The
    logits of a fresh model are sums of `width` random terms times 1/m_d, so they start as m_d^-1/2 and grow to their
    final order: no claim about their size in width, only about their change by an update.

    Args:
        statistic: one of STATISTICS.
        axis: density or width.
        kind: one of KINDS.
        parameterization: whose logits multiplier counts.

    Source: SuPar table 1, unembedding forward (the multiplier).
    """
    if axis == "density":
        return 0.0
    if statistic == "gradient" and kind != "logits":
        multiplier = formula("forward", "logits", Method(parameterization=parameterization), in_block=False)  # type: ignore[arg-type]
        return -1.0 if "m_d^-1" in (multiplier or "") else 0.0
    return None if (statistic, kind) == ("activation", "logits") else 0.0


@dataclass(frozen=True)
class Trace:
    """One line of the figure: a statistic of one kind of site at one step, over the axis.

    `by_seed[seed]` holds a value for each x; `mean`, `stderr` are of log2(statistic) over the seeds.
    """

    step: int
    x: tuple[float, ...]
    by_seed: Mapping[int, tuple[float, ...]]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean over seeds of log2(statistic) at each x."""
        return tuple(float(v) for v in self._log2().mean(axis=0))

    @property
    def stderr(self) -> tuple[float, ...] | None:
        """Standard error over seeds of `mean`; None with one seed."""
        values = self._log2()
        if len(values) < 2:
            return None
        return tuple(float(v) for v in values.std(axis=0, ddof=1) / math.sqrt(len(values)))

    def slopes(self) -> tuple[float, ...]:
        """Return each seed's slope of log2(statistic) in log2(x)."""
        x = np.log2(np.array(self.x))
        centred = x - x.mean()
        return tuple(float(v) for v in self._log2() @ centred / (centred @ centred))

    def _log2(self) -> Array:
        # a statistic that is exactly 0 (a dead layer) has no logarithm: the smallest normal number stands for it
        values = np.maximum(np.array([self.by_seed[seed] for seed in sorted(self.by_seed)]), np.finfo(float).tiny)
        logs: Array = np.log2(values)
        return logs


@dataclass(frozen=True)
class SlopeTest:
    """Whether one statistic of one kind of site moves as expected.

    `slope`: mean over seeds and steps; `ci`: of it, None with fewer than two seeds; `last`: mean slope of the last step.
    """

    parameterization: str
    axis: str
    statistic: str
    kind: str
    slope: float
    ci: Interval | None
    last: float
    expected: float | None
    threshold: float
    n_seeds: int

    @property
    def answer(self) -> Answer | None:
        """Pass, fail or undecided; None where nothing is expected."""
        if self.expected is None:
            return None
        if self.ci is None:
            return "undecided"
        low, high = self.ci[0] - self.expected, self.ci[1] - self.expected
        if max(abs(low), abs(high)) <= self.threshold:
            return "pass"
        return "fail" if low > self.threshold or high < -self.threshold else "undecided"


@dataclass(frozen=True)
class CoordinatePanel:
    """One panel: a parameterization and a kind of site, with its test."""

    parameterization: str
    kind: str
    traces: tuple[Trace, ...]
    test: SlopeTest


@dataclass(frozen=True)
class CoordinateSet:
    """A figure's data: one statistic over one axis. `fixed`: the axes that have one value."""

    axis: str
    statistic: str
    panels: tuple[CoordinatePanel, ...]
    fixed: Mapping[str, Any]
    n_seeds: int


def coordinate_sets(rows: Iterable[Mapping[str, Any]], threshold: float = MAX_SLOPE) -> list[CoordinateSet]:
    """Return a figure's data for each statistic and each axis that varies.

    Args:
        rows: one a cell, step and site, with the keys REQUIRED; sites named as in training.probes.gpt_sites.
        threshold: largest distance from the expected slope that passes.

    Raises:
        ConfigError: no rows, a row without a required key, a threshold that is not positive, or no axis that varies.
    """
    if not threshold > 0:
        raise ConfigError("check.threshold", "out of range", value=threshold, allowed="> 0")
    table = _table(rows)
    sets = []
    for axis in VARIED:
        part, fixed = _varied(table, axis)
        if part is None:
            continue
        sets += [_set(part, axis, statistic, threshold, fixed) for statistic in STATISTICS]
    if not sets:
        raise ConfigError("check", "neither width nor density varies: there is no slope", allowed="two values or more")
    return sets


def _table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    listed = [dict(row) for row in rows]
    if not listed:
        raise ConfigError("check", "there is nothing to analyse: no rows")
    for row in listed:
        if absent := [name for name in REQUIRED if name not in row]:
            raise ConfigError("check", f"a row lacks {', '.join(absent)}", allowed=REQUIRED)
    table = pd.DataFrame(listed)
    table["kind"] = table["site"].str.rpartition(".")[2]
    keys = ["parameterization", "width", "density", "seed", "step", "kind"]
    return table.groupby(keys, as_index=False)[list(STATISTICS)].mean()


def _varied(table: pd.DataFrame, axis: str) -> tuple[pd.DataFrame | None, dict[str, Any]]:
    """Return the rows of the longest sweep over `axis` at one value of the other one, and that value."""
    other = next(name for name in VARIED if name != axis)
    lengths = table.groupby(other)[axis].nunique()
    if lengths.max() < 2:
        return None, {}
    # of equally long ones the dense one, or the widest
    at = max(lengths.index[lengths == lengths.max()])
    return table[table[other] == at], {other: rounded(at)}


def _set(table: pd.DataFrame, axis: str, statistic: str, threshold: float, fixed: Mapping[str, Any]) -> CoordinateSet:
    panels = []
    for name in values_of(table, "parameterization"):
        of_name = table[table["parameterization"] == name]
        for kind in [kind for kind in KINDS if (of_name["kind"] == kind).any()]:
            of_kind = of_name[of_name["kind"] == kind]
            traces = [
                _trace(of_kind[of_kind["step"] == step], int(step), axis, statistic)
                for step in sorted(set(of_kind["step"]))
            ]
            test = slope_test(traces, name, axis, statistic, kind, threshold)
            panels.append(CoordinatePanel(name, kind, tuple(traces), test))
    n_seeds = max(panel.test.n_seeds for panel in panels)
    return CoordinateSet(axis, statistic, tuple(panels), fixed, n_seeds)


def _trace(rows: pd.DataFrame, step: int, axis: str, statistic: str) -> Trace:
    wide = rows.pivot(index="seed", columns=axis, values=statistic).dropna()
    return Trace(
        step,
        tuple(float(x) for x in wide.columns),
        {int(seed): tuple(float(v) for v in values) for seed, values in zip(wide.index, wide.to_numpy(), strict=True)},
    )


def slope_test(
    traces: Sequence[Trace], parameterization: str, axis: str, statistic: str, kind: str, threshold: float
) -> SlopeTest:
    """Return the test of one panel: the mean slope over seeds with a 95% interval, against the expected slope.

    Args:
        traces: a line for each step, of the same seeds.
        parameterization, axis, statistic, kind: what they are of.
        threshold: largest distance from the expected slope that passes.
    """
    by_step = np.array([trace.slopes() for trace in traces])
    slopes = by_step.mean(axis=0)
    n = len(slopes)
    ci = None
    if n > 1:
        half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * float(slopes.std(ddof=1)) / math.sqrt(n)
        ci = (float(slopes.mean()) - half, float(slopes.mean()) + half)
    return SlopeTest(
        parameterization=parameterization,
        axis=axis,
        statistic=statistic,
        kind=kind,
        slope=float(slopes.mean()),
        ci=ci,
        last=float(by_step[-1].mean()),
        expected=expected_slope(statistic, axis, kind, parameterization),
        threshold=threshold,
        n_seeds=n,
    )


def all_slope_tests(sets: Sequence[CoordinateSet]) -> list[SlopeTest]:
    """Return every test of some figures, parameterization by parameterization."""
    found = [panel.test for each in sets for panel in each.panels]
    return sorted(found, key=lambda test: in_rule_table(test.parameterization))


def answers(found: Sequence[SlopeTest]) -> dict[str, dict[str, tuple[Answer, str]]]:
    """Return parameterization -> axis -> (answer, what decided it), by RULE."""
    result: dict[str, dict[str, tuple[Answer, str]]] = {}
    for test in found:
        result.setdefault(test.parameterization, {}).setdefault(test.axis, ("undecided", ""))
    for name, axes in result.items():
        for axis in axes:
            mine = [t for t in found if (t.parameterization, t.axis) == (name, axis) and t.answer is not None]
            failed = [t for t in mine if t.answer == "fail"]
            open_ = [t for t in mine if t.answer == "undecided"]
            if failed:
                axes[axis] = ("fail", "; ".join(map(slope_text, failed)))
            elif open_:
                axes[axis] = ("undecided", "; ".join(map(slope_text, open_)))
            elif mine:
                most = max(abs(end - (t.expected or 0.0)) for t in mine for end in t.ci or ())
                axes[axis] = ("pass", f"every slope within {most:.2f} of the expected one")
    return result


def slope_text(test: SlopeTest) -> str:
    """Return the test in words: mlp activation +0.62 (+0.58 to +0.66), expected 0."""
    ci = "no CI from one seed" if test.ci is None else f"{test.ci[0]:+.2f} to {test.ci[1]:+.2f}"
    expected = "" if test.expected is None else f", expected {test.expected:g}"
    return f"{test.kind} {test.statistic} {test.slope:+.2f} ({ci}){expected}"


def rows_of_tests(found: Sequence[SlopeTest]) -> list[dict[str, Any]]:
    """Return a row per test, for tables, JSON and CSV."""
    return [
        {
            "parameterization": test.parameterization,
            "axis": test.axis,
            "statistic": test.statistic,
            "site": test.kind,
            "slope": test.slope,
            "ci_low": None if test.ci is None else test.ci[0],
            "ci_high": None if test.ci is None else test.ci[1],
            "slope_of_last_step": test.last,
            "expected": test.expected,
            "threshold": test.threshold,
            "n_seeds": test.n_seeds,
            "answer": test.answer,
        }
        for test in found
    ]


def data_rows(found: CoordinateSet) -> list[dict[str, Any]]:
    """Return the figure's data, a row per seed, step and x."""
    return [
        {
            **found.fixed,
            "parameterization": panel.parameterization,
            "site": panel.kind,
            "step": trace.step,
            "seed": seed,
            found.axis: x,
            found.statistic: value,
        }
        for panel in found.panels
        for trace in panel.traces
        for seed, values in trace.by_seed.items()
        for x, value in zip(trace.x, values, strict=True)
    ]
