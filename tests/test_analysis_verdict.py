"""Entries, the rule, the quick start's statements, and the files they are written to."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.basins import basin_sets
from analysis.frames import frame
from analysis.statements import moves_less_than, moves_more_than, quickstart_statements
from analysis.tables import columns, verdict_rows
from analysis.verdict import MAX_SHIFT_OCTAVES, Entry, Shift, entries, plain, proposals, shift_text, verdicts, write
from supar_sweep.errors import ConfigError
from tests.basin_rows import rows


def judged(**arguments: Any) -> list[Entry]:
    return entries(basin_sets(frame(rows(**arguments))))


def entry(found: list[Entry], name: str, density: float) -> Any:
    return next(e for e in found if (e.parameterization, e.density) == (name, density))


def test_shift_is_the_difference_of_the_optima() -> None:
    found = judged()
    for name, truth in (("sp", 2.5), ("mup", 2.0), ("supar", -0.1)):
        dense, sparse = entry(found, name, 1.0), entry(found, name, 1 / 16)
        assert dense.shift_octaves == 0.0
        assert dense.regret == 0.0
        assert sparse.shift_octaves == pytest.approx(sparse.log2_opt - dense.log2_opt)
        assert sparse.shift_octaves == pytest.approx(truth, abs=0.2)
        assert sparse.shift_ci[0] <= truth <= sparse.shift_ci[1]


def test_the_shift_is_less_certain_than_either_optimum() -> None:
    found = judged()
    dense, sparse = entry(found, "sp", 1.0), entry(found, "sp", 1 / 16)
    width = sparse.shift_ci[1] - sparse.shift_ci[0]
    assert width >= max(e.ci[1] - e.ci[0] for e in (dense, sparse))


def test_regret_is_what_the_dense_optimum_costs_on_the_sparse_line() -> None:
    found = judged()
    assert entry(found, "sp", 1 / 16).regret == pytest.approx(0.02 * 2.5**2, rel=0.15)
    sparse = entry(found, "supar", 1 / 16)
    assert 0 <= sparse.regret <= sparse.regret_upper < 0.01
    assert sparse.regret_percent == pytest.approx(100 * sparse.regret / sparse.loss_at_optimum)


def test_the_verdict_follows_the_rule() -> None:
    answers = {v.parameterization: v.answer for v in verdicts(judged())}
    assert answers == {"sp": "does not transfer", "mup": "does not transfer", "supar": "transfers"}


def test_noise_makes_the_verdict_undecided_not_wrong() -> None:
    answer = verdicts(judged(optima={"supar": (-7.0, -6.6)}, noise=0.05))[0]
    assert answer.answer == "undecided"


def test_a_shift_inside_the_limits_with_a_costly_regret_does_not_transfer_for_sure() -> None:
    sharp = rows(optima={"supar": (-7.0, -6.65)})
    for row in sharp:
        row["train_loss"] = 2.4 + 20 * (row["train_loss"] - 2.4)
    assert verdicts(entries(basin_sets(frame(sharp))))[0].answer == "undecided"


def test_without_a_sparse_line_there_is_no_verdict() -> None:
    dense = [row for row in rows() if row["density"] == 1.0]
    assert {v.answer for v in verdicts(entries(basin_sets(frame(dense))))} == {"undecided"}


def test_a_censored_line_has_a_bound_and_no_number() -> None:
    found = judged(optima={"mup": (-8.0, 0.0)})
    sparse = entry(found, "mup", 1 / 16)
    assert sparse.censored
    assert (sparse.log2_opt, sparse.ci, sparse.shift_octaves, sparse.shift_ci) == (None,) * 4
    assert sparse.shift_bound_side == "high"
    assert 4.0 < sparse.shift_bound < 8.0
    assert sparse.proposed_log2 == (-1.0, 0.0)
    assert sparse.regret_is_lower_bound
    assert verdicts(found)[0].answer == "does not transfer"


def test_a_censored_reference_bounds_the_shift_from_the_other_side() -> None:
    found = judged(optima={"sp": (-14.0, -6.0)})
    sparse = entry(found, "sp", 1 / 16)
    assert entry(found, "sp", 1.0).censored
    assert not sparse.censored
    assert sparse.shift_octaves is None
    assert sparse.regret is None
    assert sparse.shift_bound_side == "high"
    assert 4.0 < sparse.shift_bound < 8.0


def test_both_censored_on_one_side_says_nothing() -> None:
    sparse = entry(judged(optima={"sp": (0.0, 1.0)}), "sp", 1 / 16)
    assert (sparse.shift_octaves, sparse.shift_bound) == (None, None)


def half_open(noise: float) -> list[Entry]:
    """Entries of a sparse line that falls steeply and is flat from -5 on: the noise leaves its optimum one end."""
    found = rows(optima={"mup": (-8.0, -8.0)}, noise=0.0)
    rng = np.random.default_rng(1)
    for row in found:
        x = math.log2(row["lr"])
        if row["density"] < 1:
            row["train_loss"] = 2.4 + 0.02 * max(-5 - x, 0) ** 2 + 2e-4 * (x + 3) ** 2
        row["train_loss"] += rng.normal(0, noise)
    return entries(basin_sets(frame(found)))


def test_an_interval_with_one_end_is_a_bound() -> None:
    sparse = entry(half_open(noise=0.004), "mup", 1 / 16)
    assert (sparse.status, sparse.ci, sparse.shift_ci) == ("fitted", None, None)
    assert sparse.bound_side == sparse.shift_bound_side == "high"
    assert sparse.bound < sparse.log2_opt
    assert 0.5 < sparse.shift_bound < sparse.shift_octaves
    assert sparse.shift.outside
    assert f"octaves (>= {sparse.shift_bound:+.2f})" in shift_text(sparse)


@pytest.mark.parametrize(
    ("shift", "inside", "outside"),
    [
        (Shift(0.1, (-0.2, 0.4)), True, False),
        (Shift(0.4, (0.1, 0.7)), False, False),
        (Shift(0.9, (0.51, 1.3)), False, True),
        (Shift(-0.9, (-1.3, -0.51)), False, True),
        (Shift(None, bound=0.6, side="high"), False, True),
        (Shift(None, bound=0.4, side="high"), False, False),
        (Shift(None, bound=-0.6, side="low"), False, True),
        (Shift(None, bound=0.6, side="low"), False, False),
        (Shift(0.1), False, False),
    ],
)
def test_inside_and_outside_half_an_octave(shift: Shift, inside: bool, outside: bool) -> None:
    assert (shift.inside, shift.outside) == (inside, outside)


def test_the_quick_start_statements_hold_on_basins_that_have_them() -> None:
    found = judged()
    assert [s.holds for s in quickstart_statements(found)[:2]] == [True, True]
    assert moves_more_than(found, "supar", 2.0).holds is False
    assert moves_less_than(found, "sp", 0.5).holds is False
    assert moves_more_than(found, "sp", 2.6).holds is False


def test_a_censored_bound_of_two_octaves_counts_as_moved() -> None:
    found = judged(optima={"sp": (-8.0, 0.0)})
    statement = moves_more_than(found, "sp", 2.0)
    assert statement.holds is True
    assert "censored" in statement.note
    assert moves_more_than(found, "sp", 9.0).holds is None
    assert moves_less_than(found, "sp", 0.5).holds is False


def test_the_best_losses_are_compared_at_the_lowest_density() -> None:
    better, worse = rows(optima={"supar": (-7.0, -7.0)}), rows(optima={"sp": (-9.0, -6.5)})
    for row in worse:
        row["train_loss"] += 0.1
    statement = quickstart_statements(entries(basin_sets(frame(better + worse))))[2]
    assert statement.holds is True
    numbers = statement.numbers
    sp, supar = numbers["sp_best_loss"], numbers["supar_best_loss"]
    assert sp is not None
    assert supar is not None
    assert sp - supar == pytest.approx(0.1, abs=0.01)


def test_best_losses_at_different_widths_are_not_compared() -> None:
    mixed = rows(optima={"supar": (-6.0, -6.0)}, width=512) + rows(optima={"sp": (-9.0, -6.5)})
    statement = quickstart_statements(entries(basin_sets(frame(mixed))))[2]
    assert statement.holds is None
    assert "differ" in statement.note


def test_a_statement_shows_how_sure_its_number_is() -> None:
    found = judged(optima={"supar": (-7.0, -6.6)}, noise=0.01)
    statement = moves_less_than(found, "supar", 0.5)
    low, high = entry(found, "supar", 1 / 16).shift_ci
    assert f"({low:+.2f} to {high:+.2f})" in statement.note


def test_statements_without_their_lines_are_not_true_or_false() -> None:
    only = judged(optima={"mup": (-7.0, -5.0)})
    assert [s.holds for s in quickstart_statements(only)] == [None, None, None]


def test_every_width_is_judged_against_its_own_dense_line() -> None:
    wide = rows(optima={"supar": (-6.0, -6.0)}, width=512)
    found = entries(basin_sets(frame(rows(optima={"supar": (-7.0, -7.0)}) + wide)))
    assert [(e.width, e.density) for e in found] == [
        (256, 1.0), (256, 1 / 16), (512, 1.0), (512, 1 / 16),
    ]  # fmt: skip
    assert all(e.shift_octaves == pytest.approx(0.0, abs=0.2) for e in found)


def test_the_files_hold_one_entry_per_line_and_no_nan(tmp_path: Path) -> None:
    found = judged(optima={"sp": (-9.0, 0.0), "supar": (-7.0, -7.1)}, n_seeds=1)
    statements = [statement.as_dict() for statement in quickstart_statements(found)]
    verdict, summary = write(found, tmp_path / "figures", statements)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    listed = json.loads(verdict.read_text(), parse_constant=refuse)
    assert len(listed) == 4
    for key in [
        "parameterization",
        "width",
        "density",
        "n_seeds",
        "log2_lr_opt",
        "ci",
        "shift_octaves",
        "regret",
        "censored",
    ]:
        assert all(key in each for each in listed)
    censored = next(each for each in listed if each["censored"])
    assert censored["log2_lr_opt"] is None
    written = json.loads(summary.read_text(), parse_constant=refuse)
    assert set(written["verdicts"]) == {"sp", "supar"}
    assert f"+-{MAX_SHIFT_OCTAVES:g} octaves" in written["rule"]
    assert len(written["statements"]) == 3
    assert sorted(path.name for path in verdict.parent.iterdir()) == [
        "summary.json",
        "verdict.json",
    ]


def test_the_table_shows_bounds_as_bounds() -> None:
    found = judged(optima={"mup": (-8.0, 0.0)})
    dense, sparse = verdict_rows(found)
    assert tuple(dense) == columns()
    assert sparse["log2_lr_opt"].startswith(">= ")
    assert sparse["shift_octaves"].startswith(">= +")
    assert sparse["ci"] == "-"
    assert dense["shift_octaves"] == "+0.00"
    raw = verdict_rows(found, text=False)[1]
    assert raw["log2_lr_opt"] is None
    assert raw["shift_bound"] == dataclasses.asdict(found[1])["shift_bound"]


def iso(widths: dict[float, int], **arguments: Any) -> list[dict[str, Any]]:
    """Rows in which width goes with density, as in an iso-parameter grid."""
    return [{**row, "width": widths[row["density"]]} for row in rows(**arguments)]


def test_an_iso_parameter_grid_is_one_comparison() -> None:
    sets = basin_sets(frame(iso({1.0: 256, 1 / 16: 768}, optima={"sp": (-9.0, -6.5)})))
    assert len(sets) == 1
    found = entries(sets)
    assert [(e.width, e.density, e.is_reference) for e in found] == [(768, 1 / 16, False), (256, 1.0, True)][::-1]
    assert found[1].shift_octaves == pytest.approx(2.5, abs=0.2)
    assert verdicts(found)[0].answer == "does not transfer"


def test_lines_over_width_are_compared_with_the_narrowest() -> None:
    both = rows(optima={"sp": (-9.0, -6.5)}) + rows(optima={"sp": (-10.0, -7.5)}, width=512)
    found = entries(basin_sets(frame(both), hue="width", fixed={"density": 1.0}))
    assert [(e.width, e.is_reference) for e in found] == [(512, False), (256, True)]
    assert found[0].shift_octaves == pytest.approx(-1.0, abs=0.15)


def test_the_verdict_over_init_std_names_what_was_swept(tmp_path: Path) -> None:
    swept = rows(optima={"sp": (-9.0, 0.0)})
    for row in swept:
        row["init_std"], row["lr"] = row["lr"], 0.01
    found = entries(basin_sets(frame(swept), x="init_std"))
    verdict, _ = write(found, tmp_path, prefix="init_basins-")
    assert verdict.name == "init_basins-verdict.json"
    dense, sparse = json.loads(verdict.read_text())
    assert dense["swept"] == "init_std"
    assert dense["log2_init_std_opt"] == pytest.approx(-9.0, abs=0.1)
    assert sparse["log2_init_std_opt"] is None
    assert sparse["proposed_log2_init_stds"] == [-1.0, 0.0]
    assert "log2_init_std_opt" in verdict_rows(found)[0]


def test_proposals_go_round_the_lines_nearest_first_within_the_budget(tmp_path: Path) -> None:
    found = judged(optima={"mup": (-8.0, 0.0), "supar": (-8.0, 0.0)})
    wanted = proposals(found)
    assert [(each["parameterization"], each["lr"]) for each in wanted] == [
        ("mup", 2.0**-1), ("supar", 2.0**-1), ("mup", 1.0), ("supar", 1.0),
    ]  # fmt: skip
    assert all((each["width"], each["density"], each["n_layer"]) == (256, 1 / 16, 2) for each in wanted)
    assert proposals(found, budget=3) == wanted[:3]
    assert proposals(judged()) == []
    _, summary = write(found, tmp_path)
    assert json.loads(summary.read_text())["proposed"] == wanted
    with pytest.raises(ConfigError, match="budget"):
        proposals(found, budget=-1)


def test_running_the_proposals_settles_a_censored_optimum() -> None:
    optima = {"mup": (-8.0, -0.6)}
    before = judged(optima=optima)
    extra = {math.log2(each["lr"]) for each in proposals(before)}
    assert entry(before, "mup", 1 / 16).censored
    after = judged(optima=optima, grid=sorted({*range(-12, -1), *map(int, extra)}))
    assert not entry(after, "mup", 1 / 16).censored
    assert entry(after, "mup", 1 / 16).log2_opt == pytest.approx(-0.6, abs=0.3)


def test_an_entry_is_plain() -> None:
    assert json.loads(json.dumps(plain(judged()[0])))["log2_lr_opt"] == judged()[0].log2_opt
