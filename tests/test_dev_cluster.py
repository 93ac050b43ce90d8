"""The throw-away SLURM does what a cluster does: GPUs, arrays, memory limits, preemption; and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import Cluster, cluster, dev_cluster
from tests.grids import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

MAX_ARRAY_SIZE = 11


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(nodes=2, gpus=2, mem_mb=2000, max_array_size=MAX_ARRAY_SIZE, grace_s=3) as made:
        yield made


def processes_of(folder: Path) -> list[str]:
    """The command lines of living processes that name the folder in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (process / "environ").read_text(errors="replace") and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_every_node_is_idle_when_up_returns(slurm: Cluster) -> None:
    assert slurm.ask("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T").splitlines() == ["n1 idle", "n2 idle"]


def test_jobs_share_a_node_with_a_fake_gpu_each(slurm: Cluster) -> None:
    script = "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES; sleep 2"
    jobs = [slurm.batch(script, "--gpus-per-node=1", "--nodelist=n1", "--mem=64M") for _ in range(3)]
    for job in jobs:
        slurm.wait_for_state(job, "COMPLETED")
    told = [next(slurm.folder.glob(f"{job}_*.out")).read_text().split() for job in jobs]
    assert [node for node, _ in told] == ["n1"] * 3
    assert {gpu for _, gpu in told[:2]} == {"0", "1"}, "the first two run side by side"


def test_an_array_runs_up_to_the_highest_index(slurm: Cluster) -> None:
    job = slurm.batch("echo $SLURM_ARRAY_TASK_ID", f"--array=0-{MAX_ARRAY_SIZE - 1}", "--mem=64M", "--wait")
    said = sorted(int(path.read_text()) for path in slurm.folder.glob(f"{job}_*.out"))
    assert said == list(range(MAX_ARRAY_SIZE))
    refused = slurm.ask("sbatch", f"--array={MAX_ARRAY_SIZE}", "--wrap=true", check=False)
    assert "Invalid job array specification" in refused


def test_memory_is_enforced(slurm: Cluster) -> None:
    def take(megabytes: int) -> str:
        code = f"import time; kept = b'x' * ({megabytes} << 20); time.sleep(6); print(len(kept))"
        return slurm.batch(f'srun {shlex.quote(sys.executable)} -c "{code}"', "--mem=200M")

    small, large = take(20), take(500)
    slurm.wait_for_state(small, "COMPLETED")
    slurm.wait_for_state(large, "FAILED", "OUT_OF_MEMORY")
    assert "xceeded memory limit" in next(slurm.folder.glob(f"{large}_*.out")).read_text()


def test_ends_are_accounted(slurm: Cluster) -> None:
    def state(job: str) -> str:
        return slurm.ask("sacct", "-n", "-X", "-P", "-o", "State,ExitCode", "-j", job)

    good, bad = slurm.batch("true"), slurm.batch("exit 3")
    slurm.wait_for(lambda: state(good) == "COMPLETED|0:0")
    slurm.wait_for(lambda: state(bad) == "FAILED|3:0")


def test_the_urgent_partition_preempts_and_the_job_is_requeued(slurm: Cluster) -> None:
    hears = "trap 'echo asked to stop' TERM; while true; do sleep 0.2; done"
    slow = slurm.batch(f'srun bash -c "{hears}"', "--nodelist=n1", "--exclusive", "--open-mode=append")
    slurm.wait_for_state(slow, "RUNNING")
    slurm.wait_for(lambda: slurm.field(slow, "RunTime") > "00:00:00")
    urgent = slurm.batch("sleep 1", "-p", "urgent", "--nodelist=n1", "--exclusive")
    slurm.wait_for(lambda: slurm.field(slow, "Restarts") == "1")
    slurm.wait_for_state(urgent, "COMPLETED")
    assert "asked to stop" in next(slurm.folder.glob(f"{slow}_*.out")).read_text()
    slurm.ask("scancel", slow)


def test_the_cancelling_partition_does_not_requeue(slurm: Cluster) -> None:
    slow = slurm.batch("sleep 100", "-p", "cancelling", "--nodelist=n2", "--exclusive")
    slurm.wait_for_state(slow, "RUNNING")
    slurm.batch("sleep 1", "-p", "urgent", "--nodelist=n2", "--exclusive")
    slurm.wait_for_state(slow, "PREEMPTED")
    assert slurm.field(slow, "Restarts") == "0"


def test_one_cluster_a_machine_and_the_other_is_named(slurm: Cluster, tmp_path: Path) -> None:
    second = dev_cluster("up", folder=tmp_path / "second", port=slurm.port)
    assert second.returncode == 1
    assert re.search(rf"one runs in .*{slurm.folder}", second.stderr)
    assert not (tmp_path / "second").exists()
    other_knobs = dev_cluster("up", folder=slurm.folder, nodes=5)
    assert other_knobs.returncode == 1
    assert "already up" in other_knobs.stderr


def test_down_ends_jobs_daemons_and_folder() -> None:
    with cluster(accounting=False, nodes=1) as made:
        folder = made.folder
        assert "sacct" not in made.ask("sinfo")
        assert "accounting storage is disabled" in made.ask("sacct", check=False)
        stubborn = "trap '' TERM; setsid sleep 1000 & while true; do sleep 0.2; done"
        job = made.batch(f'srun bash -c "{stubborn}"')
        made.wait_for_state(job, "RUNNING")
        wait_for(lambda: any("sleep 1000" in line for line in processes_of(folder)))
        assert dev_cluster("status", folder=folder).returncode == 0
        down = dev_cluster("down", folder=folder)
        assert down.returncode == 0, down.stderr
        assert not folder.exists()
        assert processes_of(folder) == []
        assert dev_cluster("status", folder=folder).returncode == 3


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for command in ("up", "down"):
        refused = dev_cluster(command, folder=tmp_path)
        assert refused.returncode == 1
        assert str(tmp_path) in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("knob", "value", "said"),
    [
        ("node", 2, "no such knob: node=2; knobs: .*nodes"),
        ("nodes", "two", "nodes=two: must be a whole number"),
        ("accounting", "yes", "accounting=yes: must be true or false"),
        ("max_job_count", 1, "max_job_count=1: must be at least 2"),
        ("folder", "/x/" + "y" * 90, "longer than the 80 characters"),
    ],
)
def test_a_wrong_knob_is_an_error_before_anything_starts(knob: str, value: object, said: str) -> None:
    refused = dev_cluster("up", **{knob: value})
    assert refused.returncode == 1
    assert re.search(said, refused.stderr)
