"""Masks that change in training: SET, RigL and GMP, between one optimizer step and the next.

An update comes after a step like any other: the live weights have taken it, and what is dropped, grown or pruned then
counts from the next step on. RigL's growth sees the gradient of that step at the dead positions, which the gradient hook
otherwise zeroes; the norm that is clipped, and the optimizer, never do. Dropped weights, and their moments, become 0 and stay
0; grown ones start there, with moments 0 and a step count of their own (optim.OwnStepAdamW).

ASSUMPTION: RigL's authors skip the gradient step where masks are updated; here it is taken, as in SET, so that all methods
take the same number of steps. As in their code, a weight that is dropped and chosen again by the same update never left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import CheckpointError
from supar_sweep.rules.mask_schedule import MaskSchedule
from supar_sweep.rules.parameterization import SPARSE_ROLES, Quantity, multiplier
from supar_sweep.sparse.dynamic import drop_smallest, grow_largest, grow_random
from supar_sweep.sparse.linear import attach_mask, let_dead_gradients_through, named_masks
from supar_sweep.training.roles import ParameterPlan, final_live


class MaskUpdates:
    """The changing masks of one run.

    Args:
        cell: whose schedule and method; its density is below 1.
        schedule: of the cell.
        model: with masks attached.
        plans: of the model's parameters.
        optimizer, scheduler: over them.
    """

    def __init__(
        self,
        cell: CellConfig,
        schedule: MaskSchedule,
        model: nn.Module,
        plans: Sequence[ParameterPlan],
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
    ) -> None:
        self.cell, self.schedule, self.model = cell, schedule, model
        self.optimizer, self.scheduler = optimizer, scheduler
        masked = named_masks(model)
        self.plans = [plan for plan in plans if plan.name in masked]
        self.final = final_live(plans, cell)
        sparse = [plan for plan in plans if plan.role in SPARSE_ROLES]
        self._size = sum(math.prod(plan.shape) for plan in sparse)
        self._unmasked = sum(math.prod(plan.shape) for plan in sparse if plan.name not in masked)
        self._scores: dict[str, Tensor] = {}
        self._expect(0)

    def live(self, steps_done: int) -> dict[str, int]:
        """Return parameter -> its live weights after so many steps, of the masked ones."""
        return {
            plan.name: self.schedule.live(math.prod(plan.shape), self.final[plan.name], steps_done)
            for plan in self.plans
        }

    def density(self, steps_done: int) -> float:
        """Return the achieved density of the sparse layers after so many steps."""
        return (self._unmasked + sum(self.live(steps_done).values())) / self._size

    def before_step(self, steps_done: int) -> None:
        """Take what the update after this step needs of its gradients, and leave those of live weights only.

        Args:
            steps_done: steps taken, the one at hand included.
        """
        if not self._needs_gradients(steps_done):
            return
        for plan in self.plans:
            grad = plan.parameter.grad
            assert grad is not None
            self._scores[plan.name] = grad.abs()
            grad.masked_fill_(~self._mask(plan), 0.0)

    @torch.no_grad()
    def after_step(self, steps_done: int) -> None:
        """Update the masks where this is due, and get ready for the next step.

        Args:
            steps_done: steps taken.
        """
        if self.schedule.is_update(steps_done):
            for plan in self.plans:
                self._update(plan, steps_done)
            if self.cell.sparsity.hparams_density == "current":
                self._follow_density(steps_done)
        self._scores.clear()
        self._expect(steps_done)

    def restored(self, steps_done: int) -> None:
        """Check masks that came from a checkpoint, and get ready for the next step.

        Args:
            steps_done: of the checkpoint.

        Raises:
            CheckpointError: a layer has another number of live weights than the schedule says.
        """
        found = live_now(self.plans, self.model)
        for name, wanted in self.live(steps_done).items():
            if found[name] != wanted:
                raise CheckpointError(
                    f"the checkpoint at step {steps_done} has {found[name]} live weights in {name}, not the {wanted} of "
                    f"sparsity.method={self.schedule.method}; delete the cell's checkpoints folder to start it again"
                )
        self._expect(steps_done)

    def _mask(self, plan: ParameterPlan) -> Tensor:
        return plan.owner.get_buffer(f"{plan.local_name}_mask")

    def _needs_gradients(self, steps_done: int) -> bool:
        return self.schedule.method == "rigl" and self.schedule.is_update(steps_done)

    def _expect(self, steps_done: int) -> None:
        """Have the next backward pass leave what its update needs."""
        let_dead_gradients_through(self.model, self._needs_gradients(steps_done + 1))

    def _update(self, plan: ParameterPlan, steps_done: int) -> None:
        mask = self._mask(plan)
        n_live = int(mask.sum())
        if self.schedule.method == "gmp":
            wanted = self.schedule.live(mask.numel(), self.final[plan.name], steps_done)
            changed = drop_smallest(mask, plan.parameter, n_live - wanted)
        else:
            n_swap = math.floor(self.schedule.drop_share(steps_done) * n_live)
            kept = drop_smallest(mask, plan.parameter, n_swap)
            if self.schedule.method == "rigl":
                changed = grow_largest(kept, self._scores[plan.name], n_swap)
            else:
                changed = grow_random(kept, n_swap, seed=self.cell.seed, step=steps_done, name=plan.name)
        grown = changed & ~mask
        attach_mask(plan.owner, plan.local_name, changed)
        # a dead weight and its moments are 0 already, so what grows starts there; its steps are counted from here
        for key, value in self.optimizer.state[plan.parameter].items():
            if isinstance(value, Tensor) and value.shape == changed.shape:
                value.masked_fill_(grown if key == "step" else ~changed, 0.0)

    def _follow_density(self, steps_done: int) -> None:
        """Set the peak learning rate and decay of each sparse group for the density that its layers have now.

        Plans hold those of the dense start, so this is a function of the step and of nothing that was set before.
        """
        at = {id(plan.parameter): plan for plan in self.plans}
        for index, group in enumerate(self.optimizer.param_groups):
            plan = at.get(id(group["params"][0]))
            if plan is None:
                continue
            # layers of one group have one final density (optim.make_optimizer), hence one density now
            density = self.schedule.density(self.final[plan.name] / math.prod(plan.shape), steps_done)
            lr_mult = self._relative("lr", plan, density)
            decay_mult = self._relative("weight_decay", plan, density)
            if self.cell.optimizer.decay_mode == "independent":
                decay_mult = 1 / lr_mult  # lr * weight_decay is what stays
            self.scheduler.base_lrs[index] = group["initial_lr"] = plan.hparams.lr * lr_mult
            group["weight_decay"] = plan.hparams.weight_decay * decay_mult

    def _relative(self, quantity: Quantity, plan: ParameterPlan, density: float) -> float:
        """Return a rule's factor at this density over its factor at density 1; the depth rule's part cancels."""
        method, ratios = self.cell.method(), self.cell.ratios
        now, dense = (multiplier(quantity, plan.role, method, ratios(rho), in_block=True) for rho in (density, 1.0))
        assert now is not None and dense
        return now / dense


def live_now(plans: Sequence[ParameterPlan], model: nn.Module) -> Mapping[str, int]:
    """Return parameter -> its live entries as its mask stands now.

    Args:
        plans: of the model's parameters.
        model: which holds the masks.
    """
    masks = named_masks(model)
    return {plan.name: int(masks[plan.name].sum()) if plan.name in masks else plan.live for plan in plans}
