"""How a worker's death is put into words, checked on processes that really die so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launchers.state import describe_exit


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os._exit(3)", "worker left with exit code 3"),
        ("pass", "worker left with exit code 0"),
        ("os.kill(os.getpid(), 9)", "worker killed by signal 9 SIGKILL (out of memory?)"),
        ("os.kill(os.getpid(), 11)", "worker killed by signal 11 SIGSEGV"),
        ("os.kill(os.getpid(), 40)", "worker killed by signal 40 unnamed"),
    ],
)
def test_each_death_has_its_words(code: str, said: str) -> None:
    died = subprocess.run([sys.executable, "-c", f"import os; {code}"])
    assert describe_exit(died.returncode) == said
