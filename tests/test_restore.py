"""restore: the trained model of a cell's folder, read without touching it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from supar_sweep.errors import CheckpointError, ConfigError
from supar_sweep.training.restore import find_checkpoints, read_trained
from tests.test_export import COMPLETEP, as_trained, some_tokens, trained
from tests.tiny import folder_of, result_of


def test_the_newest_whole_checkpoint_is_read_and_nothing_is_touched(tmp_path: Path) -> None:
    job = trained(tmp_path)
    folder = folder_of(job).path
    files = sorted(folder.glob("checkpoints/*.pt"))
    assert [read_trained([path]).step for path in files] == [6, 12]
    assert read_trained(find_checkpoints(folder)).step == 12
    assert read_trained(find_checkpoints(folder / "checkpoints")).step == 12
    assert read_trained(find_checkpoints(files[0])).step == 6
    files[1].write_bytes(files[1].read_bytes()[:-1])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    fallen_back = read_trained(find_checkpoints(folder))
    assert fallen_back.step == 6
    torn, early = fallen_back.warnings
    assert "torn or altered" in torn
    assert "step 6 of 12" in early
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    with pytest.raises(CheckpointError, match="torn or altered"):
        read_trained(find_checkpoints(files[1]))


def test_the_restored_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    job = trained(tmp_path, **COMPLETEP)
    found = read_trained(find_checkpoints(folder_of(job).path))
    assert found.warnings == ()
    assert found.result == result_of(job)
    wanted = as_trained(job)
    with torch.no_grad():
        assert torch.equal(found.model(some_tokens()), wanted(some_tokens()))
    assert found.layer_density() == dict.fromkeys(found.masks, 0.25)


def test_a_checkpoint_of_another_cell_is_refused(tmp_path: Path) -> None:
    first, second = trained(tmp_path, seed=0), trained(tmp_path, seed=1)
    for path in folder_of(second).path.glob("checkpoints/*"):
        shutil.copy(path, folder_of(first).path / "checkpoints")
    with pytest.raises(CheckpointError, match=f"belongs to cell {second['cell_id']}"):
        read_trained(find_checkpoints(folder_of(first).path))


def test_the_model_of_a_training_function_of_ones_own_is_not_known(tmp_path: Path) -> None:
    job = trained(tmp_path)
    path = folder_of(job).path / "cell.json"
    plain = json.loads(path.read_text())
    plain["train"]["target"] = "somebody.train"
    path.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="training function of your own"):
        read_trained(find_checkpoints(folder_of(job).path))
