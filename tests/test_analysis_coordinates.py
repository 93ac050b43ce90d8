"""The coordinate check: what is expected, how it is tested, and that made-up and real runs pass and fail as they must."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.coord_check import draw, save
from analysis.coordinates import (
    KINDS,
    MAX_SLOPE,
    RULE,
    STATISTICS,
    CoordinateSet,
    all_slope_tests,
    answers,
    coordinate_sets,
    data_rows,
    expected_slope,
    rows_of_tests,
)
from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import PARAMETERIZATIONS

SITES = ("embedding", "block0.attention", "block1.attention", "block0.mlp", "block1.mlp", "logits")
DENSITIES, WIDTHS = (1.0, 0.5, 0.25), (64, 128, 256)


def rows(
    slopes: Mapping[tuple[str, str], float] | None = None,
    n_seeds: int = 3,
    noise: float = 0.0,
    steps: int = 2,
    names: tuple[str, ...] = ("supar",),
) -> list[dict[str, Any]]:
    """Rows whose statistics are powers of the axes: as expected, or with the slopes of (statistic, axis)."""
    rng = np.random.default_rng(0)
    places = {(256, density) for density in DENSITIES} | {(width, 1.0) for width in WIDTHS}
    found = []
    for name in names:
        for width, density in sorted(places):
            for seed in range(n_seeds):
                for step in range(steps):
                    for site in SITES:
                        kind = site.rpartition(".")[2]
                        row = {"parameterization": name, "width": width, "density": density, "seed": seed}
                        row |= {"step": step, "site": site, "loss": 5.0}
                        for statistic in STATISTICS:
                            log2 = 0.3 * step + float(rng.normal(0, noise))
                            for axis, value in (("width", width / 256), ("density", density)):
                                usual = expected_slope(statistic, axis, kind, name) or 0.0
                                log2 += (slopes or {}).get((statistic, axis), usual) * math.log2(value)
                            row[statistic] = 2.0**log2
                        found.append(row)
    return found


def find(sets: list[CoordinateSet], axis: str, statistic: str) -> CoordinateSet:
    return next(each for each in sets if (each.axis, each.statistic) == (axis, statistic))


def test_gradients_are_to_fall_as_the_logits_multiplier_and_all_else_is_to_stay() -> None:
    for name in PARAMETERIZATIONS:
        for kind in KINDS:
            for statistic in STATISTICS:
                assert expected_slope(statistic, "density", kind, name) == 0
        has_multiplier = name != "sp"
        for kind in ("embedding", "attention", "mlp"):
            assert expected_slope("gradient", "width", kind, name) == (-1 if has_multiplier else 0)
            assert expected_slope("change", "width", kind, name) == 0
        assert expected_slope("gradient", "width", "logits", name) == 0  # nothing lies between the loss and them
        assert expected_slope("activation", "width", "logits", name) is None


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("axis", "values"), [("density", DENSITIES), ("width", WIDTHS)])
def test_the_slope_of_a_power_law_is_its_exponent(statistic: str, axis: str, values: tuple[float, ...]) -> None:
    found = find(coordinate_sets(rows({(statistic, axis): 0.7})), axis, statistic)
    assert found.n_seeds == 3
    for panel in found.panels:
        assert [trace.step for trace in panel.traces] == [0, 1]
        assert panel.traces[0].x == tuple(sorted(values))
        assert panel.test.slope == pytest.approx(0.7)
        assert panel.test.ci == pytest.approx((0.7, 0.7))
        wrong = panel.test.expected is not None and abs(0.7 - panel.test.expected) > panel.test.threshold
        assert panel.test.answer == ("fail" if wrong else None)


def test_blocks_are_averaged_and_the_sweeps_meet_at_one_point() -> None:
    changed = rows()
    for row in changed:
        if row["site"] == "block1.mlp":
            row["activation"] *= 3
    (panel,) = [p for p in find(coordinate_sets(changed), "density", "activation").panels if p.kind == "mlp"]
    assert panel.traces[0].by_seed[0] == pytest.approx((2.0,) * 3)  # (1 + 3) / 2
    assert find(coordinate_sets(changed), "density", "activation").fixed == {"width": 256}
    assert find(coordinate_sets(changed), "width", "activation").fixed == {"density": 1.0}


def test_the_answer_follows_interval_and_threshold() -> None:
    def answer(slope: float, noise: float = 0.0, threshold: float = 0.25, n_seeds: int = 5) -> str | None:
        sets = coordinate_sets(rows({("change", "density"): slope}, n_seeds, noise), threshold)
        (panel,) = [p for p in find(sets, "density", "change").panels if p.kind == "mlp"]
        return panel.test.answer

    assert [answer(slope) for slope in (0.0, 0.2, -0.2, 0.3, -0.3)] == ["pass", "pass", "pass", "fail", "fail"]
    assert answer(0.2, threshold=0.1) == "fail"
    assert answer(0.0, noise=1.5) == "undecided"
    assert answer(0.0, n_seeds=1) == "undecided"  # no interval from one seed


def test_the_interval_covers_the_slope() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        found = rows({("change", "density"): 0.1}, n_seeds=3, steps=1)
        for row in found:
            row["change"] *= 2.0 ** rng.normal(0, 0.1)
        (panel,) = [p for p in find(coordinate_sets(found), "density", "change").panels if p.kind == "logits"]
        assert panel.test.ci is not None
        held += panel.test.ci[0] <= 0.1 <= panel.test.ci[1]
    assert 0.90 <= held / 200 <= 0.99


def test_a_parameterization_fails_with_one_statistic_and_passes_with_all() -> None:
    good = all_slope_tests(coordinate_sets(rows()))
    assert answers(good)["supar"]["density"][0] == "pass"
    assert answers(good)["supar"]["width"][0] == "pass"
    bad = answers(all_slope_tests(coordinate_sets(rows({("gradient", "density"): 0.5}))))["supar"]
    assert bad["density"][0] == "fail"
    assert "gradient +0.50" in bad["density"][1]
    assert bad["width"][0] == "pass"
    assert "not a proof" in RULE


def test_no_slope_is_an_error_and_so_is_a_row_that_lacks_something() -> None:
    with pytest.raises(ConfigError, match="neither width nor density varies"):
        coordinate_sets([row for row in rows() if row["density"] == 1 and row["width"] == 256])
    with pytest.raises(ConfigError, match="lacks change"):
        coordinate_sets([{k: v for k, v in row.items() if k != "change"} for row in rows()])
    with pytest.raises(ConfigError, match="nothing to analyse"):
        coordinate_sets([])
    with pytest.raises(ConfigError, match="threshold"):
        coordinate_sets(rows(), threshold=0.0)


def test_the_figure_has_a_row_a_site_and_says_each_answer(tmp_path: Path) -> None:
    sets = coordinate_sets(rows({("activation", "density"): 1.0}, names=("sp", "supar")))
    found = find(sets, "density", "activation")
    drawn = draw(found)
    assert len(drawn.axes) == 4 * 2
    assert [axes.get_title() for axes in drawn.axes[:2]] == ["SP", "S\xb5Par"]
    assert [axes.get_ylabel() for axes in drawn.axes[::2]] == ["Embedding", "Attention", "MLP", "Logits"]
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    n, half = 3, 1e-9  # the seeds agree, so the interval is the slope itself
    assert [test.n_seeds for test in all_slope_tests([found])] == [n] * 8
    assert all(test.ci == pytest.approx((1.0, 1.0), abs=half) for test in all_slope_tests([found]))
    assert texts == ["slope +1.00 (+1.00 to +1.00)\nexpected 0: fail"] * 8
    heading = drawn.get_suptitle()
    assert f"within \N{PLUS-MINUS SIGN}{MAX_SLOPE:g} of the expected one" in heading.replace("\n", " ")
    lines = [line for line in drawn.axes[0].lines if line.get_marker() == "."]
    assert len(lines) == 2  # one a step
    assert np.asarray(lines[0].get_ydata()) == pytest.approx([-2.0, -1.0, 0.0])  # 1/4, 1/2, 1 to the power of 1
    png, pdf, data = save(drawn, found, tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert len(data.read_text().splitlines()) == 1 + len(data_rows(found)) == 1 + 2 * 4 * 2 * 3 * 3


def test_rows_of_tests_are_plain() -> None:
    listed = rows_of_tests(all_slope_tests(coordinate_sets(rows())))
    assert len(listed) == 2 * 3 * 4
    assert {row["answer"] for row in listed} == {"pass", None}
