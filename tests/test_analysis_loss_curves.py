"""Loss curves: bins, seeds, diverged ends, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.frames import frame
from analysis.loss_curves import data_rows, draw, loss_curves, save
from supar_sweep.errors import ConfigError
from tests.basin_rows import rows

STEPS = 200


def table(n_steps: int = STEPS, n_seeds: int = 2, diverged_at: int | None = None) -> pd.DataFrame:
    """One lr of basin_rows with curves 5 - step / 100 + seed; seed 1 at density 1 may end early."""
    found = frame([row for row in rows(n_seeds=n_seeds) if row["lr"] == 2.0**-7])
    curves = []
    for _, row in found.iterrows():
        last = diverged_at if diverged_at and row["seed"] == 1 and row["density"] == 1 else n_steps
        lines: list[dict[str, Any]] = [
            {"step": s, "tokens": 64 * s, "loss": 5 - s / 100 + row["seed"]} for s in range(1, last + 1)
        ]
        curves.append([*lines, {"step": last, "val_loss": 3.0}])
    found["curve"] = pd.Series(curves, index=found.index, dtype=object)
    if diverged_at:
        found.loc[(found["seed"] == 1) & (found["density"] == 1), "kind"] = "diverged"
    return found


def test_a_line_is_the_mean_over_seeds_of_equal_bins() -> None:
    found = loss_curves(table(), n_bins=20)
    assert [name for name, _ in found.panels] == ["sp", "mup", "supar"]
    (first, *_) = found.panels[0][1]
    assert len(first.x) == 20
    # the first bin holds steps 1 .. 10
    assert first.x[0] == pytest.approx(64 * np.mean(range(1, 11)))
    assert first.loss[0] == pytest.approx(5 - np.mean(range(1, 11)) / 100 + 0.5)
    assert first.stderr is not None
    assert first.stderr[0] == pytest.approx(np.std([0, 1], ddof=1) / np.sqrt(2))


def test_short_runs_are_shown_step_by_step_and_evaluations_are_no_points() -> None:
    found = loss_curves(table(n_steps=7), x="step")
    assert found.panels[0][1][0].x == tuple(range(1, 8))


def test_a_line_ends_where_its_first_seed_diverged() -> None:
    found = loss_curves(table(diverged_at=50), x="step", n_bins=STEPS)
    by_hue = {curve.hue: curve for curve in found.panels[0][1]}
    assert by_hue[1.0].x[-1] == 50
    assert by_hue[1.0].n_diverged == 1
    assert by_hue[1 / 16].x[-1] == STEPS
    drawn = draw(found)
    assert any(line.get_marker() == "x" for line in drawn.axes[0].lines)
    assert "diverged" in [text.get_text() for text in drawn.legends[0].get_texts()]


def test_cells_without_metrics_leave_an_empty_line() -> None:
    bare = table()
    bare["curve"] = pd.Series([[]] * len(bare), index=bare.index, dtype=object)
    found = loss_curves(bare)
    assert found.panels[0][1][0].x == ()
    draw(found)


def test_what_is_mixed_or_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="x: loss curves go over"):
        loss_curves(table(), x="lr")
    both = frame(rows())
    both["curve"] = pd.Series([[]] * len(both), index=both.index, dtype=object)
    with pytest.raises(ConfigError, match=r"where\.lr: a line mixes several"):
        loss_curves(both)
    assert (
        len(loss_curves(both, hue="lr", col=None, fixed={"density": 1.0, "parameterization": "sp"}).panels[0][1]) == 11
    )


def test_the_files_hold_every_point(tmp_path: Path) -> None:
    found = loss_curves(table(), n_bins=20)
    png, _, data = save(draw(found), found, tmp_path / "curves")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(data.read_text().splitlines()) == 1 + len(data_rows(found)) == 1 + 3 * 2 * 20
