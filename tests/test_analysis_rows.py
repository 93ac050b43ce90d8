"""Rows of panels, as in a figure of RigL above GMP: their data, the figure, and verdicts that keep further axes apart."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import style
from analysis.basins import basin_sets, data_rows, lr_basins, told_apart
from analysis.frames import frame, having, panels_of, telling, values_of
from analysis.lr_basins import draw, save
from analysis.statements import quickstart_statements
from analysis.tables import columns, verdict_rows
from analysis.verdict import entries, proposals, verdicts, write
from supar_sweep.errors import ConfigError
from supar_sweep.rules.mask_schedule import DYNAMIC_METHODS
from tests.basin_rows import DENSITIES, rows

DROP_FRACTION = {"gmp": None, "rigl": 0.3}
OPTIMA = {
    "gmp": {"mup": (-7.0, -6.0), "supar": (-7.0, -9.0)},
    "rigl": {"mup": (-7.0, -5.0), "supar": (-7.0, -7.0)},
}


def table(**arguments: Any) -> pd.DataFrame:
    """Basins of two methods, each with a setting of its own that the other has not."""
    return frame(
        {**row, "method": name, "drop_fraction": DROP_FRACTION[name], "cell_id": f"{name}-{row['cell_id']}"}
        for name, optima in OPTIMA.items()
        for row in rows(optima=optima, **arguments)
    )


def test_panels_stand_row_by_row_with_their_own_optima() -> None:
    found = lr_basins(table(), row="method")
    assert [(panel.row, panel.col) for panel in found.panels] == [
        (name, parameterization) for name in ("rigl", "gmp") for parameterization in ("mup", "supar")
    ]
    for panel in found.panels:
        assert found.place(panel) == {"method": panel.row, "parameterization": panel.col}
        assert [line.hue for line in panel.lines] == list(DENSITIES)
        for line, truth in zip(panel.lines, OPTIMA[panel.row][panel.col], strict=True):
            assert line.optimum.x == pytest.approx(truth, abs=0.15)
            assert line.n_seeds == 2  # the other row's runs are not among them


def test_without_rows_the_methods_are_figures_of_their_own() -> None:
    sets = basin_sets(table())
    assert [told_apart(each, sets) for each in sets] == [{"method": each.fixed["method"]} for each in sets]
    assert sorted(each.fixed["method"] for each in sets) == ["gmp", "rigl"]
    assert len(basin_sets(table(), row="method")) == 1


def test_a_row_that_is_another_axis_of_the_figure_is_refused() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        lr_basins(table(), row="density")
    with pytest.raises(ConfigError, match="did you mean 'method'"):
        lr_basins(table(), row="metod")


def test_the_data_name_the_row_of_every_point() -> None:
    listed = data_rows(lr_basins(table(), row="method"))
    assert len(listed) == len(OPTIMA) * 2 * len(DENSITIES) * 11
    assert {(row["method"], row["parameterization"]) for row in listed} == {
        (name, parameterization) for name in OPTIMA for parameterization in ("mup", "supar")
    }
    assert {row["drop_fraction"] for row in listed if row["method"] == "rigl"} == {0.3}


def test_the_figure_is_a_grid_with_shared_limits(tmp_path: Path) -> None:
    found = lr_basins(table(), row="method")
    drawn = draw(found)
    shown = [axes for axes in drawn.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["\xb5P", "S\xb5Par"] * 2
    assert [axes.get_ylabel().partition("\n")[0] for axes in shown] == ["RigL", "", "GMP", ""]
    assert len({axes.get_ylim() for axes in shown}) == len({axes.get_xlim() for axes in shown}) == 1
    assert [bool(axes.get_xlabel()) for axes in shown] == [False, False, True, True]
    tops = [axes.get_position().y0 for axes in shown]
    assert tops[0] == tops[1] > tops[2] == tops[3]
    with next(path for path in save(drawn, found, tmp_path / "rows") if path.suffix == ".csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"rigl", "gmp"}


def test_a_row_that_lacks_a_panel_leaves_its_place_empty() -> None:
    whole = table()
    lacking = whole[(whole["method"] != "rigl") | (whole["parameterization"] != "mup")]
    drawn = draw(lr_basins(lacking, row="method"))
    assert [axes.get_visible() for axes in drawn.axes] == [False, True, True, True]
    assert drawn.axes[1].get_title() == drawn.axes[3].get_title() == "S\xb5Par"
    assert drawn.axes[1].get_ylabel().startswith("RigL")
    below = lr_basins(whole[(whole["method"] != "gmp") | (whole["parameterization"] != "mup")], row="method")
    assert [bool(axes.get_xlabel()) for axes in draw(below).axes] == [True, False, False, True]


def test_verdicts_are_about_one_method_each(tmp_path: Path) -> None:
    for sets in (basin_sets(table(), row="method"), basin_sets(table())):
        found = entries(sets)
        answers = {verdict.name: verdict.answer for verdict in verdicts(found)}
        assert answers == {
            "mup, method=rigl": "does not transfer",
            "mup, method=gmp": "does not transfer",
            "supar, method=rigl": "transfers",
            "supar, method=gmp": "does not transfer",
        }
        assert quickstart_statements(found) == []
        write(found, tmp_path)
        assert json.loads((tmp_path / "summary.json").read_text())["verdicts"].keys() == answers.keys()
        assert {each["method"] for each in json.loads((tmp_path / "verdict.json").read_text())} == set(OPTIMA)
        assert tuple(verdict_rows(found)[0]) == columns(also=["method"])
        assert {row["method"] for row in verdict_rows(found, text=False)} == set(OPTIMA)


def test_a_proposal_names_the_method_that_it_is_for() -> None:
    short = table(grid=range(-7, -1))
    wanted = proposals(entries(basin_sets(short, row="method")))
    assert wanted
    assert {(point["method"], point["parameterization"], point["density"]) for point in wanted} >= {
        ("gmp", "supar", 1 / 16)
    }


def test_what_follows_another_axis_does_not_tell_figures_apart() -> None:
    of_rigl = {"method": "rigl", "drop_fraction": 0.3, "start_fraction": None, "width": 64}
    of_gmp = {"method": "gmp", "drop_fraction": float("nan"), "start_fraction": 0.0, "width": 64}
    assert telling([of_rigl, of_gmp]) == ["method"]
    assert telling([of_rigl, {**of_rigl, "drop_fraction": 0.1}, of_gmp]) == ["method", "drop_fraction"]
    assert telling([of_rigl, {**of_rigl, "width": 128}]) == ["width"]
    assert telling([of_rigl]) == []


def test_null_is_a_value_of_an_axis() -> None:
    mixed = table()
    assert values_of(mixed, "drop_fraction") == [0.3, None]
    assert [name for name, _ in panels_of(mixed, "drop_fraction")] == ["0.3", "null"]
    assert set(having(mixed, "drop_fraction", None)["method"]) == {"gmp"}
    assert style.panel_title("drop_fraction", "null") == "Drop_fraction null"


def test_methods_are_written_as_their_papers_do() -> None:
    assert set(style.METHOD_TITLES) == {"static", *DYNAMIC_METHODS}
    assert style.place_text({"method": "gmp", "dynamic_lr_exponent": 0.5}) == "GMP, learning-rate exponent 1/2"
    assert style.fixed_text({"method": "rigl", "width": 64}) == "RigL, width 64"
