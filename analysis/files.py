"""Files that a figure or a verdict is written to: a reader sees the old one or the whole new one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from supar_sweep.errors import RecordError


def write(path: Path, content: bytes | str) -> Path:
    """Write a file whole or not at all; return its path.

    Args:
        path: target; its folder is made where it is missing.
        content: text is written as UTF-8.

    Raises:
        RecordError: a full disk, a read-only folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RecordError(f"cannot write {path}: {error.strerror or error}") from error
    return path
