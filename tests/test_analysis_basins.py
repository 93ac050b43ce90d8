"""Rows -> table -> BasinSet: what is counted, grouped, and refused."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from analysis.basins import basin_sets, data_rows, lr_basins
from analysis.frames import axes_of, frame, parts
from supar_sweep.errors import ConfigError
from tests.basin_rows import OPTIMA, rows


def test_panels_lines_and_points_follow_the_grid() -> None:
    basins = lr_basins(frame(rows()))
    assert [panel.col for panel in basins.panels] == ["sp", "mup", "supar"]
    for panel in basins.panels:
        assert [line.hue for line in panel.lines] == [1.0, 1 / 16]
        assert panel.reference_hue == 1.0
        for line in panel.lines:
            assert [point.log2_x for point in line.points] == list(range(-12, -1))
            assert line.n_seeds == 2
    assert basins.fixed == {"width": 256, "n_layer": 2}


def test_each_line_gets_its_optimum_and_each_panel_the_dense_one() -> None:
    basins = lr_basins(frame(rows()))
    for panel in basins.panels:
        for line, truth in zip(panel.lines, OPTIMA[panel.col], strict=True):
            assert line.optimum.x == pytest.approx(truth, abs=0.15)
        assert panel.transferred is panel.lines[0].optimum


def test_mean_and_standard_error_are_over_the_seeds() -> None:
    point = lr_basins(frame(rows(n_seeds=3))).panels[0].lines[0].points[0]
    assert point.mean == pytest.approx(np.mean(point.losses))
    assert point.stderr == pytest.approx(np.std(point.losses, ddof=1) / math.sqrt(3))
    alone = lr_basins(frame(rows(n_seeds=1))).panels[0].lines[0].points[0]
    assert alone.stderr is None


def test_only_done_and_diverged_are_data() -> None:
    changed = rows(optima={"supar": (-7.0, -7.1)})
    ends = {-3: "diverged", -4: "failed", -5: "running"}
    for row in changed:
        row["end"] = ends.get(round(math.log2(row["lr"])), "done")
        if row["end"] != "done":
            row["train_loss"] = None
    basins = lr_basins(frame(changed))
    by_x = {point.log2_x: point for point in basins.panels[0].lines[0].points}
    assert (by_x[-3].n_diverged, by_x[-3].n_missing) == (2, 0)
    assert (by_x[-4].n_diverged, by_x[-4].n_missing) == (0, 2)
    assert (by_x[-5].n_diverged, by_x[-5].n_missing) == (0, 2)
    assert basins.n_missing == 8  # two densities, two x, two seeds


def test_a_done_run_without_a_finite_loss_is_missing_not_a_minimum() -> None:
    changed = rows(optima={"supar": (-7.0, -7.1)})
    for row in changed:
        if row["lr"] == 2.0**-8:
            row["train_loss"] = float("nan")
    basins = lr_basins(frame(changed))
    assert basins.n_missing == 4
    assert basins.panels[0].lines[0].optimum.x == pytest.approx(-7.0, abs=0.3)


def test_the_row_order_does_not_matter() -> None:
    listed = rows()
    assert lr_basins(frame(listed)).panels == lr_basins(frame(listed[::-1])).panels


def test_the_same_cell_listed_twice_counts_once() -> None:
    listed = rows()
    assert lr_basins(frame(listed + listed)).panels == lr_basins(frame(listed)).panels


def test_without_a_dense_line_nothing_is_transferred() -> None:
    sparse = [row for row in rows() if row["density"] < 1]
    panel = lr_basins(frame(sparse)).panels[0]
    assert panel.reference is None
    assert panel.transferred is None
    assert panel.regret(panel.lines[0]).value is None


def test_any_axis_may_be_the_hue() -> None:
    both = rows() + rows(width=512, optima={"sp": (-10.0, -7.5)})
    basins = lr_basins(frame(both), hue="width", fixed={"density": 1.0, "parameterization": "sp"})
    assert [line.hue for line in basins.panels[0].lines] == [512, 256]
    assert basins.panels[0].reference_hue == 256


def test_the_held_out_loss_has_its_own_basins() -> None:
    basins = lr_basins(frame(rows()), metric="val_loss")
    assert basins.panels[2].lines[0].optimum.loss == pytest.approx(2.605, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"x": "learning_rate"}, "x"),
        ({"hue": "sparsity"}, "hue"),
        ({"metric": "best_loss"}, "metric"),
        ({"hue": "lr"}, "x"),
        ({"fixed": {"width": 128}}, "where.width"),
        ({"fixed": {"depth": 2}}, "where.depth"),
    ],
)
def test_bad_axes_are_refused_by_name(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lr_basins(frame(rows()), **arguments)
    assert caught.value.key == key


def test_a_line_that_mixes_widths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"width.*mixes"):
        lr_basins(frame(rows() + rows(width=512)))


@pytest.mark.parametrize("bad", [[], [{"lr": 1.0}], [{**rows()[0], "lr": 0.0}]])
def test_bad_rows_are_refused(bad: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError):
        frame(bad)


def test_the_data_beside_the_figure_hold_every_point() -> None:
    data = data_rows(lr_basins(frame(rows())))
    assert len(data) == 3 * 2 * 11
    first = data[0]
    assert first["by_seed"].startswith("0:2.")
    assert " 1:2." in first["by_seed"]
    assert first["mean_train_loss"] == pytest.approx(
        np.mean([float(pair.split(":")[1]) for pair in first["by_seed"].split()])
    )


def test_analysis_needs_no_torch() -> None:
    code = (
        "import sys, analysis.statements, analysis.tables, analysis.lr_basins;"
        " sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_further_axes_of_a_grid_count_and_are_named_in_errors() -> None:
    decay = [{**row, "weight_decay": d, "cell_id": f"{row['cell_id']}-{d}"} for d in (0.0, 0.1) for row in rows()]
    table = frame(decay)
    assert "weight_decay" in axes_of(table)
    assert "seed" not in axes_of(table)
    with pytest.raises(ConfigError, match="weight_decay"):
        lr_basins(table)  # a line mixes both
    with pytest.raises(ConfigError, match="weight_decay"):
        lr_basins(table, hue="wieght_decay")
    assert [line.hue for line in lr_basins(table, hue="weight_decay", fixed={"density": 1.0}).panels[0].lines] == [
        0.1,
        0.0,
    ]


def test_what_varies_along_a_line_makes_figures_of_its_own() -> None:
    table = frame(rows() + rows(width=512))
    assert parts(table, ("density", "parameterization"), ("lr",)) == [{"width": 256}, {"width": 512}]
    assert [basins.fixed["width"] for basins in basin_sets(table)] == [256, 512]
    tied = frame([{**row, "width": 256 if row["density"] == 1 else 768} for row in rows()])
    assert parts(tied, ("density", "parameterization"), ("lr",)) == [{}]
