"""The smallest cell that still exercises everything, for every test that needs one."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.sweep.identity import cell_id, label
from supar_sweep.sweep.records import CellFolder, Store
from supar_sweep.training.corpus import fingerprint

CELL: dict[str, Any] = {
    "parameterization": "supar",
    "sp_start": "mup_dense",
    "depth": "gpt2",
    "depth_alpha": None,
    "density": 0.25,
    "layer_density": "uniform",
    "seed": 0,
    "base": {"width": 16, "n_layer": 2},
    "hparams": {
        "lr": 0.01,
        "init_std": 0.08,
        "alpha_in": 1.0,
        "alpha_out": 1.0,
        "weight_decay": 0.1,
    },
    "model": {
        "width": 32,
        "d_head": 8,
        "n_layer": 2,
        "context_tokens": 16,
        "position": "learned",
        "activation": "gelu",
        "bias": False,
        "tied_head": False,
        "ffn_mult": 4.0,
    },
    "data": {"name": "stdlib", "val_fraction": 0.1},
    "optimizer": {
        "name": "adamw",
        "decay_mode": "scaled",
        "clip_norm": 1.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
    },
    "schedule": {"name": "linear", "warmup_steps": 2, "final_lr_fraction": 0.1},
    "train": {
        "steps": 12,
        "batch_seqs": 4,
        "accumulation_steps": 1,
        "precision": "float32",
        "summary_last_steps": 4,
        "eval_every_steps": None,
        "eval_seqs": 8,
        "divergence_loss_mult": 3.0,
        "divergence_patience_steps": 3,
        "target": None,
    },
}

RUNTIME: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "route": "torch",
    "compute": "dense",
    "compile": False,
    "checkpoint_every_s": None,
    "checkpoint_every_steps": None,
    "keep_checkpoints": False,
}


def with_overrides(plain: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy with dotted keys set: {"model.width": 64}; a mapping value replaces its
    whole group.
    """
    changed = deepcopy(dict(plain))
    for dotted, value in overrides.items():
        *groups, name = dotted.split(".")
        node = changed
        for group in groups:
            node = node[group]
        node[name] = value
    return changed


def tiny_plain(**overrides: Any) -> dict[str, Any]:
    """Return the tiny cell as a plain dict: tiny_plain(**{"model.width": 64, "density": 1.0})."""
    return with_overrides(CELL, overrides)


def tiny_cell(**overrides: Any) -> CellConfig:
    """Return the tiny cell, decoded: tiny_cell(**{"model.width": 64, "density": 1.0})."""
    return decode(CellConfig, tiny_plain(**overrides))


def tiny_runtime(**overrides: Any) -> RuntimeConfig:
    """Return the tiny runtime (CPU, one thread, torch's route, dense compute, no checkpoints), decoded."""
    return decode(RuntimeConfig, with_overrides(RUNTIME, overrides))


def tiny_job(store: Path, *, runtime: Any = None, **overrides: Any) -> Any:
    """Return the job of the tiny cell, as `run` would submit it.

    Args:
        store: folder of the cells.
        runtime: overrides of the runtime.
        overrides: of the cell.
    """
    plain = tiny_plain(**overrides)
    cell = decode(CellConfig, plain)
    data_fingerprint = fingerprint(cell.data)
    identity = cell_id(cell, data_fingerprint)
    folder = Store(store).folder(identity, label(cell))
    return {
        "store": str(store),
        "folder": str(folder.path.relative_to(store)),
        "cell_id": identity,
        "cell": plain,
        "runtime": with_overrides(RUNTIME, runtime or {}),
        "fingerprint": data_fingerprint,
        "provenance": {"tests": True},
    }


def folder_of(job: Any) -> CellFolder:
    """Return the folder of a job's cell."""
    return CellFolder(Path(job["store"], job["folder"]))


def result_of(job: Any) -> dict[str, Any]:
    """Return the published result of a job's cell."""
    result = folder_of(job).result()
    assert result is not None
    return result


def end_of(job: Any) -> dict[str, Any]:
    """Return the end of the last attempt at a job's cell."""
    end = folder_of(job).last_end()
    assert end is not None
    return end
