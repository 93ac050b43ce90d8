"""What a worker process sets up before it trains, and the facts of the machine that go into each
record.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import math
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

LAUNCH_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Set by whoever starts a worker, before torch is imported there: idle OpenMP threads must sleep,
not spin, on a shared machine.
"""

_OOM_TEXTS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc


def prepare_process(threads: int) -> bool:
    """Set the process up for training; return whether the allocator could be tuned.

    glibc maps every block above 32 MB anew and gives it back at each step; keeping freed memory
    saves 20 to 50% of such steps. Only for processes that do nothing but train, since the memory
    stays with them. Other C libraries are left as they are. torch's first optimizer imports
    torch._dynamo, and what that import leaves behind holds the optimizer, so a worker's first model
    would stay in (GPU) memory beside its second: it is imported here instead.

    Args:
        threads: torch threads, >= 1.
    """
    import torch

    importlib.import_module("torch._dynamo")
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    return all(mallopt(option, value) == 1 for option, value in settings.items())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out.

    torch.OutOfMemoryError is its GPU allocator's; the CPU's, the CUDA driver's (no room for one more process) and cuBLAS's are
    plain RuntimeErrors.

    Args:
        error: of a training step.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(text in str(error) for text in _OOM_TEXTS)


def memory_of_machine_gb() -> float:
    """Return the memory that is free on this machine now, in units of 1e9 bytes; infinite where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e9
    except (OSError, ValueError):
        pass
    return math.inf


def visible_gpus() -> dict[str, float]:
    """Return the GPUs that processes started from here may use: name for CUDA_VISIBLE_DEVICES -> memory in units of 1e9 bytes.

    Asks the driver's nvidia-smi, not torch; {} where that is missing.
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    found: dict[str, float] = {}
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines()]
        for index, uuid, mib in rows:
            found[index] = found[uuid] = float(mib) * 2**20 / 1e9
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [index for index, _, _ in rows] if visible is None else [name.strip() for name in visible.split(",")]
    return {name: found[name] for name in names if name in found}


def versions() -> dict[str, str]:
    """Return package -> version: Python's, and those of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("supar-sweep", "torch", "numpy"):
        try:
            found[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = "unknown"
    return found


def device_name(device: str) -> str:
    """Return the model of the device in words, such as the CPU's name.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def facts(device: str) -> dict[str, Any]:
    """Return host, device and versions, for a record. Imports torch.

    Args:
        device: "cpu" or "cuda".
    """
    import torch

    return {
        "host": socket.gethostname(),
        "device": device,
        "device_name": device_name(device),
        "versions": {**versions(), "torch": str(torch.__version__)},  # with its build: 2.13.0+cpu
    }
