"""Plain dicts -> frozen dataclasses, strictly: unknown keys, missing keys and wrong types are errors with the nearest name."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from supar_sweep.errors import ConfigError

T = TypeVar("T")

_PLAIN = (str, int, float, types.NoneType)


def decode(cls: type[T], plain: Mapping[str, Any], *, prefix: str = "") -> T:
    """Return an instance of the frozen dataclass `cls` from a plain mapping, as Hydra composes it or JSON stores it.

    Args:
        cls: a dataclass of the schema.
        plain: exactly its fields, nested mappings for nested dataclasses; fields with a default may be missing.
        prefix: dotted path of `plain` in the user's config, for error texts.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value that the dataclass itself refuses.
    """
    if not isinstance(plain, Mapping):
        raise ConfigError(prefix, f"must be a mapping of {cls.__name__} settings", value=plain)
    known = _fields(cls)  # type: ignore[arg-type]  # mypy: a class is hashable
    for key in plain:
        if key not in known:
            raise ConfigError(_join(prefix, str(key)), "unknown key", allowed=sorted(known), nearest_to=str(key))
    hints = type_hints(cls)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, item in known.items():
        if name in plain:
            value, hint = plain[name], hints[name]
            # most values of a grid's cells are of their type already; a float may be NaN
            of_type = value.__class__ is hint and hint is not float
            values[name] = value if of_type else _value(hint, value, _join(prefix, name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(_join(prefix, name), "is missing", allowed=item.metadata.get("doc", ""))
    try:
        return cls(**values)
    except ConfigError as error:
        raise (error.under(prefix) if prefix else error) from None


@lru_cache(maxsize=64)
def _fields(cls: type[Any]) -> dict[str, Field[Any]]:
    return {item.name: item for item in fields(cls)}


@lru_cache(maxsize=64)
def type_hints(cls: type[Any]) -> dict[str, Any]:
    """Return field -> its type, of a dataclass of the schema."""
    # evaluating string annotations is most of a decode, and a grid decodes thousands of cells
    return get_type_hints(cls)


def encode(config: Any, of_field: Callable[[Any], Any] | None = None) -> Any:
    """Return the plain form (dicts, lists, scalars) of a dataclass: `decode` of it gives the dataclass back.

    Args:
        config: a dataclass of the schema, or what its fields hold.
        of_field: gives the plain form of what the fields hold; default: this function. `Once(encode)`, where many configs
            share their parts.
    """
    if isinstance(config, _PLAIN):
        return config
    if is_dataclass(config):
        of_field = of_field or encode
        values = ((name, getattr(config, name)) for name in _fields(config.__class__))
        return {name: value if isinstance(value, _PLAIN) else of_field(value) for name, value in values}
    if isinstance(config, (list, tuple)):
        return [encode(item) for item in config]
    if isinstance(config, Mapping):
        return {str(key): encode(value) for key, value in config.items()}
    return config


class Once:
    """A function of dataclasses that computes each object's value once: the cells of a grid share most of their sections.

    Objects are told apart by who they are, not by what they hold: equal ones may differ in form (1 and 1.0).

    Args:
        function: what is to be computed. Its value is handed out again and again, so nobody may change it.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        # the object is kept beside its value, so that no other one can get its id
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if not is_dataclass(value):
            return self._function(value)
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = (value, self._function(value))
        return known[1]


def decode_scalar(hint: Any, value: Any, key: str) -> Any:
    """Return the value of a scalar field; None for a field of lists, mappings or sections, which are not looked at.

    Args:
        hint: the field's type, of `type_hints`.
        value: as composed.
        key: the setting, for the error's text.

    Raises:
        ConfigError: a value of another type.
    """
    scalar = {type(None), *(get_args(hint) or (hint,))} <= {type(None), int, float, bool, str}
    return _value(hint, value, key) if scalar or get_origin(hint) is Literal else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _value(hint: Any, value: Any, key: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None:
            if type(None) in options:
                return None
            raise ConfigError(key, "must be set", value=None)
        return _value(next(option for option in options if option is not type(None)), value, key)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(key, "unknown choice", value=value, allowed=get_args(hint), nearest_to=str(value))
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(key, "must be a list", value=value)
        item_hint = get_args(hint)[0]
        return tuple(_value(item_hint, item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(key, "must be a mapping", value=value)
        return dict(value)
    if is_dataclass(hint):
        return decode(hint, value, prefix=key) if not isinstance(value, hint) else value  # type: ignore[arg-type]
    if hint is Any or hint is object:
        return value
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: Any, key: str) -> Any:
    # bool is an int in Python, but "seed: true" is a slip, not a seed
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # text: YAML reads 1e-3 (no dot) as such, and Hydra hands it on
        with contextlib.suppress(ValueError, OverflowError):  # an integer beyond the floats
            if not math.isnan(number := float(value)):
                return number
    if hint is str and isinstance(value, str):
        return value
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(key, f"must be {names.get(hint, hint)}", value=value)
