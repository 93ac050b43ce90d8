"""Which role each parameter plays: tags on the modules that own them, and all of them as a list.

A tag says what a tensor is (rules/parameterization.py says what follows from it). Tags are a plain
attribute of the owning module, so they survive deepcopy, pickling, `.to()` and torch.compile, and
never enter the state_dict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import ALL_ROLES, SPARSE_ROLES, Role
from supar_sweep.sparse.compact import STANDS_FOR, CompactLinear
from supar_sweep.sparse.owners import named_owners
from supar_sweep.training.layouts import MATRIX, Layout, layout_of, refusal
from supar_sweep.training.untagged import guess_role

_TAGS = "_supar_tags"


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What one parameter is.

    Args:
        role: one of ALL_ROLES.
        base_fan_in: its fan_in at the base shape, > 0; None where the role's rules do not read it.
        in_block: whether it sits inside a residual block (depth rules act only there).
        fan_in, fan_out: of one matrix of the tensor; None = as its owner is known to store it.
    """

    role: Role
    base_fan_in: float | None = None
    in_block: bool = False
    fan_in: int | None = None
    fan_out: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaggedParameter:
    """One parameter of a model with its tag.

    Args:
        name: full dotted name, without the prefixes of wrappers (torch.compile, DDP, ...): noise and masks are drawn from it.
            The values of a compact layer go by the name of the weight that they stand for.
        owner: the module that holds it.
        local_name: its name on the owner.
        parameter: the tensor.
        tag: its tag.
        layout: which of its axes are outputs, which inputs. Of a compact layer, of the matrix whose live entries it stores.
        n_matrices, fan_out, fan_in: the tensor as n_matrices matrices [fan_out, fan_in], nearly always one. 1-d parameters of n
            elements are [1, n]. A convolution [out, in, kh, kw] has fan_in = in * kh * kw. An embedding is stored
            [n_vocab, width]. Experts [E, out, in] are E matrices.
    """

    name: str
    owner: nn.Module
    local_name: str
    parameter: nn.Parameter
    tag: Tag
    layout: Layout
    n_matrices: int
    fan_out: int
    fan_in: int

    @property
    def matrices(self) -> list[str]:
        """The name of each matrix, from which its noise and its mask are drawn: several are counted, as in "experts[0]"."""
        return [self.name] if self.n_matrices == 1 else [f"{self.name}[{index}]" for index in range(self.n_matrices)]


def tag(
    owner: nn.Module,
    parameter_name: str,
    role: Role,
    *,
    base_fan_in: float | None = None,
    in_block: bool = False,
    fan_in: int | None = None,
    fan_out: int | None = None,
) -> None:
    """Tag one parameter with its role. Tagging again replaces the tag.

    Weights of two or more dimensions must be tagged. Norm gains and biases are recognised without,
    where their class is known and they hold nothing that their start would destroy.

    Args:
        owner: the module that holds the parameter directly.
        parameter_name: its name on that module, such as "weight".
        role: `embedding` (inputs of fixed size: token or position tables, an input layer), `hidden`
            (fan_in grows with width; may be sparse), `hidden_residual` (the same, and writes to a
            residual stream), `head` (reads the hidden width, outputs of fixed size), `norm` (starts
            at 1), `bias` (starts at 0), `own` (keeps the values that it has; lr and eps as a
            bias's, no decay: gates, a forget gate's bias, LayerScale, dt_bias, A_log).
        base_fan_in: fan_in of this weight at the base shape, > 0; needed for hidden and
            hidden_residual unless the parameterization is SP from its own init_std, or
            `parameterize` gets the base as a model.
        in_block: whether the parameter sits inside a residual block; hidden_residual always does.
        fan_in: how many inputs one output of this weight sums over, for hidden and hidden_residual
            where the owner does not tell: weights of three or more axes that are no convolution's,
            or stored [in, out]. Experts stored [E, out, in] or [E, in, out] have fan_in = in: each
            expert is a matrix of its own.
        fan_out: outputs of one matrix, where several axes are: a weight [heads, d_head, in] has
            fan_out = heads * d_head, else each head would be a matrix. Only beside fan_in.

    Raises:
        ConfigError: no such parameter, an unknown role, a base_fan_in that is not positive, or a
            fan_in or fan_out that is not a count, or that this role does not read.
    """
    held = [name for name, value in owner._parameters.items() if value is not None]
    if parameter_name not in held:
        raise ConfigError(
            parameter_name,
            f"is not a parameter of this {type(owner).__name__}",
            allowed=held,
            nearest_to=parameter_name,
        )
    if role not in ALL_ROLES:
        raise ConfigError("role", f"unknown, for {parameter_name}", value=role, allowed=ALL_ROLES, nearest_to=role)
    if base_fan_in is not None and not base_fan_in > 0:
        raise ConfigError("base_fan_in", f"out of range, for {parameter_name}", value=base_fan_in, allowed="> 0")
    for key, value in (("fan_in", fan_in), ("fan_out", fan_out)):
        if value is None:
            continue
        if not value >= 1 or value != int(value):
            raise ConfigError(key, f"out of range, for {parameter_name}", value=value, allowed="an integer >= 1")
        if role not in SPARSE_ROLES:
            raise ConfigError(
                key,
                f"has no effect on {parameter_name}: role {role} does not read it",
                allowed="roles hidden, hidden_residual",
            )
    if fan_out is not None and fan_in is None:
        raise ConfigError("fan_out", f"has no effect on {parameter_name} without fan_in", value=fan_out)
    tags: dict[str, Tag] = owner.__dict__.setdefault(_TAGS, {})
    tags[parameter_name] = Tag(
        role=role,
        base_fan_in=base_fan_in,
        in_block=in_block or role == "hidden_residual",
        fan_in=fan_in,
        fan_out=fan_out,
    )


def collect(module: nn.Module, *, starts: bool = True) -> list[TaggedParameter]:
    """Return every trainable parameter of a module with its tag, in the module's own order.

    A parameter that several modules share (a tied head) appears once: under the name and the rule
    of the embedding if one of its tags says so. Parameters with requires_grad=False are left alone:
    whoever froze them gave them their values.

    Args:
        module: any nn.Module, compiled or wrapped or not.
        starts: whether the parameters are to be started anew; then untagged ones must hold nothing that this would destroy.

    Raises:
        ConfigError: a parameter without a role that can be known, two different roles for one
            parameter, or a layout in which fan_in cannot be read off.
    """
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, owner in named_owners(module):
        for local_name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                holders.setdefault(id(parameter), []).append((f"{prefix}{local_name}", owner, local_name))
    return [_tagged(places, starts) for places in holders.values()]


def _tagged(places: list[tuple[str, nn.Module, str]], starts: bool) -> TaggedParameter:
    """Return one parameter from all the places (name, owner, local name) that hold it."""
    found = [(place, known) for place in places if (known := _own_tag(place[1], place[2]))]
    roles = {known.role for _, known in found}
    if not found:
        found = [(places[0], _guess(*places[0], starts))]
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
    name = stored_name(name, owner)
    shape = stored_shape(owner, local_name)
    layout = layout_of(name, owner, shape, known.fan_in, known.fan_out)
    if layout is None:
        if known.role in SPARSE_ROLES:
            raise refusal(name, owner, shape)
        layout = MATRIX  # its numbers do not depend on it
    n_matrices, fan_out, fan_in = layout.sizes(shape)
    return TaggedParameter(
        name=name,
        owner=owner,
        local_name=local_name,
        parameter=parameter,
        tag=known,
        layout=layout,
        n_matrices=n_matrices,
        fan_out=fan_out,
        fan_in=fan_in,
    )


def stored_name(name: str, owner: nn.Module) -> str:
    """Return a parameter's name; that of a compact layer's values is the name of the weight that they stand for.

    Args:
        name: full dotted name.
        owner: the module that holds it.
    """
    if isinstance(owner, CompactLinear) and name.rpartition(".")[2] == "values":
        return name.removesuffix("values") + STANDS_FOR
    return name


def stored_shape(owner: nn.Module, local_name: str) -> tuple[int, ...]:
    """Return the shape of a parameter; of a compact layer's values, of the matrix whose live entries they are.

    Args:
        owner: the module that holds it.
        local_name: its name there.
    """
    if isinstance(owner, CompactLinear) and local_name == "values":
        return owner.fan_out, owner.fan_in
    parameter = owner._parameters[local_name]
    assert parameter is not None
    return tuple(parameter.shape)


def _own_tag(owner: nn.Module, local_name: str) -> Tag | None:
    return cast("dict[str, Tag]", owner.__dict__.get(_TAGS, {})).get(local_name)


def _guess(name: str, owner: nn.Module, local_name: str, starts: bool) -> Tag:
    """Return the tag of an untagged norm gain or bias; it is in a block if its owner's tags are."""
    parameter = owner._parameters[local_name]
    assert parameter is not None
    role = guess_role(name, owner, local_name, parameter, starts=starts)
    siblings = cast("dict[str, Tag]", owner.__dict__.get(_TAGS, {})).values()
    return Tag(role=role, in_block=any(sibling.in_block for sibling in siblings))
