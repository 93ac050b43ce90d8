"""Optimizers that mix entries and hold masks all the same, and the check that finds what does not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import supar_sweep
from supar_sweep.errors import ConfigError, MaskError
from supar_sweep.sparse.linear import named_masks
from supar_sweep.training.held_masks import check_masks, hold_masks
from supar_sweep.training.model import build
from supar_sweep.training.roles import param_groups
from tests.masked_nets import (
    BECOMES,
    N_BLOCKS,
    WIDTH,
    Net,
    backward,
    groups_by_name,
    inputs,
    masked_layers,
    n_dead_nonzero,
    planned,
)
from tests.tiny import tiny_cell

STEPS = 3


def muon_and_adamw(net: nn.Module, plans: Any) -> list[torch.optim.Optimizer]:
    hidden = [plan for plan in plans if plan.role == "hidden_residual"]
    rest = [plan for plan in plans if plan not in hidden]
    return [
        torch.optim.Muon(groups_by_name(net, hidden), momentum=0.9),
        torch.optim.AdamW(groups_by_name(net, rest)),
    ]


def steps(net: nn.Module, optimizers: list[torch.optim.Optimizer], n_steps: int = STEPS) -> list[int]:
    """Take steps; return the number of dead weights that are not 0 after each."""
    found = []
    for step in range(n_steps):
        backward(net, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(n_dead_nonzero(net))
    return found


def test_muon_moves_dead_weights_and_the_check_says_so() -> None:
    net, plans = planned()
    check_masks(plans)
    assert steps(net, muon_and_adamw(net, plans), 1)[0] > 0
    n_dead = WIDTH * WIDTH - plans[0].live
    with pytest.raises(MaskError) as error:
        check_masks(plans)
    said = str(error.value)
    n_moved = n_dead_nonzero(net.blocks[0])
    assert said.startswith(f"blocks.0.fc.weight: {n_moved} of {n_dead} dead weights are not 0, and ")
    assert f"{N_BLOCKS - 1} further layers" in said
    assert "hold_masks(optimizer, plans)" in said


def test_held_masks_keep_dead_weights_at_0_and_live_ones_as_muon_leaves_them() -> None:
    net, plans = planned()
    twin = copy.deepcopy(net)
    optimizers, others = muon_and_adamw(net, plans), muon_and_adamw(twin, plans)
    held = [hold_masks(optimizer, plans) for optimizer in optimizers]
    assert [len(each.names) for each in held] == [N_BLOCKS, 0]
    steps(twin, others, 1)
    assert steps(net, optimizers, 1) == [0]
    for name, (weight, mask) in masked_layers(net).items():
        assert torch.equal(weight[mask], masked_layers(twin)[name][0][mask])
    assert steps(net, optimizers) == [0] * STEPS
    check_masks(plans)
    for weight, mask in masked_layers(net).values():
        assert not optimizers[0].state[weight]["momentum_buffer"][~mask].any()
        assert bool((weight != 0)[mask].all())


REMADE: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "twice": lambda both: copy.deepcopy(pickle.loads(pickle.dumps(both))),
}


@pytest.mark.parametrize("how", REMADE)
def test_copies_of_an_optimizer_hold_masks_too(how: str) -> None:
    net, plans = planned()
    optimizers = muon_and_adamw(net, plans)
    for optimizer in optimizers:
        hold_masks(optimizer, plans)
    steps(net, optimizers, 1)
    other, remade = REMADE[how]((net, optimizers))
    assert [type(optimizer).__name__ for optimizer in remade] == ["Muon", "AdamW"]
    assert isinstance(remade[0], torch.optim.Muon)
    assert steps(other, remade) == [0] * STEPS
    check_masks(plans, model=other)
    steps(net, optimizers)
    for (weight, _), (copied, _) in zip(masked_layers(net).values(), masked_layers(other).values(), strict=True):
        assert torch.equal(weight, copied)
    # what it saves is as it would be without masks
    assert remade[0].state_dict().keys() == muon_and_adamw(net, plans)[0].state_dict().keys()


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_gradients_written_by_hand_are_held(kind: str) -> None:
    net, plans = planned()
    optimizer = torch.optim.AdamW(param_groups(plans), fused=kind == "fused", foreach=kind == "foreach")
    hold_masks(optimizer, plans)
    for _ in range(STEPS):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert n_dead_nonzero(net) == 0
    for weight, mask in masked_layers(net).values():
        assert not optimizer.state[weight]["exp_avg"][~mask].any()
        assert bool((weight != 0)[mask].all())


def test_one_optimizer_a_parameter_each_holds_its_own() -> None:
    net, plans = planned()
    optimizers = [
        torch.optim.Muon([plan.parameter], lr=0.1)
        if plan.role == "hidden_residual"
        else torch.optim.SGD([plan.parameter])
        for plan in plans
    ]
    assert [hold_masks(optimizer, plans).names for optimizer in optimizers] == [
        [plan.name] if plan.role == "hidden_residual" else [] for plan in plans
    ]
    assert steps(net, list(optimizers)) == [0] * STEPS


def test_masks_are_held_with_a_scaler_a_schedule_and_accumulation() -> None:
    net, plans = planned()
    optimizer = muon_and_adamw(net, plans)[0]
    hold_masks(optimizer, plans)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = 0
    for step in range(4):
        before = next(iter(masked_layers(net).values()))[0].detach().clone()
        for part in range(2):
            loss = net(inputs(2 * step + part)).square().mean()
            scaler.scale(loss * float("inf") if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        assert n_dead_nonzero(net) == 0
        taken += not torch.equal(before, next(iter(masked_layers(net).values()))[0])
    assert taken == 3  # the scaler skipped the one with infinite gradients


def test_other_step_hooks_see_the_weights_masked() -> None:
    net, plans = planned()
    optimizer = muon_and_adamw(net, plans)[0]
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(n_dead_nonzero(net)))
    hold_masks(optimizer, plans)
    steps(net, [optimizer])
    assert seen == [0] * STEPS


def test_a_removed_hold_holds_no_longer_and_can_be_taken_again() -> None:
    net, plans = planned()
    optimizer = muon_and_adamw(net, plans)[0]
    held = hold_masks(optimizer, plans)
    assert hold_masks(optimizer, plans).names == []
    held.remove()
    assert steps(net, [optimizer], 1)[0] > 0
    hold_masks(optimizer, plans)
    assert steps(net, [optimizer], 1) == [0]


def test_an_optimizer_over_tensors_that_were_replaced_is_refused() -> None:
    net, plans = planned()
    stale = torch.optim.AdamW(param_groups(plans))
    BECOMES["new parameters"](net)
    with pytest.raises(ConfigError, match=r"no longer blocks\.0\.fc\.weight.*named_parameters"):
        hold_masks(stale, plans)
    assert hold_masks(torch.optim.AdamW(groups_by_name(net, plans)), plans).names == [
        plan.name for plan in plans if plan.density < 1
    ]


def test_an_optimizer_over_another_model_is_refused_and_a_copy_can_be_named() -> None:
    net, plans = planned()
    other = copy.deepcopy(net)
    optimizer = muon_and_adamw(other, plans)[0]
    with pytest.raises(ConfigError, match=r"none of the parameters in plans.*model=copy"):
        hold_masks(optimizer, plans)
    hold_masks(optimizer, plans, model=other)
    assert steps(other, [optimizer]) == [0] * STEPS
    with pytest.raises(ConfigError, match=r"no step hooks \(got 'list'\)"):
        hold_masks([optimizer], plans)  # type: ignore[arg-type]


def test_nothing_is_held_where_nothing_is_masked() -> None:
    net, plans = planned(density=1.0)
    optimizer = muon_and_adamw(net, plans)[0]
    assert hold_masks(optimizer, plans).names == []
    check_masks(plans)
    check_masks(plans, model=net)


# ---------------------------------------------------------------- the check
WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "copied": copy.deepcopy,
    "wrapped": AveragedModel,  # of a copy
    "compiled": lambda net: torch.compile(copy.deepcopy(net), backend="eager"),
    "wrapped and compiled": lambda net: torch.compile(AveragedModel(net), backend="eager"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_the_check_sees_one_weight_in_the_model_that_is_trained(how: str) -> None:
    net, plans = planned()
    other = WRAPPED[how](net)
    check_masks(plans, model=other)
    weight, mask = list(masked_layers(other).values())[1]
    with torch.no_grad():
        weight[tuple((~mask).nonzero()[-1])] = 1e-30
    check_masks(plans)
    with pytest.raises(MaskError, match=r"^blocks\.1\.fc\.weight: 1 of \d+ dead weights are not 0\."):
        check_masks(plans, model=other)
    unknown = nn.ModuleDict({"inside": net})
    with pytest.raises(MaskError, match=r"^blocks\.0\.fc\.weight: .* pass the model that the wrapper holds"):
        check_masks(plans, model=unknown)


def test_the_check_reads_the_parameter_that_the_model_has_now() -> None:
    net, plans = planned()
    BECOMES["new parameters"](net)
    with torch.no_grad():
        masked_layers(net)["blocks.2.fc"][0].fill_(1.0)
    with pytest.raises(MaskError, match=r"^blocks\.2\.fc\.weight: (\d+) of \1 dead"):
        check_masks(plans)


def test_a_diverged_layer_is_the_losss_to_tell_but_not_one_dead_weight() -> None:
    net, plans = planned()
    weight, mask = masked_layers(net)["blocks.0.fc"]
    with torch.no_grad():
        weight.fill_(float("nan"))
        check_masks(plans)
        weight.masked_fill_(mask, 1.0)
    with pytest.raises(MaskError, match=r"blocks\.0"):
        check_masks(plans)


def test_a_mask_that_is_gone_or_does_not_fit_is_an_error() -> None:
    _, plans = planned()
    with pytest.raises(MaskError, match=r"blocks\.0\.fc\.weight: its mask is gone"):
        check_masks(plans, model=Net())
    with pytest.raises(MaskError, match=r"blocks\.0\.fc\.weight: this model has no such parameter"):
        check_masks(plans, model=nn.Linear(2, 2))
    net, plans = planned()
    net.get_submodule("blocks.0.fc").weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(MaskError, match=r"has the shape \(4,\) now"):
        check_masks(plans)


def test_compact_layers_have_no_dead_weights_to_check() -> None:
    cell = tiny_cell()
    dense = {plan.name: plan.live for plan in build(cell)[1] if plan.density < 1}
    name = next(iter(dense))
    model, plans = build(cell, {name.removesuffix(".weight"): dense[name]})
    check_masks(plans)
    check_masks(plans, model=model)
    optimizer = torch.optim.AdamW(param_groups(plans))
    assert sorted(hold_masks(optimizer, plans).names) == sorted(dense.keys() - {name})


def test_the_names_are_public() -> None:
    assert supar_sweep.check_masks is check_masks
    assert supar_sweep.hold_masks is hold_masks
    assert supar_sweep.named_masks is named_masks
    assert issubclass(supar_sweep.MaskError, supar_sweep.SuparError)
