"""Settings that the user typed and that the command would not read: an error, never silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from supar_sweep.config.schema import CellConfig, RuntimeConfig, check_compute
from supar_sweep.config.sparsity import STATIC
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.grid import GridPoint, GridSpec, axis_name, find_key

TARGET_ONLY = ("density", "parameterization", "model.width", "model.n_layer", "layer_density")
"""What the proxy of a study never reads, so that an axis over it leaves `quickstart` no use for the setting itself."""


def refuse_swept(typed: Sequence[str], spec: GridSpec, points: Sequence[GridPoint], *, tunes: bool) -> None:
    """Raise ConfigError for a typed setting of the cell that an axis replaces in every cell of the grid.

    Args:
        typed: keys of the command line.
        spec: what varies; a range around the base value (mult_log2) reads the setting.
        points: the grid.
        tunes: whether the command trains a proxy too, which reads most settings of the cell.
    """
    relative = {axis_name(find_key(key)) for key in _relative(spec)}
    for key in typed:
        try:
            name = axis_name(find_key(key))
        except ConfigError:  # a group, or no setting of the cell
            continue
        if name in relative or (tunes and key not in TARGET_ONLY and not key.startswith("sparsity.")):
            continue
        if points and all(name in point.axes for point in points):
            raise ConfigError(
                key,
                "has no effect: an axis of the experiment gives its values",
                allowed=f"experiment.axes.{name}=[...]",
            )


def refuse_idle_masks(typed: Sequence[str], points: Sequence[GridPoint]) -> None:
    """Raise ConfigError where changing masks are asked for and no cell of the grid has a dead weight.

    Args:
        typed: keys of the command line.
        points: the grid.
    """
    keys = [key for key in typed if key.partition(".")[0] == "sparsity"]
    methods = {point.cell.sparsity.method for point in points} - {"static"}
    if keys and methods and all(point.cell.density == 1 for point in points):
        raise ConfigError(
            keys[0],
            "has no effect at density 1: there is no dead weight",
            value=methods.pop(),
            allowed="density below 1",
        )


def refuse_idle_runtime(typed: Sequence[str], runtime: RuntimeConfig, cells: Sequence[CellConfig]) -> None:
    """Raise ConfigError where compact layers are asked for and a cell's masks change in training, or no cell has a dead weight;
    and for checkpoints that no run is long enough to write.

    Args:
        typed: keys of the command line.
        runtime: how cells are computed.
        cells: that are to be trained.
    """
    for cell in cells:
        check_compute(cell, runtime)
    if "runtime.compute" in typed and runtime.compute == "compact" and all(cell.density == 1 for cell in cells):
        problem = "has no effect at density 1: there is no dead weight"
        raise ConfigError("runtime.compute", problem, value="compact", allowed="auto or dense, or density below 1")
    _refuse_beyond(typed, "runtime.checkpoint_every_steps", runtime.checkpoint_every_steps, cells)


def refuse_idle_evaluation(typed: Sequence[str], cells: Sequence[CellConfig]) -> None:
    """Raise ConfigError for evaluations that no run is long enough to come to.

    A preset's cadence may be longer than a run that was shortened, so only a typed one is an error. The patience before a run
    counts as diverged may be longer, too: that switches it off.

    Args:
        typed: keys of the command line.
        cells: that are to be trained.
    """
    every = [cell.train.eval_every_steps for cell in cells if cell.train.eval_every_steps is not None]
    _refuse_beyond(typed, "train.eval_every_steps", min(every, default=None), cells)


def _refuse_beyond(typed: Sequence[str], key: str, every_steps: int | None, cells: Sequence[CellConfig]) -> None:
    if any(cell.train.target for cell in cells):
        return  # what an own training function makes of it is not known
    longest = max((cell.train.steps for cell in cells), default=0)
    if key in typed and every_steps is not None and every_steps > longest:
        problem = f"has no effect: no run has more than {longest} steps"
        raise ConfigError(key, problem, value=every_steps, allowed=f"up to {longest}, or null")


def _relative(spec: GridSpec) -> Iterator[str]:
    """Yield the keys of ranges around a base value, wherever they stand in the grid."""

    def walk(node: Mapping[Any, Any]) -> Iterator[str]:
        for key, raw in node.items():
            if isinstance(raw, Mapping) and "mult_log2" in raw:
                yield str(key)
            elif isinstance(raw, Mapping):
                yield from walk(raw)

    for node in (spec.axes, spec.by, *spec.zipped):
        yield from walk(node)


def refuse_for_proxy(typed: Sequence[str], cell: CellConfig) -> None:
    """Raise ConfigError for a typed setting that `tune` would not read: the proxy is the dense base.

    Args:
        typed: keys of the command line.
        cell: the cell that they make.
    """
    base = cell.base
    asked: dict[str, tuple[Any, Any]] = {"density": (cell.density, 1.0)}
    if base is not None:
        asked["model.width"] = (cell.model.width, base.width)
        asked["model.n_layer"] = (cell.model.n_layer, base.n_layer)
    for key, (value, of_proxy) in asked.items():
        if key in typed and value != of_proxy:
            setter = "" if key == "density" else f"; {key.replace('model', 'base')} sets it"
            problem = "has no effect on tune: the proxy is the base shape, dense"
            raise ConfigError(key, problem, value=value, allowed=f"{of_proxy:g}{setter}")
    masks = [key for key in typed if key.partition(".")[0] == "sparsity"]
    if masks and cell.sparsity != STATIC:
        problem = "has no effect on tune: the proxy is dense"
        raise ConfigError(masks[0], problem, value=cell.sparsity.method, allowed="static")
    if "parameterization" in typed and cell.parameterization == "sp":
        raise ConfigError(
            "parameterization",
            "has no effect on tune: the proxy is trained under muP, which is SuPar where all is dense",
            value="sp",
            allowed="any but sp",
        )


def refuse_for_transfer(typed: Sequence[str], plain: Mapping[str, Any]) -> None:
    """Raise ConfigError for a typed setting that `transfer` would not read.

    Args:
        typed: keys of the command line.
        plain: the composed settings.
    """
    if "seed" in typed:
        raise ConfigError("seed", "has no effect on transfer", value=plain["seed"], allowed="leave it out")
    for key, target in {
        "model.width": "target.width",
        "model.n_layer": "target.n_layer",
        "density": "target.density",
    }.items():
        if key in typed and target in typed:
            raise ConfigError(key, f"has no effect: {target} replaces it", allowed="one of them")
