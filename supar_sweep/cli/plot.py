"""`supar-sweep plot`: the figure of a grid's records, its data, and the verdict on transfer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supar_sweep.cli.grid import note_unread
from supar_sweep.cli.launch import experiment_of
from supar_sweep.cli.output import emit, say
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import decode
from supar_sweep.config.schema import check_ranges, setting
from supar_sweep.sweep.status import rows


def plot(settings: Settings) -> int:
    """Draw the grid's LR basins, write its verdict, print the verdict's table; return 0."""
    metric = metric_of(settings)
    experiment = experiment_of(settings)
    frozen = experiment.plan()
    note_unread(settings)
    emit_verdict(draw(rows(experiment, frozen), experiment.folder, metric), settings.format)
    return 0


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """conf/_plot.yaml."""

    metric: str = setting("what is drawn over lr", choices=("train_loss", "val_loss"))

    def __post_init__(self) -> None:
        check_ranges(self)


_HOLDS = {True: "holds", False: "does not hold", None: "cannot be said"}


def metric_of(settings: Settings) -> str:
    """Return which loss is drawn. Raises ConfigError for settings of `plot` that do not exist."""
    return decode(PlotConfig, settings.plain["plot"], prefix="plot").metric


def draw(records: list[dict[str, Any]], folder: Path, metric: str) -> list[Any]:
    """Return the verdict's entries, after figure, data and verdict were written into `folder`.

    Args:
        records: one row a grid point (sweep.status.rows).
        folder: the experiment's.
        metric: train_loss or val_loss.
    """
    verdict, lr_basins = room("analysis.verdict"), room("analysis.lr_basins")
    statements = room("analysis.statements")
    sets = verdict.basin_sets(room("analysis.frames").frame(records), metric)
    written: list[Path] = []
    for basins in sets:
        shape = f"-w{basins.fixed['width']}-l{basins.fixed['n_layer']}" if len(sets) > 1 else ""
        stem = folder / f"lr_basins{shape}"
        written += lr_basins.save(lr_basins.draw(basins), basins, stem)
    entries: list[Any] = verdict.entries(sets)
    claims = statements.quickstart_statements(entries)
    written += verdict.write(entries, folder, [claim.as_dict() for claim in claims])
    for answer in verdict.verdicts(entries):
        say(f"{answer.parameterization}: {answer.answer} ({answer.reason})")
    for claim in claims:
        say(f"{_HOLDS[claim.holds]}: {claim.text}" + (f" ({claim.note})" if claim.note else ""))
    for path in written:
        say(f"wrote {path}")
    return entries


def emit_verdict(entries: list[Any], format: str) -> None:
    """Print the verdict's table to stdout."""
    tables = room("analysis.tables")
    emit(tables.verdict_rows(entries, text=format == "table"), format=format)
