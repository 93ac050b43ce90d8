"""The exponent of density that keeps the best lr in place: from basins whose shift under every exponent is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

from analysis.frames import frame
from analysis.lr_exponent import Best, LrExponents, Series, data_rows, draw, falls_through_zero, lr_exponent
from analysis.report_figures import Own, basins_of, data_csv, pictures, svg
from analysis.verdict import Shift
from supar_sweep.errors import ConfigError
from tests.basin_rows import DENSITIES, rows

TRUE = {"rigl": 0.6, "gmp": 0.9}
DENSE = -7.0
OCTAVES = math.log2(DENSITIES[0] / DENSITIES[1])
RULES = {"sp": 0.0, "mup": 0.0, "init_only": 0.0, "lr_only": 1.0, "supar": 1.0}
EXPONENTS = [("supar", a) for a in (0.0, 0.5, 1.0)]


def table(runs: Sequence[tuple[str, float | None]], held_back: float = 1.0, **arguments: Any) -> pd.DataFrame:
    """Basins of two methods, each under some (parameterization, dynamic_lr_exponent).

    The shift is `held_back` of what the hidden weights' lr alone would make it.
    """
    listed = []
    for method, true in TRUE.items():
        for parameterization, exponent in runs:
            rule = RULES[parameterization] if exponent is None else exponent
            optima = {parameterization: (DENSE, DENSE + held_back * (true - rule) * OCTAVES)}
            own = {"method": method, "dynamic_lr_exponent": exponent}
            for row in rows(optima=optima, n_seeds=3, **arguments):
                listed.append({**row, **own, "cell_id": f"{method}-{exponent}-{row['cell_id']}"})
    return frame(listed)


def lines(found: LrExponents) -> dict[str, Series]:
    ((density, of_panel),) = found.panels  # the dense line is the reference
    assert density == DENSITIES[1]
    return {series.hue: series for series in of_panel}


@pytest.mark.parametrize("held_back", [1.0, 0.6])
def test_the_best_exponent_is_where_the_shift_is_zero(held_back: float) -> None:
    found = lines(lr_exponent(table(EXPONENTS, held_back)))
    assert set(found) == set(TRUE)
    for method, series in found.items():
        assert [rule for rule, _ in series.shifts] == [0.0, 0.5, 1.0]
        for rule, each in series.shifts:
            assert each.value == pytest.approx(held_back * (TRUE[method] - rule) * OCTAVES, abs=0.15)
        best = series.best
        assert best.value == pytest.approx(TRUE[method], abs=0.05)
        assert best.low is not None
        assert best.high is not None
        assert best.low < (best.value or 0.0) < best.high


def test_a_parameterization_has_the_exponent_of_its_column() -> None:
    for name, rule in RULES.items():
        found = lines(lr_exponent(table([(name, None)]), x="parameterization"))
        assert [[at for at, _ in series.shifts] for series in found.values()] == [[rule], [rule]]
    both = lines(lr_exponent(table([("mup", None), ("supar", None)]), x="parameterization"))
    assert both["rigl"].best.value == pytest.approx(TRUE["rigl"], abs=0.05)
    with pytest.raises(ConfigError, match="two values of it have the exponent 0"):
        lr_exponent(table([("sp", None), ("mup", None)]), x="parameterization")


@pytest.mark.parametrize(
    ("points", "where"),
    [
        ([(0.0, 2.0), (1.0, -2.0)], 0.5),
        ([(0.0, 3.0), (0.5, 1.0), (1.0, -3.0)], 0.5 + 0.5 * 1 / 4),
        ([(0.0, 0.0), (1.0, -1.0)], 0.0),
        ([(0.0, 1.0), (1.0, 0.0)], 1.0),
        ([(0.0, 2.0), (1.0, 1.0)], None),
        ([(0.0, -1.0), (1.0, -2.0)], None),
        ([(0.0, -1.0), (1.0, 1.0)], None),
        ([(0.0, 1.0)], None),
        ([], None),
    ],
)
def test_falling_through_zero(points: list[tuple[float, float]], where: float | None) -> None:
    assert falls_through_zero(points) == (None if where is None else pytest.approx(where))


def test_an_exponent_beyond_those_that_were_run_has_one_end() -> None:
    rising = Series("set", ((0.0, Shift(2.5, (2.1, 2.9))), (1.0, Shift(0.2, (-0.5, 0.7)))))
    assert rising.best == Best(None, 2.1 / 2.6, None)
    falling = Series("gmp", ((0.0, Shift(0.2, (-0.1, 0.6))), (1.0, Shift(None, bound=-2.0, side="low"))))
    assert falling.best == Best(None, None, None)


def test_an_optimum_beyond_the_grid_is_a_bound() -> None:
    found = lr_exponent(table(EXPONENTS, grid=range(-10, -4)))
    under_0 = dict(lines(found)["gmp"].shifts)[0.0]
    assert under_0.value is None
    assert (under_0.side, under_0.bound is not None) == ("high", True)
    (row,) = [row for row in data_rows(found) if (row["method"], row["rule_exponent"]) == ("gmp", 0.0)]
    assert (row["shift_octaves"], row["shift_bound"]) == (None, under_0.bound)
    assert row["best_exponent"] == lines(found)["gmp"].best.value


def test_the_figure_has_the_known_rules_and_a_line_a_method() -> None:
    drawn = draw(lr_exponent(table(EXPONENTS)))
    (axes,) = drawn.axes
    assert axes.get_title() == "Density 1/16"
    assert {text.get_text() for text in axes.texts} == {"\xb5P", "SMET", "S\xb5Par"}
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["RigL", "GMP"]


def test_a_report_of_the_study_shows_it_first() -> None:
    own = Own("lr_exponent", {"x": "dynamic_lr_exponent", "hue": "method"}, {}, None)
    runs = table(EXPONENTS).assign(live_parameters=1000)
    drawn, _ = pictures(runs, basins_of(runs, "train_loss", own), "train_loss", lambda _: [], None, own)
    assert drawn[0].kind == "lr_exponent"
    assert svg(drawn[0]).startswith(b"<?xml")
    assert "best_exponent" in data_csv(drawn[0])


def test_a_grid_without_the_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such axis"):
        lr_exponent(frame(rows()))
