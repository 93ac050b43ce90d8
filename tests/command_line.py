"""Commands as a person types them, in a folder of their own: what tests of bad input share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from supar_sweep.cli.main import main
from supar_sweep.sweep.records import CellFolder, Store

ROOT = Path(__file__).resolve().parent.parent
CELL = (
    *("model.d_head=8", "model.context_tokens=16", "base.width=16"),
    *("train.steps=4", "train.batch_seqs=2", "train.eval_seqs=2"),
)
GRID = (*CELL, "model.width=16", "launcher.processes=1", "runtime.checkpoint_every_steps=2")
STUDY = (*CELL, "launcher.processes=1", "study.n_trials=1", "study.confirm_top_k=0", "study.confirm_seeds=[]")
QUICK = ("quickstart", "size=smoke", "train.steps=2", "train.eval_seqs=2", "study.n_trials=1", "launcher.processes=1")
HPARAMS = "hparams: {lr: 0.01, init_std: 0.1, alpha_in: 1, alpha_out: 1, weight_decay: 0}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the commands: records go to `runs` in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    return code, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line with which a request was refused."""
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, ""), err
    assert err.startswith("supar-sweep: ")
    assert err.count("\n") == 1, err
    return err


def only_cell() -> CellFolder:
    (folder,) = Store(Path("runs/cells")).index().values()
    return folder


def result() -> dict[str, Any]:
    found = only_cell().result()
    assert found is not None
    return found


def losses() -> tuple[Any, Any]:
    return result()["summary"], only_cell().metrics()
