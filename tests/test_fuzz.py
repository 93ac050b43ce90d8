"""Every key of every command with values that make no sense: a clear error, or a plan that makes sense; never a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.training.cost import count_parameters, flops_per_step, memory_gb
from tests.fuzz_words import Line, lines

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[Line], dict[str, Any]]
TINY = (
    *("model.width=16", "model.d_head=8", "model.context_tokens=8", "model.n_layer=1", "base.width=16"),
    *("train.steps=2", "train.batch_seqs=1", "train.eval_seqs=1", "launcher.processes=1"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a command line under bounds of memory and CPU, in a folder that has the records of one cell."""
    folder = tmp_path_factory.mktemp("records")
    one = [sys.executable, "-m", "supar_sweep", "run", *TINY, f"runs_dir={folder / 'runs'}"]
    subprocess.run(one, cwd=ROOT, check=True, capture_output=True, timeout=300)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz_server", str(folder / "runs")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(line: Line) -> dict[str, Any]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(line.words) + "\n")
        server.stdin.flush()
        return dict(json.loads(server.stdout.readline()))

    yield ask
    server.stdin.close()
    server.wait(timeout=60)
    server.stdout.close()


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(line=lines())
def test_whatever_is_typed_is_refused_by_name_or_makes_sense(run: Run, line: Line) -> None:
    assert wrong_with(line, run(line)) is None


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
@given(line=lines())
def test_and_so_in_many_more_cases(run: Run, line: Line) -> None:
    assert wrong_with(line, run(line)) is None


def wrong_with(line: Line, answer: dict[str, Any]) -> str | None:
    """Return what is wrong with an answer, None = nothing."""
    code, out, err = answer["code"], answer["out"], answer["err"]
    if answer["ended_by"]:
        return f"ended by signal {answer['ended_by']} after {answer['cpu_s']:.1f} s of CPU"
    if "Traceback" in err or code is None:
        return f"a traceback: {err.strip().splitlines()[-1] if err.strip() else ''}"
    if "Warning:" in err:
        return f"a warning of Python's: {err}"
    if code == 2:
        return wrong_refusal(line, out, err)
    if code != 0:
        return f"exit {code}: {err}"
    try:
        for job in answer["began"] or []:
            check_cell(job["cell"])
        if answer["began"] is None:
            check_output(line, out)
    except (AssertionError, ValueError) as error:
        return f"makes no sense: {error}"
    return None


def wrong_refusal(line: Line, out: str, err: str) -> str | None:
    if out:
        return f"something on stdout before the error: {out[:200]}"
    said = err[err.rfind("supar-sweep: ") :]
    if not said.startswith("supar-sweep: "):
        return f"no error: {err}"
    if twice := re.search(r"^supar-sweep: (\S+): .*did you mean '\1'\?", said):
        return f"contradicts itself: {twice[0]}"
    if any(text in said for text in ("experiment single is not running", "checkpoint: is not there")):
        return None  # not the fault of these words
    if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said) for word in line.wrong for name in names(word)):
        return f"names no key: {said}"
    return None


def names(word: str) -> list[str]:
    """Return by what an error may name a word: its key, the last part of it, the section; or the value, unless it is short."""
    key, _, value = word.lstrip("+~").partition("=")
    key, value = key.partition("@")[0], value.strip("'\"")
    parts = key.split(".")
    found = [key, parts[-1], parts[-2] if len(parts) > 1 else key, parts[0]]
    found += ["hparams"] if key == "hparams_file" else []  # hparams=FILE is its other spelling
    return [*found, value] if len(value) > 2 or key == "runs_dir" else found


def check_output(line: Line, out: str) -> None:
    """Raise AssertionError or ValueError where JSON is asked for and holds numbers that cannot be."""
    if line.words[0] == "plan" and out.startswith("{"):
        plan = json.loads(out, parse_constant=refuse)
        assert plan["cells"] >= 1
        for shape in plan["shapes"]:
            for name in ("parameters", "live", "memory_gb", "flops", "steps", "width", "n_layer", "density"):
                assert 0 < shape[name] < 1e60, (name, shape[name])
    elif line.words[0] == "transfer" and out.startswith("{"):
        found = json.loads(out, parse_constant=refuse)
        for role in found["roles"].values():
            assert 0 < role["lr"] < 1e38, role


def check_cell(plain: dict[str, Any]) -> None:
    cell = decode(CellConfig, plain)
    for number in (count_parameters(cell).live, flops_per_step(cell), memory_gb(cell)):
        assert 0 < number < 1e60, number


def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} in JSON")
