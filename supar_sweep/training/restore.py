"""The model of a checkpoint: its cell's GPT, dense, on the CPU, with the weights of that step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import CheckpointError, ConfigError
from supar_sweep.sparse.convert import to_dense
from supar_sweep.sweep.files import read_json
from supar_sweep.sweep.records import CellFolder
from supar_sweep.training.checkpoint import Checkpoints
from supar_sweep.training.model import GPT, build_model


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint holds of a model.

    Args:
        cell: what was trained.
        cell_id: its id.
        step: optimizer steps done.
        model: every layer dense, dead weights 0; float64 where the cell's precision is, else float32.
        masks: layer -> mask [fan_out, fan_in], of the layers that have one.
        result: of the cell; empty where it is not complete.
        warnings: what the user should know of these weights, in words.
    """

    cell: CellConfig
    cell_id: str
    step: int
    model: GPT
    masks: Mapping[str, Tensor]
    result: Mapping[str, Any]
    warnings: tuple[str, ...]

    def layer_density(self) -> dict[str, float]:
        """Return the live share of each masked layer's weights, by its name."""
        return {name: float(mask.double().mean()) for name, mask in self.masks.items()}


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint files that a path names, newest first: at least one.

    Args:
        path: a cell's folder, its folder of checkpoints, or one of the files.

    Raises:
        ConfigError: it is none of these, or the cell has no checkpoint.
    """
    path = path.expanduser().absolute()
    form = "a cell's folder, such as runs/cells/ab/<label>-<id>, or a file step-*.pt in its folder checkpoints"
    if not path.exists():
        raise ConfigError("checkpoint", "is not there", value=str(path), allowed=form)
    cell_folder = path.parent.parent if path.is_file() else path.parent if path.name == "checkpoints" else path
    plain = read_json(cell_folder / "cell.json")
    if plain is None or (path.is_file() and path.suffix != ".pt"):
        raise ConfigError("checkpoint", "is of no cell", value=str(path), allowed=form)
    files = [path] if path.is_file() else sorted((cell_folder / "checkpoints").glob("step-*.pt"), reverse=True)
    if not files:
        again = "" if CellFolder(cell_folder).result() is None else "move its folder away and "
        raise ConfigError(
            "checkpoint",
            "has no checkpoint: they go when a cell's result is published",
            value=str(path),
            allowed=f"a cell that kept its last one: {again}`run` it with runtime.keep_checkpoints=true",
        )
    return files


def read_trained(files: Sequence[Path]) -> Trained:
    """Return the model of the first checkpoint that is whole.

    Args:
        files: from `find_checkpoints`.

    Raises:
        CheckpointError: none is whole, or they are of another cell or model.
        ConfigError: the cell's training function was the user's own.
    """
    folder = CellFolder(files[0].parent.parent)
    cell = decode(CellConfig, read_json(folder.path / "cell.json") or {}, prefix="cell")
    if cell.train.target is not None:
        raise ConfigError(
            "checkpoint",
            "is of a training function of your own, whose model is not known here",
            value=cell.train.target,
            allowed="cells with train.target=null",
        )
    warnings: list[str] = []
    state = _first_whole(files, Checkpoints(files[0].parent, folder.cell_id), warnings)
    model = build_model(cell)
    if cell.train.precision == "float64":
        model.double()
    weights, masks = to_dense(model, state["model"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint at step {state['step']} is of another model: {error}") from error
    result = folder.result() or {}
    if result.get("end") == "diverged":
        warnings.append(f"this run diverged; the weights are those of step {state['step']}, before it did")
    elif state["step"] < cell.train.steps:
        warnings.append(
            f"the weights are those of step {state['step']} of {cell.train.steps}, not the run's last; "
            "runtime.keep_checkpoints=true keeps these"
        )
    return Trained(
        cell=cell,
        cell_id=folder.cell_id,
        step=state["step"],
        model=model,
        masks=masks,
        result=result,
        warnings=tuple(warnings),
    )


def _first_whole(files: Sequence[Path], checkpoints: Checkpoints, warnings: list[str]) -> dict[str, Any]:
    first: CheckpointError | None = None
    for path in files:
        try:
            return checkpoints.read(path)
        except CheckpointError as error:
            first = first or error
            warnings.append(f"{error}; using the one before it")
    assert first is not None
    raise first
