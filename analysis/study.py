"""Trials of a tuning study -> Study -> Figure: the optimisation's history, and a slice per hyperparameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from supar_sweep.errors import ConfigError

from . import style

End = Literal["done", "diverged", "failed", "running"]

NAMES = {"alpha_in": r"$\alpha_{in}$", "alpha_out": r"$\alpha_{out}$"}
_EXCESS_SHOWN = 0.5
"""A trial's loss further above the best (relative) stands at the top edge."""


@dataclass(frozen=True)
class Trial:
    """One trial; `loss` is None unless it is done, `params` are the tried values."""

    number: int
    end: End
    loss: float | None
    params: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """Everything the figure shows. `best`: lowest loss after each trial that is done, by number; `winner`: its number.

    `confirmed`: trial -> losses on fresh seeds, None where one diverged; where there are any, the winner has the lowest mean
    of those trials that never diverged.
    """

    name: str
    metric: str
    trials: tuple[Trial, ...]
    best: tuple[tuple[int, float], ...]
    winner: int | None
    confirmed: Mapping[int, tuple[float | None, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The hyperparameters searched."""
        return tuple(sorted({name for trial in self.trials for name in trial.params}))


def study(
    rows: Iterable[Mapping[str, Any]],
    name: str,
    metric: str,
    confirmed: Mapping[int, Sequence[float | None]] | None = None,
) -> Study:
    """Return a study's figure data.

    Args:
        rows: one a trial: number, end (done, diverged, failed, running), loss, params.
        name: of the study. metric: what its losses are.
        confirmed: trial -> losses on fresh seeds, None where one diverged (best.yaml's lineage).

    Raises:
        ConfigError: no trial.
    """
    trials = tuple(
        Trial(
            int(row["number"]),
            row["end"],
            float(row["loss"]) if row["end"] == "done" and row["loss"] is not None else None,
            dict(row["params"]),
        )
        for row in sorted(rows, key=lambda row: int(row["number"]))
    )
    if not trials:
        raise ConfigError("study.name", "has no trial yet", value=name)
    done = [(trial.number, trial.loss) for trial in trials if trial.loss is not None]
    best = tuple(zip((n for n, _ in done), accumulate((loss for _, loss in done), min), strict=True))
    reruns = {
        number: tuple(None if loss is None else float(loss) for loss in losses)
        for number, losses in (confirmed or {}).items()
        if len(losses)
    }
    means = {number: _mean(losses) for number, losses in reruns.items()} if reruns else dict(done)
    scores = {number: means[number] for number, _ in done if means.get(number, math.inf) < math.inf}
    winner = min(scores, key=lambda number: (scores[number], number), default=None)
    return Study(name, metric, trials, best, winner, reruns)


def _mean(losses: Sequence[float | None]) -> float:
    """Return the mean of losses on fresh seeds; infinite where one diverged."""
    return float(np.mean([math.inf if loss is None else loss for loss in losses]))


def data_rows(found: Study) -> list[dict[str, Any]]:
    """Return the figure's data, a row per trial."""
    best = dict(found.best)
    return [
        {
            "study": found.name,
            "trial": trial.number,
            "end": trial.end,
            found.metric: trial.loss,
            "best_so_far": best.get(trial.number),
            "winner": trial.number == found.winner,
            "confirmed": " ".join(
                "diverged" if loss is None else repr(loss) for loss in found.confirmed.get(trial.number, ())
            ),
            **{name: trial.params.get(name) for name in found.names},
        }
        for trial in found.trials
    ]


def draw(found: Study) -> Figure:
    """Return the figure: history first, then a slice per hyperparameter, later trials lighter; all share the loss axis."""
    with style.look():
        n = 1 + len(found.names)
        drawn = style.figure(style.COLUMN_IN * 0.62 * n + 0.5, 3.4)
        grid = drawn.subplots(1, n, sharey=True, squeeze=False)[0]
        last = max(trial.number for trial in found.trials) or 1
        colors = style.ordered_colors(last + 1)
        low, top = _limits(found)
        if found.best:
            numbers, losses = zip(*found.best, strict=True)
            steps: dict[str, Any] = {"drawstyle": "steps-post", "color": style.INK, "linewidth": 1.2}
            grid[0].plot([*numbers, last], [*losses, losses[-1]], **steps)
        _points(grid[0], found, lambda trial: float(trial.number), colors, top)
        grid[0].set_xlabel("Trial")
        grid[0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        grid[0].set_ylabel(f"{style.METRIC_NAMES[found.metric]} (nats)")
        for axes, name in zip(grid[1:], found.names, strict=True):
            xs = [math.log2(trial.params[name]) for trial in found.trials if trial.params.get(name, 0) > 0]
            _points(axes, found, lambda trial, name=name: _log2(trial, name), colors, top)
            axes.set_xlabel(NAMES.get(name, style.axis_name(name)))
            style.log2_ticks(axes, 2 * (max(xs) - min(xs)))
        grid[0].set_ylim(low, top)
        counts = {
            end: sum(trial.end == end for trial in found.trials) for end in ("done", "diverged", "failed", "running")
        }
        text = ", ".join(f"{count} {end}" for end, count in counts.items() if count)
        style.heading(drawn, f"study {found.name}: {text}")
        style.legend(drawn, *_legend(found))
    return drawn


def _log2(trial: Trial, name: str) -> float:
    value = trial.params.get(name)
    return math.log2(value) if value and value > 0 else math.nan


def _limits(found: Study) -> tuple[float, float]:
    losses = [trial.loss for trial in found.trials if trial.loss is not None]
    losses += [loss for each in found.confirmed.values() for loss in each if loss is not None]
    if not losses:
        return 0.0, 1.0
    top = min(max(losses), min(losses) + _EXCESS_SHOWN * abs(min(losses)))
    span = max(top - min(losses), 1e-3 * abs(top))
    return min(losses) - 0.06 * span, top + 0.08 * span


def _points(axes: Axes, found: Study, x: Any, colors: Sequence[str], top: float) -> None:
    for trial in found.trials:
        at = x(trial)
        color = colors[trial.number]
        if trial.end == "diverged" or (trial.loss is not None and trial.loss > top):
            marker = "x" if trial.end == "diverged" else "^"
            axes.plot(at, 1.0, marker, color=color, transform=axes.get_xaxis_transform(), markersize=4.5, clip_on=False)
        elif trial.loss is not None:
            axes.plot(at, trial.loss, "o", color=color, markersize=4, markeredgecolor="white", markeredgewidth=0.4)
    for number, losses in found.confirmed.items():
        again = next((trial for trial in found.trials if trial.number == number), None)
        if again is not None:
            finite = [loss for loss in losses if loss is not None]
            looks: dict[str, Any] = {"color": style.MUTED, "zorder": 1.8}
            axes.plot([x(again)] * len(finite), finite, "_", markersize=6, markeredgewidth=1.2, **looks)
            if None in losses:
                at_top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
                axes.plot(x(again), 1.0, "x", markersize=4.5, **looks, **at_top)
    winner = next((trial for trial in found.trials if trial.number == found.winner), None)
    if winner is not None and winner.loss is not None:
        axes.plot(
            x(winner),
            winner.loss,
            "o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=WINNER,
            markeredgewidth=1.6,
        )


WINNER = style.FIXED_LOOKS["sp"][0]


def _legend(found: Study) -> tuple[list[Line2D], list[str]]:
    trials = found.trials
    handles = [Line2D([], [], color=style.INK, linewidth=1.2)]
    labels = ["best so far"]

    def mark(label: str, **look: Any) -> None:
        handles.append(Line2D([], [], linewidth=0, **look))
        labels.append(label)

    mark("trial (later: lighter)", marker="o", color=style.ordered_colors(3)[1], markersize=4)
    if found.confirmed:
        mark("on fresh seeds", marker="_", color=style.MUTED, markersize=6, markeredgewidth=1.2)
    if found.winner is not None:
        mark("winner", marker="o", markersize=9, markerfacecolor="none", markeredgecolor=WINNER, markeredgewidth=1.6)
    if any(trial.end == "diverged" for trial in trials) or any(None in losses for losses in found.confirmed.values()):
        mark("diverged", marker="x", color=style.MUTED, markersize=4.5)
    if any(trial.loss is not None and trial.loss > _limits(found)[1] for trial in trials):
        mark("loss above the axis", marker="^", color=style.MUTED, markersize=4.5)
    return handles, labels


def save(drawn: Figure, found: Study, stem: Path) -> list[Path]:
    """Write `stem`.png, .pdf and .csv; return the three paths."""
    return style.save_with_data(drawn, data_rows(found), stem)
