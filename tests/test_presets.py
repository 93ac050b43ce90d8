"""The paper's figures as experiments: its numbers at scale=paper, plans at every scale, what they share, how they are drawn."""

from __future__ import annotations

from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from supar_sweep.cli.compose import compose
from supar_sweep.cli.launch import freeze
from supar_sweep.cli.plot import KINDS, figure_config
from supar_sweep.cli.rooms import conf_dir
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.rules.transfer import role_hparams
from supar_sweep.sparse.density import MIN_LIVE_PER_NEURON
from supar_sweep.sweep.submission import Experiment
from supar_sweep.sweep.winner import load_winner
from tests.command_line import call, refused
from tests.command_line import here as here

SCALES = ("paper", "gpu1", "cpu")
CHECK = "fig5"
GRIDS = sorted(
    path.stem
    for path in (conf_dir() / "experiment").glob("*.yaml")
    if "${scale}" in path.read_text() and path.stem != CHECK
)
INIT_STD = 0.08665602
LR = 1.62e-2
ISO = {(768, 1.0), (1088, 0.5), (1536, 0.25), (2176, 0.125)}
TO_64 = {2.0**-k for k in range(7)}


@cache
def settings(name: str, scale: str, command: str = "plot") -> Settings:
    data = ("data=stdlib",) if scale == "paper" else ()  # the paper's text is the user's to bring
    words = (f"experiment={name}", f"scale={scale}", *data)
    return Settings.read(command, compose(command, words), words)


@cache
def cells(name: str, scale: str) -> tuple[CellConfig, ...]:
    return tuple(point.cell for point in settings(name, scale).points())


def hidden_std(cell: CellConfig) -> float:
    return role_hparams("hidden", cell.method(), cell.ratios(), cell.hparams, in_block=True, eps=1e-8).init_std


# figure: d_model, L, d_head, batch, steps, warm-up, LR at the last step over the peak, seeds
PAPER: dict[str, tuple[set[int], int, int, int, int, int, float, int]] = {
    "fig1": ({4096}, 2, 64, 128, 1169, 116, 0.1, 3),
    "fig3": ({2048}, 10, 64, 504, 11752, 1175, 0.0, 1),
    "fig6": ({4096}, 2, 64, 128, 1169, 116, 0.1, 3),
    "fig7": ({4096}, 2, 64, 8, 100, 0, 1.0, 3),
    "fig8": ({4096}, 2, 64, 128, 1169, 116, 0.1, 3),
    "fig9": ({768, 1088, 1536, 2176}, 2, 64, 128, 1169, 116, 0.1, 3),
    "fig10": ({768, 1088, 1536, 2176}, 10, 64, 256, 1907, 190, 0.1, 1),
    "fig11": ({256, 512, 1024, 2048}, 2, 64, 128, 1169, 116, 0.1, 3),
    "fig13": ({4096}, 2, 64, 8, 100, 0, 1.0, 3),
    "fig14": ({4096}, 2, 64, 128, 1169, 116, 0.1, 3),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers_stand_at_its_scale(name: str) -> None:
    widths, n_layer, d_head, batch_seqs, steps, warmup_steps, final, n_seeds = PAPER[name]
    found = cells(name, "paper")
    assert {cell.model.width for cell in found} == widths
    assert {(cell.model.n_layer, cell.model.d_head, cell.model.context_tokens) for cell in found} == {
        (n_layer, d_head, 2048)
    }
    assert {(cell.train.batch_seqs, cell.train.steps, cell.schedule.warmup_steps) for cell in found} == {
        (batch_seqs, steps, warmup_steps)
    }
    last = {1.0 if cell.schedule.name == "constant" else cell.schedule.final_lr_fraction for cell in found}
    assert last == {final}
    assert len({cell.seed for cell in found}) == n_seeds
    assert {(cell.model.position, cell.model.activation) for cell in found} == {("alibi", "swiglu")}
    assert {cell.base.width for cell in found if cell.base} == {256}
    optimizer = {(cell.optimizer.beta1, cell.optimizer.beta2, cell.optimizer.clip_norm) for cell in found}
    assert optimizer == {(0.9, 0.95, 1.0)}
    for cell in found:
        if cell.parameterization != "sp":
            alphas = (cell.hparams.alpha_in, cell.hparams.alpha_out, cell.hparams.weight_decay)
            assert alphas == (9.1705, 1.0951835, 0.1)


@pytest.mark.parametrize("name", ["fig1", "fig6", "fig7", "fig8", "fig13", "fig14"])
def test_the_papers_densities(name: str) -> None:
    assert {cell.density for cell in cells(name, "paper")} == TO_64


def test_the_papers_largest_model_goes_to_one_in_128() -> None:
    assert {cell.density for cell in cells("fig3", "paper")} == TO_64 | {2.0**-7}


@pytest.mark.parametrize("name", ["fig9", "fig10"])
def test_iso_parameter_shapes(name: str) -> None:
    assert {(cell.model.width, cell.density) for cell in cells(name, "paper")} == ISO
    for scale in SCALES:
        live = [cell.model.width**2 * cell.density for cell in cells(name, scale)]
        assert max(live) < 1.03 * min(live)


def test_live_weights_a_neuron_stay_in_fig_11() -> None:
    for scale in SCALES:
        assert len({cell.model.width * cell.density for cell in cells("fig11", scale)}) == 1
        assert {(cell.parameterization, cell.sp_start) for cell in cells("fig11", scale)} == {("sp", "own")}
    assert {hidden_std(cell) for cell in cells("fig11", "paper")} == {0.087}


def test_init_and_lr_of_the_papers_figures() -> None:
    for name in ("fig6", "fig14"):
        for cell in cells(name, "paper"):
            assert cell.hparams.init_std == INIT_STD
            if cell.parameterization == "sp":  # .02166
                assert hidden_std(cell) == pytest.approx(INIT_STD / sqrt(16), rel=1e-12)
    for name in ("fig3", "fig9", "fig10"):
        for cell in cells(name, "paper"):
            sp = cell.parameterization == "sp"
            assert cell.hparams.init_std == (0.02 if sp else INIT_STD)
            if sp:
                assert hidden_std(cell) == 0.02
    for cell in cells("fig7", "paper"):
        assert cell.hparams.lr == LR
    of_sp = {"fig3": {2048: 2e-4}, "fig10": {768: 6e-4, 1088: 6e-4, 1536: 2e-4, 2176: 2e-4}}
    for name, by_width in of_sp.items():
        for cell in cells(name, "paper"):
            assert cell.hparams.lr == (by_width[cell.model.width] if cell.parameterization == "sp" else LR)


def test_the_papers_coordinate_check() -> None:
    found = settings(CHECK, "paper", "coord-check")
    cell, check = found.cell(), found.plain["check"]
    assert (cell.model.width, cell.model.n_layer, cell.model.d_head) == (2048, 2, 32)
    assert (cell.train.batch_seqs, cell.train.steps, cell.schedule.name, cell.schedule.warmup_steps) == (
        4,
        10,
        "constant",
        0,
    )
    assert (cell.hparams.lr, cell.hparams.init_std, cell.hparams.alpha_in) == (1.68e-2, 0.101, 11.22)
    assert set(check["densities"]) == TO_64
    assert len(check["seeds"]) == 10


def test_the_papers_proxy() -> None:
    words = ("scale=paper", "data=stdlib")
    found = Settings.read("tune", compose("tune", words), words)
    cell, study = found.cell(), found.study()
    assert (cell.model.width, cell.model.n_layer, cell.model.d_head, cell.train.batch_seqs) == (256, 24, 64, 256)
    tokens = cell.train.steps * cell.train.batch_seqs * cell.model.context_tokens
    assert tokens == pytest.approx(800e6, rel=1e-3)
    assert (study.sampler, study.n_trials) == ("random", 350)
    assert set(study.space) == {"lr", "init_std", "alpha_in", "alpha_out"}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", GRIDS)
def test_every_preset_plans_at_every_scale(name: str, scale: str) -> None:
    grid = freeze(settings(name, scale))
    assert grid.plan.experiment == f"{name}-{scale}"
    assert len(grid.plan.points) == len(cells(name, scale)) >= len(grid.cells) > 1
    if scale != "paper":  # below, SuPar's own optimum drifts
        assert min(cell.model.width * cell.density for cell in cells(name, scale)) >= MIN_LIVE_PER_NEURON


@pytest.mark.parametrize("scale", SCALES)
def test_figures_share_their_cells(scale: str) -> None:
    ids = {name: set(freeze(settings(name, scale)).cells) for name in GRIDS}
    assert ids["fig1"] == ids["fig6"] == ids["fig8"]
    for ablation, of in (("fig14", "fig6"), ("fig13", "fig7")):
        supar = {
            row["cell_id"]
            for row in freeze(settings(ablation, scale)).plan.points
            if row["parameterization"] == "supar"
        }
        assert supar
        assert supar <= ids[of]
        assert not ids[ablation] <= ids[of]


DRAWN: dict[str, dict[str, Any]] = {
    "fig1": {"figure": "lr_basins"},
    "fig3": {"figure": "pareto", "metric": "val_loss"},
    CHECK: {"figure": "coord_check"},
    "fig6": {"figure": "lr_basins"},
    "fig7": {"figure": "init_basins"},
    "fig8": {"figure": "pareto"},
    "fig9": {"figure": "lr_basins", "hue": "width"},
    "fig10": {"figure": "pareto", "x": "width"},
    "fig11": {"figure": "lr_basins", "hue": "width"},
    "fig13": {"figure": "init_basins"},
    "fig14": {"figure": "lr_basins"},
    "depth": {"figure": "heatmap", "hue": "n_layer", "col": "depth"},
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_preset_says_how_it_is_drawn_and_typed_words_win(name: str) -> None:
    for scale in SCALES:
        found = settings(name, scale)
        config = figure_config(found)
        assert {key: getattr(config, key) for key in DRAWN[name]} == DRAWN[name]
    words = (f"experiment={name}", "scale=cpu", "metric=val_loss", "figure=loss_curves")
    typed = figure_config(Settings.read("plot", compose("plot", words), words))
    # the experiment's axes are those of its own figure
    assert (typed.figure, typed.metric, typed.x, typed.hue, typed.col) == ("loss_curves", "val_loss", None, None, None)
    assert typed.figure in KINDS


def test_the_typed_word_wins_over_the_row() -> None:
    words = ("experiment=fig6", "scale=cpu", "train.steps=50", "model.width=128", "experiment.axes.density=[1,0.5]")
    found = [point.cell for point in Settings.read("plan", compose("plan", words), words).points()]
    assert {(cell.train.steps, cell.schedule.warmup_steps, cell.model.width) for cell in found} == {(50, 25, 128)}
    assert {cell.density for cell in found} == {1.0, 0.5}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan experiment=fig6", "scale: must be set for experiment=fig6; allowed: paper, gpu1, cpu"),
        ("plan experiment=fig6 scale=cpus", "scale: has no such option (got 'cpus'); did you mean 'cpu'?"),
        ("plan experiment=lr_basins scale=cpu", "scale: has no effect on experiment=lr_basins"),
        ("plan experiment=fig6 scale=paper", "data.train_path: must be set"),
        ("plan experiment=fig6 scale=cpu ~scales.cpu.lr", "scales.cpu.lr: is missing: the experiment reads it"),
        ("plan experiment=fig6 scale=cpu ~scales.cpu", "scale: experiment=fig6 has no such scale (got 'cpu')"),
        (
            "run experiment=fig5 scale=cpu",
            "experiment: fig5-cpu is a coordinate check, not a grid; allowed: coord-check",
        ),
        ("coord-check experiment=fig6 scale=cpu", "experiment: fig6-cpu is a grid, not a coordinate check"),
        ("report experiment=fig5 scale=cpu", "figure: is not of a grid"),
        ("plot experiment=fig6 scale=cpu +experiment.plot.hues=width", "did you mean 'hue'?"),
        ("status experiment=fig5 scale=cpu", "experiment: fig5-cpu is a coordinate check, not a grid"),
        ("plot experiment=fig5 scale=cpu figure=lr_basins", "experiment: fig5-cpu is a coordinate check, not a grid"),
        ("plan fig6 scale=cpu", "cannot read 'fig6': settings are key=value, as experiment=fig6"),
        ("run fig66", "cannot read 'fig66': settings are key=value"),
        ("report experiment=fig6 scale=cpu figure=scaling x=lr", "x: has no effect on figure=scaling"),
        ("reproduce", "experiment: must be set"),
        # before the search, not after it
        ("reproduce fig6 scale=cpu figure=study", "figure: is not of a grid's records"),
        ("reproduce fig6 scale=cpu figure=coord_check", "figure: is not of a grid's records"),
        ("reproduce fig6 scale=cpu figure=pareto row=seed", "row: has no effect on figure=pareto"),
        ("reproduce fig6 scale=cpu check.name=x", "check.name: has no effect on figure=lr_basins"),
        ("reproduce fig6 scale=cpu hparams=cpu study.n_trials=2", "study.n_trials: has no effect: hparams gives"),
        ("reproduce fig5 scale=cpu figure=pareto", "figure: fig5-cpu is a coordinate check (got 'pareto')"),
        ("reproduce fig5 scale=cpu schedule.warmup_steps=1", "schedule.warmup_steps: has no effect on coord-check"),
        ("reproduce fig5 scale=cpu check.widths=[17]", "d_head"),
        ("quickstart figure=coord_check", "figure: is not of a grid's records"),
        ("reproduce fig66 scale=cpu", "did you mean 'fig6'?"),
        ("reproduce fig6 scale=cpu launcher=slurm launcher.wait=false", "launcher.wait: must be true"),
    ],
)
def test_wrong_requests_are_refused(here: Path, capsys: pytest.CaptureFixture[str], words: str, says: str) -> None:
    assert says in refused(capsys, *words.split())
    assert not (here / "runs").exists()


TINY = (
    *("model.d_head=16", "base.width=16", "train.eval_seqs=2", "study.n_trials=1", "study.confirm_top_k=0"),
    *("study.confirm_seeds=[]", "launcher.processes=1", "train.steps=4"),
)


def planned(here: Path) -> list[CellConfig]:
    return [decode(CellConfig, each.cell) for each in Experiment(here / "runs", "fig6-cpu").plan().cells.values()]


@pytest.mark.slow
def test_reproduce_tunes_runs_draws_and_reports_and_then_finds_all_done(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("model.width=32", "experiment.axes.density=[1,0.5]", "experiment.axes.seed=[0]")
    words = ("reproduce", "fig6", "scale=cpu", *TINY, *small, "format=json")
    code, out, err = call(capsys, *words)
    assert code == 0, err
    folder = here / "runs" / "experiments" / "fig6-cpu"
    for step in ("1/5  tuning", "2/5  remapping", "3/5  sweeping", "4/5  drawing", "5/5  reporting"):
        assert step in err
    assert {path.name for path in folder.iterdir()} >= {"lr_basins.png", "verdict.json", "report.html"}
    tuned = load_winner(here / "runs" / "studies" / "cpu" / "best.yaml").hparams
    assert {cell.hparams.init_std for cell in planned(here)} == {tuned.init_std}
    n = len(list((here / "runs" / "cells").glob("*/*/result.json")))
    assert n > 1 + 9
    assert call(capsys, *words)[:2] == (0, out)
    assert len(list((here / "runs" / "cells").glob("*/*/result.json"))) == n
    code, _, err = call(capsys, "report", "experiment=fig6", "scale=cpu", "format=json")
    assert code == 0, err
    assert "note" not in err


def test_reproduce_takes_hyperparameters_as_they_stand_and_a_figure_that_is_a_check(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("model.width=32", "model.d_head=16", "base.width=16", "train.steps=2", "check.widths=[]")
    few = ("check.densities=[1,0.5]", "check.seeds=[0,1]", "check.parameterizations=[supar]")
    code, _, err = call(capsys, "reproduce", "fig5", "scale=cpu", "hparams=default", *small, *few)
    assert code == 0, err
    assert "1/1  checking" in err
    assert not (here / "runs" / "studies").exists()
    assert (here / "runs" / "coord_checks" / "fig5-cpu" / "coord_check-density-activation.png").exists()
