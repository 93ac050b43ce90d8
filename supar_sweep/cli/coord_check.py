"""`supar-sweep coord-check`: a few steps over width and over density; do activations, gradients and updates stay put?"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from supar_sweep.cli.launch import check_corpora
from supar_sweep.cli.output import emit, say, say_written
from supar_sweep.cli.progress import Live
from supar_sweep.cli.rooms import room
from supar_sweep.cli.settings import Settings
from supar_sweep.config.decode import decode
from supar_sweep.config.fields import check_folder_name, check_ranges, setting
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError, RecordError
from supar_sweep.sweep.files import read_json, write_file, write_json
from supar_sweep.sweep.grid import GridSpec, enumerate_grid
from supar_sweep.sweep.identity import cell_id
from supar_sweep.training.corpus import fingerprint, load_corpus, resolve

READ_OF_TRAIN = ("train.steps", "train.batch_seqs")
READ_OF_RUNTIME = ("runtime.device", "runtime.threads")


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """conf/_check.yaml: the section `check`."""

    name: str = setting("folder of the check below runs_dir/coord_checks")
    parameterizations: tuple[str, ...] = setting("what is checked")
    densities: tuple[float, ...] = setting("at model.width; [] = no sweep over density")
    widths: tuple[int, ...] = setting("at density; [] = no sweep over width")
    seeds: tuple[int, ...] = setting("of init, masks, data")
    threshold: float = setting("largest distance from the expected slope that passes", gt=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_folder_name("name", self.name)
        for key in ("parameterizations", "seeds"):
            if not getattr(self, key):
                raise ConfigError(key, "is empty: nothing to check")
        if max(len(self.densities), len(self.widths)) < 2:
            raise ConfigError("densities", "and widths have fewer than two values: there is no slope")

    def folder(self, settings: Settings) -> Path:
        """Return where the check's records and figures are."""
        return settings.runs_dir / "coord_checks" / self.name


def coord_check(settings: Settings) -> int:
    """Train what is not there yet, draw, print the tests; return 0, whatever they say."""
    config = checked(settings)
    draw(_records(settings, config), config, config.folder(settings), settings.format)
    return 0


def checked(settings: Settings) -> CheckConfig:
    """Return the section `check`, after a look at all that can be wrong.

    Raises:
        ConfigError, GridError: what is wrong.
    """
    config = check_config(settings)
    _refuse_idle(settings)
    if settings.plain.get("experiment") and settings.drawn().get("figure") != "coord_check":
        raise ConfigError("experiment", f"{settings.experiment} is a grid, not a coordinate check", allowed="run, plot")
    _cells(settings, config)
    return config


def check_config(settings: Settings) -> CheckConfig:
    """Return the section `check`. Raises ConfigError for settings that do not exist or are out of range."""
    return decode(CheckConfig, settings.plain["check"], prefix="check")


def read_rows(settings: Settings, config: CheckConfig) -> list[dict[str, Any]]:
    """Return the rows of a check that was run.

    Raises:
        ConfigError: none of this name was.
        RecordError: its file is torn.
    """
    path = config.folder(settings) / "coordinates.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        known = sorted(each.parent.name for each in settings.runs_dir.glob("coord_checks/*/coordinates.jsonl"))
        raise ConfigError(
            "check.name",
            f"has not been run in {settings.runs_dir}",
            value=config.name,
            allowed=known or "none there; `coord-check` comes first",
            nearest_to=config.name,
        ) from None
    except ValueError as error:
        raise RecordError(f"{path} is torn: {error}; `coord-check` writes it anew") from error


def draw(rows: list[dict[str, Any]], config: CheckConfig, folder: Path, format: str) -> None:
    """Write figures, data and tests into the check's folder, print the tests.

    Args:
        rows: one a cell, step and site.
        config: gives the threshold.
        folder: the check's.
        format: of the table.
    """
    coordinates, figure = room("analysis.coordinates"), room("analysis.coord_check")
    sets = coordinates.coordinate_sets(rows, config.threshold)
    written: list[Path] = []
    for each in sets:
        written += figure.save(figure.draw(each), each, folder / f"coord_check-{each.axis}-{each.statistic}")
    tests = coordinates.all_slope_tests(sets)
    answers = coordinates.answers(tests)
    table = coordinates.rows_of_tests(tests)
    summary = {
        "rule": coordinates.RULE,
        "answers": {
            name: {axis: {"answer": answer, "reason": reason} for axis, (answer, reason) in axes.items()}
            for name, axes in answers.items()
        },
        "tests": table,
    }
    write_json(folder / "coord_check.json", summary)
    emit([_rounded(row) for row in table] if format == "table" else table, format=format)
    for name, axes in answers.items():
        for axis, (answer, reason) in axes.items():
            say(f"{name} over {axis}: {answer} ({reason})")
    say(coordinates.CAVEAT)
    say_written([*written, folder / "coord_check.json"])


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def _refuse_idle(settings: Settings) -> None:
    """Raise ConfigError for a setting that the check would not read, or cannot check."""
    swept = {"parameterization": "check.parameterizations", "seed": "check.seeds"}
    for key in settings.given():
        section = key.partition(".")[0]
        if key in swept:
            raise ConfigError(key, "has no effect on coord-check", allowed=f"{swept[key]}=[...]")
        if section == "schedule":
            raise ConfigError(
                key, "has no effect on coord-check: the learning rate stays constant", allowed="leave it out"
            )
        for name, read in (("train", READ_OF_TRAIN), ("runtime", READ_OF_RUNTIME)):
            if section == name and key not in (*read, name):
                raise ConfigError(key, "has no effect on coord-check", allowed=read)
    target = settings.plain["train"].get("target")
    if target is not None:
        raise ConfigError("train.target", "cannot be watched: the sites are the GPT's", value=target, allowed="null")
    settings.cell().sparsity.check_coordinates()


def _records(settings: Settings, config: CheckConfig) -> list[dict[str, Any]]:
    """Return the rows of every cell; train those that have no record yet."""
    cells = _cells(settings, config)
    data = resolve(cells[0].data)
    print_of_data = fingerprint(data)
    folder = config.folder(settings)
    check_corpora([replace(cells[0], train=replace(cells[0].train, eval_seqs=1))])  # nothing is evaluated
    corpus = None
    rows: list[dict[str, Any]] = []
    with Live(f"coord-check {config.name}") as live:
        for number, cell in enumerate(replace(cell, data=data) for cell in cells):
            live.show(number, len(cells))
            path = folder / "cells" / f"{cell_id(cell, print_of_data)}.json"
            record = read_json(path)
            if record is None:
                # torch is slow to import, and a check that is complete needs none of it
                from supar_sweep.training.environment import prepare_process
                from supar_sweep.training.probes import cell_coordinates

                if corpus is None:
                    prepare_process(settings.runtime().n_threads)
                    corpus = load_corpus(data)
                record = {"rows": cell_coordinates(cell, corpus, settings.runtime().device)}
                write_json(path, record)
            at = {"parameterization": cell.parameterization, "density": cell.density, "seed": cell.seed}
            rows += [{**at, "width": cell.model.width, **row} for row in record["rows"]]
        live.show(len(cells), len(cells))
    write_file(folder / "coordinates.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _cells(settings: Settings, config: CheckConfig) -> list[CellConfig]:
    """Return the cells of both sweeps, each once. Raises GridError for those that cannot be."""
    base = settings.cell_plain()
    common = {"parameterization": list(config.parameterizations), "seed": list(config.seeds)}
    found: dict[CellConfig, None] = {}
    for key, values in (("density", config.densities), ("width", config.widths)):
        if values:
            spec = GridSpec(axes={**common, key: list(values)})
            found |= {point.cell: None for point in enumerate_grid(base, spec)}
    return list(found)
