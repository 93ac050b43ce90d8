"""A study's trials as plain rows, read from its journal. Optuna is imported when asked for. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_sweep.errors import ConfigError
from supar_sweep.sweep.journal import read_trials

if TYPE_CHECKING:
    import optuna


def diverged(trial: optuna.trial.FrozenTrial) -> bool:
    """Return whether a trial diverged: its value, where it has one, stands for the divergence."""
    return trial.user_attrs.get("end") == "diverged"


def measured(trial: optuna.trial.FrozenTrial) -> bool:
    """Return whether a trial has a loss that was measured."""
    return trial.value is not None and not diverged(trial)


def trial_rows(runs: Path, name: str) -> list[dict[str, Any]]:
    """Return a row per trial of a study: number, end (done, diverged, failed, running), loss, params.

    A diverged trial's loss is None: what the sampler was told stands for it and was not measured.

    Args:
        runs: the runs folder.
        name: the study's.

    Raises:
        ConfigError: there is no study of this name; those that are there are listed.
        RecordError: the journal cannot be read, or is damaged.
    """
    from optuna.trial import TrialState

    journal = runs / "studies" / name / "journal.log"
    if not journal.is_file():
        known = sorted(each.parent.name for each in runs.glob("studies/*/journal.log"))
        raise ConfigError(
            "study.name",
            f"there is no such study in {runs}",
            value=name,
            allowed=known or "none there; `tune` comes first",
            nearest_to=name,
        )
    ends = {TrialState.COMPLETE: "done", TrialState.FAIL: "failed", TrialState.PRUNED: "failed"}
    rows = []
    for trial in read_trials(journal, name):
        if trial.state == TrialState.WAITING:
            continue
        end = "diverged" if diverged(trial) else ends.get(trial.state, "running")
        loss = trial.value if end == "done" else None
        rows.append({"number": trial.number, "end": end, "loss": loss, "params": dict(trial.params)})
    return rows
