"""`supar-sweep tune`: the study of base hyperparameters on the proxy, from settings to best.yaml."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from supar_sweep.cli.idle import refuse_for_proxy, refuse_idle_evaluation, refuse_idle_runtime
from supar_sweep.cli.launch import (
    check_corpora,
    check_shares,
    check_targets,
    make_launcher,
    price,
    submission_facts,
    with_threads,
)
from supar_sweep.cli.output import emit, say
from supar_sweep.cli.progress import Live
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import SuparError
from supar_sweep.sweep.jobs import Launcher
from supar_sweep.sweep.records import Store
from supar_sweep.sweep.trainer import CellTrainer
from supar_sweep.sweep.tune import check_study, proxy_of
from supar_sweep.sweep.tune import tune as run_study
from supar_sweep.sweep.winner import Winner
from supar_sweep.training.corpus import fingerprint, resolve


def tune(settings: Settings) -> int:
    """Search the proxy's hyperparameters up to the study's total budget, print the winner; return 0."""
    refuse_for_proxy(settings.given(), settings.cell())
    proxy, _ = checked_proxy(settings)
    refuse_idle_evaluation(settings.given(), [proxy])
    refuse_idle_runtime(settings.given(), settings.runtime(), [proxy])
    settings = with_threads(settings, [proxy] * settings.study().n_trials)
    with make_launcher(settings) as launcher:
        winner = study(settings, launcher)
    emit(winner_rows(winner), format=settings.format, title=f"study {settings.study().name}")
    say(f"wrote {settings.study_dir() / 'best.yaml'}")
    return 0


def checked_proxy(settings: Settings) -> tuple[CellConfig, str]:
    """Return the proxy of the settings' study and its data's fingerprint, after a look at all that can be wrong.

    Raises:
        ConfigError, DataError: what is wrong.
    """
    proxy = proxy_of(settings.cell())
    proxy = replace(proxy, data=resolve(proxy.data))
    check_study(settings.study(), proxy)
    found = fingerprint(proxy.data)
    check_corpora([proxy])
    check_shares(settings, [proxy])
    check_targets(settings, [proxy])
    return proxy, found


def study(settings: Settings, launcher: Launcher) -> Winner:
    """Return the winner of the settings' study, trained by `launcher`.

    Args:
        settings: the study, and the cell whose base shape is its proxy.
        launcher: who trains; the caller closes it.
    """
    proxy, print_of_data = checked_proxy(settings)
    facts = submission_facts(settings)
    trainer = CellTrainer(
        Store(settings.runs_dir / "cells"),
        launcher,
        settings.runtime(),
        fingerprint=print_of_data,
        provenance=facts,
        price=price(settings, launcher.processes),
    )
    with Live(f"tune {settings.study().name}") as live:
        clock = _Clock()

        def progress(phase: str, done: int, total: int) -> None:
            live.show(done, total, f"{phase}{clock.left(phase, done, total)}")

        try:
            return run_study(
                settings.study(),
                proxy,
                trainer,
                settings.study_dir(),
                fingerprint=print_of_data,
                provenance={"provenance": facts},
                progress=progress,
            )
        except SuparError:  # trials that a queue still holds would fail alike
            launcher.cancel()
            raise


class _Clock:
    """The time left of a phase, from the trials that were finished since it began."""

    def __init__(self) -> None:
        self._phase, self._from, self._since_s = "", 0, 0.0

    def left(self, phase: str, done: int, total: int) -> str:
        import time

        from supar_sweep.cli.progress import duration

        now_s = time.monotonic()
        if phase != self._phase:
            self._phase, self._from, self._since_s = phase, done, now_s
        if done <= self._from or done >= total:
            return ""
        each_s = (now_s - self._since_s) / (done - self._from)
        return f", {duration(each_s * (total - done))} left"


def winner_rows(winner: Winner) -> list[dict[str, Any]]:
    """Return the tuned hyperparameters as rows: name, value, and its log2, the unit in which they were searched."""
    import math

    return [
        {"hyperparameter": name, "value": value, "log2": math.log2(value) if value > 0 else None}
        for name, value in encode(winner.hparams).items()
    ]
