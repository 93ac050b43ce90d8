"""Measure instead of train: seconds per step of one shape, in the company that `run` gives it. A training function for
`train.target`, so launchers, records and failures are those of any other cell.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.errors import SuparError
from supar_sweep.training.cohort import Cohort
from supar_sweep.training.corpus import Corpus
from supar_sweep.training.member import Outcome, ShouldStop, Sink, Stop, stop_reason
from supar_sweep.training.train import Run

WARM_UP_PASSES = 2
TIMED_PASSES, TIMED_S = 3, 1.0
"""At least so many passes, and so long."""

STEPS = 10**6
"""Of the measured run's schedule: more than are ever taken, so that none of it is the last."""


def train(
    cell: CellConfig,
    runtime: RuntimeConfig,
    corpus: Corpus,
    *,
    sink: Sink,
    resume: Mapping[str, Any] | None = None,
    should_stop: ShouldStop = lambda: None,
) -> Outcome:
    """Return, as facts of the outcome, what a run of this cell costs: step_s, setup_s and eval_seq_s of one run, where
    `together` of them share the process and `stacked` the forward pass.

    Mask updates and checkpoints are not in it.

    Args:
        cell: of the shape; its lr and seed play no part.
        runtime: its `cohort` says how many runs share the process.
        corpus, sink, should_stop: as for training.train.train.
        resume: ignored, a measurement is short.

    Raises:
        SuparError: the runs came out before they could be measured.
    """
    sink.begin(0)
    together = runtime.cohort or 1
    runtime = replace(runtime, checkpoint_every_s=None, checkpoint_every_steps=None, keep_checkpoints=False)
    begun_s = time.perf_counter()
    runs = [Run(_endless(cell, seed), runtime, corpus, sink=_Sink(sink), together=together) for seed in range(together)]
    device = runs[0].trainer.device
    setup_s = (_now_s(device) - begun_s) / together
    cohort = Cohort(runs)
    warm = 0
    while not cohort.settled or warm < WARM_UP_PASSES:
        if reason := _pass(cohort, should_stop):
            return Outcome(end=reason, steps_done=0)
        warm += cohort.settled
    passes, begun_s = 0, _now_s(device)
    while passes < TIMED_PASSES or time.perf_counter() - begun_s < TIMED_S:
        if reason := _pass(cohort, should_stop):
            return Outcome(end=reason, steps_done=0)
        passes += 1
    stacked = len(cohort.choose())
    steps = passes * stacked
    step_s = (_now_s(device) - begun_s) / steps
    begun_s = time.perf_counter()
    runs[0].trainer.evaluate(corpus)
    eval_seq_s = (_now_s(device) - begun_s) / cell.train.eval_seqs
    measured = {"step_s": step_s, "setup_s": setup_s, "eval_seq_s": eval_seq_s}
    facts = {**runs[0].trainer.info, **measured, "together": together, "stacked": stacked}
    return Outcome(end="done", steps_done=steps, facts=facts)


def _endless(cell: CellConfig, seed: int) -> CellConfig:
    """Return the cell as a run that neither ends nor diverges while it is watched."""
    train = replace(cell.train, target=None, steps=STEPS, eval_every_steps=None, divergence_patience_steps=STEPS)
    return replace(cell, seed=seed, hparams=replace(cell.hparams, lr=1e-6), train=train)


def _pass(cohort: Cohort, should_stop: ShouldStop) -> Stop | None:
    """Take one pass, and return why to stop instead, where somebody asks for that."""
    if reason := stop_reason(should_stop()):
        return reason
    cohort.step(cohort.choose())
    for _, end in cohort.take_ends():
        if isinstance(end, Exception):
            raise end
        raise SuparError(f"a run of this shape {end.end} after {end.steps_done} steps of lr 1e-6: nothing to measure")
    return None


def _now_s(device: torch.device) -> float:
    """Return the time, once all is done that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Sink:
    """Lets the metrics through, whose writing takes its time too."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def begin(self, step: int, **info: Any) -> None:
        """Do nothing: the measurement has begun once, for all."""

    def log(self, **values: Any) -> None:
        """Write one line."""
        self._sink.log(**values)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Do nothing: no checkpoint is asked for."""

    def warn(self, message: str) -> None:
        """Pass it on."""
        self._sink.warn(message)
