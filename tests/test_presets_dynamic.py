"""Grids over how masks change in training: fig 12 and the study of its learning rates, at every scale; the paper's numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from supar_sweep.cli.compose import compose
from supar_sweep.cli.plot import figure_config
from supar_sweep.cli.settings import Settings
from supar_sweep.rules.parameterization import formula
from supar_sweep.sweep.grid import GridPoint

SCALES = ("paper", "gpu1", "cpu")
FILES = ("data.train_path=train.bin", "data.val_path=val.bin")


def preset(name: str, scale: str) -> Settings:
    words = (f"experiment={name}", f"scale={scale}", *(FILES if scale == "paper" else ()))
    return Settings.read("plot", compose("plot", words), words)


def values(points: list[GridPoint], axis: str, **where: Any) -> list[Any]:
    kept = [p.axes for p in points if all(p.axes[key] == value for key, value in where.items())]
    return list(dict.fromkeys(at[axis] for at in kept))


@pytest.mark.parametrize("scale", SCALES)
def test_fig_12_is_a_whole_grid_of_two_methods_in_rows(scale: str) -> None:
    settings = preset("fig12", scale)
    points = settings.points()
    assert values(points, "method") == ["rigl", "gmp"]
    assert values(points, "parameterization") == ["sp", "mup", "supar"]
    counts = Counter((p.axes["method"], p.axes["density"]) for p in points)
    assert len(set(counts.values())) == 1
    assert figure_config(settings).row == "method"
    # SP's own lr, and for the others octaves around the tuned one that reach the way their optimum moves
    tuned = settings.cell().hparams.lr
    mup, supar = (values(points, "lr", parameterization=name) for name in ("mup", "supar"))
    assert max(mup) / tuned > tuned / min(mup)
    assert max(supar) / tuned < tuned / min(supar)


def test_fig_12_at_paper_scale_is_the_papers() -> None:
    points = preset("fig12", "paper").points()
    for point in points:
        cell, masks = point.cell, point.cell.sparsity
        assert (cell.model.width, cell.model.n_layer, cell.model.d_head) == (1024, 2, 64)
        assert (cell.train.steps, cell.train.batch_seqs, cell.schedule.warmup_steps) == (1169, 128, 116)
        assert cell.schedule.final_lr_fraction == 0.1
        assert cell.layer_density == "uniform"
        schedule = masks.schedule(cell.train.steps)
        assert schedule is not None
        if cell.parameterization == "sp":
            assert (cell.sp_start, cell.hparams.init_std) == ("own", 0.02166)
        else:
            assert (cell.hparams.init_std, cell.hparams.alpha_in) == (0.08665602, 9.1705)
        assert schedule.method == point.axes["method"]
        assert schedule.interval_steps == pytest.approx(100, abs=1)
        assert masks.drop_fraction == (0.3 if masks.method == "rigl" else None)
        assert masks.hparams_density == (None if masks.method == "rigl" else "final")
    assert values(points, "density") == [2.0**-n for n in range(6, -1, -1)]
    assert values(points, "seed") == [0, 1, 2]


@pytest.mark.parametrize("scale", SCALES)
def test_the_study_asks_every_method_under_three_exponents(scale: str) -> None:
    settings = preset("dynamic_lr_exponent", scale)
    points = settings.points()
    assert sorted(values(points, "method")) == ["gmp", "rigl", "set"]
    assert values(points, "dynamic_lr_exponent") == [0.0, 0.5, 1.0]
    for point in points:
        power = {0.0: "", 0.5: " m_rho^-0.5", 1.0: " m_rho^-1"}[point.axes["dynamic_lr_exponent"]]
        assert formula("lr", "hidden", point.cell.method(), in_block=True) == f"m_d^-1{power}"
    # the less the rule raises the lr of sparse models, the further up their best one
    tops = [max(values(points, "lr", dynamic_lr_exponent=a)) for a in (0.0, 0.5, 1.0)]
    assert tops == sorted(tops, reverse=True)
    assert figure_config(settings).figure == "lr_exponent"


@pytest.mark.parametrize("method", ["static", "set", "rigl", "gmp"])
def test_a_method_on_an_axis_is_the_method_of_its_group(method: str) -> None:
    density = () if method == "static" else ("density=0.5",)
    alone = Settings.read("run", compose("run", (f"sparsity={method}", *density)), (f"sparsity={method}", *density))
    words = ("experiment=dynamic", f"experiment.axes.method=[{method}]")
    (point, *_) = Settings.read("run", compose("run", words), words).points()
    assert point.cell.sparsity == alone.cell().sparsity
