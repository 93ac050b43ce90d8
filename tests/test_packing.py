"""Several processes in one element: real ones, really killed. SLURM is not there: its variables are, as an element sees them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launchers.local import search_path
from supar_sweep.sweep.arrays import ArrayFolder, own_record
from supar_sweep.sweep.jobs import folder_of
from supar_sweep.sweep.records import Attempt
from supar_sweep.sweep.status import cell_state
from supar_sweep.training.packing import kernel_limit_gb, kernel_ooms, memory_gb
from supar_sweep.training.slurm_job import LEFT, command
from tests import cluster_cells
from tests.clusters import PATIENCE_S
from tests.grids import alive, wait_for
from tests.test_launchers_slurm import assert_whole_curve, begun, job_of

ELEMENT = "7_0"
Groups = Sequence[Sequence[Mapping[str, Any]]]


def start(array: ArrayFolder, function: str = cluster_cells.RUN, **variables: str) -> subprocess.Popen[bytes]:
    """The element's process, printing where SLURM would have it print."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURMD_NODENAME": "here"}
    environment = {**os.environ, "PYTHONPATH": search_path(), **slurm, **variables}
    with array.log(ELEMENT).open("ab") as log:
        return subprocess.Popen(
            command(str(array.path), function, "600", "30", "1"), env=environment, stdout=log, stderr=log
        )


def array_of(runs: Path, groups: Groups) -> ArrayFolder:
    return ArrayFolder.new(runs / "slurm", [groups])


def end_of(job: Mapping[str, Any]) -> dict[str, Any]:
    return folder_of(job).last_end() or {}


def pid_of(job: Mapping[str, Any]) -> int:
    info = json.loads((folder_of(job).attempts()[-1] / "attempt.json").read_text())
    return int(info["pid"])


def test_what_one_process_does_no_other_notices(runs_dir: Path) -> None:
    seeds = (cluster_cells.RAISES, cluster_cells.EXITS, cluster_cells.KILLED)
    raises, exits, killed, *good = jobs = [job_of(runs_dir, seed) for seed in (*seeds, 0, 1, 2)]
    array = array_of(runs_dir, [[raises, good[0]], [exits], [killed], good[1:]])
    assert start(array).wait(PATIENCE_S) == 1
    assert [cell_state(folder_of(job)).state for job in jobs] == ["failed"] * 3 + ["done"] * 3
    for job in good:
        assert_whole_curve(job, 6)
    assert (end_of(raises)["message"], own_record(folder_of(raises), array.key).died) == (
        "RuntimeError: no luck",
        False,
    )
    for job, number, said in (
        (exits, 2, "exit code 3; its last words: leaving without"),
        (killed, 3, "signal 9 SIGKILL"),
    ):
        assert said in end_of(job)["message"]
        assert own_record(folder_of(job), array.key).died, "worth another try"
        assert str(array.log(ELEMENT, number)) in end_of(job)["message"]
    assert len({pid_of(job) for job in (raises, exits, killed, good[1])}) == 4
    assert pid_of(raises) == pid_of(good[0]), "a group is trained by one process"


def test_the_hungriest_is_ended_before_slurm_ends_them_all(runs_dir: Path) -> None:
    hungry, *others = [job_of(runs_dir, seed, steps=30) for seed in (cluster_cells.HUNGRY, 0, 1)]
    array = array_of(runs_dir, [[others[0]], [hungry], [others[1]]])
    assert kernel_limit_gb() > 0.5, "too small a machine"
    assert start(array, SLURM_MEM_PER_NODE="400").wait(PATIENCE_S) == 1
    assert [cell_state(folder_of(job)).state for job in (hungry, *others)] == ["oom", "done", "done"]
    assert "GB of the 0.42 GB that the element's 3 processes share" in end_of(hungry)["message"]
    assert not own_record(folder_of(hungry), array.key).died


@pytest.mark.parametrize(("number", "asks"), [(signal.SIGUSR2, 1), (signal.SIGTERM, 0)])
def test_a_signal_reaches_all_one_asks_for_a_requeue_and_a_new_start_goes_on(
    runs_dir: Path, number: int, asks: int
) -> None:
    jobs = [job_of(runs_dir, seed, steps=100) for seed in range(3)]
    array = array_of(runs_dir, [[job] for job in jobs])
    element = start(array)
    wait_for(lambda: all(begun(job, steps=2) for job in jobs))
    element.send_signal(number)
    assert element.wait(PATIENCE_S) == LEFT
    done_steps = [len(folder_of(job).metrics()) for job in jobs]
    assert all(2 <= steps < 100 for steps in done_steps)
    assert [end_of(job)["end"] for job in jobs] == ["cancelled"] * 3
    # nobody is there to be asked: the refusal tells that one asked, and which
    logs = [array.log(ELEMENT, process).read_text() for process in range(4)]
    assert [log.count("not requeued: ") for log in logs] == [asks, 0, 0, 0]
    assert start(array, SLURM_RESTART_COUNT="1").wait(PATIENCE_S) == 0
    for job in jobs:
        assert_whole_curve(job, 100)
        assert [int(path.name) for path in folder_of(job).attempts()] == [1, 2]


def test_a_new_start_leaves_alone_what_has_ended(runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed) for seed in (cluster_cells.RAISES, 0)]
    array = array_of(runs_dir, [[job] for job in jobs])
    for restart in ("0", "1"):
        assert start(array, SLURM_RESTART_COUNT=restart).wait(PATIENCE_S) == 1
    assert [len(folder_of(job).attempts()) for job in jobs] == [1, 1]


def test_they_do_not_outlive_the_elements_process(runs_dir: Path) -> None:
    jobs = [job_of(runs_dir, seed, steps=1000) for seed in range(2)]
    element = start(array_of(runs_dir, [[job] for job in jobs]))
    wait_for(lambda: all(begun(job) for job in jobs))
    element.kill()
    element.wait()
    wait_for(lambda: not any(alive(pid_of(job)) for job in jobs))
    assert [cell_state(folder_of(job)).state for job in jobs] == ["cancelled"] * 2


def tell_surroundings(
    jobs: Sequence[Mapping[str, Any]], *, should_stop: Callable[[], Any], ended: Callable[[str, str, str], None]
) -> None:
    """Publish where a process is."""
    tmpdir = os.environ["TMPDIR"]
    Path(tmpdir, "mine").touch(exist_ok=False)
    for job in jobs:
        with Attempt(folder_of(job), job["cell"], {"provenance": job["provenance"]}) as attempt:
            attempt.begin(0)
            here = {"tmpdir": tmpdir, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "torch": "torch" in sys.modules}
            attempt.publish({"end": "done", "summary": {}, "here": here}, keep_checkpoints=False)
        ended(job["cell_id"], "done", "")


@pytest.mark.parametrize(("gpus", "seen"), [("3,5", ["3", "5", "3", "5"]), (None, [None] * 4)])
def test_each_has_a_tmpdir_and_a_gpu_of_its_own(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, gpus: str | None, seen: list[str | None]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [job_of(runs_dir, seed) for seed in range(4)]
    array = array_of(runs_dir, [[job] for job in jobs])
    given = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    assert start(array, f"{__name__}:{tell_surroundings.__name__}", **given).wait(PATIENCE_S) == 0
    results = [folder_of(job).result() or {} for job in jobs]
    assert [result["here"]["gpu"] for result in results] == seen
    folders = {result["here"]["tmpdir"] for result in results}
    assert len(folders) == 4
    assert not any(Path(folder).exists() for folder in folders), "swept up"
    assert [result["provenance"]["slurm"]["process"] for result in results] == [1, 2, 3, 4]
    on_gpu = 4 // len(gpus.split(",")) if gpus else 1
    assert [result["provenance"]["slurm"]["on_gpu"] for result in results] == [on_gpu] * 4


@pytest.mark.parametrize(
    ("groups", "files", "limit_gb", "killed"),
    [
        ("", {}, math.inf, 0),
        (
            "0::/slurm/job/task\n",
            {
                **{"slurm/job/task/memory.max": "max\n", "slurm/job/task/memory.events": "low 0\noom 4\noom_kill 2\n"},
                **{"slurm/job/memory.max": "4000000000\n", "slurm/memory.max": "9000000000\n"},
            },
            4.0,
            2,
        ),
        (
            "9:name=systemd:/\n4:memory:/job\n0::/\n",
            {
                "memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
                **{"memory/job/memory.limit_in_bytes": "2000000000\n", "memory.max": "1\n"},
            },
            2.0,
            3,
        ),
    ],
)
def test_what_the_kernel_says_of_memory(
    tmp_path: Path, groups: str, files: Mapping[str, str], limit_gb: float, killed: int
) -> None:
    list_of_groups = tmp_path / "groups"
    list_of_groups.write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kernel_limit_gb(list_of_groups, tmp_path) == limit_gb
    assert kernel_ooms(list_of_groups, tmp_path) == killed


def test_memory_is_what_a_process_holds() -> None:
    before_gb = memory_gb(os.getpid())
    held = b"x" * 200_000_000
    assert memory_gb(os.getpid()) - before_gb == pytest.approx(len(held) / 1e9, abs=0.05)
    assert memory_gb(2**22 + 1) == 0.0
