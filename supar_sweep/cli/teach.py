"""Hydra's errors as ours: the key, the value, what is allowed, the nearest name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from supar_sweep.cli.rooms import conf_dir
from supar_sweep.errors import ConfigError, SuparError

KnownKeys = Callable[[Sequence[str]], list[str]]
"""The words that choose options of groups -> every dotted key of the command then."""


def teach(error: Exception, command: str, words: Sequence[str], known_keys: KnownKeys) -> SuparError:
    """Return the error of a request that Hydra refuses.

    Args:
        error: Hydra's, or whatever stopped it.
        command: the command word.
        words: the user's, flags among them.
        known_keys: of the command.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    text = str(error)
    typed = [word.partition("=") for word in words if not word.startswith("-")]
    missing = getattr(error, "missing_cfg_file", None)
    if "primary config" in text:
        return ConfigError("--config-name", "is set by the command", value=missing, allowed="leave it out")
    if missing is not None:
        group, _, option = str(missing).removesuffix(".yaml").rpartition("/")
        allowed = sorted(getattr(error, "options", None) or options_of(group))
        return ConfigError(group or "command", "has no such option", value=option, allowed=allowed, nearest_to=option)
    if match := re.match(r"Additional config directory '(.*)' not found", text):
        return ConfigError("--config-dir", "is not a folder", value=match[1], allowed="a folder of groups of your own")
    if match := re.search(r"An item is already at '([^']+)'", text):
        return ConfigError(match[1], "is there already", allowed=f"{match[1]}=..., without the +")
    if match := re.search(r"Could not (?:override|append to config[^']*|delete[^']*) '([^']+)'", text):
        key = match[1].partition("@")[0]
        return _unknown_key(key, command, [f"{name}={value}" for name, _, value in typed], known_keys, error)
    if match := re.search(
        r"Multiple values for ([\w/]+)|force-add of config groups is not supported: '\+*([\w/]+)", text
    ):
        group = match[1] or match[2]
        return ConfigError(group, "has an option already", allowed=f"{group}=<option>, without the +: {_names(group)}")
    if match := re.search(r"You must specify '(\w+)'", text):
        return ConfigError(match[1], "must be one of its options", allowed=options_of(match[1]))
    if "Missing mandatory value" in text:
        return ConfigError(str(getattr(error, "full_key", None) or command), "must be set")
    # several values
    if match := re.search(
        r"(?:Ambiguous value for argument|Sweep parameters) '\+*~?([^=']+)=(.*?)'(?:\n| requires|$)", text, re.S
    ):
        axis = "" if match[1].startswith("experiment.") else f"; several are an axis: experiment.axes.{match[1]}=[...]"
        return ConfigError(match[1], "takes one value", value=match[2], allowed=f"one value{axis}")
    for key, _, value in typed:
        group = key.lstrip("+")
        if (options := options_of(group)) and not (value in options or "/" in value or _is_name(value)):
            return ConfigError(group, "must be one of its options", value=value, allowed=options)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if override := getattr(error, "override", None):
        return _unreadable(override, lines, str(error.__cause__ or "").strip().partition("\n")[0])
    key = str(getattr(error, "full_key", None) or "")
    where = key or f"cannot read the settings {' '.join(word[:80] for word in words if not word.startswith('hydra'))}"
    if not isinstance(error, HydraException | OmegaConfBaseException):  # of a file's YAML, say: every line of it counts
        lines = [" ".join(lines)]
    cause = str(error.__cause__ or "").strip().partition("\n")[0]
    # a cause says what is wrong, Hydra's own first line where
    return SuparError(": ".join(dict.fromkeys(part for part in (where, lines[0], cause) if part)))


def options_of(group: str) -> list[str]:
    """Return the shipped options of a group, [] where there is no such group."""
    if not re.fullmatch(r"[a-z_]+", group):
        return []
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _is_name(value: str) -> bool:
    """Return whether Hydra takes a word for an option's name, rather than for a number, a truth or nothing."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*", value)) and value.lower() not in ("null", "true", "false", "nan", "inf")


def _names(group: str) -> str:
    return ", ".join(options_of(group))


def _unreadable(word: str, lines: Sequence[str], cause: str) -> SuparError:
    """Return the error of a word that Hydra cannot read."""
    if re.fullmatch(r"[\w-]+", word):
        near = f", as experiment={word}" if (conf_dir() / "experiment" / f"{word}.yaml").is_file() else ""
        return SuparError(f"cannot read '{word}': settings are key=value{near}")
    reason = cause or next((line for line in lines[1:] if not line.startswith(("See ", "^"))), "")
    key, _, value = word.partition("=")
    hint = f"; text with special characters stands in quotes: {key}='\"...\"'" if value and not cause else ""
    shown = word if word.isprintable() else repr(word)[1:-1]
    return SuparError(f"cannot read '{shown[:200]}'{f': {reason}' if reason else ''}{hint}")


def _unknown_key(key: str, command: str, words: Sequence[str], known_keys: KnownKeys, error: Exception) -> ConfigError:
    """Return the error of a key that the composition of the chosen groups does not have."""
    # the innermost key that is not there: a mapping may be the value
    inner = re.search(r"full_key: (\S+)", str(error.__cause__ or ""))
    key = inner[1] if inner and inner[1].startswith(f"{key}.") else key
    chosen = {name: option for name, _, option in (word.partition("=") for word in words) if option in options_of(name)}
    known = known_keys([f"{name}={option}" for name, option in chosen.items()])
    parent, _, last = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    if key in known:
        problem = str(error).strip().partition("\n")[0].rstrip(".")
        return ConfigError(key, f"cannot be set so ({problem})", allowed=f"{key}=..., alone")
    section = key.partition(".")[0]
    others = [option for option in options_of(section) if key in _keys_of(section, option)]
    if others and siblings:
        having = " and ".join(f"{section}={option}" for option in others)
        problem = f"is not a setting of {section}={chosen.get(section, 'the chosen option')}; {having} has it"
        return ConfigError(key, problem, allowed=siblings)
    if parent in known and not siblings:
        return ConfigError(
            key, f"unknown key for {command}: {parent} is a value, not a section", allowed=f"{parent}=..."
        )
    # a right name under the wrong parent (width=128) is more likely than a similar one beside it
    elsewhere = [other for other in known if other.rpartition(".")[2] == last]
    if elsewhere:
        return ConfigError(key, f"unknown key for {command}", allowed=elsewhere, nearest_to=elsewhere[0])
    allowed = siblings or [other for other in known if "." not in other]
    return ConfigError(key, f"unknown key for {command}", allowed=allowed, nearest_to=key)


def _keys_of(group: str, option: str) -> set[str]:
    """Return the dotted keys that an option's own file sets, and those of the files that it starts from."""
    import yaml

    path: Path = conf_dir() / group / f"{option}.yaml"
    text = path.read_text(encoding="utf-8")
    plain: dict[str, Any] = yaml.safe_load(text) or {}
    found: set[str] = set()
    for each in plain.pop("defaults", ()):
        if isinstance(each, str) and each in options_of(group):
            found |= _keys_of(group, each)
    return found | set(_flat(plain, "" if "@package _global_" in text else f"{group}."))


def _flat(plain: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in plain.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
