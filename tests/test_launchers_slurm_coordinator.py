"""What `run` with wait=true, and `tune`, make of the ends: tried again, held back, left alone. Side by side on one cluster."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import pytest

from supar_sweep.cli.leave import QUESTION
from supar_sweep.cli.main import INTERRUPTED
from supar_sweep.sweep.cohorts import Price
from supar_sweep.sweep.complete import Summary, complete
from supar_sweep.sweep.grid import GridPoint
from supar_sweep.sweep.interrupt import ONE_PRESS_S
from supar_sweep.sweep.records import CellFolder
from supar_sweep.sweep.status import cell_state, folders
from supar_sweep.sweep.submission import Experiment, Plan, make_plan
from tests import cluster_cells
from tests.clusters import PATIENCE_S, Cluster, cluster
from tests.fake_cells import loss
from tests.grids import Told
from tests.stories import Stories
from tests.test_launchers_slurm import launcher
from tests.tiny import tiny_cell, tiny_runtime

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

NODES = 4
ALONE = Price()
story: Stories[Any] = Stories()
Ask = Callable[[Callable[[Cluster, Path], Any]], Any]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with (
        pytest.MonkeyPatch.context() as patch,
        cluster(nodes=NODES, cpus=8, mem_mb=12000, grace_s=10) as slurm,
    ):
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        with story.told(slurm, tmp_path_factory) as ask:
            yield ask


def grid(*axes: Mapping[str, Any], steps: int) -> Plan:
    points = [GridPoint(axes=each, cell=tiny_cell(**each, **{"train.steps": steps})) for each in axes]
    return make_plan("test", points, runtime=tiny_runtime(), fingerprint=lambda data: "data", provenance={})


def seeds(*values: int, steps: int) -> Plan:
    return grid(*({"seed": value} for value in values), steps=steps)


def cells(runs: Path, plan: Plan) -> list[CellFolder]:
    """The folders of a plan's cells, in its order."""
    return list(folders(Experiment(runs, "test").store, plan).values())


def completed(runs: Path, plan: Plan, told: Told, *, price: Any = ALONE, alike: int = 5, **settings: Any) -> Summary:
    with launcher(runs, **settings) as made:
        impatience = Timer(PATIENCE_S, made.cancel)  # what never comes to its end is to fail, not to hang
        impatience.start()
        try:
            return complete(
                Experiment(runs, "test"), plan, made, price=lambda cell: price, progress=told, alike=alike, retries=2
            )
        finally:
            impatience.cancel()


@contextmanager
def completing(runs: Path, plan: Plan, told: Told, **options: Any) -> Iterator[Future[Summary]]:
    """Meanwhile a coordinator is at work on the plan."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(completed, runs, plan, told, **options)


def element_of(folder: CellFolder) -> str:
    info = json.loads((folder.attempts()[-1] / "attempt.json").read_text())
    return str(info["provenance"]["slurm"]["element"])


def ends(folder: CellFolder) -> list[dict[str, Any]]:
    return [json.loads((attempt / "end.json").read_text()) for attempt in folder.attempts()]


def assert_whole_curve(folder: CellFolder, seed: int, steps: int) -> None:
    cell = tiny_cell(**{"seed": seed, "train.steps": steps})
    expected = [(step, loss(cell, step)) for step in range(1, steps + 1)]
    assert [(line["step"], line["loss"]) for line in folder.metrics()] == expected


def begun(slurm: Cluster, folder: CellFolder, steps: int = 3) -> str:
    """Wait until the cell has something to lose, and return its element."""
    slurm.wait_for(lambda: len(folder.metrics()) >= steps)
    return element_of(folder)


# -- somebody cancels ------------------------------------------------------------------------------


@story
def cancelled_by_somebody(slurm: Cluster, runs: Path) -> None:
    plan, told = seeds(1, 2, 3, steps=80), Told()
    one, other, waiting = cells(runs, plan)
    with completing(runs, plan, told, array_parallelism=2, sbatch={"exclude": "n1"}) as summary:
        array = begun(slurm, one).partition("_")[0]
        slurm.ask("scancel", f"{array}_0", f"{array}_2")
        found = summary.result()
    assert dict(found.counts) == {"n": 3, "done": 1, "cancelled": 2}
    assert [(trouble.end, trouble.n) for trouble in found.troubles] == [("cancelled", 2)]
    assert [cell_state(each).state for each in (one, other, waiting)] == ["cancelled", "done", "missing"]
    assert [len(each.attempts()) for each in (one, other, waiting)] == [1, 1, 0]
    assert len(list((runs / "slurm").iterdir())) == 1, "nothing was submitted again"
    assert told.messages == []
    assert completed(runs, plan, told).complete
    assert [len(each.attempts()) for each in (one, other, waiting)] == [2, 1, 1]
    for seed, each in enumerate((one, other, waiting), 1):
        assert_whole_curve(each, seed, 80)


def test_a_scancel_is_not_tried_again_until_the_next_run(told: Ask) -> None:
    told(cancelled_by_somebody)


# -- the site takes a job away ---------------------------------------------------------------------


@story
def preempted_and_not_requeued(slurm: Cluster, runs: Path) -> None:
    plan, told = seeds(1, steps=100), Told()
    (cell,) = cells(runs, plan)
    others = ",".join(f"n{number}" for number in range(2, NODES + 1))
    with completing(runs, plan, told, partition="cancelling", sbatch={"exclude": others}) as summary:
        slurm.ask("scontrol", "update", f"jobid={begun(slurm, cell)}", "Requeue=0")
        slurm.batch("sleep 1", "-p", "urgent", "--nodelist=n1", "--exclusive")
        found = summary.result()
    assert found.complete
    first, second = ends(cell)
    assert (first["end"], second["end"]) == ("cancelled", "done")
    assert "preempted after " in first["message"]
    assert "not requeued: " in first["message"]
    (said,) = told.messages
    assert said.endswith("; try 2 of 3")
    assert_whole_curve(cell, 1, 100)


@story
def out_of_time_and_not_requeued(slurm: Cluster, runs: Path) -> None:
    plan, told = seeds(2, steps=450), Told()
    (cell,) = cells(runs, plan)
    with completing(runs, plan, told, timeout_min=1, sbatch={"exclude": "n1"}) as summary:
        while not summary.done():
            with suppress(OSError, IndexError):  # none has begun yet, or it is about to
                slurm.ask("scontrol", "update", f"jobid={element_of(cell)}", "Requeue=0", check=False)
            time.sleep(0.5)
    assert summary.result().complete
    *lost, last = ends(cell)
    assert (lost[0]["end"], last["end"]) == ("timeout", "done")
    assert all("; not requeued: " in each["message"] for each in lost)
    assert [text.rpartition("; ")[2] for text in told.messages] == ["try 2 of 2"] * len(lost)
    assert_whole_curve(cell, 2, 450)


@pytest.mark.parametrize("tell", [preempted_and_not_requeued, out_of_time_and_not_requeued])
def test_where_nothing_is_requeued_the_coordinator_submits_again(told: Ask, tell: Any) -> None:
    told(tell)


# -- cells that go wrong ---------------------------------------------------------------------------


@story
def out_of_memory_in_company(slurm: Cluster, runs: Path) -> None:
    plan, told = seeds(cluster_cells.HUNGRY, 5, 6, 7, steps=20), Told()
    price = Price(shape="one", together=2)
    found = completed(runs, plan, told, price=price, array_parallelism=1, sbatch={"exclude": "n1"})
    assert found.complete, "what did not fit in company fits alone"
    assert [len(each.attempts()) for each in cells(runs, plan)] == [2, 2, 1, 1]
    assert sorted(text.rpartition("; ")[2] for text in told.messages) == ["again, alone"] * 2
    assert_whole_curve(cells(runs, plan)[1], 5, 20)


def test_cells_that_ran_out_of_memory_together_are_tried_alone(told: Ask) -> None:
    told(out_of_memory_in_company)


@story
def failed_alike(slurm: Cluster, runs: Path) -> None:
    n, alike = 12, 2
    bad = [{"seed": cluster_cells.RAISES, "hparams.lr": 0.01 * (number + 1)} for number in range(n)]
    plan, told = grid(*bad, steps=6), Told()
    found = completed(runs, plan, told, array_parallelism=1, alike=alike, sbatch={"exclude": "n1"})
    slurm.wait_for(lambda: not queued(slurm, runs / "slurm"))
    n_tried = found.counts["failed"]
    assert alike <= n_tried < n
    assert found.held == n - n_tried
    # one that was about to begin may have done so, and saved
    assert found.counts["missing"] + found.counts.get("cancelled", 0) == found.held
    (said,) = told.messages
    assert re.search(rf"the first {alike} cells all failed alike, so \d+ cells held back. failed: RuntimeError", said)
    assert "(see " in said


def test_when_the_first_fail_alike_what_waits_in_the_queue_is_withdrawn(told: Ask) -> None:
    told(failed_alike)


# -- people, and coordinators that are jobs --------------------------------------------------------

CELL = (
    *("model.d_head=8", "model.context_tokens=16", "base.width=16", "train.batch_seqs=2", "train.eval_seqs=2"),
    *("runtime.device=cpu", "runtime.cohort=1", "launcher=dev_cluster", "launcher.sbatch.exclude=n1"),
)
FOLLOW = (
    *("run", "experiment.name=t", "experiment.axes.seed=[0,1]", "train.steps=100000", "model.width=16"),
    *(*CELL, "launcher.wait=true"),
)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "supar_sweep", *words]


class OnATerminal:
    """A command as a person types it, on a terminal of its own.

    Args:
        folder: where.
        words: the command's.
    """

    def __init__(self, folder: Path, *words: str) -> None:
        self._terminal, its_end = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command(*words)], cwd=folder, stdin=its_end, stdout=its_end, stderr=its_end
        )
        os.close(its_end)
        self.shown = ""
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # Linux's way to say that nobody has it open any more
            while True:
                self.shown += os.read(self._terminal, 1 << 16).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._terminal)


def interrupted(slurm: Cluster, runs: Path, answer: str) -> list[str]:
    """Press Ctrl-C in a `run` that follows its jobs, answer its question, and see which of its jobs are in the queue then."""
    terminal = OnATerminal(runs, *FOLLOW)
    try:
        slurm.wait_for(lambda: list(runs.glob("runs/cells/*/*/attempts/*/metrics.jsonl")))
        slurm.wait_for(lambda: "0/2" in terminal.shown)
        terminal.type("\x03")
        slurm.wait_for(lambda: QUESTION in terminal.shown)
        time.sleep(ONE_PRESS_S)  # two presses, and not one that was passed on
        terminal.type(answer)
        terminal.process.wait(PATIENCE_S)
        slurm.wait_for(lambda: "interrupted; " in terminal.shown)
    finally:
        terminal.close()
    return queued(slurm, runs / "runs" / "slurm")


def queued(slurm: Cluster, arrays: Path) -> list[str]:
    """The elements in the queue that belong to a runs folder's arrays."""
    keys = {array.name for array in arrays.iterdir()}
    names = slurm.ask("squeue", "-h", "-r", "--format=%j").splitlines()
    return [name for name in names if name.removeprefix("supar-") in keys]


def follow(slurm: Cluster, runs: Path) -> subprocess.Popen[str]:
    """Start a `run` without a terminal that follows the jobs."""
    process = subprocess.Popen(command(*FOLLOW), cwd=runs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    slurm.wait_for(lambda: Experiment(runs / "runs", "t").runner() or process.poll() is not None)
    return process


@story
def left_to_themselves(slurm: Cluster, runs: Path) -> None:
    for answer in ("\n", "\x03"):
        assert len(interrupted(slurm, runs, answer)) == 2, "and the second `run` has followed the jobs of the first"
    process = follow(slurm, runs)
    process.terminate()
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == INTERRUPTED, said
    assert "2 cells go on in the queue" in said
    assert len(queued(slurm, runs / "runs" / "slurm")) == 2
    process = follow(slurm, runs)
    subprocess.run(command("cancel", "experiment.name=t"), cwd=runs, check=True, capture_output=True)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == INTERRUPTED, said
    slurm.wait_for(lambda: not queued(slurm, runs / "runs" / "slurm"))


@story
def cancelled_with_it(slurm: Cluster, runs: Path) -> None:
    interrupted(slurm, runs, "y\n")
    states = {cell_state(CellFolder(path)).state for path in (runs / "runs" / "cells").glob("*/*")}
    assert states <= {"cancelled", "missing"}
    assert "cancelled" in states


@pytest.mark.parametrize("tell", [left_to_themselves, cancelled_with_it])
def test_ctrl_c_asks_whether_the_jobs_are_to_end(told: Ask, tell: Any) -> None:
    told(tell)


N_TRIALS = 6


@story
def tuned(slurm: Cluster, runs: Path) -> None:
    """A coordinator is killed; the next one is itself a job, which is requeued."""
    words = (
        *("tune", "train.steps=20", "launcher.array_parallelism=2", *CELL, f"study.n_trials={N_TRIALS}"),
        *("study.confirm_top_k=1", "study.confirm_seeds=[7]"),
    )

    def done() -> int:
        return len(list(runs.glob("runs/cells/*/*/result.json")))

    first = subprocess.Popen(command(*words), cwd=runs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        slurm.wait_for(lambda: done() or first.poll() is not None)
    finally:
        first.kill()
        _, said = first.communicate()
    assert first.returncode == -signal.SIGKILL, said
    # memory by core: SLURM refuses a job that inherits it and asks for its own by node
    asks = (
        "--requeue",
        "--open-mode=append",
        "--cpus-per-task=2",
        "--mem-per-cpu=700M",
        f"--chdir={runs}",
        "--exclude=n1",
    )
    coordinator = slurm.batch(" ".join(f"'{word}'" for word in command(*words)), *asks)
    slurm.wait_for(lambda: done() >= 3)
    slurm.ask("scontrol", "requeue", coordinator)
    slurm.wait_for(lambda: slurm.field(coordinator, "Restarts") == "1")
    slurm.wait_for_state(coordinator, "PENDING")
    slurm.start_now(coordinator)
    slurm.wait_for_state(coordinator, "COMPLETED", "FAILED", "CANCELLED")
    output = (slurm.folder / f"{coordinator}_4294967294.out").read_text()
    assert slurm.field(coordinator, "JobState") == "COMPLETED", output
    assert (runs / "runs" / "studies" / "proxy" / "best.yaml").exists()
    trained = [CellFolder(path) for path in (runs / "runs" / "cells").glob("*/*")]
    assert len(trained) == N_TRIALS + 1
    for each in trained:
        assert cell_state(each).complete
        assert len(each.attempts()) == 1, "nobody trained it twice"
    journal = (runs / "runs" / "studies" / "proxy" / "journal.log").read_text().splitlines()
    tells = [json.loads(line) for line in journal if json.loads(line).get("values")]
    assert len(tells) == N_TRIALS


def test_a_tuner_may_be_killed_and_may_be_a_job(told: Ask) -> None:
    told(tuned)
