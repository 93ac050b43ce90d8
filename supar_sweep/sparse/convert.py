"""A checkpoint of one compute form into the other: dense [fan_out, fan_in] with a mask, or values [nnz] with a pattern.

Weights, gradients' moments and masks are the same numbers in both, so a conversion there and back changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.linear import MaskedLinear
from supar_sweep.sparse.masks import LivePositions

State = dict[str, Any]


def to_form_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any],
) -> tuple[State, State]:
    """Return (model state, optimizer state) in the form that `model` has, layer by layer.

    Layers that are in that form already are passed on untouched. What a state lacks, it lacks afterwards: loading says so.

    Args:
        model: whose compact layers and masked linear layers say which form is wanted.
        optimizer: over its parameters, in the order of the optimizer that made the state.
        model_state: a state_dict of the same model in either form, or a mixture.
        optimizer_state: of the optimizer beside it.
    """
    weights, moments = dict(model_state), dict(optimizer_state)
    moments["state"] = dict(moments["state"])
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {id(parameter): index for index, parameter in enumerate(ordered)}
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, CompactLinear) and f"{prefix}weight" in weights:
            live = _take_mask(weights, prefix, layer)
            weights[f"{prefix}values"] = _gather(weights.pop(f"{prefix}weight"), live)
            weights[f"{prefix}cols"] = torch.from_numpy(live.cols).to(layer.cols.dtype)
            weights[f"{prefix}row_starts"] = torch.from_numpy(live.row_starts())
            _convert_moments(moments, places.get(id(layer.values)), live, compact=True)
        elif isinstance(layer, MaskedLinear) and f"{prefix}values" in weights:
            live = _take_pattern(weights, prefix, layer)
            weights[f"{prefix}weight"] = _scatter(weights.pop(f"{prefix}values"), live)
            weights[f"{prefix}weight_mask"] = live.mask()
            _convert_moments(moments, places.get(id(layer.weight)), live, compact=False)
    return weights, moments


def to_dense(model: nn.Module, model_state: Mapping[str, Any]) -> tuple[State, dict[str, Tensor]]:
    """Return (weights, masks): the weights of a state in either form, all dense with zeros where dead; its masks by
    layer, of the layers that have one.

    Args:
        model: the same model, dense throughout.
        model_state: its state_dict in either form, or a mixture.
    """
    weights, masks = dict(model_state), {}
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, MaskedLinear):
            if f"{prefix}values" in weights:
                live = _take_pattern(weights, prefix, layer)
                weights[f"{prefix}weight"] = _scatter(weights.pop(f"{prefix}values"), live)
                masks[name] = live.mask()
            elif f"{prefix}weight_mask" in weights:
                masks[name] = weights.pop(f"{prefix}weight_mask")
                weights[f"{prefix}weight"] = weights[f"{prefix}weight"] * masks[name]
    return weights, masks


def _take_mask(weights: State, prefix: str, layer: CompactLinear) -> LivePositions:
    mask = weights.pop(f"{prefix}weight_mask", None)
    if mask is None:  # a layer without a mask is live everywhere; loading it here will say that it does not fit
        mask = torch.ones(layer.fan_out, layer.fan_in, dtype=torch.bool)
    rows, cols = np.nonzero(mask.cpu().numpy())
    return LivePositions(rows.astype(np.int32), cols.astype(np.int32), (layer.fan_out, layer.fan_in))


def _take_pattern(weights: State, prefix: str, layer: MaskedLinear) -> LivePositions:
    starts = weights.pop(f"{prefix}row_starts").cpu().numpy()
    cols = weights.pop(f"{prefix}cols").cpu().numpy()
    rows = np.repeat(np.arange(layer.fan_out), np.diff(starts))
    return LivePositions(rows.astype(np.int32), cols.astype(np.int32), (layer.fan_out, layer.fan_in))


def _convert_moments(moments: State, place: int | None, live: LivePositions, *, compact: bool) -> None:
    """Convert one parameter's moments; what has another shape, such as a step count, stays."""
    if place is None or place not in moments["state"]:
        return
    here, change = (live.shape, _gather) if compact else ((live.rows.size,), _scatter)
    moments["state"][place] = {
        key: change(value, live) if isinstance(value, Tensor) and tuple(value.shape) == here else value
        for key, value in moments["state"][place].items()
    }


def _gather(dense: Tensor, live: LivePositions) -> Tensor:
    return dense[_index(live, dense.device)]


def _scatter(values: Tensor, live: LivePositions) -> Tensor:
    dense = torch.zeros(live.shape, dtype=values.dtype, device=values.device)
    dense[_index(live, values.device)] = values
    return dense


def _index(live: LivePositions, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, cols = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (live.rows, live.cols))
    return rows, cols
