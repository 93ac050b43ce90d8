"""Variants in processes of their own that take turns: each has its environment, allocator and memory to itself, and a machine
that drifts hits all of them alike.

    python -m benchmarks.turns      such a process: commands and answers are JSON lines on stdin and stdout

    {"build": {variant, cell, place}} -> {facts}
    {"steps": n}                      -> {"step_s": seconds a step and model}
    {"memory": true}                  -> {"peak_bytes", "state_bytes"}, a model
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from benchmarks.variants import VARIANTS, Place, Running
from supar_sweep.config.schema import CellConfig

TURN_S = 0.1
"""Shorter steps are taken several at a time: what the others left in the caches is no part of the result."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        budget_s: time for all turns of a set of variants, within these bounds.
        min_rounds, max_rounds: turns of each.
    """

    budget_s: float
    min_rounds: int
    max_rounds: int


class Turns:
    """Processes of some variants of one cell, waiting for their turns.

    Args:
        names: of VARIANTS.
        plain_cell: the cell as plain values.
    """

    def __init__(self, names: Sequence[str], plain_cell: Mapping[str, Any]) -> None:
        self.plain_cell, self._open = plain_cell, contextlib.ExitStack()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._working: list[str] = []
        for name in names:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.turns"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**plain_environment(), **VARIANTS[name].env},
                text=True,
            )
            self._processes[name] = self._open.enter_context(process)
            assert process.stdin is not None
            self._open.callback(process.stdin.close)
        for name in names:
            self._read(name)  # imported

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def build(self, place: Place) -> dict[str, dict[str, Any]]:
        """Return each variant's facts, built one after another: what is measured for `auto` must be undisturbed.

        A variant that cannot be had here (its facts say why, under "failed") takes no turns.
        """
        facts = {
            name: self._ask(name, build={"variant": name, "cell": self.plain_cell, "place": asdict(place)})
            for name in self._processes
        }
        self._working = [name for name, known in facts.items() if "failed" not in known]
        return facts

    def measure(self, effort: Effort) -> tuple[dict[str, float], int]:
        """Return each variant's median seconds a step and model, and the number of rounds."""
        n_steps = dict.fromkeys(self._working, 1)
        for _ in range(2):  # the first step makes the moments, the second, where it takes no minutes, warms up
            begun_s = time.perf_counter()
            first = {name: self._steps(name, 1) for name in self._working}
            round_s = time.perf_counter() - begun_s
            if round_s * effort.min_rounds > effort.budget_s:
                break
        for name, step_s in first.items():
            n_steps[name] = max(1, round(TURN_S / step_s))
            round_s += (n_steps[name] - 1) * step_s
        n_rounds = max(effort.min_rounds, min(effort.max_rounds, int(effort.budget_s / round_s)))
        times: dict[str, list[float]] = {name: [] for name in self._working}
        for _ in range(n_rounds):
            for name, seen in times.items():
                seen.append(self._steps(name, n_steps[name]))
        return {name: statistics.median(seen) for name, seen in times.items()}, n_rounds

    def memory(self) -> dict[str, dict[str, int]]:
        """Return each variant's peak_bytes (over the import's) and state_bytes (of the sparse layers), a model."""
        return {name: self._ask(name, memory=True) for name in self._working}

    def _steps(self, name: str, n: int) -> float:
        return float(self._ask(name, steps=n)["step_s"])

    def _ask(self, name: str, **command: Any) -> dict[str, Any]:
        pipe = self._processes[name].stdin
        assert pipe is not None
        pipe.write(json.dumps(command) + "\n")
        pipe.flush()
        return self._read(name)

    def _read(self, name: str) -> dict[str, Any]:
        pipe = self._processes[name].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise RuntimeError(
                f"the process of {name} ended with {self._processes[name].wait()}; its error stands above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def plain_environment() -> dict[str, str]:
    """Return this process's environment without what sets threads: each variant sets its own."""
    ours = ("OMP_", "MKL_", "KMP_", "OPENBLAS_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


# ---------------------------------------------------------------- in the process


def serve(lines: Iterator[str], out: IO[str]) -> None:
    """Answer commands until there are no more."""
    import torch

    from benchmarks.machine import resident_bytes
    from supar_sweep.config.decode import decode

    importlib.import_module("torch._dynamo")  # the first optimizer would import it
    import_bytes = resident_bytes(peak=False)
    running: Running | None = None
    place: Place | None = None
    _answer(out, {})
    for line in lines:
        command = json.loads(line)
        if asked := command.get("build"):
            running = None  # its memory goes before the next one takes its place
            place = Place(**asked["place"])
            try:
                running = VARIANTS[asked["variant"]].build(decode(CellConfig, asked["cell"]), place)
            except (RuntimeError, NotImplementedError) as problem:  # an operator that this device lacks
                _answer(out, {"failed": str(problem).partition("\n")[0]})
            else:
                _answer(out, {**running.facts, "n_models": running.n_models})
            continue
        assert running is not None
        assert place is not None
        if n := command.get("steps"):
            begun_s = time.perf_counter()
            for _ in range(n):
                loss = running.step()
                if place.device == "cpu":
                    float(loss.mean())
            if place.device == "cuda":
                torch.cuda.synchronize()
            _answer(out, {"step_s": (time.perf_counter() - begun_s) / n / running.n_models})
        else:
            peak = resident_bytes(peak=True) - import_bytes
            if place.device == "cuda":
                peak = torch.cuda.max_memory_allocated()
            state = running.state_bytes()
            _answer(out, {"peak_bytes": peak // running.n_models, "state_bytes": state})


def _answer(out: IO[str], value: Mapping[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
