"""Parameter groups for torch's optimizers: the plans' numbers, as far as an optimizer can take them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

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
            none, or one of another meaning (Adafactor's pair, Muon's); None = as for AdamW or SGD, after the method.
        roles: only parameters of these; None = all. Muon takes ("hidden", "hidden_residual"), another optimizer the rest.

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
        if "eps" in takes and numbers.eps is not None:
            group["eps"] = numbers.eps
        made.append({**group, "name": role if number == 1 else f"{role} {number}", "role": role})
    return made


def _known_roles(roles: Collection[Role]) -> Collection[Role]:
    for role in roles:
        if role not in ALL_ROLES:
            raise ConfigError("roles", "unknown role", value=role, allowed=ALL_ROLES, nearest_to=str(role))
    return roles


def _taken(optimizer: type[torch.optim.Optimizer], plans: Sequence[ParameterPlan]) -> set[str]:
    """Return which of weight_decay and eps the groups of this class hold; see `param_groups` for the errors."""
    if not inspect.isclass(cast(object, optimizer)) or not issubclass(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "optimizer", "is no class of optimizers", value=optimizer, allowed="such as torch.optim.AdamW"
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
    takes = {name for name in ("weight_decay", "eps") if name in settings}
    if "weight_decay" not in takes and any(plan.hparams.weight_decay for plan in plans):
        raise ConfigError(
            "weight_decay", f"has no effect: {optimizer.__name__} knows none", allowed="HParams(weight_decay=0.0, ...)"
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
                plan.name, "is no matrix, and Muon takes nothing else", value=plan.role, allowed=f"roles={SPARSE_ROLES}"
            )
    warnings.warn(
        "the rules have no row for Muon: its groups hold AdamW's learning rates, and its own step is scaled by shape already",
        stacklevel=4,
    )
