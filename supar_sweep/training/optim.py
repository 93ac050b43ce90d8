"""Optimizers over parameter groups; schedules that multiply each group's lr, and never set it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR

from supar_sweep.config.schema import CellConfig, ScheduleConfig
from supar_sweep.training.roles import ParameterPlan, param_groups

FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(
    cell: CellConfig, plans: Sequence[ParameterPlan], device: torch.device | str
) -> torch.optim.Optimizer:
    """Return AdamW or SGD over the plans' groups, each with its own lr, weight decay and eps; fused
    where torch has it.

    Args:
        cell: gives the optimizer's name, betas or momentum.
        plans: from `parameterize`; their parameters already on `device`.
        device: where the parameters are.
    """
    groups = param_groups(plans)
    fused = torch.device(device).type in FUSED_DEVICES
    # torch's fused steps read gradients with their parameter's strides: a transposed one corrupts
    # silently
    assert all(plan.parameter.is_contiguous() for plan in plans), "parameters must be contiguous"
    config = cell.optimizer
    if config.name == "adamw":
        assert config.beta1 is not None and config.beta2 is not None  # the schema requires them
        return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=fused)
    assert config.momentum is not None  # the schema requires it
    return torch.optim.SGD(groups, lr=cell.hparams.lr, momentum=config.momentum, fused=fused)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, steps: int) -> LambdaLR:
    """Return a scheduler that sets each group's lr to its own peak times `lr_factor`; to be stepped
    after each step.

    Args:
        optimizer: its groups' lr are the peaks.
        schedule: the shape.
        steps: optimizer steps of the whole run, >= 1.
    """
    return LambdaLR(optimizer, lambda step: lr_factor(schedule, step, steps))


def lr_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the factor on every peak learning rate at a step: warm-up to 1, then from 1 to
    final_lr_fraction.

    Warm-up is (step + 1) / warmup_steps, so its first step is above 0 and its last is 1. The step
    after it is at 1 as well, and the run's last step is at final_lr_fraction exactly.

    Args:
        schedule: the shape.
        step: 0-based, >= 0; past the end the last factor holds.
        steps: optimizer steps of the whole run, >= 1.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    final = schedule.final_lr_fraction
    assert final is not None  # the schema requires it
    last = steps - 1 - schedule.warmup_steps
    progress = min(1.0, (step - schedule.warmup_steps) / last) if last > 0 else 1.0
    share = 1 - progress if schedule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (1 - final) * share
