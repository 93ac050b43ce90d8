"""The code that jobs run, frozen at submission: a copy of the package in the runs folder, one for each version. No torch.

    <runs>/code/<version>/supar_sweep/...    first on the PYTHONPATH of the jobs that were submitted with it

Always, and not for uncommitted changes alone: it is less than a megabyte, and a checkout of another branch, or an upgrade of the
installed package, would change what waiting jobs run as much as an edit does.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path

from supar_sweep.errors import RecordError
from supar_sweep.sweep.files import cannot_write

PACKAGE = Path(__file__).resolve().parent.parent
"""The package that this process runs."""

VERSION_VARIABLE = "SUPAR_CODE_VERSION"
"""Tells a job which version of the package it is to run."""


def code_version(package: Path = PACKAGE) -> str:
    """Return a hash of the names and contents of a package's files, 16 hex digits. Hidden files and compiled ones do not count.

    Args:
        package: its folder.

    Raises:
        RecordError: a file cannot be read.
    """
    return _version(_contents(package))


def freeze_code(parent: Path, package: Path = PACKAGE) -> Path:
    """Return the folder that holds a copy of the package as it is now; it is made where this version has none yet.

    Args:
        parent: the folder of all versions.
        package: its folder.

    Raises:
        RecordError: it cannot be read or written, or the copy of this version is not what it was.
    """
    contents = _contents(package)
    version = _version(contents)
    frozen = parent / version
    if not frozen.is_dir():
        made = parent / f".{version}.{secrets.token_hex(3)}.tmp"
        try:
            for name, content in contents.items():
                file = made / package.name / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            made.rename(frozen)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if not frozen.is_dir():  # else another submitter was faster
                raise cannot_write(frozen, error) from error
    if code_version(frozen / package.name) != version:
        raise RecordError(
            f"{frozen} is no longer the code that was submitted from there: somebody has changed it. Restore it for the jobs "
            "that wait, or remove it, and submit again"
        )
    return frozen


def code_problem(here: str) -> str:
    """Return what is wrong with the code of this process, where it was told which version to run; "" = nothing.

    Args:
        here: the version that it does run.
    """
    wanted = os.environ.get(VERSION_VARIABLE, here)
    if wanted == here:
        return ""
    return (
        f"the code has changed since this cell was submitted (version {here} in {PACKAGE}, was {wanted}): its copy in the runs "
        "folder's code/ was changed or removed, or launcher.setup sets another PYTHONPATH; submit again"
    )


def _contents(package: Path) -> dict[str, bytes]:
    try:
        names = {file: file.relative_to(package) for file in package.rglob("*") if file.is_file()}
        return {
            name.as_posix(): file.read_bytes()
            for file, name in names.items()
            if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        }
    except OSError as error:
        raise RecordError(f"cannot read {package}: {error}") from error


def _version(contents: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, content in sorted(contents.items()):
        whole.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()[:16]
