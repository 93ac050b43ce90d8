"""From roles to numbers: init, masks, parameter groups, and the table of all parameters.

One code path for every parameterization: the same noise and masks (functions of seed, parameter
name and position), other factors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import HParams, Ratios
from supar_sweep.rules.parameterization import COLUMNS, SPARSE_ROLES, Method
from supar_sweep.rules.transfer import RoleHParams, role_hparams
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.density import FEW_LIVE, few_live, live_counts
from supar_sweep.sparse.linear import attach_mask
from supar_sweep.sparse.masks import MASK_STREAM, LivePositions, dense_mask, live_positions
from supar_sweep.sparse.noise import BLOCK_ELEMENTS, normal, normal_block, stream_key
from supar_sweep.training.base_model import (
    GIVE_RATIOS,
    Base,
    base_shapes,
    check_ratios,
    parameter_shapes,
    ratios_of,
    with_base,
)
from supar_sweep.training.groups import param_groups as param_groups
from supar_sweep.training.plans import ParameterPlan as ParameterPlan
from supar_sweep.training.plans import check_init as check_init
from supar_sweep.training.plans import measure
from supar_sweep.training.plans import parameter_rows as parameter_rows
from supar_sweep.training.tags import TaggedParameter, collect, stored_shape

INIT_STREAM = "init"
"""The stream name of init noise: stream_key(seed, INIT_STREAM, parameter name)."""


def parameterize(
    module: nn.Module,
    *,
    method: Method,
    hparams: HParams,
    ratios: Ratios | None = None,
    density: float,
    seed: int,
    layer_density: str = "uniform",
    eps: float | None = None,
    pruned_for: Literal["final", "current"] | None = None,
    base: Base | None = None,
    write: bool = True,
) -> list[ParameterPlan]:
    """Write a tagged module's start in place, mask its sparse layers; return a plan per parameter.

    Hidden weights are N(0, init_std^2) at their live positions and 0 elsewhere, norms 1, biases 0; parameters of role `own`
    keep their values. Every sparse layer is corrected by its own achieved density. Where nothing is masked (density 1)
    no mask or hook is attached. Warns where SuPar's corrections are asked of fewer than 16 live weights a neuron.

    ratios must agree with the tags. In a model with an embedding or a head, m_d is its width's ratio, and the fan_in of
    at least one hidden weight must grow by it; others may grow by other factors (an MLP of another expansion). With `base`,
    every head must grow by m_d as well, or without a head one of the embeddings that grow, and m_L must be the ratio of the
    numbers of blocks.

    Args:
        module: tagged with `supar_sweep.tag`; any device and floating dtype.
        method: the rules in force.
        hparams: hyperparameters in base units.
        ratios: m_d of the model's width (for roles without a growing fan_in, and for eps), m_L and
            n_layer. m_rho is not read: it is each layer's achieved density. None = as `base` has them.
        density: live share of the hidden weights, in (0, 1].
        seed: of noise and masks, any integer.
        layer_density: how density is shared between layers: "uniform" or "er".
        eps: AdamW's eps in base units; None for SGD.
        pruned_for: the masks start full, to be pruned to `density` in training; init and lr are those of the "final" density,
            or of the "current" one, which is 1 at the start.
        base: the same model at the base shape, or a function without arguments that builds it (on the meta device): gives
            every base_fan_in, and the ratios where they are left out (`supar_sweep.derive_ratios`).
        write: False leaves the values of a trained or loaded model as they are. Masks stay, too; a sparse layer that has none
            gets that of the seed. Both must fit the density, and every dead entry must be 0 already.

    Raises:
        ConfigError: a parameter without a role or base_fan_in, a layout or a start that cannot be known, ratios that disagree
            with tags or base, an unknown layer_density, a density out of range or one that leaves a layer without a live
            weight, AdamW without eps, parameters on the meta device or sharded already, or, with write=False, masks that are not
            those of the model's weights.

    Source: SuPar table 1 (init_var, lr of hidden weights); app. D.4 (each layer's own density).
    """
    parameters = collect(module, starts=write)
    _check_at_hand(parameters, write)
    if base is not None:
        base_by_name, by_name = base_shapes(base), parameter_shapes(module)
        parameters = with_base(parameters, base_by_name, by_name)
        if ratios is None:
            ratios = ratios_of(parameters, base_by_name, by_name)
        check_ratios(ratios, parameters, base_by_name, by_name)
    if ratios is None:
        raise ConfigError("ratios", "must be set where no base model is given", allowed=f"{GIVE_RATIOS}, or base=...")
    _check_width(parameters, ratios)
    plans = start(
        parameters,
        method=method,
        hparams=hparams,
        ratios=ratios,
        density=density,
        seed=seed,
        layer_density=layer_density,
        eps=eps,
        pruned_for=pruned_for,
        write=write,
    )
    if "supar" in COLUMNS[method.parameterization].values():
        shapes, counts = _sparse_counts(parameters, layer_density, density)
        few = few_live({name: shape for name, shape in shapes.items() if counts[name] < math.prod(shape)}, counts)
        if few is not None:
            warnings.warn(f"{few[0]}: {few[1]:.3g} live weights a neuron; {FEW_LIVE}", stacklevel=2)
    return plans


def start(
    parameters: Sequence[TaggedParameter],
    *,
    method: Method,
    hparams: HParams,
    ratios: Ratios,
    density: float,
    seed: int,
    layer_density: str = "uniform",
    eps: float | None = None,
    pruned_for: Literal["final", "current"] | None = None,
    write: bool = True,
) -> list[ParameterPlan]:
    """Write the start of parameters in place; return a plan for each. `parameterize` without its checks and warnings.

    Args:
        parameters: from `collect`.
        method, hparams, ratios, density, seed, layer_density, eps, pruned_for, write: as for `parameterize`.

    Raises:
        ConfigError: as `parameterize`.
    """
    _, counts = _sparse_counts(parameters, layer_density, density)
    plans = []
    for item in parameters:
        size = item.n_matrices * item.fan_out * item.fan_in
        finals = [counts.get(name, item.fan_out * item.fan_in) for name in item.matrices]
        final = sum(finals)
        lives = [item.fan_out * item.fan_in] * item.n_matrices if pruned_for else finals
        m_d = _m_d(item, method, ratios)
        m_rho = (sum(lives) if pruned_for == "current" else final) / size
        wanted = _target(item, method, replace(ratios, m_d=m_d, m_rho=m_rho), hparams, eps)
        if m_d != ratios.m_d:
            # gradients fall with the width that the logits multiplier knows, whatever this layer's
            # own fan_in does; density they do not feel
            wanted = replace(wanted, eps=_target(item, method, ratios, hparams, eps).eps)
        if write:
            _write(item, wanted.init_std, lives, seed)
        elif pruned_for is None:
            _check_kept(item, final, density)
        if final < size or _has_mask(item):
            _mask_dead(item, lives, seed, keep=not write, keep_full=final < size)
        plan = ParameterPlan(
            name=item.name,
            role=item.tag.role,
            shape=stored_shape(item.owner, item.local_name),
            live=sum(lives),
            density=sum(lives) / size,
            m_d=m_d,
            hparams=wanted,
            measured_std=math.nan,
            parameter=item.parameter,
            owner=item.owner,
            local_name=item.local_name,
        )
        plans.append(replace(plan, measured_std=measure(plan)))
    return plans


def final_live(plans: Sequence[ParameterPlan], cell: CellConfig) -> dict[str, int]:
    """Return sparse parameter -> its live weights at the cell's density, which pruned masks reach at last.

    Args:
        plans: from `parameterize`.
        cell: gives density and layer_density.
    """
    shapes = {plan.name: (plan.shape[0], plan.shape[1]) for plan in plans if plan.role in SPARSE_ROLES}
    return live_counts(cell.layer_density, shapes, cell.density)


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


def _sparse_counts(
    parameters: Sequence[TaggedParameter], layer_density: str, density: float
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Return shapes and live counts of all matrices that carry masks, by name."""
    sparse = [item for item in parameters if item.tag.role in SPARSE_ROLES]
    shapes = {name: (item.fan_out, item.fan_in) for item in sparse for name in item.matrices}
    return shapes, live_counts(layer_density, shapes, density)


def _check_width(parameters: Sequence[TaggedParameter], ratios: Ratios) -> None:
    """Raise ConfigError where no hidden weight's fan_in grows by m_d. Layers by themselves, without an embedding or a head, say
    nothing of the width of the model that they are parts of.
    """
    if not any(item.tag.role in ("embedding", "head") for item in parameters):
        return
    grown = {
        item.name: (item.fan_in, item.tag.base_fan_in)
        for item in parameters
        if item.tag.role in SPARSE_ROLES and item.tag.base_fan_in is not None
    }
    if not grown or any(math.isclose(own / base, ratios.m_d, rel_tol=1e-6) for own, base in grown.values()):
        return
    name, (own, base) = next(iter(grown.items()))
    raise ConfigError(
        "ratios.m_d",
        f"is the width's ratio, but no hidden weight's fan_in grows by it; that of {name} does by {own / base:g} "
        f"({own} over base_fan_in {base:g})",
        value=ratios.m_d,
        allowed="the ratio of the widths, as in the tags",
    )


@torch.no_grad()
def _write(item: TaggedParameter, init_std: float, lives: Sequence[int], seed: int) -> None:
    """Write one parameter's start in place; dead entries get their numbers too."""
    parameter = item.parameter
    if item.tag.role == "own":
        return
    if item.tag.role in ("norm", "bias"):
        parameter.fill_(1.0 if item.tag.role == "norm" else 0.0)
        return
    dtype = "float64" if parameter.dtype == torch.float64 else "float32"
    if isinstance(item.owner, CompactLinear):
        positions = live_positions(stream_key(seed, MASK_STREAM, item.name), (item.fan_out, item.fan_in), lives[0])
        item.owner.set_pattern(positions)
        values = _normal_at(stream_key(seed, INIT_STREAM, item.name), positions, dtype)
        values *= init_std
        parameter.copy_(torch.from_numpy(values))
        return
    noise = []
    for name in item.matrices:
        noise.append(normal_block(stream_key(seed, INIT_STREAM, name), item.fan_out, item.fan_in, dtype))
        noise[-1] *= init_std
    parameter.copy_(item.layout.tensor([torch.from_numpy(matrix) for matrix in noise], tuple(parameter.shape)))


def _has_mask(item: TaggedParameter) -> bool:
    return f"{item.local_name}_mask" in item.owner._buffers


def _check_at_hand(parameters: Sequence[TaggedParameter], write: bool) -> None:
    """Raise ConfigError where a parameter has no values, or is to be written while each process has a part of it only."""
    for item in parameters:
        if item.parameter.is_meta:
            problem, allowed = (
                "is on the meta device, where there are no values",
                "parameterize after to_empty(device=...)",
            )
        elif write and hasattr(item.parameter, "device_mesh"):  # a DTensor
            problem, allowed = (
                "is sharded already (DTensor)",
                "parameterize first, then fully_shard or parallelize_module",
            )
        else:
            continue
        raise ConfigError(item.name, problem, allowed=allowed)


def _check_kept(item: TaggedParameter, n_live: int, density: float) -> None:
    """Raise ConfigError where a parameter that keeps its mask has another number of live weights than the density asks for:
    its plan would hold the learning rate of another density.
    """
    if isinstance(item.owner, CompactLinear):
        kept = item.parameter.numel()
    elif _has_mask(item):
        kept = int(item.owner.get_buffer(f"{item.local_name}_mask").sum())
    else:
        return
    if kept != n_live:
        raise ConfigError(
            "density",
            f"{item.name} has {kept} live weights, and this density asks for {n_live}; write=False keeps the masks of the model",
            value=density,
            allowed="the density and layer_density of these masks",
        )


def _mask_dead(item: TaggedParameter, lives: Sequence[int], seed: int, *, keep: bool, keep_full: bool) -> None:
    """Mask one parameter that has, or will have, dead entries, or had a mask.

    Args:
        item: the parameter.
        lives: live entries of each of its matrices.
        seed: of the masks.
        keep: leave a mask that stands there.
        keep_full: mask it also where all is live now.
    """
    if isinstance(item.owner, CompactLinear) or (keep and _has_mask(item)):
        return
    shape = (item.fan_out, item.fan_in)
    masks = [
        dense_mask(stream_key(seed, MASK_STREAM, name), shape, live)
        for name, live in zip(item.matrices, lives, strict=True)
    ]
    mask = item.layout.tensor(masks, tuple(item.parameter.shape))
    if keep and (lost := int(item.parameter.detach().cpu()[~mask].count_nonzero())):
        raise ConfigError(
            item.name,
            f"has no mask, and the mask of this seed would set {lost} of its weights to 0; write=False keeps all values",
            value=f"seed={seed}",
            allowed="the seed and density that the weights were masked with, or density=1",
        )
    attach_mask(item.owner, item.local_name, mask, keep_full=keep_full)


def _normal_at(key: int, live: LivePositions, dtype: str) -> npt.NDArray[np.floating]:
    """Return [nnz] the noise of a dense layer at its live positions, with a few MB of scratch."""
    values = np.empty(live.rows.size, dtype=dtype)
    for start in range(0, values.size, BLOCK_ELEMENTS):
        part = slice(start, start + BLOCK_ELEMENTS)
        values[part] = normal(key, live.rows[part], live.cols[part], dtype)
    return values
