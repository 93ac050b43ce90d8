"""From roles to numbers: init, masks, parameter groups, and the table of all parameters.

One code path for every parameterization: the same noise and masks (functions of seed, parameter
name and position), other factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import HParams, Ratios
from supar_sweep.rules.parameterization import SPARSE_ROLES, Method, Role
from supar_sweep.rules.transfer import RoleHParams, role_hparams
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.density import live_counts
from supar_sweep.sparse.linear import attach_mask, named_masks
from supar_sweep.sparse.masks import MASK_STREAM, LivePositions, dense_mask, live_positions
from supar_sweep.sparse.noise import BLOCK_ELEMENTS, normal, normal_block, stream_key
from supar_sweep.training.tags import TaggedParameter, collect

INIT_STREAM = "init"
"""The stream name of init noise: stream_key(seed, INIT_STREAM, parameter name)."""

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
        measured_std: standard deviation of the live entries as written, around 0 (norms: around 1).
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


def parameterize(
    module: nn.Module,
    *,
    method: Method,
    hparams: HParams,
    ratios: Ratios,
    density: float,
    seed: int,
    layer_density: str = "uniform",
    eps: float | None = None,
    pruned_for: Literal["final", "current"] | None = None,
) -> list[ParameterPlan]:
    """Write a tagged module's start in place, mask its sparse layers; return a plan per parameter.

    Hidden weights are N(0, init_std^2) at their live positions and 0 elsewhere, norms 1, biases 0.
    Every sparse layer is corrected by its own achieved density. Where nothing is masked (density 1)
    no mask or hook is attached.

    Args:
        module: tagged with `supar_sweep.tag`; any device and floating dtype.
        method: the rules in force.
        hparams: hyperparameters in base units.
        ratios: m_d of the model's width (for roles without a growing fan_in, and for eps), m_L and
            n_layer. m_rho is not read: it is each layer's achieved density.
        density: live share of the hidden weights, in (0, 1].
        seed: of noise and masks, any integer.
        layer_density: how density is shared between layers: "uniform" or "er".
        eps: AdamW's eps in base units; None for SGD.
        pruned_for: the masks start full, to be pruned to `density` in training; init and lr are those of the "final" density,
            or of the "current" one, which is 1 at the start.

    Raises:
        ConfigError: a parameter without a role or base_fan_in, an unknown layer_density, a density
            out of range or one that leaves a layer without a live weight, or AdamW without eps.

    Source: SuPar table 1 (init_var, lr of hidden weights); app. D.4 (each layer's own density).
    """
    parameters = collect(module)
    sparse = [item for item in parameters if item.tag.role in SPARSE_ROLES]
    counts = live_counts(layer_density, {item.name: (item.fan_out, item.fan_in) for item in sparse}, density)
    plans = []
    for item in parameters:
        size = item.fan_out * item.fan_in
        final = counts.get(item.name, size)
        live = size if pruned_for else final
        m_d = _m_d(item, method, ratios)
        m_rho = (live if pruned_for == "current" else final) / size
        wanted = _target(item, method, replace(ratios, m_d=m_d, m_rho=m_rho), hparams, eps)
        if m_d != ratios.m_d:
            # gradients fall with the width that the logits multiplier knows, whatever this layer's
            # own fan_in does; density they do not feel
            wanted = replace(wanted, eps=_target(item, method, ratios, hparams, eps).eps)
        _write(item, wanted.init_std, live, seed, masked=final < size)
        plan = ParameterPlan(
            name=item.name,
            role=item.tag.role,
            shape=_shape(item),
            live=live,
            density=live / size,
            m_d=m_d,
            hparams=wanted,
            measured_std=math.nan,
            parameter=item.parameter,
            owner=item.owner,
            local_name=item.local_name,
        )
        plans.append(replace(plan, measured_std=_measure(plan)))
    return plans


def check_init(plans: Sequence[ParameterPlan]) -> None:
    """Raise ConfigError for the first parameter that does not start as planned.

    To be called before the first step. The weights are measured now, so an initialisation that ran
    after `parameterize`, or wrote elsewhere, is found.

    Args:
        plans: from `parameterize`.

    Raises:
        ConfigError: with the parameter's name: the standard deviation of its live entries is off by
            more than sampling explains, a norm or bias is not constant, or a masked entry is not 0.
    """
    for plan in plans:
        mask = _mask(plan)
        if mask is not None and bool((plan.parameter.detach()[~mask] != 0).any()):
            raise ConfigError(plan.name, "has masked entries that are not 0")
        measured, wanted = _measure(plan), plan.hparams.init_std
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


def final_live(plans: Sequence[ParameterPlan], cell: CellConfig) -> dict[str, int]:
    """Return sparse parameter -> its live weights at the cell's density, which pruned masks reach at last.

    Args:
        plans: from `parameterize`.
        cell: gives density and layer_density.
    """
    shapes = {plan.name: (plan.shape[0], plan.shape[1]) for plan in plans if plan.role in SPARSE_ROLES}
    return live_counts(cell.layer_density, shapes, cell.density)


def param_groups(plans: Sequence[ParameterPlan], apart: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: one per distinct (lr, weight_decay, eps), in
    order of appearance.

    Each is {"params", "lr", "weight_decay"} and, for AdamW, "eps". Schedules must multiply the
    groups' lr, never set it.

    Args:
        plans: from `parameterize`.
        apart: name -> a number; parameters with other numbers are in other groups, because their lr will differ.
    """
    groups: dict[tuple[float | None, ...], dict[str, Any]] = {}
    for plan in plans:
        lr, weight_decay, eps = plan.hparams.lr, plan.hparams.weight_decay, plan.hparams.eps
        group: dict[str, Any] = {"params": [], "lr": lr, "weight_decay": weight_decay}
        if eps is not None:
            group["eps"] = eps
        key = (lr, weight_decay, eps, (apart or {}).get(plan.name))
        groups.setdefault(key, group)["params"].append(plan.parameter)
    return list(groups.values())


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


def _m_d(item: TaggedParameter, method: Method, ratios: Ratios) -> float:
    if item.tag.role not in SPARSE_ROLES:
        return ratios.m_d
    if item.tag.base_fan_in is not None:
        return item.fan_in / item.tag.base_fan_in
    if method.parameterization == "sp" and method.sp_start == "own":
        return 1.0
    raise ConfigError(
        item.name,
        f"has no base_fan_in, which {method.parameterization} needs for role {item.tag.role}",
        value=None,
        allowed="its fan_in at the base shape: supar_sweep.tag(..., base_fan_in=...)",
    )


def _target(item: TaggedParameter, method: Method, ratios: Ratios, hparams: HParams, eps: float | None) -> RoleHParams:
    return role_hparams(item.tag.role, method, ratios, hparams, in_block=item.tag.in_block, eps=eps)


@torch.no_grad()
def _write(item: TaggedParameter, init_std: float, live: int, seed: int, *, masked: bool) -> None:
    """Write one parameter's start in place; mask it if it has, or will have, dead entries, or had a mask."""
    parameter = item.parameter
    if item.tag.role in ("norm", "bias"):
        parameter.fill_(1.0 if item.tag.role == "norm" else 0.0)
        return
    dtype = "float64" if parameter.dtype == torch.float64 else "float32"
    if isinstance(item.owner, CompactLinear):
        positions = live_positions(stream_key(seed, MASK_STREAM, item.name), (item.fan_out, item.fan_in), live)
        item.owner.set_pattern(positions)
        values = _normal_at(stream_key(seed, INIT_STREAM, item.name), positions, dtype)
        values *= init_std
        parameter.copy_(torch.from_numpy(values))
        return
    noise = normal_block(stream_key(seed, INIT_STREAM, item.name), item.fan_out, item.fan_in, dtype)
    noise *= init_std
    parameter.copy_(torch.from_numpy(noise).view(parameter.shape))
    if masked or f"{item.local_name}_mask" in item.owner._buffers:
        mask = dense_mask(stream_key(seed, MASK_STREAM, item.name), (item.fan_out, item.fan_in), live)
        attach_mask(item.owner, item.local_name, mask.view(parameter.shape), keep_full=masked)


def _shape(item: TaggedParameter) -> tuple[int, ...]:
    if isinstance(item.owner, CompactLinear) and item.tag.role in SPARSE_ROLES:
        return item.fan_out, item.fan_in
    return tuple(item.parameter.shape)


def _normal_at(key: int, live: LivePositions, dtype: str) -> npt.NDArray[np.floating]:
    """Return [nnz] the noise of a dense layer at its live positions, with a few MB of scratch."""
    values = np.empty(live.rows.size, dtype=dtype)
    for start in range(0, values.size, BLOCK_ELEMENTS):
        part = slice(start, start + BLOCK_ELEMENTS)
        values[part] = normal(key, live.rows[part], live.cols[part], dtype)
    return values


def _mask(plan: ParameterPlan) -> torch.Tensor | None:
    return named_masks(plan.owner).get(plan.local_name)


@torch.no_grad()
def _measure(plan: ParameterPlan) -> float:
    """Return the root mean square of the live entries' distance from 0 (norms: from 1)."""
    values = plan.parameter.detach()
    if plan.role == "norm":
        values = values - 1.0
    # dead entries are exactly 0 (check_init looks), so they add nothing to the sum
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) / math.sqrt(plan.live)
