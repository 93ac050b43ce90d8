"""The report as data: verdicts, tables, lineage, cost, failures, from records known by formula; and its page's text."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from analysis.frames import frame
from analysis.report import CELLS_LISTED, Report, report, study_cell_ids
from analysis.report_cost import flops_text, time_text
from analysis.report_figures import Own, Picture, basins_of, line_axis, size_px, svg, swept_axis
from analysis.report_origin import Table, command_text
from analysis.report_page import html
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.identity import cell_id
from supar_sweep.sweep.status import CellState
from supar_sweep.training.cost import flops_per_step
from tests.report_records import (
    DENSITIES,
    FINGERPRINT,
    LRS,
    OPTIMA,
    PROVENANCE,
    SEEDS,
    STUDY_TRAIN_S,
    TRAIN_S,
    TRIALS,
    cell_of,
    grid,
    proxy,
    records,
    run_flops,
    study,
    winner,
)


@pytest.fixture(scope="module")
def whole() -> Report:
    return report(records())


def column(table: Table, name: str) -> list[str]:
    return [row[table.columns.index(name)] for row in table.rows]


def test_each_parameterization_has_its_verdict_with_the_rule(whole: Report) -> None:
    answers = {each.parameterization: each.answer for each in whole.verdicts}
    assert answers == {"sp": "does not transfer", "mup": "undecided", "supar": "transfers"}
    assert "octaves" in whole.rule
    assert whole.question == "Does the best learning rate of the dense model hold at every density?"


def test_the_table_holds_optimum_shift_and_regret_of_every_line(whole: Report) -> None:
    table = whole.optima
    assert table is not None
    assert len(table.rows) == len(OPTIMA) * len(DENSITIES)
    for row, entry in zip(table.rows, whole.entries, strict=True):
        dense, sparse = OPTIMA[entry.parameterization]
        expected = dense if entry.density == 1 else sparse
        assert float(row[table.columns.index("log2 lr")]) == pytest.approx(expected, abs=0.15)
        shift = row[table.columns.index("shift, octaves")]
        if entry.density == 1:
            assert shift == "reference"
        else:
            assert float(shift) == pytest.approx(sparse - dense, abs=0.3)
    # one width, one depth: said once, not in every row
    assert "width" not in table.columns
    assert "width 32" in table.note


def test_its_figures_are_those_that_the_grid_supports(whole: Report) -> None:
    assert [each.kind for each in whole.figures] == ["lr_basins", "pareto", "loss_curves", "study"]
    reasons = {each.kind: each.reason for each in whole.left_out}
    assert set(reasons) == {"heatmap", "scaling"}
    assert "several widths" in reasons["heatmap"]
    assert "a fit needs" in reasons["scaling"]


def test_the_experiments_own_figure_comes_first_and_decides_the_verdict() -> None:
    own = Own("pareto", {"x": "density", "hue": "parameterization", "col": None}, {"parameterization": "sp"}, 1 / 16)
    first = report(replace(records(), own=own)).figures[0]
    assert (first.kind, first.data.x, {curve.hue for _, curves in first.data.panels for curve in curves}) == (
        "pareto",
        "density",
        {"sp"},
    )
    axes = {"x": "lr", "hue": "density", "col": "parameterization"}
    sparse = report(replace(records(), own=Own("lr_basins", axes, {"parameterization": "sp"}, 1 / 16)))
    assert sparse.figures[0].kind == "lr_basins"
    assert {each.parameterization for each in sparse.entries} == {"sp"}
    assert {each.density: each.is_reference for each in sparse.entries} == {1.0: False, 1 / 16: True}


def test_a_basin_without_any_loss_is_left_out() -> None:
    plan = grid()
    wide = grid(width=64)
    both = replace(plan, points=plan.points + wide.points, cells={**plan.cells, **wide.cells})
    found = report(records(both, {this: CellState("missing") for this in wide.cells}))
    assert [each.name for each in found.figures if each.kind == "lr_basins"] == ["lr_basins-width32"]
    reasons = {each.kind: each.reason for each in found.left_out}
    assert reasons["lr_basins-width64"] == "none of its runs has a loss yet"
    assert "heatmap" in {each.kind for each in found.figures}


def test_a_map_without_its_reference_is_left_out() -> None:
    plan = grid()
    wide = grid(width=64)
    both = replace(plan, points=plan.points + wide.points, cells={**plan.cells, **wide.cells})
    found = report(records(both, {this: CellState("missing") for this in plan.cells}))
    assert "the proxy's own shape" in {each.kind: each.reason for each in found.left_out}["heatmap"]


def test_curves_are_drawn_at_the_transferred_value(whole: Report) -> None:
    asked: list[str] = []
    plan = grid()
    made = records(plan)

    def curve_of(this: str) -> Sequence[Mapping[str, Any]]:
        asked.append(this)
        return made.curve_of(this)

    report(replace(made, curve_of=curve_of))
    lrs = {cell_of(plan, this).hparams.lr for this in asked}
    assert lrs == {2.0**-7}  # every reference's optimum


@pytest.mark.parametrize(
    ("values", "axis"),
    [({}, "lr"), ({"lr": [2.0**-7]}, None), ({"lr": [2.0**-7], "init_std": [0.1, 0.2]}, "init_std")],
)
def test_the_swept_axis_is_found(values: dict[str, list[float]], axis: str | None) -> None:
    rows = [dict(row) for row in records().rows]
    if "lr" in values:
        rows = [row for row in rows if row["lr"] in values["lr"]]
    if "init_std" in values:
        rows = [
            {**row, "init_std": std, "cell_id": f"{row['cell_id']}{std}"} for row in rows for std in values["init_std"]
        ]
    table = frame(rows)
    assert swept_axis(table) == axis
    assert [each.x for each in basins_of(table, "train_loss")] == ([] if axis is None else [axis])


def test_an_axis_of_names_with_null_among_them_makes_parts() -> None:
    rows = [
        {**row, "train.target": name, "cell_id": f"{row['cell_id']}{name}"}
        for row in records().rows
        for name in (None, "a.b")
    ]
    assert len(basins_of(frame(rows), "train_loss")) == 2


def test_lines_are_told_apart_by_width_where_density_is_one_value() -> None:
    rows = [{**row, "density": 1.0, "width": 32 if row["density"] == 1 else 64} for row in records().rows]
    assert line_axis(frame(rows)) == "width"


def test_a_grid_without_a_swept_axis_has_no_verdict_and_says_so() -> None:
    plan = grid()
    kept = [point for point in plan.points if point["lr"] == 2.0**-7]
    found = report(
        records(replace(plan, points=tuple(kept), cells={p["cell_id"]: plan.cells[p["cell_id"]] for p in kept}))
    )
    assert found.verdicts == ()
    assert "no optima to compare" in found.no_verdict
    assert [each.kind for each in found.figures] == ["pareto", "loss_curves", "study"]
    assert "no optima to compare" in html(found)


def test_cost_is_the_sum_over_cells_and_direct_tuning_follows_its_formula(whole: Report) -> None:
    plan = grid()
    n_runs = len([row for row in TRIALS if row["end"] != "failed"]) + 2  # and two confirmations
    assert whole.cost.study is not None
    assert whole.cost.study.n_runs == n_runs
    # the search and its confirmations are five cells
    of_proxy = proxy().train.steps * flops_per_step(proxy())
    assert whole.cost.study.flops == pytest.approx(n_runs * of_proxy)
    assert whole.cost.study.train_s == pytest.approx(n_runs * STUDY_TRAIN_S)
    assert whole.cost.train_s == pytest.approx(TRAIN_S * len(plan.cells))
    assert whole.cost.flops == pytest.approx(sum(run_flops(plan, this) for this in plan.cells))
    shapes = {cell_of(plan, this).density: run_flops(plan, this) for this in plan.cells}
    assert {shape.density: shape.direct_flops for shape in whole.cost.shapes} == pytest.approx(
        {density: n_runs * flops for density, flops in shapes.items()}
    )
    assert whole.cost.direct_s == pytest.approx(len(DENSITIES) * n_runs * TRAIN_S)
    text = html(whole)
    assert "Formula." in text
    assert flops_text(whole.cost.direct_flops) in text


def test_the_proxys_own_shape_needs_no_direct_tuning() -> None:
    plan = grid(width=16)
    shapes = report(records(plan)).cost.shapes
    assert {shape.density: shape.direct_flops is None for shape in shapes} == {1.0: True, 1 / 16: False}


def test_without_a_study_there_is_no_direct_cost() -> None:
    found = report(records(grid(provenance={"hparams": None}), study=None))
    assert found.cost.direct_flops is None
    assert "direct tuning" not in found.costs.columns
    assert [step.kind for step in found.origin.steps] == ["Hyperparameters", "Rules", "Cells"]
    assert "swept in this grid" in column(found.origin.hparams, "from")
    assert "no study is known" in html(found)


def test_a_study_whose_records_are_gone_has_no_known_cost() -> None:
    known = study()
    some = dict(list(known.results.items())[1:])
    found = report(records(study=replace(known, results=some)))
    assert found.cost.study is not None
    assert found.cost.study.flops is None
    assert "not all in this runs folder" in html(found)


def test_a_studys_cells_are_those_that_it_trained() -> None:
    tried = {float(row["params"]["lr"]) for row in TRIALS}
    expected = {cell_id(replace(proxy(), hparams=replace(proxy().hparams, lr=lr)), FINGERPRINT) for lr in tried} | {
        cell_id(replace(proxy(), hparams=replace(proxy().hparams, lr=2.0**-7), seed=seed), FINGERPRINT)
        for seed in (7, 8)
    }
    assert study_cell_ids(winner(), TRIALS) == expected


def test_the_lineage_goes_from_study_to_cells(whole: Report) -> None:
    steps = {step.kind: step for step in whole.origin.steps}
    assert list(steps) == ["Study", "Trial", "Rules", "Cells"]
    assert steps["Study"].name == "proxy"
    assert dict(steps["Study"].facts)["sampler"] == "tpe, seed 0"
    assert steps["Trial"].name == "2"
    assert dict(steps["Trial"].facts)["confirmed"] == "2.6000, mean of seeds 7, 8"
    assert steps["Rules"].name == "version 1"
    n_cells = len(OPTIMA) * len(DENSITIES) * len(LRS) * len(SEEDS) - len(LRS) * len(SEEDS)  # muP's dense are SuPar's
    assert steps["Cells"].name == str(n_cells)
    assert whole.origin.warnings == ()
    by_name = {row[0]: row for row in whole.origin.hparams.rows}
    assert by_name["lr"][1:] == ("0.0078125", "-7.00", "searched, 2^-11 to 2^-4")
    assert by_name["init_std"][3] == "held fixed"


def test_targets_get_what_the_rules_say(whole: Report) -> None:
    table = whole.origin.targets
    at = {(row[0], row[2]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    m_d, density = 2.0, 1 / 16
    supar, mup, sp = (at[name, "1/16"] for name in ("S\N{MICRO SIGN}Par", "\N{MICRO SIGN}P", "SP"))
    assert float(supar["lr x"]) == pytest.approx(1 / (m_d * density))
    assert float(supar["init_std x"]) == pytest.approx((m_d * density) ** -0.5, rel=1e-3)
    assert float(mup["lr x"]) == pytest.approx(1 / m_d)
    assert float(sp["lr x"]) == 1
    assert float(supar["lr"]) == pytest.approx(2.0**-7 / (m_d * density))


@pytest.mark.parametrize(
    ("changes", "provenance", "says"),
    [
        ({"study": study(trial=1)}, {}, "newer winner (trial 1)"),
        ({"study": None}, {}, "not in this runs folder"),
        ({"study": study(data={"name": "text", "fingerprint": "e" * 64})}, {}, "on other data"),
        ({}, {"git_dirty": "abcd"}, "uncommitted changes (hash abcd)"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], provenance: dict[str, Any], says: str) -> None:
    found = report(records(grid(provenance=provenance), **changes))
    assert [warning for warning in found.origin.warnings if says in warning]
    assert says in html(found)


def test_cells_of_another_rule_table_are_named() -> None:
    plan = grid()
    cells = {f"0{this[1:]}": replace(cell, cell_id=f"0{this[1:]}") for this, cell in plan.cells.items()}
    points = tuple({**point, "cell_id": f"0{point['cell_id'][1:]}"} for point in plan.points)
    found = report(records(replace(plan, cells=cells, points=points)))
    assert [step.name for step in found.origin.steps if step.kind == "Rules"] == ["another version"]
    assert any("of another rule table" in warning for warning in found.origin.warnings)


def test_cells_of_several_versions_are_counted() -> None:
    made = records()
    results = dict(made.results)
    first = next(iter(results))
    results[first] = {**results[first], "versions": {"python": "3.11.0", "torch": "2.6.0", "supar_sweep": "0.1.0"}}
    found = report(replace(made, results=results))
    assert sorted(map(int, column(found.origin.software, "cells"))) == [1, len(results) - 1]
    assert any("not all trained by the same code" in warning for warning in found.origin.warnings)


def test_failures_stand_by_kind_with_message_and_log() -> None:
    plan = grid()
    a, b, c, d = list(plan.cells)[:4]
    ends = {
        a: CellState("failed", "ValueError: no", 2, "runs/cells/a/log.txt"),
        b: CellState("failed", "another", 1, "runs/cells/b/log.txt"),
        c: CellState("oom", "out of memory", 1, "runs/cells/c/attempts/0001"),
        d: CellState("diverged"),
    }
    found = report(records(plan, ends, unfinished_s=120.0))
    assert found.failures is not None
    assert [row[:4] for row in found.failures.rows] == [
        ("failed", "2", "ValueError: no; begun 2 times", "runs/cells/a/log.txt"),
        ("oom", "1", "out of memory", "runs/cells/c/attempts/0001"),
    ]
    assert "2 failed, 1 oom of" in found.incomplete
    assert "diverged" in found.states.columns
    text = html(found)
    assert "2 min" in text
    assert "runs/cells/a/log.txt" in text
    assert "No cell failed." not in text


def test_a_whole_grid_has_no_failures(whole: Report) -> None:
    assert (whole.failures, whole.incomplete) == (None, "")
    assert "No cell failed." in html(whole)


def test_nothing_complete_is_an_error() -> None:
    plan = grid()
    ends = {this: CellState("missing") for this in plan.cells}
    ends[next(iter(plan.cells))] = CellState("failed", "no")
    with pytest.raises(ConfigError, match="no cell is complete yet") as raised:
        report(records(plan, ends))
    assert f"{len(plan.cells) - 1} missing, 1 failed" in str(raised.value)
    assert "`run`" in str(raised.value)


def test_it_can_be_done_again(whole: Report) -> None:
    commands = dict(whole.origin.commands)
    assert commands["the code"] == f"git checkout {PROVENANCE['git_sha']}"
    assert commands["the study"] == "supar-sweep tune study.name=proxy"
    assert commands["the grid"] == "supar-sweep run experiment=mine 'experiment.axes.lr={log2: [-11, -3]}'"
    assert commands["this report"] == "supar-sweep report experiment.name=mine"
    facts = dict(whole.origin.facts)
    assert FINGERPRINT in facts["data"]
    assert "torch 2.13.0" in facts["versions"]


def test_commands_leave_out_what_the_program_adds() -> None:
    argv = ["supar-sweep run", "a=b c", "hydra.run.dir=.", "hydra/help=supar", "it's=1"]
    assert command_text(argv) == "supar-sweep run 'a=b c' 'it'\"'\"'s=1'"
    axis = "experiment.axes.lr"
    assert command_text(["supar-sweep run", f"++{axis}=null", f"++{axis}=[1,2]", "++mine=3"]) == (
        f"supar-sweep run '{axis}=[1,2]' ++mine=3"
    )


def test_the_page_needs_nothing_else(whole: Report) -> None:
    text = html(whole)
    assert "<script" not in text
    assert re.findall(r"(?:src|srcset|href)=\"(?!data:|#)", text) == []
    assert "@import" not in text
    assert re.findall(r"url\(", text) == []
    assert text.index('id="verdict"') < text.index('id="figures"') < text.index('id="tables"')
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(images) == len(whole.figures)
    assert all(b"<svg" in base64.b64decode(image) for image in images)
    tables = re.findall(r'href="data:text/csv;base64,([^"]+)"', text)
    assert b"optimum_log2" in base64.b64decode(tables[0])


def test_what_comes_from_records_is_escaped() -> None:
    plan = grid()
    bad = "<b onmouseover=alert(1)>&\"'\udc80"
    made = records(plan, {next(iter(plan.cells)): CellState("failed", bad, 1, bad)}, version=bad, made=bad)
    text = html(report(made))
    assert "<b " not in text
    assert "&lt;b onmouseover=alert(1)&gt;&amp;&#34;&#39;?" in text
    text.encode("utf-8")


def test_the_same_records_give_the_same_page(whole: Report) -> None:
    assert html(whole) == html(report(records()))


def test_a_figure_says_its_size(whole: Report) -> None:
    picture: Picture = whole.figures[0]
    width_px, height_px = size_px(svg(picture))
    width_in, height_in = 0.9 * 3.35 * len(OPTIMA), 3.1 + 1.0
    assert width_px == pytest.approx(96 * width_in, abs=1)
    assert height_px == pytest.approx(96 * height_in, abs=1)


def test_many_cells_are_cut_with_a_word(whole: Report) -> None:
    n = len(whole.cells.rows)
    assert n == int({step.kind: step.name for step in whole.origin.steps}["Cells"]) < CELLS_LISTED
    assert whole.cells.note == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0 FLOP"),
        (999.6, "1 kFLOP"),
        (2.83e8, "283 MFLOP"),
        (1.21e15, "1.21 PFLOP"),
        (3e27, "3e+03 YFLOP"),
    ],
)
def test_flops_are_written_with_a_prefix(value: float | None, text: str) -> None:
    assert flops_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.4217, "0.422 s"),
        (89.0, "89 s"),
        (90.0, "1.5 min"),
        (5400.0, "1.5 h"),
        (3600.0 * 4321, "4,321 h"),
    ],
)
def test_times_have_the_unit_that_suits_them(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text
