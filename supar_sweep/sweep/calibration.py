"""How long a step of each shape takes, as `calibrate` measured it: a readable file a device in the runs folder. No torch.

<runs>/calibration/<launcher>-<device>.json    {"device": ..., "kind": ..., "shapes": {key: {...}}}
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supar_sweep.config.decode import encode
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.errors import RecordError
from supar_sweep.sweep.files import read_json, write_json

FOLDER = "calibration"
KEY_CHARS = 12


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device.

    Args:
        path: the file.
        launcher: whose processes were measured: local, slurm.
        device: in words.
        kind: "cpu" or "cuda".
        shapes: by `shape_key`: step_s, setup_s, eval_seq_s of one run in its company, and what a reader wants to know.
    """

    path: Path
    launcher: str
    device: str
    kind: str
    shapes: Mapping[str, Mapping[str, Any]]

    @property
    def newest_s(self) -> float:
        """When the last shape was measured, in Unix time."""
        return max((float(row["time_s"]) for row in self.shapes.values()), default=0.0)

    def run_s(self, cell: CellConfig, runtime: RuntimeConfig) -> float | None:
        """Return the seconds that a process spends on one whole run of the cell; None where its shape was not measured.

            setup_s + steps * step_s + evaluations * eval_seqs * eval_seq_s

        Args:
            cell: the cell.
            runtime: how it is computed.
        """
        row = self.shapes.get(shape_key(cell, runtime))
        if row is None:
            return None
        train = cell.train
        n_evals = math.ceil(train.steps / (train.eval_every_steps or train.steps))
        eval_s = n_evals * train.eval_seqs * float(row["eval_seq_s"])
        return float(row["setup_s"]) + train.steps * float(row["step_s"]) + eval_s


def shape_key(cell: CellConfig, runtime: RuntimeConfig) -> str:
    """Return a hash of what the time of a step depends on: not of lr, seed, rules or the number of steps.

    Args:
        cell: the cell.
        runtime: how it is computed.
    """
    train = cell.train
    sparse = None if cell.density == 1 else [float(cell.density), cell.layer_density, cell.sparsity.method]
    facts = {
        "model": encode(cell.model),
        "n_vocab": cell.data.n_vocab,
        "batch": [train.batch_seqs, train.accumulation_steps, train.precision],
        "sparse": sparse,
        "optimizer": [cell.optimizer.name, cell.optimizer.momentum],
        "runtime": [runtime.n_threads, runtime.route, runtime.compute, runtime.compile, runtime.cohort],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_CHARS]


def store(runs: Path, launcher: str, device: str, kind: str, shapes: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write what was measured beside what is known of the device, and return the file.

    Args:
        runs: the runs folder.
        launcher, device, kind, shapes: as for `Calibration`; a shape measured again replaces its old row.

    Raises:
        RecordError: the folder cannot be written.
    """
    path = runs / FOLDER / f"{launcher}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    try:
        before = (read_json(path) or {}).get("shapes", {})
    except RecordError:  # torn: measured anew
        before = {}
    now_s = time.time()
    known = {**before, **{key: {**row, "time_s": now_s} for key, row in shapes.items()}}
    write_json(path, {"launcher": launcher, "device": device, "kind": kind, "shapes": known})
    return path


def newest(runs: Path, launcher: str, kind: str, device: str | None = None) -> Calibration | None:
    """Return the calibration of the device that was measured last; None where there is none.

    Args:
        runs: the runs folder.
        launcher: whose processes.
        kind: "cpu" or "cuda".
        device: this one only; None = any.
    """
    found = []
    for path in sorted((runs / FOLDER).glob("*.json")):
        try:
            each = Calibration(path, **(read_json(path) or {}))
        except TypeError as error:
            raise RecordError(
                f"{path} is no calibration ({error}); remove it, and `calibrate` writes a new one"
            ) from error
        if (each.launcher, each.kind) == (launcher, kind) and device in (None, each.device):
            found.append(each)
    return max(found, key=lambda each: each.newest_s, default=None)
