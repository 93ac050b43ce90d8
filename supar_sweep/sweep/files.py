"""Files that are whole or not there, JSON above all, and errors that name them. No torch."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from supar_sweep.errors import RecordError


def write_file(path: Path, content: bytes | str) -> Path:
    """Write a file so that a reader sees the old one or the whole new one, never a part; return its path.

    Args:
        path: target; its folder is made where it is missing.
        content: text is written as UTF-8.

    Raises:
        RecordError: a full disk, a read-only folder.
    """
    # the token keeps two hosts with the same pid apart
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    return path


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a mapping as JSON, with `write_file`.

    Args:
        path: target; its folder is made where it is missing.
        value: plain values; NaN and infinities are refused (write null, and say why beside it).
        indent: blanks a level; None = one line (ten times faster: for big files).

    Raises:
        RecordError: a full disk, a read-only folder.
        ValueError: a NaN or an infinity.
    """
    write_file(path, json.dumps(value, indent=indent, sort_keys=True, allow_nan=False) + "\n")


def cannot_write(path: Path, error: OSError) -> RecordError:
    """Return the error of a file that cannot be written: the disk's or the folder's own words."""
    return RecordError(f"cannot write {path}: {error.strerror or error}")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the file's mapping, or None where there is no file.

    Raises:
        RecordError: the file cannot be read, is torn or is no JSON mapping; the text names it.
    """
    try:
        with path.open("rb") as file:
            value = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is torn: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} is torn: it holds no mapping")
    return value
