"""The exponent of density that the best lr goes with: the same whatever exponent the runs had, from basins with a known one."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from analysis.frames import frame
from analysis.lr_exponent import LrExponents, data_rows, draw, lr_exponent
from supar_sweep.errors import ConfigError
from tests.basin_rows import DENSITIES, rows

TRUE = {"rigl": 0.6, "gmp": 1.0}
DENSE = -7.0
OCTAVES = math.log2(DENSITIES[0] / DENSITIES[1])


def table(rules: dict[str, tuple[str, float | None]], **arguments: Any) -> pd.DataFrame:
    """Basins of two methods under rules: name -> parameterization, and dynamic_lr_exponent where it is set."""
    of_parameterization = {"sp": 0.0, "mup": 0.0, "init_only": 0.0, "lr_only": 1.0, "supar": 1.0}
    listed = []
    for method, true in TRUE.items():
        for parameterization, exponent in rules.values():
            rule = of_parameterization[parameterization] if exponent is None else exponent
            optima = {parameterization: (DENSE, DENSE + (true - rule) * OCTAVES)}
            listed += [
                {
                    **row,
                    "method": method,
                    "dynamic_lr_exponent": exponent,
                    "cell_id": f"{method}-{exponent}-{row['cell_id']}",
                }
                for row in rows(optima=optima, n_seeds=3, **arguments)
            ]
    return frame(listed)


def by_line(found: LrExponents) -> dict[tuple[str, str], Any]:
    return {(name, series.hue): series for name, of_panel in found.panels for series in of_panel}


def test_the_exponent_is_the_same_under_every_rule() -> None:
    found = lr_exponent(table({str(a): ("supar", a) for a in (0.0, 0.5, 1.0)}), col="dynamic_lr_exponent")
    lines = by_line(found)
    assert set(lines) == {(f"{rule:g}", method) for rule in (0.0, 0.5, 1.0) for method in TRUE}
    for (rule, method), series in lines.items():
        assert series.rule == float(rule)
        (only,) = series.exponents  # the dense line is the reference
        assert only.density == DENSITIES[1]
        assert only.value == pytest.approx(TRUE[method], abs=0.05)
        assert only.ci == pytest.approx(tuple(series.rule + end / OCTAVES for end in only.shift.ci))


def test_a_rule_without_an_exponent_of_its_own_has_its_columns() -> None:
    names = ("sp", "mup", "init_only", "lr_only", "supar")
    lines = by_line(lr_exponent(table({name: (name, None) for name in names})))
    assert {name: series.rule for (name, _), series in lines.items()} == {
        "sp": 0.0, "mup": 0.0, "init_only": 0.0, "lr_only": 1.0, "supar": 1.0,
    }  # fmt: skip
    for (_, method), series in lines.items():
        assert series.exponents[0].value == pytest.approx(TRUE[method], abs=0.05)


def test_an_optimum_beyond_the_grid_is_a_bound() -> None:
    found = lr_exponent(table({"a": ("supar", 0.0)}, grid=range(-10, -4)), col=None)
    (only,) = by_line(found)["", "gmp"].exponents
    assert only.value is None
    assert only.side == "high"
    assert only.bound is not None
    assert 0 < only.bound <= TRUE["gmp"]
    rows_of_figure = {(row["method"], row["density"]): row for row in data_rows(found)}
    assert rows_of_figure["gmp", DENSITIES[1]]["exponent_bound"] == only.bound
    assert rows_of_figure["gmp", DENSITIES[1]]["exponent"] is None


def test_the_figure_has_the_known_rules_and_a_line_a_method() -> None:
    drawn = draw(lr_exponent(table({"mup": ("mup", None), "supar": ("supar", None)})))
    assert [axes.get_title() for axes in drawn.axes] == ["\xb5P", "S\xb5Par"]
    for axes in drawn.axes:
        assert {text.get_text() for text in axes.texts} == {"\xb5P", "SMET", "S\xb5Par"}
        assert axes.get_xlim()[0] > axes.get_xlim()[1]  # from dense to sparse
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["RigL", "GMP"]


def test_a_grid_without_the_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match="hue: no such axis"):
        lr_exponent(frame(rows()))
