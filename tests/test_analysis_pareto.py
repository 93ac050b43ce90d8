"""Loss over density at transferred and own best values: what is read off the basins, and the gains."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.frames import frame
from analysis.pareto import Pareto, data_rows, draw, pareto, save
from supar_sweep.errors import ConfigError
from tests.basin_rows import OPTIMA, rows

FLOOR, CURVATURE = 2.4 + 0.005, 0.02  # of basin_rows, over seeds 0 and 1


def curve(found: Pareto, hue: Any, at: str) -> dict[float, float | None]:
    (points,) = [c.points for _, curves in found.panels for c in curves if (c.hue, c.at) == (hue, at)]
    return {point.x: point.loss for point in points}


def as_run(losses: dict[str, dict[float, float]], n_seeds: int = 3) -> list[dict[str, Any]]:
    """Rows with one lr each: loss by parameterization and density, plus .1 a seed."""
    template = rows()[0]
    return [
        {**template, "parameterization": name, "density": density, "seed": seed, "train_loss": loss + 0.1 * seed}
        | {"cell_id": f"{name}-{density}-{seed}"}
        for name, by_density in losses.items()
        for density, loss in by_density.items()
        for seed in range(n_seeds)
    ]


def test_swept_lines_give_the_loss_at_the_dense_optimum_and_at_their_own() -> None:
    found = pareto(frame(rows()))
    assert found.swept == "lr"
    for name, (dense, sparse) in OPTIMA.items():
        own, moved = curve(found, name, "own best"), curve(found, name, "transferred")
        assert own[1.0] == moved[1.0] == pytest.approx(FLOOR, abs=0.003)
        assert own[1 / 16] == pytest.approx(FLOOR, abs=0.003)
        assert moved[1 / 16] == pytest.approx(FLOOR + CURVATURE * (sparse - dense) ** 2, abs=0.015)


def test_a_value_that_diverges_or_lies_outside_has_no_loss() -> None:
    changed = rows(optima={"mup": (-4.0, -8.0)})
    for row in changed:
        if row["density"] < 1 and row["lr"] >= 2.0**-5:
            row["end"], row["train_loss"] = "diverged", None
    found = pareto(frame(changed))
    assert curve(found, "mup", "transferred")[1 / 16] is None
    assert curve(found, "mup", "own best")[1 / 16] is not None
    draw(found)


def test_without_a_dense_optimum_there_is_nothing_to_transfer() -> None:
    found = pareto(frame(rows(optima={"sp": (-14.0, -6.5)})))
    assert set(curve(found, "sp", "transferred").values()) == {None}
    assert None not in curve(found, "sp", "own best").values()
    drawn = draw(found)
    assert [line.get_marker() for line in drawn.axes[0].lines].count("x") == 2


def test_a_censored_best_is_marked_as_a_bound() -> None:
    found = pareto(frame(rows(optima={"mup": (-8.0, 0.0)})))
    (point,) = [p for _, cs in found.panels for c in cs for p in c.points if c.at == "own best" and p.x < 1]
    assert "edge" in point.note
    drawn = draw(found)
    assert any(line.get_markerfacecolor() == "white" for axes in drawn.axes for line in axes.lines)


def test_lines_that_were_not_swept_are_shown_as_run_with_paired_gains() -> None:
    losses = {"sp": {1.0: 3.0, 0.25: 4.0}, "supar": {1.0: 3.0, 0.25: 3.6}}
    found = pareto(frame(as_run(losses)))
    assert found.swept is None
    assert curve(found, "sp", "as run") == pytest.approx({1.0: 3.1, 0.25: 4.1})
    by_x = {gain.x: gain for gain in found.gains}
    assert by_x[1.0].percent == pytest.approx(0.0)
    assert by_x[0.25].percent == pytest.approx(100 * (4.1 - 3.7) / 4.1)
    # the seeds' shared part cancels: what is left is that of the ratio, not of the losses
    each = [100 * 0.4 / (4.0 + 0.1 * seed) for seed in range(3)]
    assert by_x[0.25].stderr == pytest.approx(np.std(each, ddof=1) / np.sqrt(3))
    assert {gain.over for gain in found.gains} == {"sp"}


def annotated(found: Pareto, panel: int) -> list[str]:
    (text,) = [each.get_text() for each in draw(found).axes[panel].texts]
    return str(text).replace("\N{MINUS SIGN}", "-").replace("\N{MICRO SIGN}", "u").splitlines()


def test_the_gain_that_is_written_is_that_of_a_hand_made_example() -> None:
    # fig. 3: as run, one seed. SP 4 against 3 is 1/4 of SP's loss, muP 3.75 against 3 a fifth of muP's; nothing at density 1
    losses = {"sp": {1.0: 2.0, 1 / 64: 4.0}, "mup": {1.0: 2.0, 1 / 64: 3.75}, "supar": {1.0: 2.0, 1 / 64: 3.0}}
    found = pareto(frame(as_run(losses, n_seeds=1)))
    assert annotated(found, 0) == [
        "lower loss:",
        "SuPar vs SP: +25.0% at 1/64, +12.5% on average",
        "SuPar vs uP: +20.0% at 1/64, +10.0% on average",
    ]
    # figs. 8 and 10: each at its own best lr, whatever that is; SP's basin a tenth of SuPar's loss higher at every density
    swept = rows(optima={"sp": (-9.0, -5.0), "supar": (-7.0, -7.0)}, noise=0.0)
    for row in swept:
        row["train_loss"] += 0.1 * FLOOR * (row["parameterization"] == "sp")
    written = annotated(pareto(frame(swept)), 1)[1]
    assert written.startswith("SuPar vs SP: +9.1")  # 1 - 1 / 1.1
    assert written.endswith("% at 1/16, +9.1% on average")
    # and at the dense line's lr: SP's sparse line is 4 octaves away from its best, SuPar's is at it
    moved = 1.1 * FLOOR + CURVATURE * 4**2
    gain = next(g for g in pareto(frame(swept)).gains if (g.at, g.x) == ("transferred", 1 / 16))
    assert gain.percent == pytest.approx(100 * (1 - FLOOR / moved), abs=0.2)


@pytest.mark.parametrize(
    ("optima", "side", "written"),
    [
        ({"sp": (-9.0, 0.0), "supar": (-7.0, -7.0)}, "low", "SuPar vs SP: \N{LESS-THAN OR EQUAL TO} "),
        ({"sp": (-9.0, -7.0), "supar": (-7.0, 0.0)}, "high", "SuPar vs SP: \N{GREATER-THAN OR EQUAL TO} "),
        (
            {"sp": (-9.0, 0.0), "supar": (-7.0, 0.0)},
            None,
            "SuPar vs SP: +0.0",
        ),  # left out: what is written is of density 1
    ],
)
def test_a_gain_over_a_censored_best_is_a_bound(
    optima: dict[str, tuple[float, float]], side: str | None, written: str
) -> None:
    found = pareto(frame(rows(optima=optima, noise=0.0)))
    at_own = {gain.x: gain for gain in found.gains if gain.at == "own best"}
    assert at_own[1.0].side is None
    assert (1 / 16 in at_own) == (side is not None)
    assert side is None or at_own[1 / 16].side == side
    line = annotated(found, 1)[1]
    assert line.startswith(written)
    assert ("on average" in line) == (side is None)


def test_iso_parameter_widths_take_density_and_lr_along() -> None:
    listed = as_run({"sp": {1.0: 3.0, 0.5: 2.9}, "supar": {1.0: 3.0, 0.5: 2.8}})
    for row in listed:
        row["width"] = 256 if row["density"] == 1 else 384
        row["lr"] = 2.0**-9 if row["parameterization"] == "sp" and row["width"] == 384 else 2.0**-7
    found = pareto(frame(listed), x="width")
    assert found.swept is None
    assert sorted(curve(found, "supar", "as run")) == [256.0, 384.0]


def test_init_std_may_be_what_was_swept() -> None:
    swept = rows()
    for row in swept:
        row["init_std"], row["lr"] = row["lr"], 0.01
    found = pareto(frame(swept))
    assert found.swept == "init_std"
    assert curve(found, "supar", "own best")[1.0] == pytest.approx(FLOOR, abs=0.003)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"x": "dens"}, "x"),
        ({"x": "parameterization", "hue": "density"}, "x"),
        ({"hue": "density"}, "x"),
        ({"metric": "loss"}, "metric"),
        ({"col": "mode"}, "col"),
        ({"fixed": {"width": 3}}, "where.width"),
    ],
)
def test_bad_axes_are_refused_by_name(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pareto(frame(rows()), **arguments)
    assert caught.value.key == key


def test_a_point_that_mixes_widths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"where\.width"):
        pareto(frame(rows() + rows(width=512)))
    both = pareto(frame(rows() + rows(width=512)), col="width")
    assert [name for name, _ in both.panels] == ["256", "512"]


def test_the_figure_writes_the_gain_and_the_files_hold_every_point(tmp_path: Path) -> None:
    found = pareto(frame(rows()))
    drawn = draw(found)
    assert [axes.get_title() for axes in drawn.axes] == ["Transferred learning rate", "Own best learning rate"]
    assert drawn.axes[0].xaxis_inverted()
    gain = next(g for g in found.gains if (g.over, g.at, g.x) == ("sp", "transferred", 1 / 16))
    (text,) = [t.get_text() for t in drawn.axes[0].texts]
    assert f"SP: +{gain.percent:.1f}" in text
    _, _, table = save(drawn, found, tmp_path / "pareto")
    with table.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == len(data_rows(found)) == 3 * 2 * 2
    assert {row["at"] for row in listed} == {"transferred", "own best"}
