"""The process pool, with real processes that are really killed. The cells are made up (fake_cells),
so no torch is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launchers import local
from launchers.local import LocalLauncher
from supar_sweep.sweep.jobs import Event, Launcher, folder_of
from supar_sweep.sweep.status import cell_state
from tests import fake_cells
from tests.grids import alive, job_of, pool, wait_for
from tests.tiny import tiny_cell


def through(launcher: Launcher, jobs: list[dict[str, Any]]) -> dict[str, Event]:
    for job in jobs:
        launcher.submit([job])
    ends: dict[str, Event] = {}
    while len(ends) < len(jobs):
        for event in launcher.events(30):
            assert event.cell_id not in ends, "one event a job"
            ends[event.cell_id] = event
    return ends


def test_jobs_are_done_in_persistent_workers(runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in range(6)]
    with pool(runs_dir) as launcher:
        ends = through(launcher, jobs)
        assert launcher.events(0) == []
    assert {event.end for event in ends.values()} == {"done"}
    pids = set()
    for job in jobs:
        result = folder_of(job).result()
        assert result is not None
        assert result["summary"]["train_loss"] == fake_cells.loss(tiny_cell(seed=result_seed(job)), fake_cells.STEPS)
        pids.add(result["pid"])
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert not any(map(alive, pids))
    assert list((runs_dir / "logs").iterdir()) == []  # nothing was printed


def result_seed(job: dict[str, Any]) -> int:
    seed: int = job["cell"]["seed"]
    return seed


@pytest.mark.parametrize(
    ("seed", "end", "died", "message"),
    [
        (fake_cells.EXIT, "failed", True, "exit code 3; its last words: leaving without a word"),
        (fake_cells.KILLED, "failed", True, "killed by signal 9 SIGKILL (out of memory?)"),
        (fake_cells.SEGFAULTS, "failed", True, "killed by signal 11 SIGSEGV"),
        (fake_cells.RAISES, "failed", False, "RuntimeError: no luck"),
        (fake_cells.DIVERGES, "diverged", False, ""),
    ],
)
def test_one_cells_end_is_typed_and_changes_no_others(
    runs_dir: Path, seed: int, end: str, died: bool, message: str
) -> None:
    bad, *good = jobs = [job_of(runs_dir, s) for s in (seed, 0, 1, 2)]
    with pool(runs_dir, processes=1) as launcher:
        ends = through(launcher, jobs)
    assert (ends[bad["cell_id"]].end, ends[bad["cell_id"]].died) == (end, died)
    assert message in ends[bad["cell_id"]].message
    state = cell_state(folder_of(bad))
    assert state.state == end
    assert message in state.message
    for job in good:
        assert ends[job["cell_id"]].end == "done"


def test_a_worker_whose_gpu_failed_is_replaced_before_the_next_cell(runs_dir: Path) -> None:
    bad, *good = jobs = [job_of(runs_dir, seed) for seed in (fake_cells.GPU_FAILS, 0, 1)]
    with pool(runs_dir, processes=1) as launcher:
        ends = through(launcher, jobs)
    assert (ends[bad["cell_id"]].end, ends[bad["cell_id"]].died) == ("failed", False)
    assert "CUDA error" in ends[bad["cell_id"]].message
    assert [ends[job["cell_id"]].end for job in good] == ["done", "done"]
    attempts = [folder_of(job).attempts() for job in jobs]
    assert [len(each) for each in attempts] == [1, 1, 1]  # no cell was given to the leaving worker
    first, second, third = (json.loads((each[0] / "attempt.json").read_text())["pid"] for each in attempts)
    assert first != second == third


def test_jobs_that_were_given_together_end_one_by_one(runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in (0, fake_cells.SLOW, 1)]
    with pool(runs_dir, processes=2) as launcher:
        launcher.submit(jobs)
        first = launcher.events(30)
        assert [event.cell_id for event in first] == [jobs[0]["cell_id"]]  # told while the slow one is at work
        rest = launcher.events(30)
        while len(rest) < 2:
            rest += launcher.events(30)
    assert [event.end for event in first + rest] == ["done"] * 3
    pids = {json.loads((folder_of(job).attempts()[0] / "attempt.json").read_text())["pid"] for job in jobs}
    assert len(pids) == 1


def test_all_that_had_not_ended_die_with_their_worker(runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in (0, fake_cells.EXIT, 1)]
    with pool(runs_dir, processes=1) as launcher:
        launcher.submit(jobs)
        events = {event.cell_id: event for _ in range(2) for event in launcher.events(30)}
    ends = [events[job["cell_id"]] for job in jobs]
    assert [(event.end, event.died) for event in ends] == [("done", False), ("failed", True), ("failed", True)]
    assert (folder_of(jobs[1]).last_end() or {})["end"] == "failed"  # what it left is ended in its record
    assert folder_of(jobs[2]).attempts() == []  # never begun


def test_a_function_that_does_not_say_how_a_cell_ended_fails_it(runs_dir: Path) -> None:
    with pool(runs_dir, processes=1, function="tests.test_launchers_local:silent") as launcher:
        ends = through(launcher, [job_of(runs_dir, 0)])
    (event,) = ends.values()
    assert (event.end, event.died) == ("failed", False)
    assert "did not say" in event.message


def silent(jobs: object, *, should_stop: object, ended: object) -> None:
    """A training function that forgets to tell."""


def test_a_function_that_cannot_be_found_fails_each_job_with_the_reason(runs_dir: Path) -> None:
    with pool(runs_dir, processes=1, function="tests.fake_cells:missing") as launcher:
        ends = through(launcher, [job_of(runs_dir, seed) for seed in (0, 1)])
    assert [event.died for event in ends.values()] == [True, True]
    assert all("has no attribute 'missing'" in event.message for event in ends.values())


def test_each_worker_has_its_threads_and_sleeps_when_idle(runs_dir: Path) -> None:
    with LocalLauncher(
        processes=1,
        threads=3,
        log_folder=runs_dir / "logs",
        grace_s=30.0,
        function="tests.test_launchers_local:tell",
    ) as launcher:
        launcher.submit([job_of(runs_dir, 0)])
        (event,) = launcher.events(30)
    told = json.loads((runs_dir / "told").read_text())
    assert event.end == "done"
    assert {told[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}
    assert told["OMP_WAIT_POLICY"] == "PASSIVE"


def tell(jobs: list[dict[str, Any]], *, should_stop: object, ended: Callable[..., None]) -> None:
    """What a worker is told of its environment."""
    (Path(jobs[0]["store"]).parent / "told").write_text(json.dumps(dict(os.environ)))
    ended(jobs[0]["cell_id"], "done")


def test_each_worker_has_a_gpu_of_its_own_while_there_are_enough(runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in range(3)]
    with pool(runs_dir, processes=3, gpus=["0", "GPU-7f"], function="tests.test_launchers_local:tell_gpu") as launcher:
        through(launcher, jobs)
    seen = sorted((runs_dir / job["cell_id"]).read_text() for job in jobs)
    assert seen in (["0", "0", "GPU-7f"], ["0", "GPU-7f", "GPU-7f"])


def tell_gpu(jobs: list[dict[str, Any]], *, should_stop: object, ended: Callable[..., None]) -> None:
    """What a worker sees of the GPUs; it waits for the other two, so that each job gets a worker of its own."""
    runs = Path(jobs[0]["store"]).parent
    (runs / jobs[0]["cell_id"]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    wait_for(lambda: sum(path.is_file() for path in runs.iterdir()) == 3)
    ended(jobs[0]["cell_id"], "done")


def test_as_many_workers_as_cores_unless_told(runs_dir: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    for threads in (1, cores, 10 * cores):
        made = LocalLauncher(processes=None, threads=threads, log_folder=runs_dir, grace_s=0.0)
        assert made.slots == max(1, cores // threads)
        made.close()


def test_cancel_saves_what_runs_and_drops_what_waits(runs_dir: Path) -> None:
    slow, waiting = job_of(runs_dir, fake_cells.SLOW), job_of(runs_dir, 1)
    with pool(runs_dir, processes=1) as launcher:
        launcher.submit([slow])
        launcher.submit([waiting])
        checkpoint = folder_of(slow).path / "checkpoints" / "last.json"
        wait_for(checkpoint.exists)
        launcher.cancel()
        ends = {event.cell_id: event for event in launcher.events(30)}
        while len(ends) < 2:
            ends |= {event.cell_id: event for event in launcher.events(30)}
    assert {event.end for event in ends.values()} == {"cancelled"}
    assert cell_state(folder_of(slow)).state == "cancelled"
    assert checkpoint.exists()
    assert not folder_of(waiting).path.exists()


def test_what_no_worker_has_is_withdrawn(runs_dir: Path) -> None:
    slow, *waiting = (job_of(runs_dir, seed) for seed in (fake_cells.SLOW, 1, 2))
    with pool(runs_dir, processes=1) as launcher:
        for job in (slow, *waiting):
            launcher.submit([job])
        assert launcher.withdraw() == {job["cell_id"] for job in waiting}
        assert launcher.withdraw() == set()
        (event,) = launcher.events(60)
        assert (event.cell_id, event.end) == (slow["cell_id"], "done")
        assert launcher.events(0) == []
    assert not any(folder_of(job).path.exists() for job in waiting)


def test_cancel_now_kills(runs_dir: Path) -> None:
    slow = job_of(runs_dir, fake_cells.SLOW)
    with pool(runs_dir, processes=1) as launcher:
        launcher.submit([slow])
        wait_for((folder_of(slow).path / "checkpoints" / "last.json").exists)
        launcher.cancel(now=True)
        (event,) = launcher.events(30)
    assert event.end == "cancelled"
    assert "signal 9" in event.message
    assert "signal 9" in cell_state(folder_of(slow)).message


def test_a_worker_asked_to_leave_saves_and_the_pool_goes_on(runs_dir: Path) -> None:
    slow, next_one = job_of(runs_dir, fake_cells.SLOW), job_of(runs_dir, 1)
    with pool(runs_dir, processes=1) as launcher:
        launcher.submit([slow])
        wait_for((folder_of(slow).path / "checkpoints" / "last.json").exists)
        info = json.loads((folder_of(slow).attempts()[0] / "attempt.json").read_text())
        os.kill(info["pid"], signal.SIGINT)  # the terminal's, not its own
        os.kill(info["pid"], signal.SIGTERM)
        (event,) = launcher.events(30)
        assert (event.end, event.died) == ("cancelled", False)
        wait_for(lambda: not alive(info["pid"]))
        ends = through(launcher, [next_one])
    # a job given to it before its leave was noticed died with it: the coordinator's to try again
    assert ends[next_one["cell_id"]].end in ("done", "failed")


def hang_up(jobs: object, *, should_stop: object, ended: object) -> None:
    """A worker that says no more to its parent and does not end, as in a driver's teardown."""
    socket.socket(fileno=int(sys.argv[1])).shutdown(socket.SHUT_RDWR)
    threading.Event().wait()


def test_a_worker_that_hung_up_and_does_not_end_is_killed(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LEAVE_S", 0.2)
    with pool(runs_dir, processes=1, function="tests.test_launchers_local:hang_up") as launcher:
        launcher.submit([job_of(runs_dir, 0)])
        (event,) = launcher.events(30)
    assert (event.end, event.died) == ("failed", True)
    assert "signal 9" in event.message


PARENT = """
import sys, pathlib
from tests.grids import pool, job_of, fake_cells
runs = pathlib.Path(sys.argv[1])
launcher = pool(runs)
for seed in (fake_cells.SLOW, 1, 2):
    launcher.submit([job_of(runs, seed)])
while True:
    launcher.events(1)
"""


def test_workers_save_and_leave_when_the_parent_is_killed(runs_dir: Path) -> None:
    slow = folder_of(job_of(runs_dir, fake_cells.SLOW))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(runs_dir)])
    wait_for((slow.path / "checkpoints" / "last.json").exists)
    info = json.loads((slow.attempts()[0] / "attempt.json").read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(info["pid"]))
    assert cell_state(slow).state == "cancelled"
    assert (slow.path / "checkpoints" / "last.json").exists()


def test_nothing_is_printed_on_this_terminal(runs_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pool(runs_dir, processes=1) as launcher:
        through(launcher, [job_of(runs_dir, fake_cells.EXIT)])
    assert capfd.readouterr() == ("", "")
    (log,) = (runs_dir / "logs").iterdir()
    assert log.read_text() == "leaving without a word\n"
