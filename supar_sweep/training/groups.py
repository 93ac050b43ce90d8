"""Parameter groups for torch's optimizers: the plans' numbers, as far as an optimizer can take them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import ALL_ROLES, SPARSE_ROLES, OptimizerName, Role
from supar_sweep.training.plans import ParameterPlan, check_current

RULES_OF: Mapping[str, OptimizerName] = {
    **dict.fromkeys(("SGD", "ASGD"), "sgd"),  # steps as long as the gradient
    **dict.fromkeys(("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam", "Adafactor", "Muon"), "adamw"),
    **dict.fromkeys(("Adadelta", "Adagrad", "RMSprop", "Rprop"), "adamw"),
}
"""Class -> the optimizer whose rules fit it: does a step's length depend on that of the gradient? Subclasses go by their base."""

OTHER_EPS = ("Adadelta", "Adafactor", "Muon")
"""Classes whose eps is not added to the root of an average of squared gradients, so the rules' eps is none for them."""

L2_DECAY = ("Adadelta", "Adagrad", "Adamax", "RMSprop")
"""Classes that add weight decay to the gradient, where its strength no longer goes by the rules' lr * weight_decay."""


def param_groups(
    plans: Sequence[ParameterPlan],
    apart: Mapping[str, float] | None = None,
    *,
    optimizer: type[torch.optim.Optimizer] | None = None,
    roles: Collection[Role] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: one per distinct (lr, weight_decay, eps), in
    order of appearance.

    Each is {"params", "lr", "weight_decay", "name", "role"} and, for AdamW, "eps". `role` is that of
    its parameters, several joined by "+"; `name` is the same, with a number where several groups
    would share it. Schedules must multiply the groups' lr, never set it.

    Args:
        plans: from `parameterize`.
        apart: name -> a number; parameters with other numbers are in other groups, because their lr will differ.
        optimizer: the class that will take the groups: they then hold what it has. eps is left out where the class has
            none, or one of another meaning (Adafactor's pair, Muon's), and `decoupled_weight_decay` is True where the class
            has it (Adam, NAdam, RAdam), as the rules ask; None = as for AdamW or SGD, after the method.
        roles: only parameters of these; None = all. Muon takes ("hidden", "hidden_residual"), another optimizer the rest.

    Warns where a class adds weight decay to the gradient (RMSprop, Adagrad, Adamax, Adadelta), and of Muon.

    Raises:
        ConfigError: a class that the plans' rules are not for (SGD over adamw's, or the reverse), one that would ignore a
            weight decay, one that cannot take a parameter of this shape, roles that do not exist or that no parameter
            has, or a parameter that was replaced since (by fully_shard, for one): no step would reach it.
    """
    chosen = list(plans) if roles is None else [plan for plan in plans if plan.role in _known_roles(roles)]
    if roles is not None and not chosen:
        raise ConfigError("roles", "no parameter has one", value=tuple(roles), allowed={plan.role for plan in plans})
    for plan in chosen:
        check_current(plan)
    takes = {"weight_decay", "eps"} if optimizer is None else _taken(optimizer, chosen)
    groups: dict[tuple[float | None, ...], list[ParameterPlan]] = {}
    for plan in chosen:
        numbers = plan.hparams
        key = (numbers.lr, numbers.weight_decay, numbers.eps, (apart or {}).get(plan.name))
        groups.setdefault(key, []).append(plan)
    made: list[dict[str, Any]] = []
    for members in groups.values():
        numbers, role = members[0].hparams, "+".join(dict.fromkeys(plan.role for plan in members))
        number = 1 + sum(group["role"] == role for group in made)
        group: dict[str, Any] = {"params": [plan.parameter for plan in members], "lr": numbers.lr}
        if "weight_decay" in takes:
            group["weight_decay"] = numbers.weight_decay
        if "decoupled_weight_decay" in takes and numbers.weight_decay:
            group["decoupled_weight_decay"] = True
        if "eps" in takes and numbers.eps is not None:
            group["eps"] = numbers.eps
        made.append({**group, "name": role if number == 1 else f"{role} {number}", "role": role})
    return made


def _known_roles(roles: Collection[Role]) -> Collection[Role]:
    if isinstance(roles, str):
        raise ConfigError("roles", "is a single string", value=roles, allowed=f"several roles, or one as ({roles!r},)")
    for role in roles:
        if role not in ALL_ROLES:
            raise ConfigError("roles", "unknown role", value=role, allowed=ALL_ROLES, nearest_to=str(role))
    return roles


def _taken(optimizer: type[torch.optim.Optimizer], plans: Sequence[ParameterPlan]) -> set[str]:
    """Return which settings the groups of this class hold; see `param_groups` for the errors."""
    given: object = optimizer
    if not (inspect.isclass(given) and issubclass(given, torch.optim.Optimizer)):
        value = type(given).__name__ if isinstance(given, torch.optim.Optimizer) else given
        raise ConfigError(
            "optimizer", "is not an optimizer class", value=value, allowed="a class, such as torch.optim.AdamW"
        )
    names = [kind.__name__ for kind in optimizer.__mro__]
    fitting = next((RULES_OF[name] for name in names if name in RULES_OF), None)
    planned: OptimizerName = "sgd" if all(plan.hparams.eps is None for plan in plans) else "adamw"
    if fitting not in (None, planned):
        raise ConfigError(
            "optimizer",
            f"the plans hold the learning rates of {planned}, which are not those of {optimizer.__name__}",
            allowed=f"parameterize with Method(optimizer={fitting!r})",
        )
    settings = inspect.signature(optimizer).parameters
    takes = {name for name in ("weight_decay", "decoupled_weight_decay", "eps") if name in settings}
    decays = any(plan.hparams.weight_decay for plan in plans)
    if "weight_decay" not in takes and decays:
        raise ConfigError(
            "weight_decay",
            f"has no effect: {optimizer.__name__} does not have one",
            allowed="HParams(weight_decay=0.0, ...)",
        )
    if decays and set(names) & set(L2_DECAY):
        warnings.warn(
            f"{optimizer.__name__} adds weight decay to the gradient. The rules are for decay that is decoupled from it: "
            "use AdamW, or HParams(weight_decay=0.0, ...)",
            stacklevel=3,
        )
    if set(names) & set(OTHER_EPS):
        takes -= {"eps"}
    if "Muon" in names:
        _check_muon(plans)
    return takes


def _check_muon(plans: Sequence[ParameterPlan]) -> None:
    for plan in plans:
        if plan.parameter.dim() != 2:
            raise ConfigError(
                plan.name,
                "is not a matrix, and Muon takes nothing else",
                value=plan.role,
                allowed=f"roles={SPARSE_ROLES}",
            )
    problem = "the rules have no row for Muon. Its groups hold AdamW's learning rates; its own step is scaled by shape already"
    if any(plan.density < 1 for plan in plans):
        problem += ". It also moves pruned weights, unless you call supar_sweep.hold_masks(optimizer, plans)"
    warnings.warn(problem, stacklevel=4)
