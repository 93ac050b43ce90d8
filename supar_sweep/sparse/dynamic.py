"""Which positions of a mask to drop and which to grow: pure functions of weights, gradients, seed and step.

Counts are exact. Ties go to the first position in row-major order, so that every machine that has the same numbers takes the same
positions. Masks are bool [fan_out, fan_in], True where live; nothing here is changed in place.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from supar_sweep.sparse.noise import bits, stream_key

GROWTH_STREAM = "growth"
"""The stream name of SET's growth: stream_key(seed, GROWTH_STREAM, "<parameter name> <step>")."""


def drop_smallest(mask: Tensor, weight: Tensor, n_drop: int) -> Tensor:
    """Return the mask without the `n_drop` live positions of smallest |weight|.

    Args:
        mask: bool [fan_out, fan_in].
        weight: of its shape.
        n_drop: in [0, live positions].
    """
    return _changed(mask, _first(mask, weight.abs(), n_drop, descending=False), False)


def grow_largest(mask: Tensor, score: Tensor, n_grow: int) -> Tensor:
    """Return the mask with the `n_grow` dead positions of largest score: RigL's growth, where the score is |gradient|.

    Args:
        mask: bool [fan_out, fan_in].
        score: of its shape; NaN counts as the largest.
        n_grow: in [0, dead positions].

    Source: RigL (arXiv:1911.11134), section 3, (4): argtopk over the positions that are not live after the drop.
    """
    return _changed(mask, _first(~mask, score, n_grow, descending=True), True)


def grow_random(mask: Tensor, n_grow: int, *, seed: int, step: int, name: str) -> Tensor:
    """Return the mask with `n_grow` random dead positions: SET's growth, a function of seed, step and name.

    Args:
        mask: bool [fan_out, fan_in].
        n_grow: in [0, dead positions].
        seed: the run's.
        step: optimizer steps taken.
        name: the parameter's.

    Source: Mocanu et al. 2018, SET (arXiv:1707.04780), algorithm 1: as many random connections as were removed.
    """
    rows, cols = np.nonzero(~mask.cpu().numpy())
    noise = bits(stream_key(seed, GROWTH_STREAM, f"{name} {step}"), rows, cols)
    # no two positions tie, so the smallest are one set whatever the order
    chosen = np.argpartition(noise, n_grow - 1)[:n_grow] if n_grow else np.empty(0, dtype=np.int64)
    flat = torch.from_numpy(rows[chosen] * mask.shape[1] + cols[chosen])
    return _changed(mask, flat.to(mask.device), True)


def _first(candidates: Tensor, score: Tensor, count: int, *, descending: bool) -> Tensor:
    """Return the flat positions of the `count` first candidates by score."""
    positions = candidates.flatten().nonzero().squeeze(1)
    assert 0 <= count <= positions.numel(), f"{count} of {positions.numel()} positions"
    order = torch.argsort(score.flatten()[positions], descending=descending, stable=True)
    return positions[order[:count]]


def _changed(mask: Tensor, positions: Tensor, live: bool) -> Tensor:
    changed = mask.flatten().clone()
    changed[positions] = live
    return changed.view_as(mask)
