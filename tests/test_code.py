"""The code of a job is that of its submission: real processes, and edits between the two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launchers.local import search_path
from launchers.slurm_script import job_environment
from supar_sweep.errors import RecordError
from supar_sweep.sweep.arrays import ArrayFolder
from supar_sweep.sweep.code import PACKAGE, code_version, freeze_code
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.status import cell_state
from supar_sweep.training.slurm_job import command
from tests import cluster_cells
from tests.clusters import PATIENCE_S
from tests.test_launchers_slurm import assert_whole_curve, job_of

EDITED = "raise SystemExit('the checkout, as it was edited')\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package in a checkout that a test may edit."""
    return shutil.copytree(PACKAGE, tmp_path / "checkout" / PACKAGE.name)


def edit(package: Path) -> None:
    (package / "sweep" / "records.py").write_text(EDITED)


def start(array: ArrayFolder, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    return subprocess.run(
        command(str(array.path), cluster_cells.RUN, "600", "30", "1"),
        env={**os.environ, **slurm, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_version_is_names_and_contents_and_nothing_else(checkout: Path) -> None:
    version = code_version(checkout)
    assert version == code_version(PACKAGE)
    os.utime(checkout / "errors.py", (0, 0))
    (checkout / "__pycache__").mkdir(exist_ok=True)
    (checkout / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"x")
    (checkout / ".errors.py.swp").write_bytes(b"x")
    assert code_version(checkout) == version
    (checkout / "errors.py").rename(checkout / "mistakes.py")
    renamed = code_version(checkout)
    (checkout / "mistakes.py").write_text("x = 1\n")
    assert len({version, renamed, code_version(checkout)}) == 3


def test_one_copy_a_version_whoever_makes_it(checkout: Path, runs_dir: Path) -> None:
    code = runs_dir / "code"
    submitters = [threading.Thread(target=freeze_code, args=(code, checkout)) for _ in range(8)]
    for each in submitters:
        each.start()
    for each in submitters:
        each.join()
    version = code_version(checkout)
    assert [path.name for path in code.iterdir()] == [version]
    assert freeze_code(code, checkout) == code / version
    assert code_version(code / version / PACKAGE.name) == version
    edit(checkout)
    assert freeze_code(code, checkout) == code / code_version(checkout)
    assert len(list(code.iterdir())) == 2


def test_a_copy_that_somebody_changed_is_not_submitted_from(checkout: Path, runs_dir: Path) -> None:
    frozen = freeze_code(runs_dir / "code", checkout)
    edit(frozen / PACKAGE.name)
    with pytest.raises(RecordError, match="no longer the code that was submitted from there"):
        freeze_code(runs_dir / "code", checkout)
    shutil.rmtree(frozen)
    assert freeze_code(runs_dir / "code", checkout) == frozen


def test_an_edit_after_the_submission_changes_no_job(
    checkout: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(checkout.parent), *sys.path])
    jobs = [job_of(runs_dir, seed) for seed in range(3)]
    array = ArrayFolder.new(runs_dir / "slurm", [[jobs[:2], jobs[2:]]])  # two processes
    frozen = freeze_code(runs_dir / "code", checkout)
    environment = job_environment(1, frozen)
    edit(checkout)
    assert "the checkout, as it was edited" in start(array, {"PYTHONPATH": search_path()}).stdout
    ran = start(array, environment)
    assert ran.returncode == 0, ran.stdout
    for job in jobs:
        assert_whole_curve(job, 6)
        result = folder_of(job).result() or {}
        assert result["provenance"]["slurm"]["code"] == frozen.name == code_version(PACKAGE)


def test_a_job_that_finds_other_code_says_so_and_trains_nothing(checkout: Path, runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in range(2)]
    array = ArrayFolder.new(runs_dir / "slurm", [[[job] for job in jobs]])
    frozen = freeze_code(runs_dir / "code", checkout)
    changed = frozen / PACKAGE.name / "errors.py"
    changed.write_text(changed.read_text() + "# changed\n")
    other = code_version(frozen / PACKAGE.name)
    assert start(array, job_environment(1, frozen)).returncode == 1
    for job in jobs:
        state = cell_state(folder_of(job))
        assert (state.state, state.attempts) == ("failed", 1)
        assert f"version {other} in {frozen / PACKAGE.name}, was {frozen.name}" in state.message
        assert not folder_of(job).metrics()
