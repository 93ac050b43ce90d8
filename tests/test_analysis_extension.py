"""Which values would settle a grid's censored optima."""

from __future__ import annotations

from math import log2

from analysis.extension import wanted
from analysis.frames import frame
from tests.basin_rows import rows

GRID = range(-9, -4)  # log2 of the swept values


def test_a_line_that_is_best_at_its_edge_wants_the_values_beyond() -> None:
    # the dense line is best inside the grid, the sparse ones above and below it
    table = frame(rows(optima={"sp": (-7.0, -3.0), "mup": (-7.0, -11.0)}, grid=GRID))
    found, waiting = wanted(table)
    assert not waiting
    assert [each.line for each in found] == ["sp density 0.0625", "mup density 0.0625"]
    above, below = found
    assert (above.axis, above.values) == (
        "lr",
        (2.0**-4, 2.0**-3),
    )  # two octaves beyond the last value, by the grid's step
    assert (below.axis, below.values) == ("lr", (2.0**-10, 2.0**-11))
    assert set(above.of) == {f"sp-256-0.0625-{x}-{seed}" for x in GRID for seed in (0, 1)}
    assert "high end of the grid, 0.03125" in above.why
    assert "low end of the grid, 0.001953" in below.why


def test_the_values_are_the_grids_own_ones_times_its_step() -> None:
    tuned = 0.0137
    listed = rows(optima={"sp": (-7.0, -3.0)}, grid=GRID)
    for row in listed:
        row["lr"] *= tuned
    (line,), _ = wanted(frame(listed))
    assert line.values == (tuned * 2.0**-4, tuned * 2.0**-3)  # exactly, as mult_log2 would write them


def test_a_line_with_a_run_without_a_result_is_not_looked_at() -> None:
    listed = rows(optima={"sp": (-7.0, -3.0), "mup": (-7.0, -3.0)}, grid=GRID)
    gap = next(row for row in listed if row["parameterization"] == "sp" and row["density"] < 1 and row["lr"] == 2.0**-5)
    gap |= {"end": "failed", "train_loss": None}
    found, waiting = wanted(frame(listed))
    assert [each.line for each in found] == ["mup density 0.0625"]
    assert waiting == ["sp density 0.0625"]


def test_init_std_is_extended_where_it_was_swept() -> None:
    listed = rows(optima={"sp": (-7.0, -3.0)}, grid=GRID)
    for row in listed:
        row["init_std"], row["lr"] = row["lr"], 0.01
    (line,), _ = wanted(frame(listed))
    assert (line.axis, line.values) == ("init_std", (2.0**-4, 2.0**-3))


def test_widths_and_losses_are_told_apart() -> None:
    listed = rows(optima={"sp": (-7.0, -7.0)}, grid=GRID) + rows(optima={"sp": (-7.0, -3.0)}, grid=GRID, width=512)
    assert [each.line for each in wanted(frame(listed))[0]] == ["sp density 0.0625 width 512"]
    for row in listed:
        row["val_loss"] = 2.4 + 0.02 * (log2(row["lr"]) + 7) ** 2 + 0.001 * row["seed"]
    assert wanted(frame(listed), "val_loss") == ([], [])
