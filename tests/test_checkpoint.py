"""Checkpoints: whole or not at all, the last two, the newest that is whole, never another's."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_sweep.errors import CheckpointError
from supar_sweep.training.checkpoint import Checkpoints
from tests.full_disk import files_up_to


def state(value: float) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((300,), value), "w_mask": torch.tensor([True, False])},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "rng": torch.get_rng_state(),
        "route": "onednn",
        "loss": None,
    }


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "0123456789abcdef")


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def newest_step(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.newest()
    return None if found is None else int(found["step"])


def test_what_was_saved_comes_back(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    assert checkpoints.save(7, state(0.5))
    found = checkpoints.newest()
    assert found is not None
    assert (found["step"], found["route"], found["loss"]) == (7, "onednn", None)
    assert torch.equal(found["model"]["w"], torch.full((300,), 0.5))
    assert found["model"]["w_mask"].dtype == torch.bool
    assert found["optimizer"]["state"][0]["step"].item() == 3.0
    assert not checkpoints.warnings


def test_the_last_two_are_kept_with_their_digests(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 100, 15):
        checkpoints.save(step, state(step))
    assert names(checkpoints) == [
        "step-00000015.pt",
        "step-00000015.sha256",
        "step-00000100.pt",
        "step-00000100.sha256",
    ]
    assert newest_step(checkpoints) == 100


def test_digests_are_those_that_sha256sum_checks(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, state(1.0))
    command = ["sha256sum", "-c", "step-00000005.sha256"]
    subprocess.run(command, cwd=checkpoints.folder, check=True, capture_output=True)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_text(path: Path) -> None:
    path.write_text("no checkpoint")


def lose_digest(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def spoil_digest(path: Path) -> None:
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe")


DAMAGE = [truncate, empty, flip, replace_by_text, lose_digest, spoil_digest]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(damage: Any, checkpoints: Checkpoints) -> None:
    checkpoints.save(10, state(1.0))
    checkpoints.save(20, state(2.0))
    damage(checkpoints.folder / "step-00000020.pt")
    assert newest_step(checkpoints) == 10
    (warning,) = checkpoints.warnings
    assert "step-00000020.pt" in warning
    assert "using the one before it" in warning
    # put aside, not deleted; and it does not count among the two that are kept
    assert "step-00000020.torn" in names(checkpoints)
    checkpoints.save(15, state(1.5))
    assert {"step-00000010.pt", "step-00000015.pt"} <= set(names(checkpoints))


def test_where_all_are_damaged_the_run_begins_again(checkpoints: Checkpoints) -> None:
    for step in (10, 20):
        checkpoints.save(step, state(1.0))
        flip(checkpoints.folder / f"step-{step:08d}.pt")
    assert checkpoints.newest() is None
    assert len(checkpoints.warnings) == 2


def test_a_whole_file_that_is_no_checkpoint_is_torn_too(checkpoints: Checkpoints) -> None:
    checkpoints.save(10, state(1.0))
    path = checkpoints.folder / "step-00000020.pt"
    torch.save([1, 2], path)
    from hashlib import sha256

    path.with_suffix(".sha256").write_text(f"{sha256(path.read_bytes()).hexdigest()}  {path.name}")
    assert newest_step(checkpoints) == 10


def test_another_cells_checkpoint_is_an_error_and_stays(checkpoints: Checkpoints) -> None:
    checkpoints.save(10, state(1.0))
    stranger = Checkpoints(checkpoints.folder, "fedcba9876543210")
    with pytest.raises(CheckpointError, match="belongs to cell 0123456789abcdef, not to fedcba"):
        stranger.newest()
    assert newest_step(checkpoints) == 10


def test_another_format_is_an_error(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("supar_sweep.training.checkpoint.CHECKPOINT_VERSION", 99)
        checkpoints.save(10, state(1.0))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoints.newest()


def test_a_full_disk_is_a_warning_and_leaves_the_old_checkpoint(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(10, state(1.0))

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        assert not checkpoints.save(20, state(2.0))
    assert checkpoints.warnings == [
        "checkpoint at step 20 not written: No space left on device",
    ]
    assert names(checkpoints) == ["step-00000010.pt", "step-00000010.sha256"]
    assert newest_step(checkpoints) == 10


def test_a_file_that_may_not_grow_is_a_warning(checkpoints: Checkpoints) -> None:
    checkpoints.save(10, state(1.0))
    with files_up_to(1500):
        assert not checkpoints.save(20, state(2.0))
    assert len(checkpoints.warnings) == 1
    assert newest_step(checkpoints) == 10
    assert names(checkpoints) == ["step-00000010.pt", "step-00000010.sha256"]


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", "0" * 16)
    assert not checkpoints.save(1, state(1.0))
    assert checkpoints.newest() is None


KILLED_WRITER = """
import os, sys, torch
from pathlib import Path
from supar_sweep.training import checkpoint
checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]), "0123456789abcdef")
original = Path.replace
def die_before(self, target):
    if str(target).endswith(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return original(self, target)
Path.replace = die_before
checkpoints.save(20, {"w": torch.zeros(3)})
"""


@pytest.mark.parametrize("moment", [".sha256", ".pt"])
def test_a_writer_killed_midway_leaves_the_old_checkpoint(moment: str, checkpoints: Checkpoints) -> None:
    checkpoints.save(10, state(1.0))
    command = [sys.executable, "-c", KILLED_WRITER, str(checkpoints.folder), moment]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert newest_step(checkpoints) == 10
    checkpoints.save(30, state(3.0))
    assert names(checkpoints) == [f"step-000000{step}.{kind}" for step in (10, 30) for kind in ("pt", "sha256")]
