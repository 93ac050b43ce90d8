"""A model measured against the same model at the base shape: each weight's base_fan_in, and the ratios."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import Ratios
from supar_sweep.rules.parameterization import SPARSE_ROLES
from supar_sweep.sparse.owners import named_owners
from supar_sweep.training.layouts import Shape
from supar_sweep.training.tags import TaggedParameter, collect, stored_name, stored_shape

Base = nn.Module | Callable[[], nn.Module]
"""The base as a model, or what builds it. Only its shapes are read, so it may be on the meta device."""

GIVE_RATIOS = "parameterize(..., ratios=Ratios(m_d=..., m_L=..., n_layer=...))"


def derive_ratios(module: nn.Module, base: Base) -> Ratios:
    """Return m_d, m_L and n_layer of a tagged model against the same model at the base shape.

    m_d is the ratio of the heads' fan_in; without a head (or with a tied one), of the axis in which the embeddings grow;
    without these, of the hidden weights' fan_in. n_layer counts the indices of the list that holds the parameters inside
    residual blocks (`blocks.0`, `blocks.1`, ...), m_L is their ratio.

    Args:
        module: tagged.
        base: the same architecture at the base shape; it needs no tags.

    Raises:
        ConfigError: the two are not of one architecture, or disagree about a ratio, or the depth cannot be counted.
    """
    shapes, own = base_shapes(base), parameter_shapes(module)
    return ratios_of(with_base(collect(module, starts=False), shapes, own), shapes, own)


def ratios_of(items: Sequence[TaggedParameter], base: Mapping[str, Shape], own: Mapping[str, Shape]) -> Ratios:
    """Return `derive_ratios` of parameters from `with_base`.

    Args:
        items: of the target.
        base, own: parameter name -> shape at the base and at the target.
    """
    m_d = _width_ratio(items, base)
    depth = _depth(items, own, base)
    if depth is None:
        raise ConfigError("ratios.n_layer", "cannot be counted in the names of the parameters", allowed=GIVE_RATIOS)
    return Ratios(m_d=m_d, n_layer=depth[0], m_L=depth[0] / depth[1])


def base_shapes(base: Base) -> dict[str, Shape]:
    """Return parameter name -> shape of the base, built on the meta device where it is not built yet.

    Args:
        base: the model, or what builds it.

    Raises:
        ConfigError: what builds it returned no module.
    """
    if not isinstance(base, nn.Module):
        with torch.device("meta"):
            built = base()
        if not isinstance(built, nn.Module):
            raise ConfigError("base", "built no model", value=type(built).__name__, allowed="a torch.nn.Module")
        base = built
    return parameter_shapes(base)


def parameter_shapes(module: nn.Module) -> dict[str, Shape]:
    """Return parameter name -> shape, frozen ones too, a tied one under each of its names.

    Args:
        module: any nn.Module.
    """
    return {
        stored_name(f"{prefix}{local_name}", owner): stored_shape(owner, local_name)
        for prefix, owner in named_owners(module)
        for local_name, parameter in owner._parameters.items()
        if parameter is not None
    }


def with_base(
    items: Sequence[TaggedParameter], base: Mapping[str, Shape], own: Mapping[str, Shape]
) -> list[TaggedParameter]:
    """Return the parameters with base_fan_in as the base has it.

    Names are matched. A layer that only a deeper target has is matched with those whose names differ from its own in numbers
    alone (blocks.7.up.weight with blocks.0.up.weight).

    Args:
        items: of the target.
        base: parameter name -> shape at the base.
        own: parameter name -> shape at the target.

    Raises:
        ConfigError: a parameter that one of the two lacks, other numbers of axes, a tag's base_fan_in that the base
            contradicts, an embedding that grows along two axes, or a head whose outputs change.
    """
    patterns = {_pattern(name) for name in own}
    for name, shape in base.items():
        if _pattern(name) not in patterns:
            raise ConfigError(name, f"is in the base (shape {shape}), but not in the model", allowed=_ONE_ARCHITECTURE)
    return [_with_base(item, _namesake(item.name, base), own[item.name]) for item in items]


_ONE_ARCHITECTURE = "the same architecture at the base shape"


def _with_base(item: TaggedParameter, base: Shape, own: Shape) -> TaggedParameter:
    known, shapes = item.tag, f"shape {own}, at the base {base}"
    if len(base) != len(own):
        raise ConfigError(item.name, f"has {shapes}", allowed=_ONE_ARCHITECTURE)
    _, base_out, base_in = item.layout.sizes(base)
    if known.role == "embedding" and sum(one != other for one, other in zip(own, base, strict=True)) > 1:
        raise ConfigError(
            item.name,
            f"is an embedding that grows along more than one axis: {shapes}",
            allowed="inputs of a fixed size",
        )
    if known.role == "head" and base_out != item.fan_out:
        raise ConfigError(item.name, f"is a head whose outputs change: {shapes}", allowed="outputs of a fixed size")
    if known.role not in SPARSE_ROLES:
        return item
    if known.base_fan_in is not None and not math.isclose(known.base_fan_in, base_in, rel_tol=_SAME):
        raise ConfigError(
            item.name,
            f"is tagged with another base_fan_in than the {base_in} of the base",
            value=known.base_fan_in,
            allowed="no base_fan_in beside base=",
        )
    return replace(item, tag=replace(known, base_fan_in=base_in))


_SAME = 1e-6


def check_ratios(
    ratios: Ratios, items: Sequence[TaggedParameter], base: Mapping[str, Shape], own: Mapping[str, Shape]
) -> None:
    """Raise ConfigError where the ratios are not those of the two models.

    Args:
        ratios: as given.
        items: of the target, from `with_base`.
        base, own: parameter name -> shape.
    """
    widths = _width_ratios(items, base)
    wrong = [width for width in widths if not math.isclose(width.ratio, ratios.m_d, rel_tol=_SAME)]
    # every head reads the width; of embeddings some may grow with something else, as a depthwise convolution does
    allowed_wrong = {"head": 0, "embedding": len(widths) - 1}
    if wrong and len(wrong) > allowed_wrong.get(wrong[0].role, len(widths)):
        raise ConfigError(
            "ratios.m_d",
            f"{wrong[0].name} is {wrong[0].ratio:g} times as wide as in the base",
            value=ratios.m_d,
            allowed=GIVE_RATIOS,
        )
    depth = _depth(items, own, base)
    if depth is not None and not math.isclose(depth[0] / depth[1], ratios.m_L, rel_tol=_SAME):
        raise ConfigError(
            "ratios.m_L", f"the model has {depth[0]} blocks, the base {depth[1]}", value=ratios.m_L, allowed=GIVE_RATIOS
        )


class _Width(NamedTuple):
    """What one parameter says of the model's width: its ratio to the base's, and as what it says so."""

    name: str
    ratio: float
    role: str


def _width_ratio(items: Sequence[TaggedParameter], base: Mapping[str, Shape]) -> float:
    widths = _width_ratios(items, base)
    if len({round(width.ratio, 9) for width in widths}) > 1:
        seen = ", ".join(f"{width.name} {width.ratio:g}" for width in widths)
        raise ConfigError("ratios.m_d", f"layers disagree about it: {seen}", allowed=GIVE_RATIOS)
    return widths[0].ratio if widths else 1.0


def _width_ratios(items: Sequence[TaggedParameter], base: Mapping[str, Shape]) -> list[_Width]:
    """Return the parameters that tell the width: heads, else embeddings that grow, else embeddings, else hidden weights."""
    sizes = {item.name: item.layout.sizes(_namesake(item.name, base)) for item in items}
    read = [_Width(item.name, item.fan_in / sizes[item.name][2], item.tag.role) for item in items]
    tables = [
        _Width(item.name, item.parameter.numel() / math.prod(sizes[item.name]), "embedding")
        for item in items
        if item.tag.role == "embedding"
    ]
    return (
        [width for width in read if width.role == "head"]
        or [width for width in tables if width.ratio != 1]
        or tables
        or [width for width in read if width.role in SPARSE_ROLES]
    )


def _depth(items: Sequence[TaggedParameter], own: Iterable[str], base: Iterable[str]) -> tuple[int, int] | None:
    """Return (blocks of the target, blocks of the base); (1, 1) where nothing is in a block, None where it cannot be told."""
    counts, base_counts = _index_counts(own), _index_counts(base)
    stacks: dict[tuple[str, ...], tuple[int, int]] = {}
    for item in items:
        if not item.tag.in_block:
            continue
        parts = tuple(item.name.split("."))
        keys = [(at, (*parts[:at], "#", *parts[at + 1 :])) for at, part in enumerate(parts) if part.isdigit()]
        found = [(counts[key], base_counts[key]) for key in keys]
        # an index that never changes may number the parts of a model, and one behind it the blocks
        if not found or (max(found[0]) == 1 and any(max(pair) > 1 for pair in found[1:])):
            return None
        prefix = parts[: keys[0][0]]
        before = stacks.get(prefix, (1, 1))
        stacks[prefix] = max(before[0], found[0][0]), max(before[1], found[0][1])
    if len(stacks) > 1:
        return None  # one residual stream or several: names do not say
    return next(iter(stacks.values()), (1, 1))


def _index_counts(names: Iterable[str]) -> Counter[tuple[int, tuple[str, ...]]]:
    """Return (place of an index, name with # there) -> how many names there are that differ in this index alone."""
    split = [tuple(name.split(".")) for name in names]
    return Counter(
        (at, (*parts[:at], "#", *parts[at + 1 :])) for parts in split for at, part in enumerate(parts) if part.isdigit()
    )


def _namesake(name: str, base: Mapping[str, Shape]) -> Shape:
    if name in base:
        return base[name]
    shapes = {shape for other, shape in base.items() if _pattern(other) == _pattern(name)}
    if len(shapes) == 1:
        return shapes.pop()
    if shapes:
        seen = ", ".join(map(str, sorted(shapes)))
        raise ConfigError(
            name,
            f"is not in the base, and its layers of such names differ ({seen})",
            allowed="tag(..., base_fan_in=...)",
        )
    raise ConfigError(name, "is not in the base", allowed=_ONE_ARCHITECTURE)


def _pattern(name: str) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in name.split("."))
