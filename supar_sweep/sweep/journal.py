"""A study's journal: read as Optuna reads it, refused where it is damaged, and mended after a kill. No torch.

Optuna is imported when a journal is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_sweep.errors import RecordError

if TYPE_CHECKING:
    import optuna

_SET_TRIAL_STATE, _CREATE_TRIAL, _RUNNING = 6, 4, 0


def read_trials(journal: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a study, in order; none where the journal does not know it. A torn last line is left out.

    Args:
        journal: the file.
        name: the study's.

    Raises:
        RecordError: the file cannot be read, or is damaged.
    """
    return _Journal(journal).trials(name)


def mend_journal(journal: Path, name: str) -> None:
    """Make the journal as if its writer had not been killed in the middle of a line or of a question.

    A killed writer leaves a lock, which the next append would wait half a minute for; half a line, which the next append
    would be glued to; or a trial without all of its numbers. That trial is taken back, so that the sampler is asked again
    in the state in which it was asked before. For the holder of the study's lock only: nobody else writes then.

    Args:
        journal: the file; it need not exist.
        name: the study's.

    Raises:
        RecordError: a journal that cannot be read, or is torn elsewhere, which no killed writer does.
    """
    if not journal.exists():
        return
    try:
        Path(f"{journal}.lock").unlink(missing_ok=True)  # JournalFileOpenLock's
        read = _Journal(journal)
        keep = len(read.whole)
        trials = read.trials(name)
        if trials and trials[-1].state.name == "RUNNING" and set(trials[-1].params) != read.space:
            keep = read.last_start
        if keep != read.n_bytes:
            with journal.open("r+b") as file:
                file.truncate(keep)
    except OSError as error:
        raise RecordError(f"cannot read {journal}: {error.strerror}") from error


class _Journal:
    """The whole lines of a journal, replayed by Optuna.

    `last_start` is the byte at which the line begins that started the last trial, `space` the searched hyperparameters:
    both known once `trials` was called.
    """

    def __init__(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise RecordError(f"cannot read {path}: {error.strerror}") from error
        self.path, self.n_bytes = path, len(raw)
        self.whole = raw[: raw.rfind(b"\n") + 1]
        self.last_start = self._line = 0
        self.space: frozenset[str] = frozenset()

    def trials(self, name: str) -> list[optuna.trial.FrozenTrial]:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import BaseJournalBackend

        lines = self._operations()

        class Lines(BaseJournalBackend):
            def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
                return lines

            def append_logs(self, logs: list[dict[str, Any]]) -> None:
                raise NotImplementedError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = JournalStorage(Lines())
        except ValueError as error:
            raise self.torn(f"at line {self._line}", str(error)) from error
        except Exception as error:  # Optuna takes every line for one that it wrote
            why = f"Optuna cannot apply it: {type(error).__name__} {error}"
            raise self.torn(f"at line {self._line}", why) from error
        if name not in optuna.get_all_study_names(storage):
            return []
        study = optuna.load_study(study_name=name, storage=storage)
        space = study.user_attrs.get("space")
        self.space = frozenset(space if isinstance(space, dict) else ())
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            try:
                _check(trial, self.space, last=trial is trials[-1])
            except Exception as error:  # values of any type and number
                raise self.torn(f"in trial {trial.number}", str(error)) from error
        return trials

    def _operations(self) -> Iterator[dict[str, Any]]:
        begin = 0
        for line in BytesIO(self.whole):
            self._line += 1
            operation = json.loads(line)
            if not isinstance(operation, dict) or "op_code" not in operation:
                raise ValueError("it is not an operation of Optuna's")
            code = operation["op_code"]
            if code == _CREATE_TRIAL or (code == _SET_TRIAL_STATE and operation["state"] == _RUNNING):
                self.last_start = begin
            yield operation
            begin += len(line)

    def torn(self, where: str, why: str) -> RecordError:
        return RecordError(
            f"{self.path} is torn {where} ({why}); move it away and tune again: the study "
            "begins anew, and trials whose cells are done are not trained twice"
        )


def _check(trial: optuna.trial.FrozenTrial, space: Collection[str], *, last: bool) -> None:
    """Raise any error for a trial that Optuna reads but that has no value, or no numbers, to compute with."""
    complete = trial.state.name == "COMPLETE"
    if complete and (trial.value is None or math.isnan(trial.value)):
        raise ValueError(f"its value is {trial.value}")
    # only the last one can have been under way when its writer was killed
    if (complete or (trial.state.name == "RUNNING" and not last)) and (
        missing := sorted(set(space) - set(trial.params))
    ):
        raise ValueError(f"it has no {missing[0]}")
    for name, value in trial.params.items():
        if not 0 < value < math.inf:
            raise ValueError(f"its {name} is {value}")
