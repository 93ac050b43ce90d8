"""`report`: one HTML file from a real study and a real grid; what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from supar_sweep.cli.main import main
from supar_sweep.sweep.records import Store
from tests.command_line import CELL, STUDY, call, refused

pytestmark = pytest.mark.xdist_group("report")  # they share the records below


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a study, a grid that takes its winner, and a grid in which some cells fail; tiny and real."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    common = (*CELL, "launcher.processes=1", f"runs_dir={folder}")
    tune = [word for word in STUDY if not word.startswith(("study.n_trials", "study.confirm"))]
    told = ("study.name=mine", "study.n_trials=3", "study.confirm_top_k=1", "study.confirm_seeds=[5]")
    assert main(["tune", *tune, *told, f"runs_dir={folder}"]) == 0
    axes = (
        "experiment.axes.parameterization=[sp,supar]",
        "experiment.axes.density=[1,0.5]",
        "experiment.axes.width=[16,32]",
        "experiment.axes.seed=[0,1]",
        "experiment.axes.lr={log2: [-8, -5]}",
    )
    tuned = f"hparams={folder}/studies/mine/best.yaml"
    assert main(["run", *common, *axes, tuned, "experiment.name=grid"]) == 0
    broken = (
        "experiment.axes.lr=[0.01,0.02]",
        "experiment.axes.train.target=[null,json.no_such_function]",
        "model.width=16",
    )
    assert main(["run", *common, *broken, "experiment.name=broken"]) == 1
    return folder


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_it_writes_one_page_and_prints_the_verdict(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code, out, err = call(capsys, "report", f"runs_dir={runs}", "experiment.name=grid", "format=json")
    assert code == 0, err
    path = runs / "experiments" / "grid" / "report.html"
    assert f"wrote {path}" in err
    assert len(json.loads(out)) == 2 * 2 * 2  # a line per parameterization, density, width
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    titles = re.findall(r"<figure>\s*<h3>([^<]+)", page)
    assert titles[:2] == ["Loss against learning rate, width 16", "Loss against learning rate, width 32"]
    assert titles[-3:] == ["Loss against density", "Training curves", "The study mine"]
    assert "scaling" in page[page.index("Figures that this grid does not support") :]
    text = text_of(page)
    for said in (
        "SP",
        "S\N{MICRO SIGN}Par",
        "The rule.",
        "Study mine",
        "Formula.",
        "No cell failed.",
        "Scaling fit loss = floor",
        "a fit needs 6",
        "supar-sweep tune",
    ):
        assert said in text, said
    assert f"All {2 * 2 * 2 * 2 * 4} cells" in text


def test_the_studys_cost_is_that_of_its_cells(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"runs_dir={runs}", "experiment.name=grid"]) == 0
    text = text_of((runs / "experiments" / "grid" / "report.html").read_text(encoding="utf-8"))
    assert re.search(r"Tuning the proxy 4 runs, [\d.]+ [kMG]FLOP in [\d.]+ s", text)  # three trials, one confirmation
    assert re.search(r"Tuning each target directly [\d.]+ [kMG]FLOP in [\d.]+ s for 3 shapes", text)


def test_failures_are_on_the_page_with_their_log(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "report", f"runs_dir={runs}", "experiment.name=broken")
    assert code == 0, err
    text = text_of((runs / "experiments" / "broken" / "report.html").read_text(encoding="utf-8"))
    assert "The grid is not complete: 2 failed of 4 cells." in text
    assert "train.target: cannot be imported" in text
    log = re.search(r"(\S+/attempts/0001/log.txt|\S+/attempts/0001)", text)
    assert log is not None
    assert Path(log[1]).exists()


def test_a_grid_that_was_never_run_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    error = refused(capsys, "report", f"runs_dir={runs}", "experiment.name=gird")
    assert "has not been run" in error
    assert "did you mean 'grid'?" in error


def test_a_grid_without_a_result_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*CELL, "launcher.processes=1", f"runs_dir={runs}", "model.width=16", "experiment.name=none")
    assert main(["run", *words, "train.target=json.no_such_function"]) == 1
    capsys.readouterr()
    error = refused(capsys, "report", f"runs_dir={runs}", "experiment.name=none")
    assert "no cell is complete yet (1 failed)" in error
    assert not (runs / "experiments" / "none" / "report.html").exists()


def test_settings_of_figures_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert "figure" in refused(capsys, "report", f"runs_dir={runs}", "experiment.name=grid", "+figure=pareto")
    assert "metric" in refused(capsys, "report", f"runs_dir={runs}", "experiment.name=grid", "metric=loss")


def test_a_torn_result_is_left_out_and_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = next(folder for folder in Store(runs / "cells").index().values() if folder.path.name.startswith("sp-w32"))
    whole = (cell.path / "result.json").read_bytes()
    (cell.path / "result.json").write_bytes(whole[:100])
    try:
        assert main(["report", f"runs_dir={runs}", "experiment.name=grid"]) == 0
        text = text_of((runs / "experiments" / "grid" / "report.html").read_text(encoding="utf-8"))
        assert "1 corrupt of 64 cells" in text
        assert "is torn" in text
    finally:
        (cell.path / "result.json").write_bytes(whole)
