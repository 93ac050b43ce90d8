"""`coord-check` on real runs, small: SP fails, muP fails in density, SuPar passes; records are used again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import call, refused
from tests.command_line import here as here

SMALL = (
    *("model.width=128", "model.d_head=16", "model.context_tokens=32", "base.width=64"),
    *("check.densities=[1,0.5,0.25]", "check.widths=[64,128,256]", "check.seeds=[0,1,2,3]"),
    *("train.steps=4", "train.batch_seqs=8", "hparams.lr=0.004"),
)


@pytest.mark.slow
def test_only_supar_passes_in_density_and_sp_fails_in_width(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "coord-check", *SMALL, "format=json")
    assert code == 0, err
    folder = Path("runs/coord_checks/coord_check")
    summary = json.loads((folder / "coord_check.json").read_text())
    found = {(name, axis): each["answer"] for name, axes in summary["answers"].items() for axis, each in axes.items()}
    assert found["sp", "density"] == found["mup", "density"] == found["sp", "width"] == "fail", err
    assert found["supar", "density"] == "pass", err
    assert found["supar", "width"] != "fail", err
    assert json.loads(out) == summary["tests"]
    figures = sorted(path.stem for path in folder.glob("*.png"))
    assert figures == sorted(
        f"coord_check-{axis}-{statistic}"
        for axis in ("density", "width")
        for statistic in ("activation", "gradient", "change")
    )
    assert "evidence, not a proof" in err
    # muP and SuPar share their dense cells: 3 densities and 2 more widths, twice, and the sparse ones of the third
    assert len(list((folder / "cells").glob("*.json"))) == 4 * (5 + 5 + 2)


TINY = (
    *("model.width=32", "model.d_head=8", "model.context_tokens=16", "base.width=16", "train.steps=2"),
    *("check.densities=[1,0.5]", "check.widths=[]", "check.seeds=[0,1]", "check.parameterizations=[supar]"),
)


def test_a_second_call_trains_nothing_and_plot_draws_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, first, _ = call(capsys, "coord-check", *TINY, "format=json", "check.threshold=9")
    cells = {path: path.stat().st_mtime_ns for path in Path("runs/coord_checks/coord_check/cells").iterdir()}
    assert len(cells) == 2 * 2
    _, again, _ = call(capsys, "coord-check", *TINY, "format=json", "check.threshold=9")
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in Path("runs/coord_checks/coord_check/cells").iterdir()} == cells
    for path in Path("runs").rglob("*.png"):
        path.unlink()
    code, plotted, err = call(capsys, "plot", "figure=coord_check", "format=json", "check.threshold=9")
    assert code == 0, err
    assert plotted == first
    assert len(list(Path("runs").rglob("coord_check-density-*.png"))) == 3


def test_the_held_out_part_may_be_short_as_nothing_is_evaluated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "short.txt").write_text("a text of few words, " * 40)
    text = (
        "data=text",
        "data.paths=[short.txt]",
        "data.val_fraction=0.1",
        "model.context_tokens=16",
        "train.batch_seqs=2",
    )
    check = ("check.parameterizations=[supar]", "check.densities=[1,0.5]", "check.widths=[]", "check.seeds=[0]")
    shape = ("model.width=16", "model.d_head=8", "model.n_layer=1", "base.width=8", "base.n_layer=1", "train.steps=2")
    code, _, err = call(capsys, "coord-check", *text, *check, *shape, "runtime.device=cpu")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=1"], "seed: has no effect on coord-check; allowed: check.seeds=[...]"),
        (["parameterization=sp"], "check.parameterizations=[...]"),
        (["schedule=constant"], "the learning rate stays constant"),
        (["train.eval_seqs=4"], "train.eval_seqs: has no effect on coord-check"),
        (["runtime.compile=true"], "runtime.compile: has no effect on coord-check"),
        (["check.densities=[1]", "check.widths=[]"], "there is no slope"),
        (["check.seeds=[]"], "check.seeds: is empty"),
        (["check.threshold=0"], "check.threshold: out of range"),
        (["check.thresh=1"], "did you mean 'check.threshold'?"),
        (["check.densities=[1,2]"], "density: out of range"),
        (["check.parameterizations=[mop]"], "did you mean 'mup'?"),
        (["train.target=a.b"], "train.target"),
        (["sparsity=rigl"], "sparsity.method: has no effect on a coordinate check"),
        (["sparsity=gmp", "density=0.5", "check.densities=[]"], "(got 'gmp'); allowed: static"),
    ],
)
def test_wrong_requests_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert says in refused(capsys, "coord-check", *words)
    assert not list(here.iterdir())
