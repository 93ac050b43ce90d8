"""Which role each parameter plays: tags on the modules that own them, and all of them as a list.

A tag says what a tensor is (rules/parameterization.py says what follows from it). Tags are a plain
attribute of the owning module, so they survive deepcopy, pickling, `.to()` and torch.compile, and
never enter the state_dict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import ROLES, Role
from supar_sweep.sparse.compact import STANDS_FOR, CompactLinear

_TAGS = "_supar_tags"
_COMPILED = "_orig_mod."
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What one parameter is.

    Args:
        role: embedding, hidden, hidden_residual, head, norm or bias.
        base_fan_in: its fan_in at the base shape, > 0; None where the role's rules do not read it.
        in_block: whether it sits inside a residual block (depth rules act only there).
    """

    role: Role
    base_fan_in: float | None = None
    in_block: bool = False


@dataclass(frozen=True, kw_only=True)
class TaggedParameter:
    """One parameter of a model with its tag.

    Args:
        name: full dotted name, without torch.compile's prefixes: noise and masks are drawn from it. The values of a compact
            layer go by the name of the weight that they stand for.
        owner: the module that holds it.
        local_name: its name on the owner.
        parameter: the tensor.
        tag: its tag.
        fan_out, fan_in: the tensor as a matrix [shape[0], product of the rest]; 1-d parameters of n
            elements are [1, n]. A convolution [out, in, kh, kw] has fan_in = in * kh * kw. An
            embedding is stored [n_vocab, width]. Of a compact layer, the matrix whose live entries it stores.
    """

    name: str
    owner: nn.Module
    local_name: str
    parameter: nn.Parameter
    tag: Tag
    fan_out: int
    fan_in: int


def tag(
    owner: nn.Module,
    parameter_name: str,
    role: Role,
    *,
    base_fan_in: float | None = None,
    in_block: bool = False,
) -> None:
    """Tag one parameter with its role. Tagging again replaces the tag.

    Weights of two or more dimensions must be tagged. Norm gains and biases are recognised without.

    Args:
        owner: the module that holds the parameter directly.
        parameter_name: its name on that module, such as "weight".
        role: `embedding` (inputs of fixed size: token or position tables, an input layer), `hidden`
            (fan_in grows with width; may be sparse), `hidden_residual` (the same, and writes to a
            residual stream), `head` (reads the hidden width, outputs of fixed size), `norm`,
            `bias`.
        base_fan_in: fan_in of this weight at the base shape, > 0; needed for hidden and
            hidden_residual unless the parameterization is SP from its own init_std.
        in_block: whether the parameter sits inside a residual block; hidden_residual always does.

    Raises:
        ConfigError: no such parameter, an unknown role, or a base_fan_in that is not positive.
    """
    held = [name for name, value in owner._parameters.items() if value is not None]
    if parameter_name not in held:
        raise ConfigError(
            parameter_name,
            f"is no parameter of this {type(owner).__name__}",
            allowed=held,
            nearest_to=parameter_name,
        )
    if role not in ROLES:
        raise ConfigError("role", f"unknown, for {parameter_name}", value=role, allowed=ROLES, nearest_to=role)
    if base_fan_in is not None and not base_fan_in > 0:
        raise ConfigError("base_fan_in", f"out of range, for {parameter_name}", value=base_fan_in, allowed="> 0")
    tags: dict[str, Tag] = owner.__dict__.setdefault(_TAGS, {})
    tags[parameter_name] = Tag(role=role, base_fan_in=base_fan_in, in_block=in_block or role == "hidden_residual")


def collect(module: nn.Module) -> list[TaggedParameter]:
    """Return every trainable parameter of a module with its tag, in the module's own order.

    A parameter that several modules share (a tied head) appears once: under the name and the rule
    of the embedding if one of its tags says so. Parameters with requires_grad=False are left alone:
    whoever froze them gave them their values.

    Args:
        module: any nn.Module, compiled or not.

    Raises:
        ConfigError: a parameter without a role that can be known, two different roles for one
            parameter, or a layout in which fan_in cannot be read off.
    """
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, owner in module.named_modules():
        for local_name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                name = f"{prefix}.{local_name}".removeprefix(".").replace(_COMPILED, "")
                holders.setdefault(id(parameter), []).append((name, owner, local_name))
    return [_tagged(places) for places in holders.values()]


def _tagged(places: list[tuple[str, nn.Module, str]]) -> TaggedParameter:
    """Return one parameter from all the places (name, owner, local name) that hold it."""
    found = [(place, known) for place in places if (known := _own_tag(place[1], place[2]))]
    roles = {known.role for _, known in found}
    if not found:
        found = [(places[0], _guess(*places[0]))]
    elif "embedding" in roles:
        found = [entry for entry in found if entry[1].role == "embedding"]
    elif len(roles) > 1:
        names = ", ".join(f"{place[0]} ({known.role})" for place, known in found)
        raise ConfigError(
            places[0][0],
            f"one tied parameter has several roles: {names}",
            allowed="one role, or a tie in which one tag is embedding",
        )
    (name, owner, local_name), known = found[0]
    parameter = owner._parameters[local_name]
    assert parameter is not None
    if parameter.dim() > 1 and getattr(owner, "transposed", False):
        raise ConfigError(
            name,
            f"{type(owner).__name__} stores its weight input first, so its fan_in is not at hand",
            allowed="layers that store [out, in, ...]",
        )
    if isinstance(owner, CompactLinear) and local_name == "values":
        name = name.removesuffix(local_name) + STANDS_FOR
        fan_out, fan_in = owner.fan_out, owner.fan_in
    else:
        fan_out = parameter.shape[0] if parameter.dim() > 1 else 1
        fan_in = parameter.numel() // max(1, fan_out)
    return TaggedParameter(
        name=name,
        owner=owner,
        local_name=local_name,
        parameter=parameter,
        tag=known,
        fan_out=fan_out,
        fan_in=fan_in,
    )


def _own_tag(owner: nn.Module, local_name: str) -> Tag | None:
    return cast("dict[str, Tag]", owner.__dict__.get(_TAGS, {})).get(local_name)


def _guess(name: str, owner: nn.Module, local_name: str) -> Tag:
    """Return the tag of an untagged norm gain or bias; it is in a block if its owner's tags are."""
    parameter = cast(Tensor, owner._parameters[local_name])
    if parameter.dim() > 1:
        raise ConfigError(
            name,
            f"has no role (shape {tuple(parameter.shape)}): tag it with supar_sweep.tag(owner, {local_name!r}, role)",
            allowed=ROLES,
        )
    siblings = cast("dict[str, Tag]", owner.__dict__.get(_TAGS, {})).values()
    in_block = any(sibling.in_block for sibling in siblings)
    if "bias" in local_name:
        return Tag(role="bias", in_block=in_block)
    if isinstance(owner, _NORMS) or "norm" in type(owner).__name__.lower():
        return Tag(role="norm", in_block=in_block)
    # a gain taken for a bias would start at 0 and silence its layer, so there is no default
    raise ConfigError(
        name,
        f"has no role: a parameter of {type(owner).__name__}, neither called bias nor in a norm; "
        f"tag it with supar_sweep.tag(owner, {local_name!r}, role)",
        allowed=("norm (starts at 1)", "bias (starts at 0)"),
    )
