"""Errors that teach: the key, the value, what is allowed, the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST_VALUE = 160
"""Characters of a value that an error shows."""


class SuparError(Exception):
    """Any error whose text is meant for the user: the command line prints it without a traceback."""


class ConfigError(SuparError):
    """A setting that cannot be used.

    Args:
        key: dotted config key, as the user would type it in an override.
        problem: what is wrong, in words, without the key.
        value: the offending value; left out of the text when not given.
        allowed: what may stand there: a sentence, or an iterable of names.
        nearest_to: a mistyped name; the closest of `allowed` is suggested.
    """

    _NO_VALUE = object()

    def __init__(
        self,
        key: str,
        problem: str,
        *,
        value: object = _NO_VALUE,
        allowed: str | Iterable[str] = "",
        nearest_to: str | None = None,
    ) -> None:
        self.key = key
        self.problem = problem
        self.value = value
        self.allowed = allowed if isinstance(allowed, str) else list(allowed)
        self.nearest_to = nearest_to
        super().__init__(key, problem)

    def under(self, prefix: str) -> ConfigError:
        """Return the same error with its key below `prefix` (used by decoders of nested settings)."""
        return ConfigError(
            f"{prefix}.{self.key}" if self.key else prefix,
            self.problem,
            value=self.value,
            allowed=self.allowed,
            nearest_to=self.nearest_to,
        )

    def __str__(self) -> str:
        shown = "" if self.value is ConfigError._NO_VALUE else f" (got {_shortened(repr(self.value))})"
        text = f"{self.key}: {self.problem}{shown}" if self.key else f"{self.problem}{shown}"
        if isinstance(self.allowed, list):
            names = [str(name) for name in self.allowed]
            near = get_close_matches(self.nearest_to or "", names, 1)
            if near:
                text += f"; did you mean '{near[0]}'?"
            text += f"; allowed: {', '.join(names)}"
        elif self.allowed:
            text += f"; allowed: {self.allowed}"
        return text


def _shortened(text: str) -> str:
    """Return a value's text, without its middle where it fills lines: 1e308 as a whole number has 309 digits."""
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE // 2]}... ({len(text)} characters)"


class DataError(SuparError):
    """A corpus that cannot be read, is empty, or is shorter than one batch."""


class CheckpointError(SuparError):
    """A checkpoint that is torn, or belongs to another cell, mask or compute route."""


class MaskError(SuparError):
    """Weights that a mask keeps at 0 are not 0, or a mask is gone."""


class RecordError(SuparError):
    """A record that cannot be read or written (torn file, full disk, read-only folder)."""


class LostDeviceError(SuparError):
    """A GPU that answers nothing any more to this process: no fault of the cells that were on it, but the end of all of them."""


class RankError(SuparError):
    """Processes that train one cell together do not agree, or another one of them has failed."""


class LostRankError(RankError):
    """One of the processes that train a cell together is gone without a word."""


class BusyError(SuparError):
    """Another process is working on the same experiment or cell."""
