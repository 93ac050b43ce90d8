"""Compiles kernel.cpp once for each compiler and CPU, into the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")

COMPILERS = ("c++", "g++", "clang++")
"""Looked for on PATH, in turn, where the environment names no CXX."""

BUILD_LIMIT_S = 60.0
"""The build takes two seconds, more where many workers start at once."""

_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fno-exceptions", "-fno-rtti")
# tuned for this CPU: what x86 calls -march, ARM calls -mcpu; a compiler that knows neither builds for any
_TUNINGS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())


class BuildError(Exception):
    """The kernel cannot be had here; the text says why in one line."""


class _TookTooLong(BuildError):
    pass


def built_kernel() -> tuple[Path, str]:
    """Return the compiled kernel's file, built if the cache does not hold it yet, and the compiler in words.

    Several processes may build at once: each writes a file of its own and renames it, and the last one wins.

    Raises:
        BuildError: there is no compiler, no folder to write to, or the build fails or takes too long.
    """
    compiler = _compiler()
    try:
        version = _output([*compiler, "--version"], 10.0).partition("\n")[0].strip()
        key = hashlib.sha256()
        for part in (SOURCE.read_text(encoding="utf-8"), version, *_FLAGS, platform.machine(), _cpu()):
            key.update(part.encode() + b"\0")
        folder, stem = _cache_folder(), f"kernel-{key.hexdigest()[:24]}"
        return _cached(folder, stem) or _build(compiler, folder, stem), version
    except OSError as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise BuildError(f"no C++ compiler: no {' or '.join(named[:1] or COMPILERS)} on PATH")


def _cache_folder() -> Path:
    """Return the folder of the built kernels, made if need be.

    Raises:
        BuildError: there is no home folder, or others could plant a library in it.
        OSError: it cannot be made.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "supar-sweep"
    except RuntimeError as error:
        raise BuildError(f"no cache folder: {error}") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    seen = folder.stat()
    if seen.st_uid != os.geteuid() or seen.st_mode & 0o022:
        raise BuildError(f"others may write to the cache folder {folder}")
    return folder


def _cpu() -> str:
    """Return what tells two CPUs apart that need different code: a home folder may serve many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cached(folder: Path, stem: str) -> Path | None:
    """Return the cached kernel that holds what its name says; None where there is none, so that it is built anew.

    A library that was cut kills the process that loads it, or cannot be loaded at all.
    """
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path == _named(path, folder, stem):
            return path
        path.unlink(missing_ok=True)
    return None


def _named(path: Path, folder: Path, stem: str) -> Path:
    """Return where a kernel lies in the cache: its name ends in the digest of what it holds."""
    return folder / f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"


def _build(compiler: Sequence[str], folder: Path, stem: str) -> Path:
    problem = ""
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
        target = Path(scratch) / f"{stem}.so"
        for tuning in _TUNINGS:
            try:
                _output([*compiler, *_FLAGS, *tuning, str(SOURCE), "-o", str(target)], BUILD_LIMIT_S)
            except _TookTooLong:
                raise
            except BuildError as error:
                problem = problem or str(error)
                continue
            # a half-written library would crash whoever loads it
            with target.open("rb") as stream:
                os.fsync(stream.fileno())
            file = _named(target, folder, stem)
            os.replace(target, file)
            return file
    raise BuildError(problem)


def _output(command: Sequence[str], limit_s: float) -> str:
    """Return a command's stdout.

    Raises:
        BuildError: it fails, or runs longer than `limit_s`.
        OSError: it cannot be started.
    """
    # a session of its own: a compiler is several processes, and all have to end
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise _TookTooLong(f"{command[0]} took over {limit_s:.0f} s") from None
        except BaseException:
            _kill(process)
            raise
    if process.returncode != 0:
        lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'status {process.returncode}'}")
    return text


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
