"""`supar-sweep plot`: any figure over a grid's records, a study's trials or a check's rows, with its data; the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from supar_sweep.cli.coord_check import check_config, read_rows
from supar_sweep.cli.coord_check import draw as draw_check
from supar_sweep.cli.launch import experiment_of
from supar_sweep.cli.output import emit, say, say_written
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import FIGURE, Settings
from supar_sweep.cli.status import note_unread
from supar_sweep.config.decode import decode
from supar_sweep.config.fields import check_ranges, setting
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.status import folders, rows
from supar_sweep.sweep.submission import Experiment, Plan
from supar_sweep.sweep.trials import trial_rows
from supar_sweep.sweep.winner import load_winner
from supar_sweep.training.cost import count_parameters


@dataclass(frozen=True)
class Kind:
    """A figure of `plot`: its own axes (None = it has none), and the settings that it reads."""

    x: str | None
    hue: str | None
    col: str | None
    reads: tuple[str, ...]


_ONE_ROW = tuple(key for key in FIGURE if key != "row")
KINDS = {
    "lr_basins": Kind("lr", "density", "parameterization", FIGURE),
    "init_basins": Kind("init_std", "density", "parameterization", FIGURE),
    "pareto": Kind("density", "parameterization", None, _ONE_ROW),
    "heatmap": Kind("density", "width", "parameterization", tuple(key for key in _ONE_ROW if key != "reference")),
    "lr_exponent": Kind("dynamic_lr_exponent", "method", None, ("figure", "x", "hue", "where", "metric", "reference")),
    "scaling": Kind(None, None, "parameterization", ("figure", "col", "where", "metric")),
    "loss_curves": Kind("tokens", "density", "parameterization", ("figure", "x", "hue", "col", "where")),
    "study": Kind(None, None, None, ("figure", "study")),
    "coord_check": Kind(None, None, None, ("figure", "check")),
}
NO_PANELS = "none"
CHECK = "coord_check"
NO_GRID = ("study", CHECK)
"""Figures of other records than a grid's."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """conf/_plot.yaml."""

    metric: str = setting("what is drawn", choices=("train_loss", "val_loss"))

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class PlotConfig(MetricConfig):
    """conf/_figure.yaml and conf/_plot.yaml."""

    figure: str = setting("what is drawn", choices=tuple(KINDS))
    x: str | None = setting("axis")
    hue: str | None = setting("axis of the lines")
    col: str | None = setting("axis of the panels")
    row: str | None = setting("axis of the rows of panels")
    where: Mapping[str, Any] = setting("axis -> the value that is drawn")
    reference: float | None = setting("value of hue (pareto: of x) whose optimum is transferred")


def plot(settings: Settings) -> int:
    """Draw a figure and write its data beside it; for basins also write and print the verdict; return 0."""
    config = figure_config(settings)
    refuse_idle(settings, config.figure, *FIGURE, "study", "check")
    if config.figure == "study":
        return _study(settings)
    if config.figure == "coord_check":
        check = check_config(settings)
        draw_check(read_rows(settings, check), check, check.folder(settings), settings.format)
        return 0
    note_unread(settings)
    draw_grid(settings, config)
    return 0


def draw_grid(settings: Settings, config: PlotConfig) -> None:
    """Draw a figure of the grid's records, print its data, or for basins the verdict.

    Args:
        settings: the experiment.
        config: what is drawn of it: neither study nor coord_check, which are drawn of other records.
    """
    experiment = experiment_of(settings)
    frozen = experiment.plan()
    records = grid_rows(experiment, frozen)
    axes = _axes(config)
    stem = experiment.folder / _stem(config)
    if config.figure in ("lr_basins", "init_basins"):
        entries = draw_basins(
            records, experiment.folder, config.metric, axes, stem.name, config.where, config.reference
        )
        emit_verdict(entries, settings.format)
        return
    table = room("analysis.frames").frame(records)
    module = room(f"analysis.{config.figure}")
    keywords: dict[str, Any] = {**axes, "fixed": config.where}
    if config.figure == "loss_curves":
        table = room("analysis.frames").where(table, config.where)
        cells = folders(experiment.store, frozen)
        table["curve"] = [cells[this].metrics() for this in table["cell_id"]]
    else:
        keywords["metric"] = config.metric
    if "reference" in KINDS[config.figure].reads:
        keywords["reference"] = config.reference
    found = getattr(module, config.figure)(table, **keywords)
    data = module.data_rows(found)
    written = module.save(module.draw(found), found, stem)
    emit(data, format=settings.format)
    say_written(written)


def check_drawn(settings: Settings) -> dict[str, Any]:
    """Return how the experiment says that it is drawn.

    Raises:
        ConfigError: a key or a figure that does not exist.
    """
    own = settings.drawn()
    if unknown := next((key for key in own if key not in FIGURE), None):
        raise ConfigError(f"experiment.plot.{unknown}", "unknown key", allowed=FIGURE, nearest_to=unknown)
    figure = own.get("figure", "lr_basins")
    if figure not in KINDS:
        raise ConfigError(
            "experiment.plot.figure", "no such figure", value=figure, allowed=KINDS, nearest_to=str(figure)
        )
    return own


def figure_config(settings: Settings) -> PlotConfig:
    """Return what `plot` draws: as typed, else as the experiment says (experiment.plot), else as conf/_figure.yaml says.

    What the experiment says belongs to its own figure: with another one typed, only its metric is still read.

    Raises:
        ConfigError: a figure or setting that does not exist.
    """
    own = check_drawn(settings)
    typed = {key.partition(".")[0] for key in settings.given(*FIGURE)}
    plain = {key: settings.plain[key] for key in FIGURE}
    if "figure" in typed and plain["figure"] != own.get("figure", plain["figure"]):
        own = {key: value for key, value in own.items() if key == "metric"}
    return decode(PlotConfig, {**plain, **{key: value for key, value in own.items() if key not in typed}})


def grid_rows(experiment: Experiment, frozen: Plan) -> list[dict[str, Any]]:
    """Return one row a grid point, for analysis: sweep.status.rows, with `live_parameters`: its live hidden weights.

    Args:
        experiment: the grid's place. frozen: its plan.
    """
    live = live_hidden_weights(frozen)
    return [{**row, "live_parameters": live[row["cell_id"]]} for row in rows(experiment, frozen)]


def own_figure(settings: Settings) -> Any:
    """Return the figure that is asked for, or that the experiment names, as `report` takes it (report_figures.Own), else None.

    Raises:
        ConfigError: a figure that is not of a grid's records, or a typed setting that it does not read.
    """
    if not settings.drawn() and not settings.given(*FIGURE):
        return None
    config = figure_config(settings)
    refuse_no_grid(config)
    # the report's own verdict reads the metric
    refuse_idle(settings, config.figure, *(key for key in FIGURE if key != "metric"))
    return room("analysis.report_figures").Own(config.figure, _axes(config), config.where, config.reference)


def refuse_no_grid(config: PlotConfig) -> None:
    """Raise ConfigError for a figure of other records than a grid's."""
    if config.figure in NO_GRID:
        grids = [kind for kind in KINDS if kind not in NO_GRID]
        raise ConfigError("figure", "is not of a grid's records; `plot` draws it", value=config.figure, allowed=grids)


def live_hidden_weights(frozen: Plan) -> dict[str, int]:
    """Return each cell's number of live hidden weights, by id; counted once a shape."""
    counted: dict[Any, int] = {}
    found = {}
    for this, planned in frozen.cells.items():
        cell = decode(CellConfig, planned.cell)
        shape = (cell.model, cell.density, cell.layer_density)
        if shape not in counted:
            counted[shape] = count_parameters(cell).sparse_live
        found[this] = counted[shape]
    return found


def metric_of(settings: Settings) -> str:
    """Return which loss is drawn: as typed, else the experiment's own. Raises ConfigError for one that does not exist."""
    own = {} if settings.given("metric") else settings.drawn()
    return decode(MetricConfig, {"metric": own.get("metric", settings.plain["metric"])}).metric


def draw_basins(
    records: list[dict[str, Any]],
    folder: Path,
    metric: str,
    axes: Mapping[str, Any] | None = None,
    name: str = "lr_basins",
    where: Mapping[str, Any] | None = None,
    reference: float | None = None,
) -> list[Any]:
    """Return the verdict's entries, after figures, data and verdict were written into `folder`.

    Args:
        records: of `grid_rows`.
        folder: the experiment's.
        metric: train_loss or val_loss.
        axes: x, hue, col, row; default: lr over density, a panel a parameterization.
        name: of the files; the verdict's are verdict.json and summary.json for lr_basins, else <name>-verdict.json.
        where: axis -> the value that is drawn.
        reference: hue whose optimum is transferred; None = the usual one.
    """
    basins, verdict = room("analysis.basins"), room("analysis.verdict")
    figure, statements = room("analysis.lr_basins"), room("analysis.statements")
    table = room("analysis.frames").frame(records)
    sets = basins.basin_sets(table, metric, **(axes or {}), fixed=where, reference=reference)
    written: list[Path] = []
    for each in sets:
        written += figure.save(figure.draw(each), each, folder / (name + _of_part(basins.told_apart(each, sets))))
    entries: list[Any] = verdict.entries(sets)
    whole = name == "lr_basins"
    claims = statements.quickstart_statements(entries) if whole and statements.can_be_asked(entries) else []
    fits = room("analysis.scaling").summary(table, metric, where)
    written += verdict.write(entries, folder, [claim.as_dict() for claim in claims], "" if whole else f"{name}-", fits)
    say_verdicts(verdict.verdicts(entries))
    for said in room("analysis.scaling").in_words(fits):
        say(said)
    for claim in claims:
        say(f"{claim.answer}: {claim.text}" + (f" ({claim.note})" if claim.note else ""))
    say_written(written)
    return entries


def emit_verdict(entries: list[Any], format: str) -> None:
    """Print the verdict's table to stdout."""
    tables = room("analysis.tables")
    emit(tables.verdict_rows(entries, text=format == "table"), format=format)


def say_verdicts(verdicts: Iterable[Any]) -> None:
    """Write each parameterization's verdict to stderr."""
    for verdict in verdicts:
        say(f"{verdict.name}: {verdict.answer} ({verdict.reason})")


def _of_part(apart: Mapping[str, Any]) -> str:
    """Return what tells this figure's file from those of the other parts: -width512-n_layer4."""
    return "".join(f"-{axis}{value:g}" if _number(value) else f"-{value}" for axis, value in apart.items())


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _axes(config: PlotConfig) -> dict[str, str | None]:
    """Return the figure's axes, those that it reads."""
    own = KINDS[config.figure]
    col = own.col if config.col is None else None if config.col == NO_PANELS else config.col
    row = None if config.row == NO_PANELS else config.row
    axes = {"x": config.x or own.x, "hue": config.hue or own.hue, "col": col, "row": row}
    return {key: axis for key, axis in axes.items() if key in own.reads}


def _stem(config: PlotConfig) -> str:
    """Return the file's name: the figure's, with the axes and values that are not its own."""
    axes = _axes(config)
    own = _axes(replace(config, x=None, hue=None, col=None, row=None))
    parts = [f"{key}-{axes[key] or NO_PANELS}" for key in axes if axes[key] != own[key]]
    parts += [f"{axis}{value:g}" if _number(value) else f"{axis}-{value}" for axis, value in config.where.items()]
    parts += (
        [config.metric] if config.metric != "train_loss" and config.figure not in ("lr_basins", "loss_curves") else []
    )
    return "-".join([config.figure, *parts]).replace("/", "_")


def refuse_idle(settings: Settings, figure: str, *sections: str) -> None:
    """Raise ConfigError for a typed setting of `sections` that this figure does not read."""
    reads = KINDS[figure].reads
    for key in settings.given(*sections):
        top = key.partition(".")[0]
        if top not in reads:
            raise ConfigError(key, f"has no effect on figure={figure}", allowed=reads)


def _study(settings: Settings) -> int:
    name, module = settings.study().name, room("analysis.study")
    folder = settings.runs_dir / "studies" / name
    trials = trial_rows(settings.runs_dir, name)
    metric, confirmed = settings.study().metric, {}
    if (folder / "best.yaml").exists():
        lineage = load_winner(folder / "best.yaml").lineage
        metric = lineage.get("metric", metric)
        confirmed = {each["trial"]: each["values"] for each in lineage.get("confirmed", ())}
    found = module.study(trials, name, metric, confirmed)
    written = module.save(module.draw(found), found, folder / "study")
    emit(module.data_rows(found), format=settings.format)
    say_written(written)
    return 0
