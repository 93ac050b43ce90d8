"""Costs against the real model, and against the formulas they state."""

from __future__ import annotations

from typing import Any

import pytest

from supar_sweep.training.cost import (
    count_parameters,
    flops_per_step,
    flops_per_token,
    memory_gb,
    sparse_shapes,
)
from supar_sweep.training.model import build
from tests.tiny import tiny_cell

SHAPES: list[dict[str, Any]] = [
    {},
    {"density": 1.0},
    {"layer_density": "er", "density": 0.1},
    {"model.activation": "swiglu", "model.position": "alibi"},
    {"model.bias": True, "model.tied_head": True, "model.n_layer": 3},
    {"model.ffn_mult": 2.5, "model.context_tokens": 8},
]


@pytest.mark.parametrize("overrides", SHAPES)
def test_counts_are_those_of_the_model(overrides: dict[str, Any]) -> None:
    cell = tiny_cell(**overrides)
    _, plans = build(cell)
    count = count_parameters(cell)
    sparse = [plan for plan in plans if plan.role in ("hidden", "hidden_residual")]
    assert count.total == sum(plan.parameter.numel() for plan in plans)
    assert count.live == sum(plan.live for plan in plans)
    assert count.sparse_total == sum(plan.parameter.numel() for plan in sparse)
    assert count.sparse_live == sum(plan.live for plan in sparse)
    named = {plan.name.removesuffix(".weight"): plan.shape for plan in sparse}
    assert sparse_shapes(cell) == named


def test_flops_are_6n_plus_attention() -> None:
    cell = tiny_cell(density=0.25)
    hidden, head = 2 * 12 * 32**2, 256 * 32
    attention = 12 * 2 * 32 * 16
    assert flops_per_token(cell) == 6 * (hidden // 4 + head) + attention
    assert flops_per_token(cell, dense_compute=True) == 6 * (hidden + head) + attention
    assert flops_per_step(cell) == 4 * 16 * flops_per_token(cell)
    # a tied head is multiplied all the same
    assert flops_per_token(tiny_cell(density=0.25, **{"model.tied_head": True})) == flops_per_token(cell)


def test_the_flops_of_a_pruned_run_are_those_of_its_mean_live_weights() -> None:
    gmp = {"method": "gmp", "update_fraction": 0.25, "start_fraction": 0.0, "stop_fraction": 0.5}
    cell = tiny_cell(density=0.25, sparsity={**gmp, "hparams_density": "final"})
    hidden, head, attention = 2 * 12 * 32**2, 256 * 32, 12 * 2 * 32 * 16
    # a quarter of the steps dense, a quarter after the first of two prunings, the rest at the end
    mean = (1 + (0.25 + 0.75 / 8) + 0.25 + 0.25) / 4
    assert flops_per_token(cell) == 6 * (round(hidden * mean) + head) + attention
    assert flops_per_token(cell, steps_done=3) == flops_per_token(tiny_cell(density=1.0))
    assert flops_per_token(cell, dense_compute=True) == flops_per_token(cell, steps_done=1)
    assert memory_gb(cell) == memory_gb(cell, compact=True)


def test_memory_is_weights_gradients_moments_and_activations() -> None:
    big = {"model.width": 1024, "model.d_head": 64, "density": 1.0}
    cell = tiny_cell(**big)
    state = 4 * 4 * count_parameters(cell).total / 1e9
    assert state < memory_gb(cell) < 1.1 * state
    assert memory_gb(tiny_cell(**big, **{"train.precision": "float64"})) == pytest.approx(2 * memory_gb(cell))
    masks = count_parameters(cell).sparse_total / 1e9
    assert memory_gb(tiny_cell(**{**big, "density": 0.5})) == pytest.approx(memory_gb(cell) + masks)
    wide = {**big, "train.batch_seqs": 512}
    split = tiny_cell(**wide, **{"train.accumulation_steps": 128})
    assert memory_gb(split) == pytest.approx(memory_gb(cell))
    assert memory_gb(tiny_cell(**wide)) > 2 * memory_gb(cell)
