"""The tuner: Optuna asks, a launcher trains, one coordinator tells. Optuna is imported when a study starts. No torch.

A trial is a cell like any other: it has an id, a folder and a record, so a coordinator that died finds the trials it had asked
for finished, or submits them again with the same numbers. The budget is a total: a rerun tops up to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.config.sparsity import STATIC
from supar_sweep.config.study import StudyConfig
from supar_sweep.errors import ConfigError, SuparError
from supar_sweep.rules.parameterization import RULES_VERSION
from supar_sweep.sweep import locks
from supar_sweep.sweep.identity import canonical, cell_id
from supar_sweep.sweep.journal import mend_journal
from supar_sweep.sweep.sampling import next_sampler, refuse_misled, told_as_diverged
from supar_sweep.sweep.trainer import CellEnd
from supar_sweep.sweep.trials import measured
from supar_sweep.sweep.winner import Winner

if TYPE_CHECKING:
    import optuna

FAILURES_IN_A_ROW = 3
"""A study stops when so many trials in a row fail (crash, not diverge): the next would fail alike."""


class Trainer(Protocol):
    """Trains cells for the coordinator: trainer.CellTrainer, over a store and a launcher."""

    @property
    def slots(self) -> int:
        """Return how many cells are worth submitting at once."""

    def submit(self, cell: CellConfig) -> str:
        """Return the cell's id at once; a cell that is complete already ends without being trained."""

    def ends(self, timeout_s: float) -> Sequence[CellEnd]:
        """Return the ends since the last call, waiting up to timeout_s for one."""


def proxy_of(cell: CellConfig) -> CellConfig:
    """Return the proxy of a target: the base shape itself, dense, where every parameterization but SP is muP.

    Args:
        cell: the target; its training settings are the proxy's too, because nothing else transfers.

    Raises:
        ConfigError: a cell without a base shape, or one that is no shape of the model.
    """
    if cell.base is None:
        raise ConfigError("base", "must be set: the base shape is what is tuned", value=None)
    try:
        shape = replace(cell.model, width=cell.base.width, n_layer=cell.base.n_layer)
    except ConfigError as error:  # the target's shape is good, so it is the base's that is not
        base = error.key if error.key in ("width", "n_layer") else "width"
        raise ConfigError(f"base.{base}", error.problem, value=error.value, allowed=error.allowed) from None
    return replace(cell, model=shape, density=1.0, sparsity=STATIC, parameterization="mup")


def study_hash(study: StudyConfig, proxy: CellConfig, fingerprint: str) -> str:
    """Return 16 hex digits over all that makes two trials of a study comparable: space, metric, proxy, data, rules."""
    plain = encode(canonical(proxy))
    plain.pop("hparams")
    fixed = {k: v for k, v in encode(proxy.hparams).items() if k not in study.space}
    parts = [plain, fixed, encode(study.intervals()), study.metric, fingerprint, RULES_VERSION]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tune(
    study: StudyConfig,
    proxy: CellConfig,
    trainer: Trainer,
    folder: Path,
    *,
    fingerprint: str,
    provenance: Mapping[str, Any],
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Winner:
    """Return the best base hyperparameters found, and write them to folder/best.yaml.

    Args:
        study: budget, sampler, space, confirmation.
        proxy: the dense cell that is tuned; its hparams are tried first, and stand for what is not searched.
        trainer: trains trials; a diverged one is told to the sampler as `told_as_diverged` says, and never wins.
        folder: the study's folder: journal.log (optuna-dashboard opens it), best.yaml, lock.
        fingerprint: of the proxy's data.
        provenance: code version and the like, copied into the lineage.
        progress: called with ("search" or "confirm", finished, total).

    Raises:
        ConfigError: a proxy that is not dense, defaults outside the space, or a study of this name with another space.
        BusyError: another coordinator works on this study.
        RecordError: the study's journal cannot be read, or is damaged.
        SuparError: trials keep failing, all of them diverged, or none of the best held on every fresh seed.
    """
    check_study(study, proxy)
    folder = folder.resolve()
    with locks.hold(folder / "lock", f"study {study.name}"):
        tuner = _Tuner(study, proxy, trainer, folder, fingerprint)
        tuner.search(progress)
        scores = tuner.confirm(progress)
        winner = tuner.winner(scores, provenance)
        winner.write(folder / "best.yaml")
    return winner


def check_study(study: StudyConfig, proxy: CellConfig) -> None:
    """Raise ConfigError where a study cannot be of this proxy: `tune` does so before anything starts.

    Args:
        study: the study.
        proxy: the dense cell that is tuned.
    """
    if proxy.density != 1:
        raise ConfigError("density", "the proxy is dense", value=proxy.density, allowed="1")
    if proxy.seed in study.confirm_seeds:
        raise ConfigError(
            "study.confirm_seeds",
            "must be seeds that the trials did not use",
            value=list(study.confirm_seeds),
            allowed=f"any but seed = {proxy.seed}",
        )
    for name, interval in study.intervals().items():
        value = getattr(proxy.hparams, name)
        if not (value > 0 and interval.low_log2 <= math.log2(value) <= interval.high_log2):
            raise ConfigError(
                f"hparams.{name}",
                "is tried first, so it must lie in the search space",
                value=value,
                allowed=f"2^{interval.low_log2:g} .. 2^{interval.high_log2:g}",
            )


class _Tuner:
    def __init__(
        self,
        study: StudyConfig,
        proxy: CellConfig,
        trainer: Trainer,
        folder: Path,
        fingerprint: str,
    ) -> None:
        self.config, self.proxy, self.trainer = study, proxy, trainer
        self.fingerprint = fingerprint
        self.hash = study_hash(study, proxy, fingerprint)
        self.told_as_diverged = told_as_diverged(proxy)
        self.study = self._open(folder / "journal.log")

    def _open(self, journal: Path) -> optuna.Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        mend_journal(journal, self.config.name)
        # the default symlink lock spins for ever once its holder was killed
        backend = JournalFileBackend(str(journal), JournalFileOpenLock(str(journal)))
        opened = optuna.create_study(storage=JournalStorage(backend), study_name=self.config.name, load_if_exists=True)
        known = opened.user_attrs.get("study_hash")
        if known is None:
            opened.set_user_attr("space", encode(self.config.intervals()))
            defaults = {n: getattr(self.proxy.hparams, n) for n in self.config.intervals()}
            opened.enqueue_trial(defaults, skip_if_exists=True)
            opened.set_user_attr("study_hash", self.hash)  # last: without it, all of this is done again
        elif known != self.hash:
            raise ConfigError(
                "study.name",
                "a study of this name has another space, proxy, metric, data or rule version",
                value=self.config.name,
                allowed=f"a new name, or delete {journal.parent}",
            )
        refuse_misled(self.config.name, opened.get_trials(deepcopy=False), self.told_as_diverged)
        return opened

    # -- search -----------------------------------------------------------------------------------

    def search(self, progress: Callable[[str, int, int], None]) -> None:
        """Ask, train and tell until the total budget is spent."""
        running = self._reconcile()
        failures, error = 0, ""
        total = self.config.n_trials
        held: dict[str, CellEnd] = {}
        while True:
            progress("search", min(len(self._complete()), total), total)
            while self._may_ask(len(running)):
                trial = self._ask()
                running[trial.number] = self.trainer.submit(self._cell(trial.params))
            if not running:
                return
            under_way = set(running.values())
            held |= {event.cell_id: event for event in self.trainer.ends(timeout_s=60.0) if event.cell_id in under_way}
            # a batch is told as a whole and in order, so that what the sampler sees does not depend on who was faster
            if self.config.batch_trials is not None and held.keys() < under_way:
                continue
            for number in sorted(number for number, cell in running.items() if cell in held):  # two may share a cell
                error = self._tell(number, held[running.pop(number)])
                failures = failures + 1 if error else 0
            held = {}
            if failures >= FAILURES_IN_A_ROW:
                raise SuparError(
                    f"study {self.config.name}: {failures} trials in a row failed; the last error: {error}"
                )

    def _complete(self) -> list[optuna.trial.FrozenTrial]:
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _may_ask(self, n_running: int) -> bool:
        from optuna.trial import TrialState

        if len(self._complete()) + n_running >= self.config.n_trials:
            return False
        batch = self.config.batch_trials
        if batch is None:
            return n_running < self.trainer.slots
        asked = sum(trial.state != TrialState.WAITING for trial in self.study.get_trials(deepcopy=False))
        return n_running == 0 or asked % batch != 0

    def _ask(self) -> optuna.trial.Trial:
        from optuna.distributions import BaseDistribution, FloatDistribution

        trials = self.study.get_trials(deepcopy=False)
        self.study.sampler = next_sampler(self.config, trials, self.told_as_diverged)
        space: dict[str, BaseDistribution] = {
            name: FloatDistribution(2**interval.low_log2, 2**interval.high_log2, log=True)
            for name, interval in self.config.intervals().items()
        }
        with warnings.catch_warnings():  # that the Gaussian process clips infinity is what we want of it
            warnings.filterwarnings("ignore", message="Clip non-finite values")
            return self.study.ask(space)

    def _cell(self, params: Mapping[str, float], seed: int | None = None) -> CellConfig:
        return replace(
            self.proxy,
            hparams=replace(self.proxy.hparams, **params),
            seed=self.proxy.seed if seed is None else seed,
        )

    def _reconcile(self) -> dict[int, str]:
        """Submit again what a dead coordinator had asked for: the same numbers give the same cell, done or resumed."""
        from optuna.trial import TrialState

        return {
            trial.number: self.trainer.submit(self._cell(trial.params))
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        }

    def _tell(self, number: int, event: CellEnd) -> str:
        """Tell one trial; return why it gave no value, "" where it did."""
        from optuna.trial import Trial, TrialState

        trial = Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)
        trial.set_user_attr("cell_id", event.cell_id)
        trial.set_user_attr("end", event.end)
        value = self.told_as_diverged if event.end == "diverged" else self._value(event)
        if value is None:
            error = self._why_no_value(event)
            trial.set_user_attr("error", error)
            self.study.tell(number, state=TrialState.FAIL)
            return error
        self.study.tell(number, value)
        return ""

    def _value(self, event: CellEnd) -> float | None:
        if event.end != "done" or event.result is None:
            return None
        value = event.result["summary"].get(self.config.metric)
        return None if value is None or not math.isfinite(value) else float(value)

    def _why_no_value(self, event: CellEnd) -> str:
        if event.end != "done":
            return event.message or event.end
        return (
            f"done, but its record has no {self.config.metric}: it was not measured, or was not finite (a run with such a "
            "loss should end as diverged)"
        )

    # -- confirmation -----------------------------------------------------------------------------

    def confirm(self, progress: Callable[[str, int, int], None]) -> dict[int, list[float | None]]:
        """Return the fresh-seed losses of the best trials by trial number, None where a seed diverged: a winner picked on one
        seed flatters itself.

        Raises:
            SuparError: no trial gave a loss, or a confirmation failed.
        """
        ranked = self._ranked()
        top, seeds = ranked[: self.config.confirm_top_k] or ranked[:1], self.config.confirm_seeds
        losses: dict[int, list[float | None]] = {trial.number: [None] * len(seeds) for trial in top}
        waiting = {
            self.trainer.submit(self._cell(trial.params, seed)): (trial.number, position)
            for trial in top
            for position, seed in enumerate(seeds)
        }
        total = len(waiting)
        if not total:
            return losses
        while waiting:
            progress("confirm", total - len(waiting), total)
            for event in self.trainer.ends(timeout_s=60.0):
                if event.cell_id in waiting:
                    number, position = waiting.pop(event.cell_id)
                    value = losses[number][position] = self._value(event)
                    if value is None and event.end != "diverged":
                        raise SuparError(f"confirming trial {number} failed: {self._why_no_value(event)}")
        progress("confirm", total, total)
        return losses

    def _ranked(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that gave a loss, best first, one of each cell."""
        trials = self._complete()
        best_first = sorted(filter(measured, trials), key=lambda trial: (trial.value, trial.number))
        if not best_first:
            space = ", ".join(
                f"study.space.{name} = 2^{interval.low_log2:g} .. 2^{interval.high_log2:g}"
                for name, interval in self.config.intervals().items()
            )
            raise SuparError(
                f"study {self.config.name}: all {len(trials)} trials diverged, so there is no winner. They were drawn from "
                f"{space}. Move the space down (lr first), or warm up longer, under another study.name: a study keeps its space"
            )
        of_cell: dict[str, optuna.trial.FrozenTrial] = {}
        for trial in best_first:
            of_cell.setdefault(cell_id(self._cell(trial.params), self.fingerprint), trial)
        return list(of_cell.values())

    def winner(self, losses: Mapping[int, Sequence[float | None]], provenance: Mapping[str, Any]) -> Winner:
        """Return the best of the trials that held on every fresh seed.

        Args:
            losses: as `confirm` returned them.
            provenance: joins the lineage.

        Raises:
            SuparError: each of them diverged on some seed.
        """
        trials = {trial.number: trial for trial in self._complete()}
        held = [number for number in losses if None not in losses[number]]
        if not held:
            raise SuparError(
                f"study {self.config.name}: each of its best {len(losses)} trials ({', '.join(map(str, losses))}) diverged on "
                f"a fresh seed of {list(self.config.confirm_seeds)}, so there is no winner. Confirm more of them "
                f"(study.confirm_top_k={2 * self.config.confirm_top_k}; what is done is not trained again), or move the "
                "space down under another study.name"
            )

        def score(number: int) -> tuple[bool, float, int]:
            values = [value for value in losses[number] if value is not None] or [trials[number].value or 0.0]
            return number not in held, sum(values) / len(values), number

        best = min(held, key=score)
        lineage = {
            "study": self.config.name,
            "study_hash": self.hash,
            "trial": best,
            "n_trials": len(trials),
            "metric": self.config.metric,
            "value": trials[best].value,
            "confirmed": [
                {"trial": number, "seeds": list(self.config.confirm_seeds), "values": list(values)}
                for number, values in sorted(losses.items(), key=lambda item: score(item[0]))
                if values
            ],
            "space": encode(self.config.intervals()),
            "sampler": {"name": self.config.sampler, "seed": self.config.seed},
            "data": {"name": self.proxy.data.name, "fingerprint": self.fingerprint},
            "rules_version": RULES_VERSION,
            "proxy": encode(self.proxy),
            **provenance,
        }
        return Winner(replace(self.proxy.hparams, **trials[best].params), lineage, self.proxy.base)
