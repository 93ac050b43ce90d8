"""What the launcher makes of SLURM's answers in an order that no cluster gives on request: the commands are scripts here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from launchers.slurm import SlurmLauncher
from launchers.slurm_follow import cancel
from launchers.slurm_submission import ANSWER_S
from supar_sweep.errors import SuparError
from supar_sweep.sweep.arrays import ArrayFolder
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.records import Attempt
from tests.elements import ROOT
from tests.test_launchers_slurm import config, job_of

T = TypeVar("T")

ANSWERS = {
    "sbatch": "echo 7",
    "squeue": 'case "$*" in *ArrayJobID*) f=mine ;; *) f=queue ;; esac; [ ! -f {folder}/$f ] || /bin/cat {folder}/$f',
    "scancel": 'echo "$@" >>{folder}/cancelled',
    "scontrol": "echo 'MaxArraySize = 1001'",
    "srun": "exit 0",
}


class Paper(NamedTuple):
    """A SLURM that says what it is told to say, and a launcher that asks it."""

    folder: Path
    launcher: SlurmLauncher

    def says(self, state: str) -> None:
        """Have the queue hold the first element in this state."""
        (self.folder / "queue").write_text(f"7_0|{state}|None|0|0|\n")

    def answers(self, command: str, text: str) -> None:
        """Have a command be this shell script from now on."""
        write_command(self.folder, command, text)

    def submitted(self, job: Mapping[str, Any]) -> None:
        self.launcher.submit([job])
        assert self.launcher.flush() == set()


def write_command(folder: Path, command: str, text: str) -> None:
    script = folder / command
    script.write_text(f"#!/bin/sh\n{text.replace('{folder}', str(folder))}\n")
    script.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paper]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in ANSWERS.items():
        write_command(folder, name, text)
    monkeypatch.setenv("PATH", str(folder))
    with SlurmLauncher(config(poll_s=0.1, grace_s=0.0), threads=1, folder=runs_dir / "slurm") as launcher:
        yield Paper(folder, launcher)


@pytest.mark.parametrize("seen_first", [True, False])
def test_what_was_withdrawn_and_not_told_ends_where_all_is_cancelled(
    slurm: Paper, runs_dir: Path, seen_first: bool
) -> None:
    job = job_of(runs_dir, 0)
    slurm.submitted(job)
    slurm.says("PENDING")
    assert slurm.launcher.withdraw() == set(), "the queue still has it"
    assert (slurm.folder / "cancelled").read_text() == "7_0\n"
    slurm.says("CANCELLED")
    if seen_first:
        assert slurm.launcher.events(5) == [], "a withdrawal is told by the next call of `withdraw`"
    slurm.launcher.cancel()
    (event,) = slurm.launcher.events(5)
    assert (event.cell_id, event.end) == (job["cell_id"], "cancelled")
    assert slurm.launcher.withdraw() == set(), "told once"


def test_what_was_withdrawn_is_told_by_a_later_call(slurm: Paper, runs_dir: Path) -> None:
    job = job_of(runs_dir, 0)
    slurm.submitted(job)
    slurm.says("PENDING")
    assert slurm.launcher.withdraw() == set()
    slurm.says("CANCELLED")
    assert slurm.launcher.events(5) == []
    assert slurm.launcher.withdraw() == {job["cell_id"]}


def test_a_cell_that_fails_at_once_was_not_refused(slurm: Paper, runs_dir: Path) -> None:
    job = job_of(runs_dir, 0)
    slurm.submitted(job)
    (array,) = (runs_dir / "slurm").iterdir()
    with Attempt(folder_of(job), job["cell"], {"provenance": {"slurm": {"array": array.name}}}) as attempt:
        attempt.end("failed", "no luck")
    slurm.says("RUNNING")
    assert slurm.launcher.flush() == set()
    assert slurm.launcher.events(0) == [], "after `flush`, what sbatch said and no more"
    (event,) = slurm.launcher.events(5)
    assert (event.end, event.message) == ("failed", "no luck")


def test_an_element_that_printed_nothing_is_told_with_its_log(slurm: Paper, runs_dir: Path) -> None:
    """As after launcher.setup=[exit 1]: no cell has begun, and only the log could say more."""
    slurm.submitted(job_of(runs_dir, 0))
    (path,) = (runs_dir / "slurm").iterdir()
    log = ArrayFolder(path).log("7_0")
    log.touch()
    (slurm.folder / "queue").write_text("7_0|FAILED|NonZeroExitCode|256|0|\n")
    (event,) = slurm.launcher.events(20)
    assert event.message == f"worker left with exit code 1; its log: {log}"


# -- another user's elements, in a runs folder that both use -----------------------------------------


@pytest.mark.root
def test_the_queue_is_asked_for_the_arrays_of_all_who_submitted_some(slurm: Paper, runs_dir: Path) -> None:
    slurm.submitted(job_of(runs_dir, 0))
    (array,) = (runs_dir / "slurm").iterdir()
    other = 54321
    os.chown(array, other, -1)
    slurm.answers(
        "squeue",
        f'case "$*" in *--user={os.getuid()},{other}*) echo "7|supar-{array.name}|" ;; *) echo "7_0|PENDING|None|0|0|" ;; esac',
    )
    assert list(slurm.launcher.known().values()) == ["pending"]


def test_whoever_may_not_end_an_element_is_told_so(slurm: Paper, runs_dir: Path) -> None:
    job = job_of(runs_dir, 0)
    slurm.submitted(job)
    (array,) = (runs_dir / "slurm").iterdir()
    (slurm.folder / "mine").write_text(f"7|supar-{array.name}|\n")
    slurm.says("RUNNING")
    slurm.answers(
        "scancel", 'echo "scancel: error: Kill job error on job id 7_0: Access/permission denied" >&2; exit 210'
    )
    with pytest.raises(SuparError, match=r"1 of 1 elements are another user's, and go on .*job id 7_0"):
        cancel(runs_dir / "slurm", {job["cell_id"]})
    slurm.answers("scancel", 'echo "scancel: error: Invalid job id 7_0" >&2; exit 1')
    assert cancel(runs_dir / "slurm", {job["cell_id"]}) == 1, "it has ended meanwhile"


# -- sbatch ----------------------------------------------------------------------------------------

PARTS = r"""
for script; do :; done
n=$(( $(/bin/sed -n "s/^#SBATCH --array=0-\([0-9]*\)%.*/\1/p" "$script") + 1 ))
name=$(/bin/sed -n "s/^#SBATCH --job-name=//p" "$script")
"""
SLEEPS = """
echo $$ >>{folder}/sleeping
echo "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying" >&2
exec /bin/sleep 600
"""
WITH_ROOM = (
    PARTS
    + """
room=$(/bin/cat {folder}/room)
if [ $n -le $room ]; then
    echo $(( room - n )) >{folder}/room
    echo $n >>{folder}/arrays
    /bin/grep -c . {folder}/arrays
    exit
fi
"""
    + SLEEPS
)


def is_alive(pid: str) -> bool:
    return Path("/proc", pid).exists()


def test_an_sbatch_that_goes_to_sleep_has_a_full_queue_and_is_ended(slurm: Paper, runs_dir: Path) -> None:
    """As at MaxJobCount: the array's halves, and their halves, fill what room there is."""
    (slurm.folder / "room").write_text("10\n")
    slurm.answers("sbatch", WITH_ROOM)
    for seed in range(24):
        slurm.launcher.submit([job_of(runs_dir, seed)])
    begun_s = time.monotonic()
    held = slurm.launcher.flush()
    assert time.monotonic() - begun_s < ANSWER_S, "it did not wait for an answer"
    arrays = [int(line) for line in (slurm.folder / "arrays").read_text().split()]
    assert (arrays, len(held)) == ([6, 3, 1], 14)
    assert not any(map(is_alive, (slurm.folder / "sleeping").read_text().split()))
    assert len(list((runs_dir / "slurm").iterdir())) == len(arrays), "what was refused leaves no folder"
    (slurm.folder / "room").write_text("14\n")
    deadline_s = time.monotonic() + ANSWER_S
    while slurm.launcher.flush():
        assert time.monotonic() < deadline_s
    arrays = [int(line) for line in (slurm.folder / "arrays").read_text().split()]
    assert sum(arrays) == 24


def test_what_sbatch_submitted_after_its_words_is_found_in_the_queue(slurm: Paper, runs_dir: Path) -> None:
    slurm.answers("sbatch", PARTS + 'echo "8|$name|" >{folder}/mine' + SLEEPS)
    job = job_of(runs_dir, 0)
    slurm.launcher.submit([job])
    assert slurm.launcher.flush() == set()
    (array,) = (runs_dir / "slurm").iterdir()
    assert ArrayFolder(array).job_id() == "8"


def test_ends_are_told_while_an_sbatch_is_at_work(
    slurm: Paper, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launchers.slurm_outbox.SETTLE_S", 0.1)
    first, second = job_of(runs_dir, 0), job_of(runs_dir, 1)
    slurm.submitted(first)
    slurm.answers("sbatch", "echo $$ >{folder}/sleeping; exec /bin/sleep 600")
    slurm.launcher.submit([second])
    assert slurm.launcher.events(0) == []
    slurm.says("FAILED")
    (event,) = slurm.launcher.events(20)
    assert event.cell_id == first["cell_id"]
    assert slurm.launcher.waiting() == {second["cell_id"]}
    assert slurm.launcher.withdraw() == {second["cell_id"]}
    assert not is_alive((slurm.folder / "sleeping").read_text().strip())
    (array,) = (path for path in (runs_dir / "slurm").iterdir() if not (path / "submitted.json").exists())
    assert f"--name=supar-{array.name}" in (slurm.folder / "cancelled").read_text(), "it may have been submitted"


SUBMIT = """
import pathlib, sys
from launchers.slurm import SlurmLauncher
from launchers.slurm_follow import cancel
from tests.test_launchers_slurm import config, job_of
runs = pathlib.Path(sys.argv[1])
launcher = SlurmLauncher(config(), threads=1, folder=runs / "slurm")
launcher.submit([job_of(runs, 0)])
launcher.flush()
"""


def test_an_sbatch_ends_with_its_run_that_was_killed(slurm: Paper, runs_dir: Path) -> None:
    slurm.answers("sbatch", "echo $$ >{folder}/pid; exec /bin/sleep 600")
    run = subprocess.Popen([sys.executable, "-c", SUBMIT, str(runs_dir)], cwd=ROOT)
    try:
        pid = until(lambda: (slurm.folder / "pid").read_text().strip() if (slurm.folder / "pid").exists() else "")
        assert is_alive(pid)
        assert os.getsid(int(pid)) != os.getsid(0), "a terminal's Ctrl-C does not reach it"
    finally:
        run.kill()
        run.wait()
    until(lambda: not is_alive(pid))


def until(answer: Callable[[], T]) -> T:
    """What it answers, as soon as that is something."""
    deadline_s = time.monotonic() + 60
    while not (found := answer()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return found
