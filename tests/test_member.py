"""A run's state beside its weights: divergence, summary, what a checkpoint keeps, stop reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from supar_sweep.training.member import Member, stop_reason
from supar_sweep.training.train import read
from tests.tiny import tiny_cell


class LineSink:
    """A sink that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def begin(self, step: int, **info: Any) -> None: ...

    def log(self, **values: Any) -> None:
        self.lines.append(values)

    def save(self, step: int, state: Mapping[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...


def member(sink: LineSink, **overrides: Any) -> Member:
    config = tiny_cell(**{f"train.{name}": value for name, value in overrides.items()}).train
    return Member(config, 256, 64, sink)


def feed(losses: list[float], **overrides: Any) -> tuple[Member, list[bool]]:
    watched = member(LineSink(), **overrides)
    return watched, [watched.observe(step, loss, 1.0, 1.0) for step, loss in enumerate(losses, start=1)]


def test_divergence_is_a_loss_above_the_bound_for_patience_steps_on_end() -> None:
    bound = 3 * math.log(256)
    high, low = bound * 1.01, bound * 0.99
    watched, answers = feed([high, high, low, high, high, high])
    assert answers == [False] * 5 + [True]
    outcome = watched.outcome("done", 99)
    assert (outcome.end, outcome.steps_done) == ("diverged", 6)
    assert outcome.last_finite_loss == high
    assert outcome.train_loss is outcome.val_loss is None
    assert feed([high] * 9, divergence_patience_steps=10)[0].diverged_at is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_at_once(bad: float) -> None:
    watched, answers = feed([5.0, bad])
    assert answers == [False, True]
    outcome = watched.outcome("done", 2)
    assert (outcome.end, outcome.steps_done, outcome.last_finite_loss) == ("diverged", 2, 5.0)
    assert feed([bad])[0].outcome("done", 1).last_finite_loss is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_ends_at_once(bad: float) -> None:
    watched, _ = feed([5.0, 4.0])
    assert not watched.observe_val(1, 4.5)
    assert watched.observe_val(2, bad)
    outcome = watched.outcome("done", 2)
    assert (outcome.end, outcome.steps_done, outcome.last_finite_loss) == ("diverged", 2, 4.0)
    assert outcome.train_loss is outcome.val_loss is None


def test_the_divergence_count_survives_a_resume() -> None:
    high = 4 * math.log(256)
    before, _ = feed([5.0, high, high])
    after = member(LineSink())
    after.load(before.state())
    assert after.observe(4, high, 1.0, 1.0)


def test_reading_losses_late_finds_the_same_step() -> None:
    losses = [5.0, 4.0, math.nan, 3.0]
    sink = LineSink()
    late = member(sink)
    unread = [(step, torch.tensor(loss), torch.tensor(1.0), 0.5) for step, loss in enumerate(losses, start=1)]
    assert read(late, unread)
    assert late.outcome("done", 4).steps_done == 3
    assert not unread
    assert [line["step"] for line in sink.lines] == [1, 2, 3]


def test_the_summary_is_the_mean_over_the_last_steps() -> None:
    watched, _ = feed([6.0, 5.0, 4.0, 3.0], summary_last_steps=2)
    watched.observe_val(4, 3.5)
    outcome = watched.outcome("done", 4)
    assert (outcome.end, outcome.steps_done) == ("done", 4)
    assert (outcome.train_loss, outcome.val_loss) == ((4.0 + 3.0) / 2, 3.5)
    assert outcome.last_finite_loss == 3.0
    # a run that was stopped has no summary yet, and its window goes on where it was
    assert watched.outcome("timeout", 4).train_loss is None
    resumed = member(LineSink(), summary_last_steps=2)
    resumed.load(watched.state())
    resumed.observe(5, 1.0, 1.0, 1.0)
    assert resumed.outcome("done", 5).train_loss == (3.0 + 1.0) / 2


def test_stop_reasons() -> None:
    assert [stop_reason(a) for a in (None, False, True, "timeout", "preempted")] == [
        None,
        None,
        "cancelled",
        "timeout",
        "preempted",
    ]
