"""What an element asks SLURM while SLURM is signalling it; the rest of it is tested on a real cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supar_sweep.training.slurm_job import state_now

KILLED_ONCE = """#!/bin/sh
if mkdir {flag}; then kill -{signal} $$; fi
echo "RUNNING|"
"""


@pytest.mark.parametrize("signal", ["TERM", "USR2"])
def test_a_question_that_slurms_signal_killed_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(KILLED_ONCE.format(flag=tmp_path / "asked", signal=signal))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert state_now() == "RUNNING"
    assert (tmp_path / "asked").exists()
