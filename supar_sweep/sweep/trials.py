"""A study's trials as plain rows, read from its journal. Optuna is imported when asked for. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supar_sweep.errors import ConfigError, RecordError


def trial_rows(runs: Path, name: str) -> list[dict[str, Any]]:
    """Return a row per trial of a study: number, end (done, diverged, failed, running), loss, params.

    A diverged trial's loss is None: what the sampler was told stands for it and was not measured.

    Args:
        runs: the runs folder.
        name: the study's.

    Raises:
        ConfigError: there is no study of this name; those that are there are listed.
        RecordError: the journal cannot be read.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
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
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(journal))))
        trials = study.get_trials(deepcopy=False)
    except (OSError, ValueError, KeyError) as error:
        raise RecordError(f"cannot read {journal}: {error}") from error
    ends = {TrialState.COMPLETE: "done", TrialState.FAIL: "failed", TrialState.PRUNED: "failed"}
    rows = []
    for trial in trials:
        if trial.state == TrialState.WAITING:
            continue
        end = "diverged" if trial.user_attrs.get("end") == "diverged" else ends.get(trial.state, "running")
        loss = trial.value if end == "done" else None
        rows.append({"number": trial.number, "end": end, "loss": loss, "params": dict(trial.params)})
    return rows
