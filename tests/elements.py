"""Elements of an array without a SLURM: real processes of `slurm_job`, in the environment that srun would give them."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from supar_sweep.sweep.arrays import ArrayFolder
from supar_sweep.training.worker import RUN_CELLS

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    runs: Path,
    jobs: Sequence[Mapping[str, Any]],
    *,
    tasks: int,
    function: str = RUN_CELLS,
    mute: Collection[int] = (),
) -> list[subprocess.Popen[str]]:
    """Start the tasks of an element that trains these jobs, and return their processes, by rank.

    Args:
        runs: the runs folder.
        jobs: of the element.
        tasks: how many.
        function: what each calls with the jobs.
        mute: ranks that cannot write a file of more than PROBE_BYTES: the system does not let them.
    """
    array = ArrayFolder.new(runs / "slurm", [[jobs]])
    command = [sys.executable, "-m", "supar_sweep.training.slurm_job", str(array.path), function, "3600", "60"]
    slurm = {
        **{"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0"},
        **{"SLURM_NTASKS": str(tasks), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"},
        **{"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    environment = {**os.environ, **slurm, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [*command, str(tasks)],
            env={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=no_file_grows if rank in mute else None,
        )
        for rank in range(tasks)
    ]


PROBE_BYTES = 8
"""Python writes four bytes to find a folder for temporary files."""


def no_file_grows() -> None:
    """Have every write to a file fail; pipes and sockets are none."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (PROBE_BYTES, PROBE_BYTES))


def wait(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 300) -> tuple[list[int], list[str]]:
    """Wait for the end of all, and return their exit codes and what they printed."""
    try:
        printed = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed
