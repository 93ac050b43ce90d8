"""Optimizers over groups, and schedules as factors on every group's own peak."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from supar_sweep.config.schema import CellConfig, ScheduleConfig
from supar_sweep.sparse.linear import named_masks
from supar_sweep.training.model import GPT, build
from supar_sweep.training.optim import OwnStepAdamW, lr_factor, make_optimizer, make_scheduler
from tests.tiny import tiny_cell

SGD = {"name": "sgd", "decay_mode": "scaled", "clip_norm": 1.0, "momentum": 0.9}
SCHEDULES = [
    {"name": "linear", "final_lr_fraction": 0.1},
    {"name": "linear", "final_lr_fraction": 0.0},
    {"name": "cosine", "final_lr_fraction": 0.1},
    {"name": "constant"},
]


def schedule(name: Any, warmup_steps: int = 0, final_lr_fraction: float | None = None) -> ScheduleConfig:
    return ScheduleConfig(name=name, warmup_steps=warmup_steps, final_lr_fraction=final_lr_fraction)


def made(**overrides: Any) -> tuple[CellConfig, GPT, list[Any], torch.optim.Optimizer]:
    cell = tiny_cell(**overrides)
    model, plans = build(cell)
    return cell, model, plans, make_optimizer(cell, plans, "cpu")


def step(model: Any, optimizer: Any, seed: int = 0) -> None:
    x = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


# ---------------------------------------------------------------- schedules
def test_linear_with_warmup_in_numbers() -> None:
    config = schedule("linear", warmup_steps=4, final_lr_fraction=0.1)
    got = [lr_factor(config, step, 10) for step in range(10)]
    wanted = [1 / 4, 2 / 4, 3 / 4, 1, *(1 - 0.9 * k / 5 for k in range(6))]
    assert got == pytest.approx(wanted, abs=1e-15)


def test_cosine_in_numbers() -> None:
    config = schedule("cosine", final_lr_fraction=0.2)
    got = [lr_factor(config, step, 5) for step in range(5)]
    wanted = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert got == pytest.approx(wanted, abs=1e-15)


@given(
    shape=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 400),
    warmup_share=st.floats(0, 1, exclude_max=True),
)
def test_every_schedule_rises_to_1_and_falls_to_its_end(shape: dict[str, Any], steps: int, warmup_share: float) -> None:
    warmup = int(steps * warmup_share)
    config = schedule(**shape, warmup_steps=warmup)
    factors = [lr_factor(config, step, steps) for step in range(steps)]
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[0] > 0 or (steps == 1 and config.final_lr_fraction == 0)
    final = 1.0 if config.final_lr_fraction is None else config.final_lr_fraction
    assert math.isclose(factors[-1], final, abs_tol=1e-15)
    if len(after) > 1:
        assert after[0] == 1.0
    assert lr_factor(config, steps + 5, steps) == factors[-1]  # past the end: as at the end


@pytest.mark.parametrize("shape", SCHEDULES, ids=lambda s: f"{s['name']}-{s.get('final_lr_fraction')}")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_schedules_multiply_each_groups_lr(shape: dict[str, Any], optimizer: Any) -> None:
    overrides = {} if optimizer == "adamw" else {"optimizer": SGD}
    _, model, _, torch_optimizer = made(**overrides)
    peaks = [group["lr"] for group in torch_optimizer.param_groups]
    assert len(set(peaks)) > 1
    config, steps = schedule(**shape, warmup_steps=3), 10
    scheduler = make_scheduler(torch_optimizer, config, steps)
    for index in range(steps):
        factor = lr_factor(config, index, steps)
        assert [g["lr"] for g in torch_optimizer.param_groups] == [p * factor for p in peaks]
        step(model, torch_optimizer, index)
        scheduler.step()


def test_a_scheduler_continues_from_its_state() -> None:
    config = schedule("linear", warmup_steps=3, final_lr_fraction=0.1)
    _, model, _, one = made()
    scheduler = make_scheduler(one, config, 10)
    for index in range(5):
        step(model, one, index)
        scheduler.step()
    _, _, _, two = made()
    resumed = make_scheduler(two, config, 10)
    two.load_state_dict(one.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert [g["lr"] for g in two.param_groups] == [g["lr"] for g in one.param_groups]


# ---------------------------------------------------------------- optimizers
def test_adamw_takes_betas_and_each_groups_eps_and_decay() -> None:
    cell, _, plans, optimizer = made(**{"optimizer.beta1": 0.8, "optimizer.beta2": 0.9})
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(groups) == len(plans)
    for plan in plans:
        group = groups[id(plan.parameter)]
        assert group["betas"] == (0.8, 0.9)
        assert group["fused"]
        assert (group["lr"], group["weight_decay"], group["eps"]) == (
            plan.hparams.lr,
            plan.hparams.weight_decay,
            plan.hparams.eps,
        )
    assert cell.optimizer.eps is not None
    assert {g["eps"] for g in optimizer.param_groups} == {cell.optimizer.eps / 2}  # m_d = 32 / 16


SWAPS = {"update_fraction": 0.1, "stop_fraction": 0.75, "drop_fraction": 0.3}


def test_counting_each_weights_steps_changes_nothing_until_one_is_grown() -> None:
    double = {"train.precision": "float64"}
    _, own_model, _, own = made(**double, sparsity={"method": "rigl", **SWAPS})
    _, plain_model, _, plain = made(**double)
    assert isinstance(own, OwnStepAdamW)
    assert not isinstance(plain, OwnStepAdamW)
    for index in range(5):
        step(own_model, own, index)
        step(plain_model, plain, index)
    for one, other in zip(own_model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9)])
def test_a_weight_that_is_grown_late_moves_as_one_of_a_fresh_optimizer(betas: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    old, young = (nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(2))
    group = {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-8}
    late = OwnStepAdamW([{"params": [old], **group}], betas, {old})
    fresh = torch.optim.AdamW([{"params": [young], **group}], betas=betas, foreach=False)
    for _ in range(50):
        old.grad = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        late.step()
    with torch.no_grad():
        for tensor in (old, *late.state[old].values()):
            tensor[0, 1] = 0.0
    for _ in range(20):
        gradient = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        old.grad, young.grad = gradient.clone(), gradient.clone()
        late.step()
        fresh.step()
        assert old[0, 1].item() == pytest.approx(young[0, 1].item(), rel=1e-9)
    assert abs(old[0, 0].item() - young[0, 0].item()) > 1e-3


def test_step_counts_stand_in_the_state() -> None:
    _, model, _, one = made(sparsity={"method": "set", **SWAPS})
    for index in range(3):
        step(model, one, index)
    _, _, _, two = made(sparsity={"method": "set", **SWAPS})
    two.load_state_dict(one.state_dict())
    counts = [state["step"] for state in two.state.values()]
    assert all(bool((count == 3).all()) for count in counts)
    assert {count.dim() for count in counts} == {0, 2}


def test_sgd_takes_momentum() -> None:
    _, _, plans, optimizer = made(optimizer=SGD)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    by_role = {plan.role: plan.hparams.lr for plan in plans}
    assert by_role["hidden"] == 0.01 / 0.25
    assert by_role["embedding"] == 0.01 * 2


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_fused_step_is_the_plain_step(precision: str, optimizer: Any) -> None:
    overrides = {"train.precision": precision} | ({} if optimizer == "adamw" else {"optimizer": SGD})
    _, fused_model, _, fused = made(**overrides)
    _, plain_model, _, plain = made(**overrides)
    for group in plain.param_groups:
        group["fused"], group["foreach"] = None, False
    for index in range(3):
        step(fused_model, fused, index)
        step(plain_model, plain, index)
    close: Any = {"rtol": 1e-4, "atol": 1e-6} if precision == "float32" else {"rtol": 1e-9, "atol": 1e-12}
    for one, other in zip(fused_model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_dead_weights_gradients_and_moments_stay_zero_through_clipping_and_decay(
    optimizer: Any,
) -> None:
    overrides = {} if optimizer == "adamw" else {"optimizer": SGD}
    _, model, plans, torch_optimizer = made(**{"density": 0.125, **overrides})
    for index in range(4):
        x = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(index))
        torch_optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        torch_optimizer.step()
    masks = named_masks(model)
    assert masks
    squares = 0.0
    for plan in plans:
        gradient = plan.parameter.grad
        live = gradient[masks[plan.name]] if plan.name in masks else gradient
        squares += live.square().sum().item()
    live_norm = math.sqrt(squares)
    # after clipping to 0.1 the live entries alone have that norm: dead ones took no part
    assert math.isclose(live_norm, min(0.1, norm.item()), rel_tol=1e-4)
    for plan in plans:
        if plan.name in masks:
            dead = ~masks[plan.name]
            moments = [v for v in torch_optimizer.state[plan.parameter].values() if v.dim() == 2]
            assert moments
            for tensor in (plan.parameter, plan.parameter.grad, *moments):
                assert torch.count_nonzero(tensor[dead]) == 0
