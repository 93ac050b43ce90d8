"""How a setting is declared and checked: documentation and range stand beside the field. No torch, no Hydra."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import lru_cache
from typing import Any

from supar_sweep.errors import ConfigError

IDENTITY_DEFAULT = "identity_default"

NAME_BYTES = 200
"""Longest name of a folder: file systems take 255 bytes, and files beside it carry the name with an ending."""


_LIMITS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("ge", ">=", operator.ge),
    ("gt", ">", operator.gt),
    ("le", "<=", operator.le),
    ("lt", "<", operator.lt),
)


def setting(
    doc: str,
    *,
    default: Any = MISSING,
    choices: Sequence[str] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return a dataclass field with its documentation and range as metadata (checked by `check_ranges`).

    Args:
        doc: what it is, in words.
        default: its default; without one, conf/ must set it.
        choices: the names that may stand there.
        ge, gt, le, lt: the range of a number: >=, >, <=, <.
    """
    metadata = {"doc": doc, "choices": tuple(choices), "ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def later(doc: str, *, default: Any, **limits: Any) -> Any:
    """Return a field added after release 0.1: left out of the identity while it stands at its behaviour-keeping default.

    Args:
        doc, limits: as for `setting`.
        default: the value that trains as the releases without the field did.
    """
    made = setting(doc, default=default, **limits)
    made.metadata = {**made.metadata, IDENTITY_DEFAULT: default}
    return made


def check_ranges(config: Any) -> None:
    """Raise ConfigError for the first field of a dataclass outside the range that its metadata declares. None always passes."""
    for name, metadata in _with_range(config.__class__):
        check_range(name, getattr(config, name), metadata)


@lru_cache(maxsize=64)
def _with_range(cls: type[Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Return the fields that declare a range, and their metadata."""
    names = ("choices", *(name for name, _, _ in _LIMITS))
    return tuple(
        (item.name, item.metadata)
        for item in fields(cls)
        if any(item.metadata.get(name) not in (None, ()) for name in names)
    )


def check_range(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value outside the range that a field's metadata declares. None always passes.

    Args:
        key: of the field.
        value: of the field's type.
        metadata: of a field made by `setting`, or {}.
    """
    if value is None or not metadata:
        return
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(key, "unknown choice", value=value, allowed=choices, nearest_to=str(value))
    limits = [(sign, bound, test) for name, sign, test in _LIMITS if (bound := metadata.get(name)) is not None]
    if limits and not (is_finite(value) and all(test(value, bound) for _, bound, test in limits)):
        allowed = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in limits)
        raise ConfigError(key, "out of range", value=value, allowed=allowed)


def is_finite(number: float) -> bool:
    """Return whether a number is neither NaN nor infinite. An integer of any length is finite, also one beyond the floats."""
    return isinstance(number, int) or math.isfinite(number)


def check_folder_name(key: str, value: str) -> None:
    """Raise ConfigError where a name cannot be a folder's own.

    Args:
        key: what it is the name of, as the user would type it.
        value: the name.
    """
    if not value.strip() or "/" in value or value.startswith(".") or not value.isprintable():
        allowed = "a name without slash, dot in front, line break or other control character"
        raise ConfigError(key, "cannot be the name of a folder", value=value, allowed=allowed)
    check_length(key, value)


def check_length(key: str, value: str) -> None:
    """Raise ConfigError where the name of a file is longer than file systems take.

    Args:
        key: what it is the name of, as the user would type it.
        value: one part of a path.
    """
    if (n_bytes := len(os.fsencode(value))) > NAME_BYTES:
        raise ConfigError(
            key, f"is too long: {n_bytes} bytes", value=f"{value[:20]}...", allowed=f"up to {NAME_BYTES} bytes"
        )


def require_only(config: Any, mode_key: str, used: dict[str, tuple[str, ...]]) -> None:
    """Raise ConfigError where a field that the chosen mode needs is missing, or one that it does not read is set.

    Args:
        config: the dataclass; optional fields are None when not set.
        mode_key: the field that chooses the mode.
        used: mode -> the optional fields that it reads, all of them required.

    Raises:
        ConfigError: named by the field.
    """
    mode = getattr(config, mode_key)
    for name in sorted({name for names in used.values() for name in names}):
        value = getattr(config, name)
        if name in used[mode] and value is None:
            raise ConfigError(name, f"must be set when {mode_key} is {mode}")
        if name not in used[mode] and value is not None:
            modes = [other for other, names in used.items() if name in names]
            raise ConfigError(
                name,
                f"has no effect when {mode_key} is {mode}",
                value=value,
                allowed=f"null, or {mode_key} one of {', '.join(modes)}",
            )
