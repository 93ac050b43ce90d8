"""Axes -> cells: products, zips, dependent axes, and every way to ask for a grid that cannot be."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.grid import (
    SHOWN_PROBLEMS,
    GridError,
    GridPoint,
    GridSpec,
    axis_name,
    enumerate_grid,
    find_key,
)
from tests.tiny import CELL


def grid(**spec: Any) -> list[GridPoint]:
    return enumerate_grid(deepcopy(CELL), GridSpec(**spec))


def test_no_axes_is_the_one_cell_of_the_base() -> None:
    [point] = grid()
    assert point.axes == {}
    assert point.cell == decode(CellConfig, CELL)


def test_axes_make_a_product_with_the_last_axis_fastest() -> None:
    points = grid(axes={"width": [16, 32], "seed": [0, 1, 2]})
    assert [(p.cell.model.width, p.cell.seed) for p in points] == [
        (width, seed) for width in (16, 32) for seed in (0, 1, 2)
    ]
    assert all(p.axes == {"width": p.cell.model.width, "seed": p.cell.seed} for p in points)


def test_only_what_an_axis_names_changes() -> None:
    for point in grid(axes={"lr": [0.5, 0.25], "n_layer": [1, 2]}):
        plain = deepcopy(CELL)
        plain["hparams"]["lr"] = point.axes["lr"]
        plain["model"]["n_layer"] = point.axes["n_layer"]
        assert point.cell == decode(CellConfig, plain)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("lr", ("hparams", "lr")),
        ("hparams.lr", ("hparams", "lr")),
        ("width", ("model", "width")),
        ("n_layer", ("model", "n_layer")),
        ("base.width", ("base", "width")),
        ("density", ("", "density")),
        ("optimizer.name", ("optimizer", "name")),
    ],
)
def test_keys_are_dotted_or_the_last_part_alone(key: str, found: tuple[str, str]) -> None:
    assert find_key(key) == found


def test_axes_are_called_by_the_last_part_of_their_key_where_that_is_unique() -> None:
    assert axis_name(("model", "width")) == "width"
    assert axis_name(("base", "width")) == "base.width"
    assert axis_name(("data", "name")) == "data.name"


@pytest.mark.parametrize("step", [1, 0.5, 0.25])
def test_log2_ranges_are_inclusive_powers_of_two(step: float) -> None:
    points = grid(axes={"lr": {"log2": [-8, -5], "step": step}})
    n = round(3 / step) + 1
    assert [p.axes["lr"] for p in points] == [2 ** (-8 + i * step) for i in range(n)]


def test_a_log2_range_stops_below_an_end_that_it_does_not_meet() -> None:
    assert [p.axes["lr"] for p in grid(axes={"lr": {"log2": [-3, -0.5]}})] == [2**-3, 2**-2, 2**-1]


def test_log2_ranges_serve_whole_numbers_too() -> None:
    assert [p.cell.model.width for p in grid(axes={"width": {"log2": [4, 6]}})] == [16, 32, 64]


def test_values_have_the_type_of_their_field() -> None:
    [point] = grid(axes={"density": [1]})
    assert isinstance(point.axes["density"], float)


def test_a_zipped_key_keeps_its_values_where_by_names_none() -> None:
    shapes = {"width": [16, 32], "density": [1, 0.25], "lr": [0.1, 0.2]}
    axes = {"parameterization": ["sp", "supar"]}
    by = {"parameterization": {"supar": {"lr": [0.5, 0.6]}}}
    found = [
        (cell.parameterization, cell.model.width, cell.density, cell.hparams.lr)
        for cell in (point.cell for point in grid(axes=axes, zipped=(shapes,), by=by))
    ]
    assert found == [
        ("sp", 16, 1.0, 0.1),
        ("sp", 32, 0.25, 0.2),
        *(("supar", 16, 1.0, lr) for lr in (0.5, 0.6)),
        *(("supar", 32, 0.25, lr) for lr in (0.5, 0.6)),
    ]
    for everywhere in ({"lr": [0.5]}, {"lr": [0.6]}):
        by = {"parameterization": {"sp": everywhere, "supar": everywhere}}
        with pytest.raises(ConfigError, match="lr: has no effect"):
            grid(axes=axes, zipped=(shapes,), by=by)
    with pytest.raises(ConfigError, match="lr: is swept twice"):
        grid(axes={**axes, "lr": [0.3]}, zipped=(shapes,), by={"parameterization": {"sp": {"lr": [0.5]}}})


def test_zipped_axes_walk_in_step() -> None:
    points = grid(zipped=({"width": [16, 32], "density": [1, 0.5]},), axes={"seed": [0, 1]})
    assert [(p.axes["seed"], p.axes["width"], p.axes["density"]) for p in points] == [
        (0, 16, 1.0),
        (0, 32, 0.5),
        (1, 16, 1.0),
        (1, 32, 0.5),
    ]


def test_an_axis_may_depend_on_another_axis_value() -> None:
    points = grid(
        axes={"parameterization": ["sp", "mup"], "seed": [0, 1]},
        by={"parameterization": {"sp": {"lr": [0.1]}, "mup": {"lr": {"log2": [-3, -2]}}}},
    )
    found = [(p.axes["parameterization"], p.axes["seed"], p.axes["lr"]) for p in points]
    assert found == [
        (name, seed, lr) for name, lrs in (("sp", [0.1]), ("mup", [2**-3, 2**-2])) for seed in (0, 1) for lr in lrs
    ]


def test_a_dependent_axis_keeps_the_general_values_where_none_are_named() -> None:
    points = grid(axes={"density": [1, 0.5], "lr": [0.1, 0.2]}, by={"density": {"0.5": {"lr": [0.3]}}})
    assert [(p.axes["density"], p.axes["lr"]) for p in points] == [(1, 0.1), (1, 0.2), (0.5, 0.3)]


def test_a_narrowed_axis_leaves_other_windows_unused() -> None:
    by = {"parameterization": {"sp": {"lr": [0.1]}, "supar": {"lr": [0.2]}}}
    [point] = grid(axes={"parameterization": ["supar"]}, by=by)
    assert point.cell.hparams.lr == 0.2


def test_derived_values_follow_the_axes() -> None:
    for point in grid(axes={"width": [16, 32, 64]}):
        assert point.cell.model.n_head == point.cell.model.width // CELL["model"]["d_head"]
        assert point.cell.ratios().m_d == point.cell.model.width / CELL["base"]["width"]


def test_ten_thousand_cells() -> None:
    points = grid(
        axes={
            "width": [16, 32],
            "density": {"log2": [-4, 0]},
            "lr": {"log2": [-10, -1]},
            "seed": list(range(100)),
        }
    )
    assert len(points) == 2 * 5 * 10 * 100
    assert len({repr(p.cell) for p in points}) == len(points)
    # sections are shared, not decoded once a cell
    assert len({id(p.cell.model) for p in points}) == 2
    assert len({id(p.cell.hparams) for p in points}) == 10


@pytest.mark.parametrize(
    ("spec", "key", "says"),
    [
        ({"axes": {"widht": [1]}}, "experiment.axes.widht", "did you mean 'width'"),
        ({"axes": {"model.widht": [1]}}, "experiment.axes.model.widht", "'model.width'"),
        ({"axes": {"name": ["x"]}}, "experiment.axes.name", "optimizer.name"),
        ({"axes": {"model": [1]}}, "experiment.axes.model", "model.width"),
        ({"axes": {"lr": []}}, "experiment.axes.lr", "no values"),
        ({"axes": {"lr": 0.1}}, "experiment.axes.lr", "must be a list"),
        ({"axes": {"lr": {"log": [1, 2]}}}, "experiment.axes.lr.log", "'log2'"),
        ({"axes": {"lr": {"log2": [2, 1]}}}, "experiment.axes.lr", "octaves"),
        ({"axes": {"lr": {"log2": [1, 2], "step": 0}}}, "experiment.axes.lr", "octaves"),
        ({"axes": {"lr": [1, 1.0]}}, "experiment.axes.lr", "twice"),
        ({"axes": {"lr": [1], "hparams.lr": [1]}}, "experiment.axes", "twice"),
        (
            {"axes": {"lr": [1]}, "zipped": ({"lr": [1], "seed": [1]},)},
            "experiment.axes.lr",
            "twice",
        ),
        (
            {"zipped": ({"width": [16, 32], "seed": [1]},)},
            "experiment.zipped[0]",
            "one length",
        ),
        (
            {"by": {"density": {1: {"lr": [1]}}}},
            "experiment.by.density",
            "is not an axis of this grid",
        ),
        (
            {
                "axes": {"parameterization": ["sp", "mup"]},
                "by": {"parameterization": {"sp": {"lr": [1]}}},
            },
            "experiment.by.parameterization.mup.lr",
            "is missing",
        ),
        (
            {
                "axes": {"parameterization": ["sp"]},
                "by": {"parameterization": {"sp": {"lr": [1]}, "mpu": {"lr": [1]}}},
            },
            "experiment.by.parameterization.mpu",
            "did you mean 'mup'",
        ),
        (
            {
                "axes": {"parameterization": ["sp"], "lr": [2]},
                "by": {"parameterization": {"sp": {"lr": [1]}}},
            },
            "experiment.axes.lr",
            "has no effect",
        ),
    ],
)
def test_impossible_specs_name_the_key(spec: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grid(**spec)
    assert caught.value.key == key
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_invalid_cells_are_reported_at_once() -> None:
    with pytest.raises(GridError) as caught:
        grid(axes={"width": [16, 17, 0], "density": [1, 0, math.nan, 2]})
    error = caught.value
    assert len(error.problems) == error.n_cells - 1 == 3 * 4 - 1
    for said in ("density: out of range (got 0.0)", "density: out of range (got 2.0)"):
        assert f"{said}; allowed: > 0 and <= 1 [1 of 12 cells, first: width=16" in str(error)
    assert "model.width: must be a multiple of d_head" in str(error)
    assert "4 of 12 cells, first: width=17" in str(error)


def test_one_problem_of_many_cells_is_one_line() -> None:
    with pytest.raises(GridError) as caught:
        grid(axes={"width": [17], "seed": list(range(50))})
    assert "\n" not in str(caught.value)
    assert "50 of 50 cells" in str(caught.value)


def test_a_long_list_of_problems_is_cut_and_counted() -> None:
    bad = [16 * i + 1 for i in range(1, SHOWN_PROBLEMS + 6)]
    with pytest.raises(GridError) as caught:
        grid(axes={"width": bad})
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + SHOWN_PROBLEMS + 1
    assert lines[-1].strip() == "... and 5 more problems"


def test_a_wrong_base_without_axes_is_a_plain_error() -> None:
    with pytest.raises(ConfigError) as caught:
        enumerate_grid({**CELL, "density": 0}, GridSpec())
    assert not isinstance(caught.value, GridError)
    assert caught.value.key == "density"


def test_a_base_with_unknown_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="densty: unknown key; did you mean 'density'"):
        enumerate_grid({**CELL, "densty": 0.5}, GridSpec())


def test_a_range_around_the_base_value_follows_it() -> None:
    for lr in (0.01, 0.0173):
        base = deepcopy(CELL)
        base["hparams"]["lr"] = lr
        spec = GridSpec(
            axes={"parameterization": ["mup", "supar"]},
            by={"parameterization": {p: {"lr": {"mult_log2": [-1, 2], "step": 0.5}} for p in ("mup", "supar")}},
        )
        found = [p.cell.hparams.lr for p in enumerate_grid(base, spec) if p.cell.parameterization == "supar"]
        assert found == [lr * 2 ** (octave / 2) for octave in range(-2, 5)]
    [low, high] = grid(axes={"hparams.init_std": {"mult_log2": [0, 1]}})
    assert high.cell.hparams.init_std == 2 * low.cell.hparams.init_std == 2 * CELL["hparams"]["init_std"]


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"position": {"mult_log2": [-1, 1]}}, "multiplies the base value, which must be a number > 0"),
        ({"lr": {"mult_log2": [-1, 1], "log2": [-9, -1]}}, "log2 and mult_log2 both give the range"),
        ({"lr": {"mult_log2": [1, -1]}}, "is not a range of octaves"),
        ({"lr": {"mult_log": [-1, 1]}}, "did you mean 'mult_log2'"),
    ],
)
def test_a_bad_range_around_the_base_value(axes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        grid(axes=axes)
