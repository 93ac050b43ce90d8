"""`plot`: every figure from a real grid and a real study, axes by name, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from supar_sweep.cli.main import main
from supar_sweep.cli.plot import KINDS
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.trials import trial_rows
from tests.command_line import CELL, STUDY, call, refused

pytestmark = pytest.mark.xdist_group("plot")  # they share the records below


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a grid over lr, width and density, one over init_std, and a study; all tiny and real."""
    runs = tmp_path_factory.mktemp("records") / "runs"
    common = (*CELL, "launcher.processes=1", f"runs_dir={runs}")
    axes = (
        "experiment.axes.parameterization=[sp,supar]",
        "experiment.axes.density=[1,0.5]",
        "experiment.axes.seed=[0,1]",
    )
    lr = ("experiment.axes.width=[16,32]", "experiment.axes.lr={log2: [-8, -5]}")
    assert main(["run", *common, *axes, *lr, "experiment.name=over_lr"]) == 0
    init = ("model.width=16", "experiment.axes.init_std={log2: [-6, -3]}")
    assert main(["run", *common, *axes, *init, "experiment.name=over_init"]) == 0
    tune = [word for word in STUDY if not word.startswith("study.n_trials")]
    assert main(["tune", *tune, f"runs_dir={runs}", "study.n_trials=3", "study.name=mine"]) == 0
    return runs


def plot(records: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return the rows that `plot` prints as JSON, and the files that it says it wrote."""
    capsys.readouterr()
    code, out, err = call(capsys, "plot", f"runs_dir={records}", "experiment.name=over_lr", *words, "format=json")
    assert code == 0, err
    return json.loads(out), [
        Path(line.removeprefix("wrote ")) for line in err.splitlines() if line.startswith("wrote ")
    ]


DRAWN = [
    (("where.width=32",), "lr_basins-width32"),
    (("figure=lr_basins", "hue=width", "where.density=1"), "lr_basins-hue-width-density1"),
    (("figure=lr_basins", "hue=width", "col=density", "where.parameterization=supar"), "lr_basins"),
    (("hue=width", "row=density"), "lr_basins-hue-width-row-density"),
    (("figure=init_basins", "experiment.name=over_init"), "init_basins"),
    (("figure=pareto", "where.width=16"), "pareto-width16"),
    (("figure=pareto", "col=width", "metric=val_loss"), "pareto-col-width-val_loss"),
    (("figure=pareto", "x=width", "col=density"), "pareto-x-width-col-density"),
    (("figure=heatmap",), "heatmap"),
    (("figure=lr_exponent", "x=parameterization", "hue=width"), "lr_exponent-x-parameterization-hue-width"),
    (("figure=scaling",), "scaling"),
    (("figure=loss_curves", "where={width: 16, lr: 0.0078125}"), "loss_curves"),
    (
        ("figure=loss_curves", "x=step", "hue=lr", "col=none", "where={width: 16, density: 1, parameterization: sp}"),
        "loss",
    ),
    (("figure=study", "study.name=mine"), "study"),
]


@pytest.mark.parametrize(("words", "stem"), DRAWN, ids=[" ".join(words) for words, _ in DRAWN])
def test_every_figure_is_drawn_with_its_data(
    records: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], stem: str
) -> None:
    rows, written = plot(records, capsys, *words)
    assert rows
    by_kind = {path.suffix: path for path in written}
    assert by_kind[".png"].stem.startswith(stem)
    assert by_kind[".png"].read_bytes().startswith(b"\x89PNG")
    assert by_kind[".pdf"].read_bytes().startswith(b"%PDF")
    with by_kind[".csv"].open(newline="") as file:
        assert list(csv.DictReader(file))


def test_all_figures_are_tried_here_or_with_the_check() -> None:
    named = {word.partition("=")[2] for words, _ in DRAWN for word in words if word.startswith("figure=")}
    assert named == set(KINDS) - {"coord_check"}


def test_lr_basins_over_two_widths_are_two_figures_and_one_verdict(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, written = plot(records, capsys)
    assert {path.stem for path in written if path.suffix == ".png"} == {"lr_basins-width16", "lr_basins-width32"}
    assert {(row["parameterization"], row["width"], row["density"]) for row in rows} == {
        (name, width, density) for name in ("sp", "supar") for width in (16, 32) for density in (1.0, 0.5)
    }
    assert (records / "experiments/over_lr/verdict.json") in written
    fits = json.loads((records / "experiments/over_lr/summary.json").read_text())["scaling"]["fits"]
    # two widths at two densities are too few for four parameters
    assert {name: (each["n_points"], each["fit"]) for name, each in fits.items()} == {
        "sp": (4, None),
        "supar": (4, None),
    }
    assert all("a fit needs 6" in each["reason"] for each in fits.values())


def test_a_verdict_over_init_std_stands_beside_that_over_lr(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, written = plot(records, capsys, "figure=init_basins", "experiment.name=over_init")
    assert {path.name for path in written if path.suffix == ".json"} == {
        "init_basins-verdict.json",
        "init_basins-summary.json",
    }
    assert all("log2_init_std_opt" in row for row in rows)


def test_a_figure_that_the_experiment_names_on_the_command_line_is_no_idle_word(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ("experiment.name=over_lr", "+experiment.plot.figure=pareto", "where.width=16")
    code, _, err = call(capsys, "plot", f"runs_dir={records}", *words)
    assert code == 0, err
    assert "pareto-width16.png" in err
    assert "no effect" not in err


def test_loss_curves_hold_every_step_of_a_short_run(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = plot(records, capsys, "figure=loss_curves", "x=step", "where={width: 16, lr: 0.0078125}")
    assert sorted({row["step"] for row in rows}) == [1, 2, 3, 4]
    assert {row["n_seeds"] for row in rows} == {2}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("figure=paretto", "figure: unknown choice (got 'paretto'); did you mean 'pareto'?"),
        (
            "figure=pareto x=dnsity",
            "x: no such axis (got 'dnsity'); did you mean 'density'?; allowed: parameterization,",
        ),
        ("hue=learning_rate", "hue: no such axis"),
        ("col=lr", "all axes of a figure must differ"),
        ("where.depth=2", "where.depth: no such column"),
        ("where.width=17", "where.width: no row has it (got 17)"),
        ("figure=study x=lr", "x: has no effect on figure=study"),
        ("figure=loss_curves metric=val_loss", "metric: has no effect on figure=loss_curves"),
        ("figure=scaling hue=width", "hue: has no effect on figure=scaling"),
        ("figure=pareto row=width", "row: has no effect on figure=pareto"),
        ("row=lr", "all axes of a figure must differ"),
        ("figure=heatmap reference=1", "reference: has no effect on figure=heatmap"),
        ("check.name=mine", "check.name: has no effect on figure=lr_basins"),
        ("metric=loss", "metric: unknown choice (got 'loss')"),
        ("reference=dense", "reference: must be a number"),
        ("figure=study study.name=mne", "study.name: there is no such study"),
        ("figure=coord_check check.name=nope", "check.name: has not been run"),
        ("xx=lr", "unknown key"),
    ],
)
def test_wrong_requests_are_refused(records: Path, capsys: pytest.CaptureFixture[str], words: str, says: str) -> None:
    capsys.readouterr()
    assert says in refused(capsys, "plot", f"runs_dir={records}", "experiment.name=over_lr", *words.split(" "))


def test_trials_are_read_from_the_journal(records: Path) -> None:
    rows = trial_rows(records, "mine")
    assert [row["number"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["end"] == "done"
        assert row["loss"] > 0
        assert set(row["params"]) == {"lr", "init_std", "alpha_in", "alpha_out"}
    with pytest.raises(ConfigError, match="mine"):
        trial_rows(records, "others")
