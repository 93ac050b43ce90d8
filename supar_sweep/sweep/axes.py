"""How the values of an axis are written: a list, a range of octaves, a range of octaves around the base value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from supar_sweep.config.fields import is_finite
from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import LARGEST_LOG2

MAX_VALUES = 10_000
"""An axis has no more values: finer than any loss can tell apart. What has more is a slip of the step."""


def expand(raw: Any, *, at: str) -> tuple[Any, ...]:
    """Return the values of one axis.

    Args:
        raw: a list, or {log2: [low, high], step: 1}, the step in octaves.
        at: where it stands in the user's config, for error texts.

    Raises:
        ConfigError: neither of the two, no values, or more than MAX_VALUES.
    """
    if isinstance(raw, Mapping):
        values = _log2_values(raw, at)
    elif isinstance(raw, Sequence) and not isinstance(raw, str):
        values = tuple(raw)
    else:
        raise ConfigError(at, "must be a list of values", value=raw, allowed=_AXIS_FORMS)
    if not values:
        raise ConfigError(at, "has no values", allowed=_AXIS_FORMS)
    if len(values) > MAX_VALUES:
        raise ConfigError(at, f"has too many values, {len(values):,}", allowed=f"up to {MAX_VALUES:,}")
    return values


_AXIS_FORMS = "[value, ...], {log2: [low, high], step: 1} or {mult_log2: [low, high], step: 1}"


def _log2_values(raw: Mapping[str, Any], at: str) -> tuple[float, ...]:
    for name in raw:
        if name not in ("log2", "step"):
            known = ("log2", "mult_log2", "step")
            raise ConfigError(f"{at}.{name}", "unknown key", allowed=known, nearest_to=str(name))
    ends, step = raw.get("log2"), raw.get("step", 1)
    numbers = [*ends, step] if isinstance(ends, Sequence) and not isinstance(ends, str) else []
    good = len(numbers) == 3 and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and is_finite(n) for n in numbers
    )
    if not good or step <= 0 or numbers[0] > numbers[1]:
        raise ConfigError(at, "is not a range of octaves", value=dict(raw), allowed="{log2: [low, high], step: > 0}")
    low, high, _ = numbers
    if max(-low, high) > LARGEST_LOG2:
        allowed = f"octaves from -{LARGEST_LOG2} to {LARGEST_LOG2}"
        raise ConfigError(at, "reaches beyond what can be computed with", value=dict(raw), allowed=allowed)
    if (high - low) / MAX_VALUES > step:
        raise ConfigError(at, "has too many values", value=dict(raw), allowed=f"up to {MAX_VALUES:,}; a larger step")
    count = math.floor((high - low) / step + 1e-9) + 1
    return tuple(2.0 ** (low + i * step) for i in range(count))


def absolute(raw: Any, base_value: Any, *, at: str) -> Any:
    """Return an axis with a range around the base value, {mult_log2: [low, high], step: 1}, as the list of its values.

    Anything else is returned as it stands, for `expand`.

    Args:
        raw: the axis as written.
        base_value: what the setting is where no axis changes it; `low` and `high` are octaves from it.
        at: where it stands in the user's config, for error texts.

    Raises:
        ConfigError: a base value that is no positive number, or no range.
    """
    if not isinstance(raw, Mapping) or "mult_log2" not in raw:
        return raw
    if "log2" in raw:
        raise ConfigError(at, "log2 and mult_log2 both give the range", value=dict(raw), allowed="one of them")
    if isinstance(base_value, bool) or not isinstance(base_value, (int, float)) or not base_value > 0:
        raise ConfigError(at, "mult_log2 multiplies the base value, which must be a number > 0", value=base_value)
    octaves = {"log2" if name == "mult_log2" else name: value for name, value in raw.items()}
    return [base_value * factor for factor in _log2_values(octaves, at)]
