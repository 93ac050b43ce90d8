"""What can be said of settings before they are resolved: a section that is missing, a value of the wrong type or range, a
reference that leads nowhere. What is computed from such a value would fail in its place, under another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_sweep.cli.rooms import conf_dir
from supar_sweep.config.decode import decode_scalar, type_hints
from supar_sweep.config.fields import check_length, check_range
from supar_sweep.config.schema import CellConfig, RuntimeConfig
from supar_sweep.config.study import StudyConfig
from supar_sweep.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCHEMAS: dict[str, type] = {"": CellConfig, "runtime": RuntimeConfig, "study": StudyConfig}


def check_early(config: DictConfig, sections: Sequence[str]) -> None:
    """Raise ConfigError for the first setting that cannot be, whatever the others are computed to be.

    Args:
        config: composed, not yet resolved.
        sections: the top-level keys that the command reads.
    """
    from omegaconf import DictConfig

    nodes = config._content
    assert isinstance(nodes, dict)  # a composed config is a mapping
    for name in sections:
        if name not in nodes:
            raise ConfigError(
                name, "is missing, and the command reads it", allowed=_options(name) or f"leave out ~{name}"
            )
    for name in ("launcher", "runtime", "experiment"):
        node = nodes.get(name)
        if node is not None and not isinstance(node, DictConfig) and node._value() is not None:
            raise ConfigError(name, "must be a mapping", value=node._value(), allowed=_options(name))
    for section, cls in SCHEMAS.items():
        _check_node(cls, nodes.get(section) if section else config, section)


def _check_node(cls: type, node: Any, prefix: str) -> None:
    """Check the plain scalars of a section; what refers to others, and lists, are decoded later."""
    from omegaconf import DictConfig

    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return
    hints, children = type_hints(cls), node._content
    assert isinstance(children, dict)
    for item in fields(cls):
        child: Any = children.get(item.name)
        if child is None or child._is_missing() or child._is_interpolation():
            continue
        key = f"{prefix}.{item.name}" if prefix else item.name
        inner = next((hint for hint in _options_of(hints[item.name]) if is_dataclass(hint)), None)
        if inner is not None:
            _check_node(inner, child, key)  # type: ignore[arg-type]  # mypy: a dataclass here is a class
        else:
            check_range(key, decode_scalar(hints[item.name], child._value(), key), item.metadata)


def _options_of(hint: Any) -> tuple[Any, ...]:
    from typing import get_args

    return (hint, *get_args(hint))


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return the config as plain dicts, lists and scalars.

    Args:
        config: composed.

    Raises:
        ConfigError: a setting that must be set, or one that refers to what is not there.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(str(error.full_key), "must be set") from None
    except (OmegaConfBaseException, RecursionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        for key, text in _references(OmegaConf.to_container(config, resolve=False), ""):
            try:
                OmegaConf.select(config, key, throw_on_resolution_failure=True)
            except (OmegaConfBaseException, RecursionError):
                raise ConfigError(key, f"cannot be worked out: {reason}", value=text) from None
        raise ConfigError(str(getattr(error, "full_key", None) or ""), f"cannot be worked out: {reason}") from None
    return dict(plain)


def _references(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _references(child, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _references(child, f"{prefix}[{index}]")
    elif isinstance(node, str) and "${" in node:
        yield prefix, node


def check_path(key: str, value: Any, *, missing: bool = False) -> None:
    """Raise ConfigError for what cannot be a path.

    Args:
        key: of the setting.
        value: of the setting.
        missing: it may be null.
    """
    if missing and value is None:
        return
    if not (isinstance(value, str) and value.strip()):
        raise ConfigError(key, "must be a path", value=value)
    if not value.isprintable():
        raise ConfigError(key, "must be a path without line breaks and other control characters", value=value)
    for part in Path(value).parts:
        check_length(key, part)
    if value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ConfigError(key, "names the home of a user who does not exist", value=value) from None


def check_tuned_at(value: Any) -> None:
    """Raise ConfigError where what is known of the proxy is not a value by each name.

    Args:
        value: of `tuned_at`, resolved.
    """
    if not isinstance(value or {}, dict):
        raise ConfigError("tuned_at", "must map what is known of the proxy to its value", value=value)
    for name, known in (value or {}).items():
        if isinstance(known, list) or (isinstance(known, dict) and name != "optimizer"):
            raise ConfigError(f"tuned_at.{name}", "must be one value", value=known)


def check_scale(config: DictConfig, typed: dict[str, str]) -> None:
    """Raise ConfigError where a scale is missing, unknown to the experiment, or would have no effect.

    A row of the table `scales` is what its experiment reads of it, so this comes before the config is resolved.

    Args:
        config: composed.
        typed: key -> value, as on the command line.
    """
    from omegaconf import DictConfig

    scale, scales = config.get("scale"), config.get("scales")
    name = typed.get("experiment")
    if scales is not None:
        rows = dict(scales) if isinstance(scales, DictConfig) else {}
        if not rows or not all(isinstance(row, DictConfig) for row in rows.values()):
            raise ConfigError("scales", "must map each scale to what the experiment reads of it", value=scales)
    if scales is None:
        if "scale" in typed and name is not None:
            problem = f"has no effect on experiment={name}, which has no table `scales`"
            raise ConfigError("scale", problem, value=scale, allowed=f"leave it out{_instead(str(typed['scale']))}")
    elif scale is None:
        raise ConfigError("scale", f"must be set for experiment={name}", allowed=list(map(str, scales)))
    elif scale not in scales:
        problem = f"experiment={name} has no such scale"
        raise ConfigError("scale", problem, value=scale, allowed=list(map(str, scales)), nearest_to=str(scale))


def _instead(scale: str) -> str:
    """Return the words that make a cell of one's own like those of a scale; "" where there is no such file."""
    import yaml

    path = conf_dir() / "scale" / f"{scale}.yaml"
    if not path.is_file():
        return ""
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = {
        key.removeprefix("override /"): option for each in plain.get("defaults", ()) for key, option in each.items()
    }
    words = [f"{group}={option}" for group, option in groups.items()]
    for section in ("model", "base", "train", "optimizer"):
        for name, value in (plain.get(section) or {}).items():
            if "${" not in str(value):
                words.append(f"{section}.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return f", and write what you want of it: {' '.join(words)}"
