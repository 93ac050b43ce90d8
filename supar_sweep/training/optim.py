"""Optimizers over parameter groups; schedules that multiply each group's lr, and never set it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from supar_sweep.config.schema import CellConfig, ScheduleConfig
from supar_sweep.rules.parameterization import SPARSE_ROLES
from supar_sweep.training.roles import ParameterPlan, final_live, param_groups

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
    final = final_live(plans, cell) if cell.pruned_for() == "current" else {}
    # where lr follows a layer's density, layers share a group only if that will be the same at every step
    apart = {plan.name: final[plan.name] / math.prod(plan.shape) for plan in plans if plan.name in final}
    groups = param_groups(plans, apart)
    fused = torch.device(device).type in FUSED_DEVICES
    # torch's fused steps read gradients with their parameter's strides: a transposed one corrupts
    # silently
    assert all(plan.parameter.is_contiguous() for plan in plans), "parameters must be contiguous"
    config = cell.optimizer
    if config.name == "adamw":
        assert config.beta1 is not None and config.beta2 is not None  # the schema requires them
        betas = (config.beta1, config.beta2)
        if cell.sparsity.method in ("set", "rigl") and cell.mask_schedule() is not None:
            return OwnStepAdamW(groups, betas, {plan.parameter for plan in plans if plan.role in SPARSE_ROLES})
        return torch.optim.AdamW(groups, betas=betas, fused=fused)
    assert config.momentum is not None  # the schema requires it
    return torch.optim.SGD(groups, lr=cell.hparams.lr, momentum=config.momentum, fused=fused)


class OwnStepAdamW(torch.optim.AdamW):
    """AdamW in which each weight of some parameters counts its own steps, so that one that is grown late starts as one of step 0.

    With one count a parameter, the averages of a new weight would be corrected as if they were long filled: its first step
    would be (1 - beta1) / sqrt(1 - beta2) of what it should be, 3.2 times at .9 and .999.

    Args:
        groups: each with "params", "lr", "weight_decay", "eps".
        betas: of both averages.
        counted: the parameters whose state "step" has their own shape; zero it where a weight is grown.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, with t of each weight.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], counted: set[torch.nn.Parameter]
    ) -> None:
        super().__init__(groups, betas=betas, foreach=False)
        self._counted = counted

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; torch leaves step counts on the device that they were loaded to."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device)

    def _move(self, parameter: torch.nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            like = parameter if parameter in self._counted else parameter.new_zeros(())
            state.update(step=torch.zeros_like(like, requires_grad=False))
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        step, mean, square = state["step"], state["exp_avg"], state["exp_avg_sq"]
        step += 1  # of dead weights too: their averages are 0, and 0 / 0 would be none
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        unbiased, unbiased_square = (
            average / -torch.expm1(step * math.log(beta)) if beta else average
            for average, beta in ((mean, beta1), (square, beta2))
        )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(unbiased, unbiased_square.sqrt().add_(group["eps"]), value=-group["lr"])


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
