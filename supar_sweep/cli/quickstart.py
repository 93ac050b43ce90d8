"""`supar-sweep quickstart`: tune a dense proxy, remap its hyperparameters, sweep the sparse targets, draw, judge."""

from __future__ import annotations

from dataclasses import replace

from supar_sweep.cli.grid import run_grid
from supar_sweep.cli.launch import experiment_of, freeze, make_launcher, with_threads
from supar_sweep.cli.output import say
from supar_sweep.cli.plot import draw_basins, emit_verdict, grid_rows, metric_of
from supar_sweep.cli.settings import Settings
from supar_sweep.cli.transfer import say_remapped
from supar_sweep.cli.tune import checked_proxy, study
from supar_sweep.config.decode import encode


def quickstart(settings: Settings) -> int:
    """Run the whole main job on this machine; a second call finds all done and only redraws. Returns the exit code."""
    # bad settings are an error now, not after the search
    metric = metric_of(settings)
    freeze(settings)
    proxy, _ = checked_proxy(settings)
    settings = with_threads(settings, [proxy] * settings.study().n_trials)
    with make_launcher(settings) as launcher:
        say("1/4  tuning the dense proxy")
        winner = study(settings, launcher)
        tuned = replace(settings, plain={**settings.plain, "hparams": encode(winner.hparams)}, winner=winner)
        say("2/4  remapping the tuned hyperparameters to the targets")
        say_remapped(tuned)
        say("3/4  sweeping density x LR x seeds at the target's width")
        code = run_grid(tuned, launcher)
    if code:
        return code
    say("4/4  drawing")
    experiment = experiment_of(tuned)
    entries = draw_basins(grid_rows(experiment, experiment.plan()), experiment.folder, metric)
    emit_verdict(entries, settings.format)
    say(f"figure   {experiment.folder / 'lr_basins.png'}")
    say(f"table    {experiment.folder / 'verdict.json'}")
    say(f"tuned    {settings.study_dir() / 'best.yaml'}")
    say(f"records  {settings.runs_dir / 'cells'}")
    return 0
