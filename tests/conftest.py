"""What every test shares: markers and what they ask of the machine, threads, a runs folder.

Tests that need more than Python carry a marker of REQUIREMENTS. Where the machine lacks the thing,
they skip with a reason; if its name is in SUPAR_REQUIRE (`SUPAR_REQUIRE=slurm,browser`), that skip
is a failure, so a machine that is meant to have it cannot lose it silently.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

# Before torch or matplotlib is imported, here or in any process a test starts: one thread each,
# since pytest-xdist and the launchers already fill the cores, and no window.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ["MPLBACKEND"] = "Agg"

# The same examples on every run and machine, and no failure because a machine was slow.
hypothesis.settings.register_profile("supar", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("supar")


BASELINE = "55c68375e4c15678d19b3f70a21e06659a271c90"
"""The commit whose numbers the working tree must repeat bit for bit."""


class Requirement(NamedTuple):
    """What a marker asks of the machine: its name, and a check that says what is missing."""

    meaning: str
    missing: Callable[[], str | None]


def _no_slurm() -> str | None:
    return None if shutil.which("sinfo") else "no SLURM: sinfo is not on PATH"


def _no_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return None if any(map(shutil.which, names)) else f"no browser: none of {', '.join(names)}"


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"


def _no_root() -> str | None:
    return None if os.geteuid() == 0 else f"not root: effective user id {os.geteuid()}"


def _no_compiler() -> str | None:
    names = ("c++", "g++", "clang++")
    return None if any(map(shutil.which, names)) else f"no C++ compiler: none of {', '.join(names)}"


def _no_inductor() -> str | None:
    import torch

    spaced = " " in torch.__file__
    return _no_compiler() or ("torch.compile does not quote the path of torch, which has a space" if spaced else None)


def _no_history() -> str | None:
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        has_it = subprocess.run(["git", "-C", folder, "cat-file", "-e", f"{BASELINE}^{{commit}}"], capture_output=True)
    except OSError as error:
        return f"no git: {error.strerror}"
    return None if has_it.returncode == 0 else f"no commit {BASELINE[:7]}: not a git clone with all commits"


def _no_package(*names: str) -> str | None:
    missing = [name for name in names if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


REQUIREMENTS = {
    "slurm": Requirement("SLURM's packages, of which launchers/dev_cluster.sh makes a cluster", _no_slurm),
    "browser": Requirement("a Chromium or Chrome on PATH", _no_browser),
    "gpu": Requirement("a CUDA device that torch sees", _no_gpu),
    "root": Requirement("the superuser", _no_root),
    "history": Requirement("a git clone that holds the commit BASELINE", _no_history),
    "compiler": Requirement("a C++ compiler on PATH", _no_compiler),
    "inductor": Requirement("a C++ compiler, and torch under a path without a space", _no_inductor),
    "hf": Requirement(
        "transformers, tokenizers and safetensors", lambda: _no_package("transformers", "tokenizers", "safetensors")
    ),
    "lm_eval": Requirement(
        "lm-evaluation-harness, with transformers", lambda: _no_package("lm_eval", "transformers", "datasets")
    ),
}


@cache
def _missing(name: str) -> str | None:
    return REQUIREMENTS[name].missing()


def _required() -> set[str]:
    return {name.strip() for name in os.environ.get("SUPAR_REQUIRE", "").split(",")} - {""}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slow: more than a few seconds; `make slow` and `make cluster` run them, `make test` does not"
    )
    for name, requirement in REQUIREMENTS.items():
        config.addinivalue_line("markers", f"{name}: needs {requirement.meaning}")
    if unknown := sorted(_required() - REQUIREMENTS.keys()):
        raise pytest.UsageError(f"SUPAR_REQUIRE: unknown {', '.join(unknown)}; known: {', '.join(REQUIREMENTS)}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in REQUIREMENTS:
        if item.get_closest_marker(name) is not None and (reason := _missing(name)):
            if name in _required():
                pytest.fail(f"SUPAR_REQUIRE asks for {name}, but: {reason}", pytrace=False)
            pytest.skip(reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test that failed and is tried again (`make cluster`) leaves its failure in the log."""
    if str(report.outcome) == "rerun":  # a word of the plugin's own
        print(f"\n{report.longreprtext}\n")


def pytest_xdist_auto_num_workers() -> int:
    """At most eight: tests start worker processes of their own, each with a torch."""
    return min(8, len(os.sched_getaffinity(0)))


@pytest.fixture(params=["torch", pytest.param("kernel", marks=pytest.mark.compiler)])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes the compact layers: torch's operators, then the compiled kernel."""
    from supar_sweep.sparse import kernel

    if request.param == "kernel":
        choice = kernel.choose_kernel("cpu")
        assert choice.used, choice.reason
    else:
        monkeypatch.setattr(kernel, "_library", lambda: (None, "switched off by a test"))
    return str(request.param)


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """A folder for records that no other test sees; not created yet, as on a user's first call."""
    return tmp_path / "runs"
