"""The same cells, trained by the code of an old commit and by the working tree: the same ids, the same losses, bit for bit.

OLD=<commit> NEW=<commit> make slow PYTEST_ARGS="-k old_against_new"     compares two others
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BASELINE

pytestmark = [pytest.mark.slow, pytest.mark.history, pytest.mark.xdist_group("old_against_new")]

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tests" / "guard" / "text.txt"
COMMON = (
    *("data=text", "data.paths=[text.txt]", "model.width=32", "model.d_head=16", "model.context_tokens=16"),
    *("base.width=16", "train.batch_seqs=4", "train.eval_seqs=8", "train.eval_every_steps=10", "train.steps=30"),
    *("runtime.device=cpu", "runtime.threads=1", "runtime.route=torch", "launcher.processes=1"),
)
ONE = "parameterization=supar"
GRIDS: dict[str, tuple[str, ...]] = {
    "rules": (  # sp, mup, supar; dense and sparse; together in a cohort; weight decay
        *("runtime.compute=dense", "runtime.cohort=8", "hparams.weight_decay=0.1", "experiment.axes.density=[1,0.25]"),
        "experiment.axes.parameterization=[sp,mup,supar]",
    ),
    "compact": (  # live weights only, densities by layer, gradients accumulated, another schedule
        *("runtime.compute=compact", "runtime.cohort=1", "density=0.25", "layer_density=er", "schedule=cosine", ONE),
        *("train.accumulation_steps=2", "experiment.axes.seed=[0,1]"),
    ),
    "methods": (  # masks that change
        *("runtime.compute=dense", "runtime.cohort=1", ONE),
        *("experiment=dynamic", "experiment.axes.density=[0.25]", "experiment.axes.lr=[0.0078125]"),
        "experiment.axes.seed=[0]",
    ),
    "sgd": (  # another optimizer and model
        *("runtime.compute=dense", "runtime.cohort=1", "density=0.5", "optimizer=sgd", "hparams.lr=0.125", ONE),
        *("model.position=alibi", "model.activation=swiglu", "model.tied_head=true", "model.bias=false"),
    ),
    "depth": (  # CompleteP in a deeper model, another number format
        *("runtime.compute=dense", "runtime.cohort=1", "density=0.5", "model.n_layer=4", "depth=completep", ONE),
        *("depth_alpha=1.0", "train.precision=bfloat16"),
    ),
}
N_CELLS = 5 + 2 + 3 + 1 + 1
TIMES = {"wall_s", "step_s", "time_s", "train_s"}


def tree(commit: str | None, folder: Path) -> Path:
    """Return the working tree, or a folder with the files of a commit."""
    if commit is None:
        return ROOT
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def trained(source: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the code of a tree records: a folder's name -> its curve and its summary."""
    folder.mkdir()
    shutil.copy(TEXT, folder)
    environment = {**os.environ, "PYTHONPATH": str(source)}

    def said(*words: str) -> str:
        answer = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    assert Path(said("-c", "import supar_sweep; print(supar_sweep.__file__)")) == source / "supar_sweep" / "__init__.py"
    for name, words in GRIDS.items():
        said("-m", "supar_sweep", "run", *COMMON, *words, f"experiment.name={name}")
    records = {}
    for result in sorted((folder / "runs" / "cells").glob("*/*/result.json")):
        attempts = sorted((result.parent / "attempts").iterdir())
        lines = (attempts[-1] / "metrics.jsonl").read_text().splitlines()
        curve = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
        plain = json.loads(result.read_text())
        records[result.parent.name] = {"curve": curve, "end": plain["end"], "summary": plain["summary"]}
    return records


def test_old_and_new_code_train_the_same_cells_to_the_same_bits(tmp_path: Path) -> None:
    old = tree(os.environ.get("OLD", BASELINE), tmp_path / "old-tree")
    new = tree(os.environ.get("NEW"), tmp_path / "new-tree")
    assert old != new
    before, after = trained(old, tmp_path / "old"), trained(new, tmp_path / "new")
    assert len(before) == N_CELLS
    assert after.keys() == before.keys(), "the ids have changed"
    for name, record in before.items():
        assert len(record["curve"]) > 30
        for was, now in zip(record["curve"], after[name]["curve"], strict=True):
            assert now == was, f"{name}: the first line that differs"
        assert after[name] == record, name
    bits = {name: hashlib.sha256(json.dumps(record).encode()).hexdigest() for name, record in before.items()}
    assert len(set(bits.values())) == N_CELLS, "two cells train alike: they test one thing"
