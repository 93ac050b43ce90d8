"""How a setting is declared and checked: documentation and range stand beside the field. No torch, no Hydra."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from typing import Any

from supar_sweep.errors import ConfigError

IDENTITY_DEFAULT = "identity_default"


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
    for item in fields(config):
        value, meta = getattr(config, item.name), item.metadata
        if value is None or not meta:
            continue
        if meta.get("choices") and value not in meta["choices"]:
            raise ConfigError(
                item.name,
                "unknown choice",
                value=value,
                allowed=meta["choices"],
                nearest_to=str(value),
            )
        parts: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
            ("ge", ">=", operator.ge),
            ("gt", ">", operator.gt),
            ("le", "<=", operator.le),
            ("lt", "<", operator.lt),
        )
        limits = [(sign, meta[name], test) for name, sign, test in parts if meta.get(name) is not None]
        if limits and not (math.isfinite(value) and all(test(value, bound) for _, bound, test in limits)):
            allowed = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in limits)
            raise ConfigError(item.name, "out of range", value=value, allowed=allowed)


def check_folder_name(key: str, value: str) -> None:
    """Raise ConfigError where a name cannot be a folder's own.

    Args:
        key: what it is the name of, as the user would type it.
        value: the name.
    """
    if not value.strip() or "/" in value or value.startswith("."):
        raise ConfigError(key, "is no name", value=value, allowed="a folder name: no slash, no dot in front")


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
