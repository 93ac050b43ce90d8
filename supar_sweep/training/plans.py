"""What each parameter starts from and is trained with: the plan, the check before the first step, the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import Role
from supar_sweep.rules.transfer import RoleHParams
from supar_sweep.sparse.linear import named_masks

MAX_ROUNDING = 2.0**-7
"""How far, relatively, the size of kept values may lie off: a cast to bfloat16 rounds each by half of that at most."""

MAX_STANDARD_ERRORS = 6.0
"""How far a measured standard deviation may lie off; chance goes beyond once in 5e8 layers."""


@dataclass(frozen=True, kw_only=True)
class ParameterPlan:
    """What one parameter starts from and is trained with.

    Args:
        name: full dotted name.
        role: its role.
        shape: of the tensor; of a compact layer's values, (fan_out, fan_in) of the matrix they are of.
        live: number of live entries.
        density: live / all entries, the layer's own m_rho.
        m_d: fan_in / base fan_in; for roles whose fan_in does not grow with width, the model's
            width ratio.
        hparams: init_std, lr, weight_decay, eps at the target.
        measured_std: standard deviation of the live entries as they start, around 0 (norms: around 1).
        parameter: the tensor itself; a compact layer's values are [live].
        owner: the module that holds it.
        local_name: its name on the owner.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    live: int
    density: float
    m_d: float
    hparams: RoleHParams
    measured_std: float
    parameter: nn.Parameter
    owner: nn.Module
    local_name: str


def check_init(plans: Sequence[ParameterPlan]) -> None:
    """Raise ConfigError for the first parameter that does not start as planned.

    To be called before the first step. The weights are measured now, so an initialisation that ran
    after `parameterize`, or wrote elsewhere, is found.

    Args:
        plans: from `parameterize`.

    Raises:
        ConfigError: with the parameter's name: the standard deviation of its live entries is off by
            more than sampling explains, a norm or bias is not constant, a parameter of role `own`
            has other values than it had, a masked entry is not 0, or the parameter was replaced.
    """
    for plan in plans:
        check_current(plan)
        if plan.role == "own":
            _check_own(plan)
            continue
        mask = _mask(plan)
        if mask is not None and bool((plan.parameter.detach()[~mask] != 0).any()):
            raise ConfigError(plan.name, "has masked entries that are not 0")
        measured, wanted = measure(plan), plan.hparams.init_std
        # standard error of a root mean square of n normal numbers: std / sqrt(2 n)
        tolerance = wanted * (MAX_STANDARD_ERRORS / math.sqrt(2 * plan.live))
        if not abs(measured - wanted) <= tolerance or (wanted > 0 and measured == 0):
            around = "1" if plan.role == "norm" else "0"
            raise ConfigError(
                plan.name,
                f"starts with the wrong standard deviation around {around} (role {plan.role})",
                value=measured,
                allowed=f"{wanted:.6g} +- {tolerance:.2g} ({plan.live} live entries)",
            )


def check_current(plan: ParameterPlan) -> None:
    """Raise ConfigError where the model holds another parameter by now than the planned one.

    Args:
        plan: of the parameter.
    """
    if plan.owner._parameters.get(plan.local_name) is plan.parameter:
        return
    raise ConfigError(
        plan.name,
        "was replaced after parameterize, as fully_shard, load_state_dict(assign=True) and parametrizations do: an optimizer "
        "over its plan would train nothing",
        allowed="groups by name: named = dict(model.named_parameters()), and for each plan {'params': [named[plan.name]], "
        "'lr': plan.hparams.lr, 'weight_decay': plan.hparams.weight_decay, 'eps': plan.hparams.eps}",
    )


def parameter_rows(plans: Sequence[ParameterPlan]) -> list[dict[str, Any]]:
    """Return one plain row per parameter: name, role, shape, live, density, m_d, init_std,
    measured_std, lr, weight_decay, eps.

    Args:
        plans: from `parameterize`.
    """
    return [
        {
            "name": plan.name,
            "role": plan.role,
            "shape": list(plan.shape),
            "live": plan.live,
            "density": plan.density,
            "m_d": plan.m_d,
            "init_std": plan.hparams.init_std,
            "measured_std": plan.measured_std,
            "lr": plan.hparams.lr,
            "weight_decay": plan.hparams.weight_decay,
            "eps": plan.hparams.eps,
        }
        for plan in plans
    ]


def _check_own(plan: ParameterPlan) -> None:
    """Raise ConfigError where a parameter that keeps its values has lost them."""
    measured = measure(plan)
    if not math.isclose(measured, plan.measured_std, rel_tol=MAX_ROUNDING):
        raise ConfigError(
            plan.name,
            "was to keep its values (role own), and holds others now (root mean square)",
            value=measured,
            allowed=f"{plan.measured_std:.6g}",
        )


def _mask(plan: ParameterPlan) -> torch.Tensor | None:
    return named_masks(plan.owner).get(plan.local_name)


@torch.no_grad()
def measure(plan: ParameterPlan) -> float:
    """Return the root mean square of the live entries' distance from 0 (norms: from 1).

    Args:
        plan: of the parameter; its dead entries are 0.
    """
    values = plan.parameter.detach()
    if plan.role == "norm":
        values = values - 1.0
    # dead entries are exactly 0 (check_init looks), so they add nothing to the sum
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) / math.sqrt(plan.live)
