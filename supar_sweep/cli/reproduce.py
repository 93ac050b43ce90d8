"""`supar-sweep reproduce fig6 scale=cpu`: tune a dense proxy, remap its hyperparameters, sweep, draw and report, in one command.

Every step skips what is done, so the same command continues after whatever stopped it. `quickstart` is the same, of its own grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from supar_sweep.cli.compose import compose
from supar_sweep.cli.coord_check import checked, coord_check
from supar_sweep.cli.grid import run_grid
from supar_sweep.cli.idle import TARGET_ONLY
from supar_sweep.cli.launch import experiment_of, freeze, launcher_config, make_launcher, with_threads
from supar_sweep.cli.output import say, say_written
from supar_sweep.cli.plot import CHECK, draw_grid, figure_config, own_figure, refuse_idle, refuse_no_grid
from supar_sweep.cli.report import write_report
from supar_sweep.cli.settings import CELL_KEYS, FIGURE, OUTPUT, READS, Settings
from supar_sweep.cli.transfer import say_remapped
from supar_sweep.cli.tune import checked_proxy, study
from supar_sweep.errors import ConfigError


def reproduce(settings: Settings) -> int:
    """Make a figure of the paper from nothing; return the exit code of `run`, or 0."""
    if settings.plain.get("experiment") is None or not settings.given("experiment"):
        raise ConfigError("experiment", "must be set: what is reproduced", allowed="e.g. reproduce fig6 scale=cpu")
    chosen = [key for key in settings.given() if key in ("hparams", "hparams_file")]
    if chosen and (idle := settings.given("study")):
        raise ConfigError(idle[0], f"has no effect: {chosen[0]} gives the hyperparameters", allowed="one of them")
    return whole(settings, None if chosen else proxy_settings(settings), with_report=True)


def proxy_settings(settings: Settings) -> Settings:
    """Return those of `tune` with what was typed for it: a scale has one proxy, whatever the length of a figure's own runs.

    Args:
        settings: of `reproduce`.
    """
    read = {*CELL_KEYS, *OUTPUT, *READS["tune"]} - {*TARGET_ONLY, "sparsity"}
    typed = tuple(
        text
        for text, key in zip(settings.overrides, settings.given(), strict=True)
        if key.partition(".")[0] in read and key not in TARGET_ONLY
    )
    return Settings.read("tune", compose("tune", typed, folders=settings.folders), typed)


def whole(settings: Settings, proxy: Settings | None, *, with_report: bool) -> int:
    """Tune, remap, sweep, draw and report; return 0, or the exit code of a `run` that did not complete.

    Args:
        settings: of the grid, or of the coordinate check.
        proxy: of the study; None = the hyperparameters of `settings` stand as they are.
        with_report: whether a grid's report is written too.
    """
    config = figure_config(settings)
    is_grid = settings.drawn().get("figure") != CHECK
    if is_grid:
        refuse_no_grid(config)
    elif config.figure != CHECK:
        raise ConfigError("figure", f"{settings.experiment} is a coordinate check", value=config.figure, allowed=CHECK)
    # the report reads the metric, whatever is drawn
    refuse_idle(settings, config.figure, *(key for key in FIGURE if key != "metric" or not with_report), "check")
    if not getattr(launcher_config(settings), "wait", True):
        raise ConfigError("launcher.wait", f"must be true: {settings.command} draws what it has run", value=False)
    # bad settings are an error now, not after the search
    cells = list(freeze(settings).cells.values()) if is_grid else []
    if not is_grid:
        checked(settings)
    if proxy is not None:
        cells = [checked_proxy(proxy)[0]] * proxy.study().n_trials
    step = _Steps(2 * (proxy is not None) + (3 if is_grid and with_report else 2 if is_grid else 1))
    runtime = with_threads(settings, cells).plain["runtime"]
    with make_launcher(_at(settings, runtime)) as launcher:
        if proxy is not None:
            step("tuning the dense proxy")
            settings = settings.tuned(study(_at(proxy, runtime), launcher))
            step("remapping the tuned hyperparameters to the targets")
            say_remapped(settings)
        if is_grid:
            step("sweeping the targets")
            code = run_grid(_at(settings, runtime), launcher)
            if code:
                return code
    if not is_grid:
        step("checking the coordinates")
        return coord_check(settings)
    step("drawing")
    draw_grid(settings, config)
    experiment = experiment_of(settings)
    if with_report:
        step("reporting")
        say_written([write_report(experiment, experiment.plan(), config.metric, own_figure(settings))[1]])
    if proxy is not None:
        say(f"tuned    {proxy.study_dir() / 'best.yaml'}")
    say(f"records  {settings.runs_dir / 'cells'}")
    return 0


def _at(settings: Settings, runtime: Any) -> Settings:
    """Return the settings with the threads that were chosen: one launcher serves the study and the grid."""
    return replace(settings, plain={**settings.plain, "runtime": runtime})


@dataclass
class _Steps:
    """Counts the steps on stderr."""

    n: int
    done: int = 0

    def __call__(self, what: str) -> None:
        self.done += 1
        say(f"{self.done}/{self.n}  {what}")
