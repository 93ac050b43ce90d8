"""Axes -> cells: the product of axes, some walked in step (zipped), some dependent on another (by).

Ten thousand cells take well under a second: a section of the config that no axis touches is decoded
once, any other once a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, get_args, get_type_hints

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.sweep.axes import absolute, expand

MAX_CELLS = 100_000
"""A grid has no more points: twice what `plan` and `status` were measured with, some 700 MB in each of them and a million
files. What has more is a slip of a step or a seed; what is meant can be several experiments over one store of cells."""

SHOWN_PROBLEMS = 20
"""An error about invalid cells shows at most so many different problems."""

Key = tuple[str, str]
"""(section, field) of a cell's setting; section "" for the cell's own fields."""


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """What varies over a grid.

    A key is a dotted setting of the cell, or its last part where that is unique (lr, width).

    Args:
        axes: key -> values: a list, or {log2: [low, high], step: 1} for 2^low, 2^(low + step), ...
            up to and including 2^high, or {mult_log2: [low, high], step: 1} for those times the base value.
        zipped: each entry maps keys to lists of one length, walked in step.
        by: axis -> one of its values -> other key -> values: that key's values where the axis has
            that value. A key that also stands in `axes` keeps those for the values not named here.
    """

    axes: Mapping[str, Any] = field(default_factory=dict)
    zipped: tuple[Mapping[str, Any], ...] = ()
    by: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GridPoint:
    """One cell and where it stands: axis name -> value, in the order of the axes."""

    axes: Mapping[str, Any]
    cell: CellConfig


class GridError(ConfigError):
    """Cells that cannot be trained, all at once.

    Args:
        problems: the axis values of each invalid cell and what is wrong with it; not empty.
        n_cells: cells of the whole grid.
    """

    def __init__(self, problems: Sequence[tuple[Mapping[str, Any], ConfigError]], n_cells: int) -> None:
        self.problems = list(problems)
        self.n_cells = n_cells
        super().__init__(self.problems[0][1].key, f"{len(self.problems)} invalid cells")

    def __str__(self) -> str:
        where: dict[str, list[Mapping[str, Any]]] = {}
        for axes, error in self.problems:
            where.setdefault(str(error), []).append(axes)
        lines = [
            f"{text} [{len(cells)} of {self.n_cells} cells, first: {_show(cells[0])}]" for text, cells in where.items()
        ]
        if len(lines) == 1:
            return lines[0]
        head = f"{len(self.problems)} of {self.n_cells} cells are invalid; nothing was started:"
        more = len(lines) - SHOWN_PROBLEMS
        tail = [f"... and {more} more problems"] if more > 0 else []
        return "\n  ".join([head, *lines[:SHOWN_PROBLEMS], *tail])


def enumerate_grid(base: Mapping[str, Any], spec: GridSpec) -> list[GridPoint]:
    """Return every cell of a grid, the last axis fastest; without axes, the one cell of `base`.

    Args:
        base: a cell's settings as plain values; an axis replaces its own.
        spec: what varies.

    Raises:
        ConfigError: an unknown, ambiguous or repeated key, an empty axis, a value twice on an axis, more than MAX_CELLS points.
        GridError: cells that the schema refuses, all of them.
    """
    points = list(_points(_absolute(spec, base)))
    build = _Builder(base)
    done: list[GridPoint] = []
    problems: list[tuple[Mapping[str, Any], ConfigError]] = []
    for values in points:
        try:
            cell = build(values)
        except ConfigError as error:
            problems.append(({axis_name(key): value for key, value in values.items()}, error))
            continue
        # read back from the cell: 1 on a float axis is 1.0, as in the records
        done.append(GridPoint({axis_name(key): _read(cell, key) for key in values}, cell))
    if problems and not points[0]:
        raise problems[0][1]
    if problems:
        raise GridError(problems, len(points))
    return done


def find_key(key: str, *, at: str = "experiment.axes") -> Key:
    """Return the setting that a key names: "hparams.lr" and "lr" are both ("hparams", "lr").

    Args:
        key: dotted, or the last part alone. `width` and `n_layer` are the model's; the base's are
            spelled out.
        at: where the key stands in the user's config, for error texts.

    Raises:
        ConfigError: no such setting, more than one, or a whole section.
    """
    sections, leaves = _settings()
    section, dot, name = key.rpartition(".")
    if dot and name in sections.get(section, ()):
        return section, name
    owners = () if dot else leaves.get(key, ())
    if len(owners) == 1:
        return owners[0], key
    if owners:
        raise ConfigError(f"{at}.{key}", "is ambiguous", allowed=[f"{owner}.{key}" for owner in owners])
    if key in sections:
        names = [f"{key}.{name}" for name in sections[key]]
        raise ConfigError(f"{at}.{key}", "is a section; name a setting of it", allowed=names)
    names = (
        [f"{section}.{other}" for other in sections[section]]
        if dot and section in sections
        else [name for name, found in leaves.items() if len(found) == 1]
    )
    raise ConfigError(f"{at}.{key}", "no such setting", allowed=names, nearest_to=key)


@lru_cache(maxsize=256)
def axis_name(key: Key) -> str:
    """Return an axis' name in tables and figures: the last part of its key where that is unique."""
    section, name = key
    owners = _settings()[1].get(name, ())
    return name if owners == (section,) else f"{section}.{name}"


@lru_cache(maxsize=1)
def _settings() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Return section -> its fields ("" = the cell's own), and field -> sections that have it."""
    sections: dict[str, tuple[str, ...]] = {"": ()}
    for name, hint in get_type_hints(CellConfig).items():
        inner = next((h for h in (hint, *get_args(hint)) if is_dataclass(h)), None)
        if inner is None:
            sections[""] += (name,)
        else:
            sections[name] = tuple(item.name for item in fields(inner))
    leaves: dict[str, tuple[str, ...]] = {}
    for section, names in sections.items():
        for name in names:
            # the base has a width and a depth too, but an axis called width is the target's
            if section != "base":
                leaves[name] = (*leaves.get(name, ()), section)
    return sections, leaves


def _absolute(spec: GridSpec, base_plain: Mapping[str, Any]) -> GridSpec:
    """Return the grid with every range around a base value (mult_log2) written out."""

    def written_out(axes: Mapping[str, Any], at: str) -> dict[str, Any]:
        return {key: absolute(raw, base_value(key, f"{at}.{key}"), at=f"{at}.{key}") for key, raw in axes.items()}

    def base_value(key: str, at: str) -> Any:
        section, name = find_key(key, at=at.removesuffix(f".{key}"))
        node = base_plain.get(section) if section else base_plain
        return node.get(name) if isinstance(node, Mapping) else None

    by = {
        axis: {
            value: written_out(_flat(table), f"experiment.by.{axis}.{value}") if isinstance(table, Mapping) else table
            for value, table in by_value.items()
        }
        if isinstance(by_value, Mapping)
        else by_value
        for axis, by_value in spec.by.items()
    }
    zipped = tuple(written_out(_flat(each), f"experiment.zipped[{i}]") for i, each in enumerate(spec.zipped))
    return replace(spec, axes=written_out(_flat(spec.axes), "experiment.axes"), zipped=zipped, by=by)


def _points(spec: GridSpec) -> Iterator[dict[Key, Any]]:
    """Yield the settings of each point."""
    axes = _flat(spec.axes)
    plain = {find_key(key): expand(raw, at=f"experiment.axes.{key}") for key, raw in axes.items()}
    if len(plain) < len(axes):
        raise ConfigError("experiment.axes", "names a setting twice", value=list(spec.axes))
    dependent = _dependent(spec)
    loose: set[Key] = {key for tables in dependent.values() for table in tables for key in table}
    dimensions = [[{key: value} for value in values] for key, values in plain.items() if key not in loose]
    dimensions += [_zipped(entry, f"experiment.zipped[{i}]") for i, entry in enumerate(spec.zipped)]
    _refuse_repeats(dimensions, loose.intersection(plain))
    tables = _fill(spec, dependent, plain, dimensions)
    _refuse_many(dimensions, tables)
    for steps in product(*dimensions):
        point = {key: value for step in steps for key, value in step.items()}
        choices = [
            [(key, value) for value in values]
            for axis, by_value in tables.items()
            for key, values in by_value[point[axis]].items()
        ]
        for extra in product(*choices):
            yield {**point, **dict(extra)}


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"hparams.lr": values} for {"hparams": {"lr": values}}, Hydra's form of it."""
    sections = _settings()[0]
    flat: dict[str, Any] = {}
    for key, raw in entry.items():
        nested = key in sections and isinstance(raw, Mapping)
        flat |= {f"{key}.{name}": inner for name, inner in raw.items()} if nested else {key: raw}
    return flat


def _zipped(entry: Mapping[str, Any], at: str) -> list[dict[Key, Any]]:
    entry = _flat(entry)
    columns = {find_key(key, at=at): expand(raw, at=f"{at}.{key}") for key, raw in entry.items()}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        shown = ", ".join(f"{name}: {len(columns[find_key(name)])}" for name in entry)
        raise ConfigError(at, "needs lists of one length", value=shown or None)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _refuse_repeats(dimensions: list[list[dict[Key, Any]]], loose: set[Key]) -> None:
    swept: set[Key] = set(loose)
    for dimension in dimensions:
        for key in dimension[0]:
            if key in swept:
                raise ConfigError(f"experiment.axes.{axis_name(key)}", "is swept twice")
            swept.add(key)
        _refuse_twice([tuple(step.values()) for step in dimension], tuple(dimension[0]))


def _refuse_twice(rows: Sequence[tuple[Any, ...]], keys: tuple[Key, ...]) -> None:
    seen: set[str] = set()
    for row in rows:
        # text, because a value may be a list; 1 and 1.0 are the same value of an axis
        shown = repr([float(v) if isinstance(v, int) else v for v in row])
        if shown in seen:
            name = ", ".join(axis_name(key) for key in keys)
            raise ConfigError(
                f"experiment.axes.{name}",
                "has a value twice",
                value=row[0] if len(row) == 1 else row,
            )
        seen.add(shown)


def _refuse_many(dimensions: list[list[dict[Key, Any]]], tables: Tables) -> None:
    """Refuse a product that is too large, before any of it is made."""

    def n_points(step: Mapping[Key, Any]) -> int:
        dependent = (tables[axis][step[axis]].values() for axis in step if axis in tables)
        return prod(len(values) for of_axis in dependent for values in of_axis)

    lengths = [sum(map(n_points, dimension)) for dimension in dimensions]
    if (n := prod(lengths)) > MAX_CELLS:
        names = [", ".join(map(axis_name, dimension[0])) for dimension in dimensions]
        shown = " x ".join(f"{length:,} of {name}" for name, length in zip(names, lengths, strict=True))
        allowed = f"up to {MAX_CELLS:,}; a larger step, fewer values, or several experiments"
        raise ConfigError("experiment.axes", f"make {n:,} cells ({shown})", allowed=allowed)


Dependent = dict[Key, list[dict[Key, Any]]]
Tables = dict[Key, dict[Any, dict[Key, tuple[Any, ...]]]]


def _dependent(spec: GridSpec) -> Dependent:
    """Return axis -> for each of its named values, the raw values of other keys."""
    found: Dependent = {}
    owner: dict[Key, Key] = {}
    for axis, by_value in spec.by.items():
        at = f"experiment.by.{axis}"
        axis_key = find_key(axis, at="experiment.by")
        if not isinstance(by_value, Mapping):
            raise ConfigError(at, "must map values to axes", value=by_value)
        found[axis_key] = []
        for value, axes in by_value.items():
            if not isinstance(axes, Mapping):
                raise ConfigError(f"{at}.{value}", "must map keys to values", value=axes)
            table = {find_key(key, at=f"{at}.{value}"): raw for key, raw in _flat(axes).items()}
            for key in table:
                if owner.setdefault(key, axis_key) != axis_key or key == axis_key:
                    raise ConfigError(f"{at}.{value}.{axis_name(key)}", "depends on two axes")
            found[axis_key].append(table)
    return found


def _fill(
    spec: GridSpec,
    dependent: Dependent,
    plain: Mapping[Key, tuple[Any, ...]],
    dimensions: Sequence[Sequence[Mapping[Key, Any]]],
) -> Tables:
    """Return axis -> its value -> key -> values, complete for every value that the axis takes."""
    filled: Tables = {}
    for (axis, tables), (name, by_value) in zip(dependent.items(), spec.by.items(), strict=True):
        at = f"experiment.by.{name}"
        taken = [step[axis] for dimension in dimensions for step in dimension if axis in step]
        if not taken:
            raise ConfigError(at, "is not an axis of this grid", allowed=list(spec.axes))
        named = dict(zip(by_value, tables, strict=True))
        for value in named:
            _check_legal(axis, value, taken, at)
        keys = [key for table in tables for key in table]
        filled[axis] = {}
        walked = {key for dimension in dimensions for key in dimension[0]}
        idle = walked.union(plain).intersection(keys)
        for value in taken:
            matching = [table for given, table in named.items() if _same(given, value)]
            table = matching[0] if matching else {}
            own: dict[Key, tuple[Any, ...]] = {}
            for key in dict.fromkeys(keys):
                if key in table:
                    values = expand(table[key], at=f"{at}.{value}.{axis_name(key)}")
                elif key in plain:
                    values = plain[key]
                    idle.discard(key)
                elif key in walked:  # the step that walks it says its value
                    idle.discard(key)
                    continue
                else:
                    raise ConfigError(
                        f"{at}.{value}.{axis_name(key)}",
                        "is missing",
                        allowed=f"values here, or experiment.axes.{axis_name(key)} for all",
                    )
                _refuse_twice([(v,) for v in values], (key,))
                own[key] = values
            filled[axis][value] = own
        for key in idle:
            raise ConfigError(
                f"experiment.axes.{axis_name(key)}",
                f"has no effect: {at} gives its values for every {name}",
                allowed=f"~{at} removes those",
            )
    return filled


def _check_legal(axis: Key, value: Any, taken: Sequence[Any], at: str) -> None:
    """Refuse a value that the axis could never take; one left out of a narrowed axis may stand."""
    if any(_same(value, other) for other in taken):
        return
    section, name = axis
    hint = get_type_hints(CellConfig)[section or name]
    owner = CellConfig if not section else next(h for h in (hint, *get_args(hint)) if is_dataclass(h))
    meta = next(item.metadata for item in fields(owner) if item.name == name)
    if meta.get("choices") and value not in meta["choices"]:
        raise ConfigError(f"{at}.{value}", "unknown choice", allowed=meta["choices"], nearest_to=str(value))
    if not meta.get("choices") and all(isinstance(other, (int, float)) for other in taken):
        try:
            float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{at}.{value}", "is not a value of the axis", allowed=taken) from None


def _same(named: Any, value: Any) -> bool:
    """Return whether a key of `by` means this value; JSON turns the key 0.25 into text."""
    return bool(named == value) or str(named) == str(value)


class _Builder:
    """Builds cells from one base, decoding each section once a combination of values on it."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self.base = base
        self.hints = get_type_hints(CellConfig)
        self.sections: dict[tuple[Any, ...], Any] = {}

    def __call__(self, values: Mapping[Key, Any]) -> CellConfig:
        changed: dict[str, dict[str, Any]] = {}
        for (section, name), value in values.items():
            changed.setdefault(section, {})[name] = value
        plain = {**self.base, **changed.pop("", {})}
        for section in _settings()[0]:
            if section and isinstance(plain.get(section), Mapping):
                plain[section] = self._section(section, changed.pop(section, {}))
        for section in changed:  # a section that the base leaves out (base: null) or gets wrong
            plain[section] = changed[section]
        return decode(CellConfig, plain)

    def _section(self, section: str, changes: Mapping[str, Any]) -> Any:
        key = (section, *changes.items())
        try:
            known = self.sections.get(key)
        except TypeError:  # a list among the values
            return self._decode(section, changes)
        if known is None:
            try:
                known = self._decode(section, changes)
            except ConfigError as error:
                known = error
            self.sections[key] = known
        if isinstance(known, ConfigError):
            raise known
        return known

    def _decode(self, section: str, changes: Mapping[str, Any]) -> Any:
        hint = self.hints[section]
        cls = next(h for h in (hint, *get_args(hint)) if is_dataclass(h))
        return decode(cls, {**self.base[section], **changes}, prefix=section)  # type: ignore[arg-type]


def _read(cell: CellConfig, key: Key) -> Any:
    section, name = key
    return getattr(getattr(cell, section) if section else cell, name)


def _show(axes: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in axes.items()
    )
