"""What an element makes of SLURM's signals; the rest of it is tested on a real cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from supar_sweep.training.slurm_job import Signals


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    yield Signals(timeout_s=600, signal_delay_s=30)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("state", "why"),
    [("RUNNING", "preempted"), ("SIGNALING", "preempted"), ("COMPLETING", "cancelled"), ("", "cancelled")],
)
def test_a_job_that_slurm_lets_run_on_is_preempted_and_not_cancelled(
    signals: Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, why: str
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{state}|'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.why == why
