"""A real SLURM of a test's own (launchers/dev_cluster.sh), and what it is asked."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

SCRIPT = Path(__file__).resolve().parent.parent / "launchers" / "dev_cluster.sh"
PATIENCE_S = 300.0
"""What a machine with other work may take for what a quiet one does in seconds."""

PORTS = range(17100, 30000, 100)
"""First ports to choose from: below what the kernel gives out by itself, and not the script's own."""


def dev_cluster(command: str, **knobs: object) -> subprocess.CompletedProcess[str]:
    """Call the script; booleans as it spells them."""
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in knobs.items()]
    return subprocess.run([str(SCRIPT), command, *words], capture_output=True, text=True, timeout=600)


class Cluster:
    """A running dev cluster.

    Args:
        folder: its folder.
        port: the first of its ports.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.environment = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def ask(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM's answers: stdout, or with check=False both streams."""
        answer = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=120
        )
        assert not check or answer.returncode == 0, f"{' '.join(command)}: {answer.stderr}"
        return answer.stdout.strip() if check else answer.stdout + answer.stderr

    def batch(self, script: str, *options: str) -> str:
        """Submit a shell script, and return the job's id."""
        return self.ask("sbatch", "--parsable", f"--output={self.folder}/%A_%a.out", *options, f"--wrap={script}")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState; "" where SLURM has forgotten the job."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job, check=False)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")

    def start_now(self, *elements: str) -> None:
        """Cut the two minutes short that SLURM holds requeued elements for.

        It holds them because a node takes no credential as old as the one that it revoked at their end, and counts in whole
        seconds: an element that starts again in that same second is killed before it has begun.
        """
        time.sleep(1)
        for element in elements:
            self.ask("scontrol", "update", f"jobid={element}", "StartTime=now", check=False)

    def kill_node(self, node: str, *, with_jobs: bool) -> None:
        """Kill a node's daemon, and its jobs with it (power is gone) or not (the network is)."""
        daemons, steps, processes = [], [], []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (process / "cmdline").read_text().rstrip("\0").split("\0")
                environment = (process / "environ").read_text(errors="replace").split("\0")
                if f"SUPAR_DEV_CLUSTER={self.folder}" in environment and command[-2:] == ["-N", node]:
                    daemons.append(int(process.name))
                elif {f"SLURM_CONF={self.environment['SLURM_CONF']}", f"SLURMD_NODENAME={node}"} <= {*environment}:
                    processes.append(int(process.name))
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    steps += [parent] if "slurmstepd" in Path(f"/proc/{parent}/cmdline").read_text() else []
        assert daemons, f"{node} is not running"
        # the daemons first: they would tell of the others' end
        for pid in [*daemons, *(steps + processes if with_jobs else [])]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_controller(self) -> None:
        """Kill slurmctld, as a crash does."""
        os.kill(int((self.folder / "run" / "slurmctld.pid").read_text()), signal.SIGKILL)

    def start_controller(self) -> None:
        """Start slurmctld again, and wait until it answers."""
        self._start("slurmctld")
        self.wait_for(lambda: " is UP" in self.ask("scontrol", "ping", check=False))

    def start_node(self, node: str) -> None:
        """Start a node's daemon again."""
        self._start("slurmd", "-N", node)

    def _start(self, *daemon: str) -> None:
        marked = {**os.environ, **self.environment, "SUPAR_DEV_CLUSTER": str(self.folder)}
        subprocess.run(daemon, env=marked, check=True, capture_output=True)

    def wait_for(self, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        """Wait until the condition holds; show the queue where it never does."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, self.ask("squeue", "-t", "all") + self.ask("sinfo", "-N")
            time.sleep(0.1)

    def wait_for_state(self, job: str, *states: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the job is in one of the states."""
        self.wait_for(lambda: self.field(job, "JobState") in states, timeout_s)


def free_ports(n: int = 40) -> int:
    """The first of so many ports that nobody listens at: several suites may run on one machine."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError):
            for each in range(port, port + n):
                with socket.create_server(("127.0.0.1", each)):
                    pass
            return port
    raise AssertionError(f"no {n} ports on end are free in {PORTS}")


@contextmanager
def cluster(**knobs: object) -> Iterator[Cluster]:
    """A cluster of the knobs, brought down at the end."""
    with TemporaryDirectory(prefix="supar-slurm-") as parent:
        Path(parent).chmod(0o755)  # munged wants every folder above its socket to be passable
        folder = Path(parent) / "c"
        port = free_ports()
        up = dev_cluster("up", folder=folder, port=port, **knobs)
        assert up.returncode == 0, up.stderr
        try:
            yield Cluster(folder, port)
        finally:
            down = dev_cluster("down", folder=folder)
            assert down.returncode == 0, down.stderr
