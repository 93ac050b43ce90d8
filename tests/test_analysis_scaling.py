"""The scaling fit: parameters of a known law come back, intervals cover them, and what cannot be fitted is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.frames import frame
from analysis.scaling import Point, draw, fit_points, in_words, save, scaling, summary
from analysis.verdict import write
from supar_sweep.errors import ConfigError
from tests.basin_rows import rows

FLOOR, SCALE, ALPHA, GAMMA = 2.0, 0.5, 0.3, 0.15
WIDTHS, DENSITIES = (64, 128, 256, 512), (1.0, 0.25, 0.0625)


def live(width: float, density: float) -> float:
    return 24 * width**2 * density


LIVE_0 = float(np.exp(np.mean([np.log(live(w, d)) for w in WIDTHS for d in DENSITIES])))


def law(width: float, density: float) -> float:
    return FLOOR + SCALE * (live(width, density) / LIVE_0) ** -ALPHA * density**GAMMA


def points(noise: float = 0.0, seed: int = 0, **where: Any) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [
        Point(w, d, live(w, d), law(w, d) + float(rng.normal(0, noise)), False)
        for w in where.get("widths", WIDTHS)
        for d in where.get("densities", DENSITIES)
    ]


def test_a_law_without_noise_comes_back() -> None:
    fit, reason = fit_points(points())
    assert fit is not None, reason
    assert fit.live_0 == pytest.approx(LIVE_0)
    assert fit.floor.value == pytest.approx(FLOOR, abs=0.01)
    assert np.exp(fit.log_scale.value) == pytest.approx(SCALE, abs=0.01)
    assert fit.alpha.value == pytest.approx(ALPHA, abs=0.01)
    assert fit.gamma.value == pytest.approx(GAMMA, abs=0.01)
    assert fit.df == len(WIDTHS) * len(DENSITIES) - 4
    assert fit.loss(live(1024, 0.5), 0.5) == pytest.approx(law(1024, 0.5), abs=0.01)


def test_the_intervals_cover_the_law() -> None:
    truths = {"floor": FLOOR, "alpha": ALPHA, "gamma": GAMMA}
    held, ends = dict.fromkeys(truths, 0), 0
    n = 60
    for seed in range(n):
        fit, _ = fit_points(points(noise=0.005, seed=seed))
        assert fit is not None
        for name, truth in truths.items():
            estimate = getattr(fit, name)
            low = -np.inf if estimate.low is None else estimate.low
            high = np.inf if estimate.high is None else estimate.high
            assert low < estimate.value < high
            held[name] += low <= truth <= high
            ends += (estimate.low is not None) + (estimate.high is not None)
    for name, count in held.items():
        assert count / n >= 0.88, (name, count)
    assert ends > 0.95 * 6 * n  # an interval without an end cannot be wrong


def test_grids_that_do_not_allow_a_fit_say_why() -> None:
    fit, reason = fit_points(points(widths=WIDTHS[:1]))
    assert fit is None
    assert "3 points" in reason
    assert fit_points(points(densities=(1.0,)))[0] is None
    iso = [Point(64 / d, d, 1e5 * d**-2, 2.5 + d, False) for d in (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03)]
    assert "cannot be told apart" in fit_points(iso)[1]


def test_censored_points_are_bounds_and_are_left_out() -> None:
    worse = [Point(p.width, p.density, p.live, p.loss + 1, True) for p in points()[:2]]
    assert fit_points([*points()[2:], *worse])[0] == fit_points(points()[2:])[0]


def table() -> pd.DataFrame:
    listed = []
    for width in WIDTHS:
        for row in rows(optima={"sp": (-9.0, -6.5), "supar": (-7.0, -7.1)}, width=width):
            row["train_loss"] += law(width, row["density"]) - 2.4
            listed.append(row)
    found = frame(listed)
    found["live_parameters"] = [live(w, d) for w, d in zip(found["width"], found["density"], strict=True)]
    return found


def test_losses_are_those_of_the_basins_optima_and_the_figure_has_the_fit(tmp_path: Path) -> None:
    found = scaling(table())
    assert [panel.col for panel in found.panels] == ["sp", "supar"]
    for panel in found.panels:
        assert len(panel.points) == len(WIDTHS) * 2
        for point in panel.points:
            assert point.loss == pytest.approx(law(point.width, point.density) + 0.005, abs=0.004)
        assert panel.fit is not None
        assert panel.fit.alpha.value == pytest.approx(ALPHA, abs=0.1)
    drawn = draw(found)
    assert "gamma" in drawn.axes[0].texts[0].get_text()
    _, _, data = save(drawn, found, tmp_path / "scaling")
    with data.open(newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["fitted"]) == pytest.approx(float(first["train_loss"]), abs=0.01)


def test_the_summary_holds_the_fit_with_intervals_or_why_there_is_none(tmp_path: Path) -> None:
    found = summary(table(), "train_loss")
    assert "density^gamma" in found["form"]
    for panel in scaling(table()).panels:
        each = found["fits"][panel.col]
        assert (each["n_points"], each["n_censored"], each["reason"]) == (len(WIDTHS) * 2, 0, "")
        assert panel.fit is not None
        for name in ("floor", "log_scale", "alpha", "gamma"):
            assert each["fit"][name] == vars(getattr(panel.fit, name))
        assert each["fit"]["live_0"] == panel.fit.live_0
    assert len(in_words(found)) == 2
    assert "sp: scaling fit floor " in in_words(found)[0]

    # beyond a grid's edge a loss is a bound: said, and left out
    high = table()
    few = summary(high[(high["lr"] < 2.0**-8) | (high["parameterization"] == "supar") | (high["density"] == 1)])
    assert few["fits"]["sp"]["n_censored"] == len(WIDTHS)
    assert few["fits"]["sp"]["fit"] is None
    assert in_words(few)[-1].startswith(f"sp: no scaling fit (too few shapes: {len(WIDTHS)} points of")
    one_width = summary(high, fixed={"width": WIDTHS[0]})
    (said,) = in_words(one_width)
    assert said.startswith("sp, supar: no scaling fit (too few shapes: 2 points")
    mixed = high.assign(n_layer=[2, 4] * (len(high) // 2))
    assert "where.n_layer" in in_words(summary(mixed))[0]
    _, path = write([], tmp_path, scaling=found)
    assert json.loads(path.read_text())["scaling"] == found


def test_axes_of_the_fit_itself_are_refused() -> None:
    with pytest.raises(ConfigError, match="col"):
        scaling(table(), col="width")
    few = table()
    drawn = draw(scaling(few[few["width"] == 64]))
    assert "no fit" in drawn.axes[0].texts[0].get_text()


@pytest.mark.parametrize("axis", ["n_layer", "batch_seqs"])
def test_points_that_mix_values_of_another_axis_are_refused(axis: str) -> None:
    once = table()
    once[axis] = 2
    again = once.copy()
    again[axis], again["cell_id"] = 4, again["cell_id"] + "-4"
    both = pd.concat([once, again], ignore_index=True)
    with pytest.raises(ConfigError, match=rf"where\.{axis}"):
        scaling(both)
    assert scaling(both, fixed={axis: 2}).panels[0].fit == scaling(once).panels[0].fit
