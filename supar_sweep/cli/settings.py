"""What a command gets: the composed config as plain values, decoded on demand. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_sweep.cli.early import check_early, check_path, check_scale, check_tuned_at, resolved
from supar_sweep.cli.idle import (
    refuse_idle_evaluation,
    refuse_idle_masks,
    refuse_idle_runtime,
    refuse_swept,
)
from supar_sweep.config.decode import decode, encode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.config.study import StudyConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.grid import GridPoint, GridSpec, enumerate_grid
from supar_sweep.sweep.tables import FORMATS
from supar_sweep.sweep.winner import Winner, load_winner

if TYPE_CHECKING:
    from omegaconf import DictConfig

CELL_KEYS = tuple(item.name for item in fields(CellConfig))


@dataclass(frozen=True)
class Settings:
    """One command's composed config.

    Args:
        command: the command word.
        plain: the config as dicts, lists, scalars; interpolations resolved, hparams_file merged in.
        overrides: what the user typed, as Hydra lists it.
        winner: what hparams_file holds, with its lineage; None where none is given.
        folders: of the user's own groups.
        config: what `plain` was resolved from (a DictConfig).
    """

    command: str
    plain: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    winner: Winner | None = None
    folders: tuple[str, ...] = ()
    config: Any = field(default=None, repr=False, compare=False)

    @staticmethod
    def read(
        command: str, config: DictConfig, overrides: tuple[str, ...] = (), folders: tuple[str, ...] = ()
    ) -> Settings:
        """Return the settings of a composed config.

        Raises:
            ConfigError: an unknown key, format or scale, an hparams_file that cannot be read.
        """
        check_early(config, sections_of(command))
        check_scale(config, dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text))
        check_path("hparams_file", config.get("hparams_file"), missing=True)
        winner = None
        if config.get("hparams_file") is not None:
            winner = load_winner(Path(config.hparams_file))
            # before anything is resolved, so that a setting that refers to a hyperparameter gets the file's
            config = _with_hparams(config, winner, overrides)
        elif "hparams" not in (typed := Settings("", {}, overrides).given("hparams")):
            config = _with_row(config, typed)
        return Settings._resolved(command, config, overrides, folders, winner)

    @staticmethod
    def _resolved(
        command: str, config: DictConfig, overrides: tuple[str, ...], folders: tuple[str, ...], winner: Winner | None
    ) -> Settings:
        plain = resolved(config)
        added = [text.lstrip("+").partition("=")[0] for text in overrides if text.startswith("+")]
        added_tops = {key.partition(".")[0].partition("@")[0] for key in added}
        own = (*CELL_KEYS, *OUTPUT, *READS.get(command, ()))
        for top in dict.fromkeys(key.partition(".")[0].partition("@")[0] for key in (*added, *plain)):
            # a file of settings may serve several commands; what is typed is meant for this one
            if top in plain and top not in (own if top in added_tops else (*CELL_KEYS, *SECTIONS)):
                raise ConfigError(top, f"unknown key for {command}", allowed=own, nearest_to=top)
        check_path("runs_dir", plain.get("runs_dir"))
        check_tuned_at(plain.get("tuned_at"))
        allowed = (*FORMATS, *FURTHER_FORMATS.get(command, ()))
        if plain["format"] not in allowed:
            raise ConfigError("format", f"no such format of {command}", value=plain["format"], allowed=allowed)
        return Settings(command, plain, overrides, winner, folders, config)

    def tuned(self, winner: Winner) -> Settings:
        """Return the settings with a study's hyperparameters in place of their own, typed ones too: those began its search."""
        from omegaconf import OmegaConf

        config = self.config.copy()
        OmegaConf.update(config, "hparams", encode(winner.hparams), merge=False)
        OmegaConf.update(config, "base", encode(winner.base), merge=False)
        return Settings._resolved(self.command, config, self.overrides, self.folders, winner)

    @property
    def format(self) -> str:
        """How tables are written: table, json, csv."""
        return str(self.plain["format"])

    @property
    def runs_dir(self) -> Path:
        """The folder of all records."""
        return Path(self.plain["runs_dir"]).expanduser()

    @property
    def experiment(self) -> str:
        """The grid's name."""
        name = self.plain["experiment"].get("name")
        if not isinstance(name, str):
            raise ConfigError("experiment.name", "must be text", value=name)
        return name

    def study_dir(self) -> Path:
        """The study's folder: journal, best.yaml."""
        return self.runs_dir / "studies" / self.study().name

    def cell_plain(self) -> dict[str, Any]:
        """Return the cell's settings, not yet decoded: the base of a grid."""
        return {key: self.plain[key] for key in CELL_KEYS if key in self.plain}

    def cell(self) -> CellConfig:
        """Return the one cell that the settings describe, axes aside."""
        return decode(CellConfig, self.cell_plain())

    def runtime(self) -> RuntimeConfig:
        """Return how cells are computed."""
        return decode(RuntimeConfig, self.plain["runtime"], prefix="runtime")

    def study(self) -> StudyConfig:
        """Return the tuning study."""
        return decode(StudyConfig, self.plain["study"], prefix="study")

    def drawn(self) -> dict[str, Any]:
        """Return how the experiment says that it is drawn, {} where it says nothing."""
        plot = (self.plain.get("experiment") or {}).get("plot") or {}
        if not isinstance(plot, Mapping):
            raise ConfigError("experiment.plot", "must be a mapping", value=plot, allowed="{figure: ..., x: ..., ...}")
        return dict(plot)

    def grid(self) -> GridSpec:
        """Return what varies. Raises ConfigError for an experiment that is a coordinate check, not a grid."""
        self.refuse_check()
        spec = {key: value for key, value in self.plain["experiment"].items() if key not in ("name", "plot")}
        own = {item.name for item in fields(GridSpec)}
        if section := next((key for key in spec if key in self.plain and key not in own), None):
            problem = "is a section of its own, not a part of experiment"
            first_line = "a file of the group experiment whose first line is '# @package _global_'"
            raise ConfigError(f"experiment.{section}", problem, allowed=first_line)
        return decode(GridSpec, spec, prefix="experiment")

    def refuse_check(self) -> None:
        """Raise ConfigError for an experiment that is a coordinate check, not a grid."""
        if self.drawn().get("figure") == "coord_check":
            name = self.experiment
            raise ConfigError("experiment", f"{name} is a coordinate check, not a grid", allowed="coord-check, plot")

    def points(self) -> list[GridPoint]:
        """Return every cell of the grid.

        Raises:
            GridError: invalid cells, all at once.
            ConfigError: a typed setting that an axis replaces everywhere.
        """
        spec = self.grid()
        points = enumerate_grid(self.cell_plain(), spec)
        refuse_swept(self.given(), spec, points, tunes="study" in READS[self.command])
        refuse_idle_masks(self.given(), points)
        cells = [point.cell for point in points]
        refuse_idle_evaluation(self.given(), cells)
        if "runtime" in self.plain:
            refuse_idle_runtime(self.given(), self.runtime(), cells)
        return points

    def given(self, *sections: str) -> tuple[str, ...]:
        """Return the keys set on the command line, those in `sections` only (default: all)."""
        keys = [text.lstrip("+~").partition("=")[0].partition("@")[0] for text in self.overrides]
        return tuple(key for key in keys if not sections or key.replace("/", ".").partition(".")[0] in sections)


OUTPUT = ("hparams_file", "tuned_at", "runs_dir", "format")
_SCALE = ("scale", "scales")
_GRID = ("experiment", "launcher", "runtime", *_SCALE)
FIGURE = ("figure", "x", "hue", "col", "row", "where", "metric", "reference")
"""What says which figure `plot` draws."""

READS = {
    "quickstart": (*_GRID, *FIGURE, "study"),
    "reproduce": (*_GRID, *FIGURE, "study", "check"),
    "tune": ("launcher", "runtime", "study", *_SCALE),
    "transfer": ("target",),
    "rules": ("show",),
    "plan": (*_GRID, "test_only"),
    "calibrate": _GRID,
    "run": (*_GRID, "extend", "budget", "metric"),
    "status": (*_GRID, "by", "watch"),
    "logs": ("cell", "attempt", "lines"),
    "cancel": (*_GRID, "cell"),
    "plot": (*_GRID, *FIGURE, "study", "check"),
    "report": (*_GRID, *FIGURE),
    "export": ("checkpoint", "to"),
    "coord-check": ("runtime", "check", "experiment", *_SCALE),
}
"""The top-level keys of each command, beside a cell's own and OUTPUT."""

SECTIONS = tuple(dict.fromkeys((*OUTPUT, *(key for keys in READS.values() for key in keys))))
"""The top-level keys beside a cell's own, of any command."""

NO_CELL = ("export", "logs")
"""Commands without a cell's settings: a record says what cell it is of."""


def sections_of(command: str) -> tuple[str, ...]:
    """Return every top-level key that a command's config has; none for a word that is no command."""
    if command in NO_CELL:
        return ("runs_dir", "format", *READS[command])
    return (*CELL_KEYS, *OUTPUT, *READS[command]) if command in READS else ()


FURTHER_FORMATS = {"transfer": ("yaml",), "rules": ("markdown",)}
"""Formats that a command has besides those of every table."""


def _with_row(config: DictConfig, typed: tuple[str, ...]) -> DictConfig:
    """Return the config with the hyperparameters that the scale's row has of its own, `scales.<scale>.hparams`.

    Args:
        config: not yet resolved.
        typed: keys of the command line, which win.
    """
    from omegaconf import OmegaConf

    own = OmegaConf.select(config, f"scales.{config.get('scale')}.hparams") or {}
    config = config.copy()
    for name, value in own.items():
        if f"hparams.{name}" not in typed:
            OmegaConf.update(config, f"hparams.{name}", value)
    return config


def _with_hparams(config: DictConfig, winner: Winner, overrides: tuple[str, ...]) -> DictConfig:
    """Return the config with a file's hyperparameters, and their base shape; typed values win."""
    from omegaconf import OmegaConf

    typed = Settings("", {}, overrides).given("hparams", "base")
    if "hparams" in typed:
        raise ConfigError(
            "hparams_file",
            "and hparams=<option> both choose the hyperparameters",
            value=config.hparams_file,
            allowed="one of them",
        )
    config = config.copy()
    for section, values in (("hparams", encode(winner.hparams)), ("base", encode(winner.base))):
        if values is not None:
            kept = {name: config[section][name] for name in values if f"{section}.{name}" in typed}
            OmegaConf.update(config, section, {**values, **kept}, merge=False, force_add=True)
    return config
