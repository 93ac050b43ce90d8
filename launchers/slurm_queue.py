"""SLURM's own commands, asked once for many arrays: sbatch, squeue, sacct, scancel, scontrol."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from supar_sweep.errors import ConfigError, SuparError

from .slurm_config import options_in
from .slurm_environment import commands_environment
from .slurm_submission import ANSWER_S, Submission, one_line
from .state import Report

IDS_A_CALL = 1000
DENIED = "permission denied"

PENDING_RANGE = re.compile(r"(\d+)_\[([\d,-]+)")


class Slurm:
    """The commands of the SLURM that this machine belongs to.

    Raises:
        ConfigError: they are not installed here.
    """

    def __init__(self) -> None:
        for command in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
            if shutil.which(command) is None:
                allowed = "a machine of the cluster; without one, launchers/dev_cluster.sh makes a small one"
                raise ConfigError(
                    "launcher", f"needs SLURM, and {command} is not on PATH", value="slurm", allowed=allowed
                )
        self._accounting: bool | None = None
        self._environment = commands_environment(os.environ)

    def _ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=ANSWER_S,
                env=self._environment,
                start_new_session=True,  # a terminal's Ctrl-C is ours alone: a squeue that it killed would have told of no job
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer in {ANSWER_S:g} s")

    def max_array_size(self) -> int:
        """Return one more than the highest index that an array may have.

        Raises:
            SuparError: the controller does not answer.
        """
        answer = self._ask("scontrol", "show", "config")
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
        if found is None:
            raise SuparError(f"scontrol does not tell MaxArraySize: {one_line(answer.stderr)}")
        return int(found[1])

    def options(self) -> set[str]:
        """Return the long options of this cluster's sbatch."""
        return options_in(self._ask("sbatch", "--help").stdout)

    def sbatch(self, script: Path) -> Submission:
        """Return an sbatch that is submitting the script."""
        return Submission(script, self._environment)

    def test_only(self, script: Path) -> str:
        """Return what sbatch says of the script without submitting it: when it would start and where, or why it cannot.

        Args:
            script: a batch script.
        """
        answer = self._ask("sbatch", "--test-only", str(script))
        return one_line(answer.stderr or answer.stdout)

    def queue(self, names: Iterable[str]) -> dict[str, Report] | None:
        """Return what the queue tells of each element, "<job id>_<index>", those that ended lately among them; None = the
        controller does not answer.

        Args:
            names: of the arrays. Asked by name, since the question fails as a whole where one id is forgotten.
        """
        fields = ("JobArrayID", "State", "Reason", "exit_code", "RestartCnt")
        form = ",".join(f"{field}:|" for field in fields)
        answer = self._ask("squeue", "-h", "-r", "-t", "all", f"--name={','.join(names)}", f"--Format={form}")
        if answer.returncode != 0:
            return None
        found = {}
        for line in answer.stdout.splitlines():
            element, state, reason, status, restarts, *_ = line.strip().split("|")
            code = os.waitstatus_to_exitcode(int(status)) if status.isdecimal() else 0
            found[element] = Report(state, reason, code, int(restarts) if restarts.isdecimal() else 0)
        return found

    def arrays(self, owners: Collection[int] = ()) -> dict[str, str] | None:
        """Return the job id of each array in the queue by name; None = the controller does not answer.

        Args:
            owners: user ids whose arrays are asked for; none = this user's.
        """
        users = ",".join(str(owner) for owner in sorted(owners)) or str(os.getuid())
        answer = self._ask("squeue", "-h", f"--user={users}", "--Format=ArrayJobID:|,Name:|")
        if answer.returncode != 0:
            return None
        rows = (line.strip().split("|") for line in answer.stdout.splitlines())
        return {name: job_id for job_id, name, *_ in rows}

    def accounts(self, job_ids: Sequence[str]) -> dict[str, Report]:
        """Return what the accounting tells of each element; {} where a site has none, or it does not answer.

        Args:
            job_ids: of the arrays.
        """
        if not job_ids or self._accounting is False or shutil.which("sacct") is None:
            return {}
        answer = self._ask("sacct", "-n", "-P", "-o", "JobID,State,ExitCode", "-j", ",".join(job_ids))
        if answer.returncode != 0:
            if "disabled" in answer.stderr:
                self._accounting = False
            return {}
        return read_accounts(answer.stdout)

    def cancel(self, ids: Sequence[str], *, now: bool) -> list[str]:
        """End arrays or elements: asked first, and killed after the cluster's KillWait; `now`: killed. Return a line for each
        that belongs to somebody else, and goes on.
        """
        denied = []
        for start in range(0, len(ids), IDS_A_CALL):
            some = ids[start : start + IDS_A_CALL]
            if now:
                self._ask("scancel", "--full", "--signal=KILL", *some)
            answer = self._ask("scancel", *some)
            denied += [one_line(line) for line in answer.stderr.splitlines() if DENIED in line]
        return denied

    def release(self, element: str) -> None:
        """Let an element go that SLURM holds."""
        self._ask("scontrol", "release", element)

    def cancel_name(self, name: str) -> None:
        """End whatever array has the name, should there be one."""
        self._ask("scancel", "--me", f"--name={name}")


def read_accounts(text: str) -> dict[str, Report]:
    """Return the report on each element in sacct's JobID|State|ExitCode rows. An element whose step ran out of memory did.

    >>> read_accounts("7_0|FAILED|9:0\\n7_0.0|OUT_OF_MEMORY|0:125\\n7_[1-2%4]|CANCELLED by 0|0:0\\n")["7_2"].state
    'CANCELLED'
    """
    found: dict[str, Report] = {}
    for line in text.splitlines():
        job, state, exit_code = line.split("|")
        element, _, step = job.partition(".")
        state = state.split(" ")[0]
        code, _, by_signal = exit_code.partition(":")
        for each in _elements(element):
            if not step:
                found[each] = Report(state, "", -int(by_signal) if by_signal not in ("", "0") else int(code))
            elif state.startswith("OUT_OF_ME"):
                found[each] = found.get(each, Report(state))._replace(state="OUT_OF_MEMORY")
    return found


def _elements(job: str) -> list[str]:
    """Return the elements that sacct means by 7_3, or by 7_[0-2,5%4] for those still pending."""
    pending = PENDING_RANGE.match(job)
    if pending is None:
        return [job]
    found = []
    for part in pending[2].split(","):
        first, _, last = part.partition("-")
        found += [f"{pending[1]}_{index}" for index in range(int(first), int(last or first) + 1)]
    return found


def environment_of_job(variables: Mapping[str, str]) -> list[str]:
    """Return the shell lines that set variables of a job."""
    quoted = {name: "'" + value.replace("'", "'\\''") + "'" for name, value in variables.items()}
    return [f"export {name}={value}" for name, value in quoted.items()]
