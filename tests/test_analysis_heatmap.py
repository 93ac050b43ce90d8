"""Shift and regret over width x density against one reference."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from analysis.frames import frame
from analysis.heatmap import Cell, HeatMap, draw, heatmap, save
from supar_sweep.errors import ConfigError
from tests.basin_rows import rows

# the optimum of each density, by width
BY_WIDTH = {128: (-8.0, -6.0), 256: (-9.0, -6.5)}


def found(**arguments: Any) -> HeatMap:
    listed = [row for width, both in BY_WIDTH.items() for row in rows({"sp": both}, width=width)]
    return heatmap(frame(listed), **arguments)


def cell(data: HeatMap, density: float, width: float) -> Cell:
    place = {"density": density, "width": width}
    (one,) = [c for _, cells in data.panels for c in cells if (c.x, c.y) == (place[data.x], place[data.y])]
    return one


@pytest.mark.parametrize(("x", "hue"), [("density", "width"), ("width", "density")])
def test_all_squares_are_measured_from_the_narrow_dense_one(x: str, hue: str) -> None:
    data = found(x=x, hue=hue)
    reference = BY_WIDTH[128][0]
    for width, both in BY_WIDTH.items():
        for density, optimum in zip((1.0, 1 / 16), both, strict=True):
            one = cell(data, density, width)
            assert one.is_reference == (width == 128 and density == 1)
            assert one.shift.value == pytest.approx(optimum - reference, abs=0.15)
            assert one.regret.value == pytest.approx(0.02 * (optimum - reference) ** 2, abs=0.012)
            if not one.is_reference:
                assert one.shift.ci is not None
                assert one.shift.ci[0] < (one.shift.value or 0.0) < one.shift.ci[1]


def test_a_censored_square_has_a_bound_and_an_uninformative_one_no_colour() -> None:
    listed = rows({"sp": (-8.0, 0.0)}) + rows({"sp": (-13.0, -8.0)}, width=512)
    data = heatmap(frame(listed))
    assert cell(data, 1 / 16, 256).shift.value is None
    texts = [text.get_text() for text in draw(data).axes[0].texts]
    assert sum(text.startswith(">") for text in texts) == 1
    assert sum(text.startswith("<") for text in texts) == 1


def test_init_std_is_taken_where_it_is_what_varies() -> None:
    listed = [row for width, both in BY_WIDTH.items() for row in rows({"sp": both}, width=width)]
    for row in listed:
        row["init_std"], row["lr"] = row["lr"], 0.01
    assert heatmap(frame(listed)).swept == "init_std"
    assert found().swept == "lr"


def test_wrong_axes_and_mixed_squares_are_refused() -> None:
    with pytest.raises(ConfigError, match="hue: no such axis"):
        found(hue="widht")
    with pytest.raises(ConfigError, match="hue: needs an axis of numbers"):
        found(hue="parameterization", col="width")
    deep = [{**row, "n_layer": 4, "cell_id": row["cell_id"] + "deep"} for row in rows()]
    with pytest.raises(ConfigError, match=r"where\.n_layer"):
        heatmap(frame(rows() + deep))


def test_the_figure_writes_every_number_and_frames_the_reference(tmp_path: Path) -> None:
    data = found()
    drawn = draw(data)
    shifts, regrets = drawn.axes[:2]
    assert len(shifts.texts) == len(regrets.texts) == 4
    assert "+2.0" in [text.get_text() for text in shifts.texts]
    assert len([patch for patch in shifts.patches if not patch.get_fill()]) == 1
    _, _, table = save(drawn, data, tmp_path / "map")
    with table.open(newline="") as file:
        assert [row["is_reference"] for row in csv.DictReader(file)].count("True") == 1
