"""What this machine is and can: its facts, the peak of its matmul, its memory's speed, a process's memory."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from supar_sweep.sparse.route import choose_route, onednn_linear
from supar_sweep.training.environment import facts

MIB = 2**20


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """Return the machine and the versions, for a results file; no host name.

    Args:
        device: "cpu" or "cuda".
    """
    known = facts(device)
    return {
        "device": known["device_name"],
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": known["versions"],
    }


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def interleaved_s(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each step's median seconds, the steps taken in turn so that a drifting machine hits all; the first round warms up.

    Args:
        steps: name -> what to time.
        rounds: timed rounds, >= 1.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begun_s = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begun_s)
    return {name: statistics.median(seen[1:]) for name, seen in times.items()}


def best_s(step: Callable[[], object], rounds: int = 7) -> float:
    """Return the shortest of some rounds, in seconds."""
    seen = []
    for _ in range(rounds + 1):
        begun_s = time.perf_counter()
        step()
        seen.append(time.perf_counter() - begun_s)
    return min(seen[1:])


@lru_cache(maxsize=8)
def peak_flops(threads: int) -> float:
    """Return the FLOP/s of a large fp32 matmul on this CPU, on the faster of the routes that a run may choose.

    Args:
        threads: torch threads; they are set.
    """
    torch.set_num_threads(threads)
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(a, b)]
    if choose_route("cpu").route == "onednn":
        products.append(lambda: onednn_linear(a, b, None))
    with torch.no_grad():
        return max(2 * n**3 / best_s(product) for product in products)


@lru_cache(maxsize=64)
def bytes_per_s(n_bytes: int, threads: int) -> float:
    """Return the bytes read and written a second when n_bytes are copied again and again: memory's speed, or a cache's.

    Args:
        n_bytes: source and target together, >= 2^16.
        threads: torch threads; they are set.
    """
    torch.set_num_threads(threads)
    n = n_bytes // 8
    source, target = torch.ones(n), torch.zeros(n)
    repeats = max(1, 2**28 // n_bytes)

    def copies() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return repeats * 8 * n / best_s(copies)


def resident_bytes(peak: bool) -> int:
    """Return the resident memory of this process, now or at its highest. Linux only.

    Args:
        peak: the high-water mark.
    """
    wanted = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(wanted):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {wanted} in /proc/self/status")
