"""Masks on parameters and on the linear layer, checked against dense autograd and float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.linear import MaskedLinear, attach_mask, named_masks
from supar_sweep.sparse.masks import dense_mask
from supar_sweep.sparse.route import MAX_ROUTE_ERROR, ROUTES
from tests.small_linear import FAN_IN, FAN_OUT, N_LIVE, inputs, layer, precision


def backward(loss: Any) -> None:
    loss.backward()


def dead(module: nn.Module, name: str = "weight") -> Tensor:
    return ~module.get_buffer(f"{name}_mask")


def test_attaching_zeroes_the_dead_weights_and_only_them() -> None:
    dense, masked = layer(None), layer()
    assert torch.equal(masked.weight, dense.weight * masked.weight_mask)
    assert masked.density == N_LIVE / (FAN_IN * FAN_OUT)


def test_a_full_mask_costs_nothing() -> None:
    full = layer(FAN_IN * FAN_OUT)
    assert full.density == 1.0
    assert list(full.state_dict()) == ["weight", "bias"]
    assert type(full._parameters) is dict
    assert not full.weight._backward_hooks
    assert named_masks(full) == {}


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_masked_dense_autograd(route: str) -> None:
    if route == "onednn" and not hasattr(precision(), "fp32_precision"):
        pytest.skip("this torch has no oneDNN precision setting")
    masked = layer(route=route)
    x = inputs().requires_grad_()
    masked(x).square().sum().backward()

    weight, bias = (p.detach().double().requires_grad_() for p in (masked.weight, masked.bias))
    x_ref = inputs().double().requires_grad_()
    backward(F.linear(x_ref, weight, bias).square().sum())

    assert weight.grad is not None
    assert bool((masked.weight.grad[dead(masked)] == 0).all())
    tolerance = 1e-6 if route == "torch" else 2 * MAX_ROUTE_ERROR
    pairs = [
        (masked.weight.grad, weight.grad * masked.weight_mask),
        (masked.bias.grad, bias.grad),
        (x.grad, x_ref.grad),
    ]
    for got, want in pairs:
        assert (got - want).norm() <= tolerance * want.norm()
    assert masked.weight.grad.is_contiguous()


def test_accumulated_gradients_are_masked_too() -> None:
    masked = layer()
    masked(inputs(1)).square().sum().backward()
    first = masked.weight.grad.clone()
    masked(inputs(2)).square().sum().backward()
    second = masked.weight.grad - first
    assert bool((masked.weight.grad[dead(masked)] == 0).all())
    assert second.abs().sum() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_dead_entries_stay_zero_through_adamw_decay_and_clipping(fused: bool) -> None:
    model: Any = nn.Sequential(layer(), nn.GELU(), MaskedLinear(FAN_OUT, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    masked = model[0]
    start = masked.weight.detach().clone()
    for step in range(20):
        optimizer.zero_grad()
        nn.init.normal_(model[2].weight, generator=torch.Generator().manual_seed(step))
        model(inputs(step)).square().sum().backward()
        live_norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        clipped = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert torch.isclose(clipped, live_norm.norm())
        optimizer.step()
        moments = [optimizer.state[masked.weight][key] for key in ("exp_avg", "exp_avg_sq")]
        for tensor in (masked.weight.detach(), masked.weight.grad, *moments):
            assert int((tensor[dead(masked)] != 0).sum()) == 0
    assert bool((masked.weight != start)[masked.weight_mask].all())


def test_clip_norm_is_that_of_the_live_gradients() -> None:
    masked = layer(bias=False)
    masked(inputs()).square().sum().backward()
    weight = masked.weight.detach().clone().requires_grad_()
    backward(F.linear(inputs(), weight).square().sum())
    assert weight.grad is not None
    norm = nn.utils.clip_grad_norm_(masked.parameters(), 1e9)
    assert torch.isclose(norm, weight.grad[masked.weight_mask].norm())
    assert norm < 0.9 * weight.grad.norm()


def test_any_parameter_of_any_module_can_be_masked() -> None:
    conv = nn.Conv2d(3, 5, 3)
    mask = dense_mask(2, (5, 27), 20).reshape(5, 3, 3, 3)
    assert attach_mask(conv, "weight", mask)
    assert attach_mask(conv, "bias", torch.tensor([True, False, True, True, True]))
    assert conv.bias is not None
    conv(torch.ones(1, 3, 8, 8)).square().sum().backward()
    for name in ("weight", "bias"):
        for tensor in (conv.get_parameter(name), conv.get_parameter(name).grad):
            assert tensor is not None
            assert bool((tensor[dead(conv, name)] == 0).all())
            assert bool((tensor[~dead(conv, name)] != 0).all())
    assert len(conv._load_state_dict_post_hooks) == 1


def test_attaching_again_replaces_the_mask() -> None:
    masked = layer()
    sparser = dense_mask(1, (FAN_OUT, FAN_IN), N_LIVE // 2)
    attach_mask(masked, "weight", sparser)
    masked(inputs()).square().sum().backward()
    assert torch.equal(masked.weight != 0, sparser)
    assert torch.equal(masked.weight.grad != 0, sparser)
    attach_mask(masked, "weight", torch.ones_like(sparser))
    assert masked.density == 1.0


def test_the_callers_mask_is_copied() -> None:
    mask = dense_mask(1, (FAN_OUT, FAN_IN), N_LIVE)
    masked = layer(None)
    attach_mask(masked, "weight", mask)
    mask.fill_(True)
    assert masked.density < 1


def test_hooks_are_put_on_once() -> None:
    masked = layer()
    for _ in range(3):
        masked(inputs())
        attach_mask(masked, "weight", masked.weight_mask)
    assert len(masked.weight._backward_hooks) == len(masked._load_state_dict_post_hooks) == 1


def saved_and_loaded(module: nn.Module, tmp_path: Path, assign: bool) -> nn.Module:
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other: nn.Module = layer(7)  # another mask, so another one than the hook was made with
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=assign)
    return other


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "load_state_dict": lambda module, path: saved_and_loaded(module, path, False),
    "load_state_dict assign": lambda module, path: saved_and_loaded(module, path, True),
    "deepcopy": lambda module, path: copy.deepcopy(module),
    "pickle": lambda module, path: pickle.loads(pickle.dumps(module)),
    "dtype there and back": lambda module, path: module.double().float(),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_or_loaded_module_keeps_its_mask_at_work(how: str, tmp_path: Path) -> None:
    source = layer()
    mask = source.weight_mask.clone()
    module = COPIES[how](source, tmp_path)
    assert torch.equal(module.get_buffer("weight_mask"), mask)
    module(inputs()).square().sum().backward()
    weight = module.get_parameter("weight")
    assert weight.grad is not None
    assert torch.equal(weight != 0, mask)
    assert torch.equal(weight.grad != 0, mask)


def test_loading_dense_weights_zeroes_the_dead_ones() -> None:
    dense, masked = layer(None), layer()
    mask = masked.weight_mask.clone()
    masked.load_state_dict({**dense.state_dict(), "weight_mask": mask})
    assert torch.equal(masked.weight, dense.weight * mask)


def test_a_checkpoint_without_the_mask_is_refused() -> None:
    with pytest.raises(RuntimeError, match="weight_mask"):
        layer().load_state_dict(layer(None).state_dict())
    with pytest.raises(RuntimeError, match="weight_mask"):
        layer(None).load_state_dict(layer().state_dict())


def test_attaching_after_writing_weights_zeroes_whatever_was_written() -> None:
    masked = layer()
    nn.init.constant_(masked.weight, float("nan"))
    attach_mask(masked, "weight", masked.weight_mask)
    assert bool((masked.weight[dead(masked)] == 0).all())
    assert bool(masked.weight[~dead(masked)].isnan().all())


def test_named_masks_use_the_parameters_dotted_names() -> None:
    model = nn.Sequential(layer(), nn.Sequential(layer(), layer(None)))
    assert sorted(named_masks(model)) == ["0.weight", "1.0.weight"]
    assert list(named_masks(layer())) == ["weight"]
    assert set(named_masks(model)) < {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("wieght", torch.ones(FAN_OUT, FAN_IN, dtype=torch.bool), "did you mean 'weight'"),
        ("weight", torch.ones(FAN_IN, FAN_OUT, dtype=torch.bool), "torch.bool"),
        ("weight", torch.ones(FAN_OUT, FAN_IN), "torch.float32"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(name: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach_mask(layer(None), name, mask)


def test_masks_work_under_torch_compile() -> None:
    masked = layer(route="onednn")
    compiled: Any = torch.compile(masked, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(inputs()), F.linear(inputs(), masked.weight, masked.bias))
    compiled(inputs()).square().sum().backward()
    assert torch.equal(masked.weight.grad != 0, masked.weight_mask)


def test_masks_work_under_ddp(tmp_path: Path) -> None:
    # DDP copies gradients into its buckets and back: the mask must come before that
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(layer())
        for seed in range(2):
            model(inputs(seed)).square().sum().backward()
        masked = model.module
        assert torch.equal(masked.weight.grad != 0, masked.weight_mask)
    finally:
        distributed.destroy_process_group()


def test_bfloat16_gradients_are_masked() -> None:
    masked = layer(route="onednn").bfloat16()
    masked(inputs().bfloat16()).square().sum().backward()
    assert masked.weight.grad.dtype == torch.bfloat16
    assert bool((masked.weight.grad[dead(masked)] == 0).all())
