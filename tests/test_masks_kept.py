"""Gradients of dead weights are 0 before clipping, and dead weights after the step, however a model was copied and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supar_sweep.sparse.linear import attach_mask, let_dead_gradients_through, named_masks
from supar_sweep.sparse.masks import dense_mask
from tests.masked_nets import (
    BECOMES,
    N_BLOCKS,
    WIDTH,
    backward,
    groups_by_name,
    inputs,
    masked_layers,
    planned,
)

STEPS = 3


def compiled(net: nn.Module, how: str, backend: str = "aot_eager") -> Callable[[Tensor], Tensor]:
    """Compiled before it ever ran: no eager forward has seen its parameters."""
    torch._dynamo.reset()
    if how == "eager":
        return net
    if how == "whole":
        whole: Callable[[Tensor], Tensor] = torch.compile(net, backend=backend, fullgraph=True)
        return whole
    for block in net.get_submodule("blocks").children():
        block.compile(backend=backend, fullgraph=True)
    return net


def trained_well(net: nn.Module, forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Take steps, and see that of gradients before clipping, and of weights after it, the live ones alone are not 0."""
    start = {name: weight.detach().clone() for name, (weight, _) in masked_layers(net).items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(forward, step)
        for weight, mask in masked_layers(net).values():
            assert weight.grad is not None
            assert torch.equal(weight.grad != 0, mask)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    assert len(start) == N_BLOCKS
    for name, (weight, mask) in masked_layers(net).items():
        assert torch.equal(weight != 0, mask)
        assert bool((weight != start[name])[mask].all())


# torch's own, of a block whose input is another's output, masks or not
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", ["eager", "whole", "blocks"])
@pytest.mark.parametrize("became", BECOMES)
def test_whatever_a_model_becomes_its_masks_hold(became: str, how: str) -> None:
    net = BECOMES[became](planned()[0])
    trained_well(net, compiled(net, how), torch.optim.AdamW(net.parameters(), weight_decay=0.5))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw for-loop": lambda groups: torch.optim.AdamW(groups, foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "nadam": torch.optim.NAdam,
}


@pytest.mark.parametrize("how", ["eager", "whole"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copys_masks_hold_under_every_optimizer(name: str, how: str) -> None:
    net, plans = planned()
    net = copy.deepcopy(net)
    trained_well(net, compiled(net, how), OPTIMIZERS[name](groups_by_name(net, plans)))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_masks_hold_in_what_inductor_makes_of_a_copy(how: str) -> None:
    net = copy.deepcopy(planned()[0])
    trained_well(net, compiled(net, how, "inductor"), torch.optim.AdamW(net.parameters()))


def test_gradients_that_autograd_returns_are_masked() -> None:
    net = copy.deepcopy(planned()[0])
    loss = net(inputs()).square().mean()
    weights = [weight for weight, _ in masked_layers(net).values()]
    for grad, (_, mask) in zip(torch.autograd.grad(loss, weights), masked_layers(net).values(), strict=True):
        assert torch.equal(grad != 0, mask)


def test_whoever_acts_on_a_gradient_as_soon_as_it_is_there_sees_it_masked() -> None:
    """As an optimizer in the backward pass does, though it came before the mask."""
    layer = nn.Linear(WIDTH, WIDTH)
    seen: list[Tensor] = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))  # type: ignore[no-untyped-call]
    mask = dense_mask(0, (WIDTH, WIDTH), 100)
    attach_mask(layer, "weight", mask)
    backward(layer)
    assert torch.equal(seen[0] != 0, mask)


def attention() -> tuple[nn.Module, Callable[[nn.Module], Any], list[str]]:
    module = nn.MultiheadAttention(WIDTH, 2, bias=False)
    return module, lambda module: module(inputs(), inputs(1), inputs(2))[0], ["in_proj_weight", "out_proj.weight"]


def lstm() -> tuple[nn.Module, Callable[[nn.Module], Any], list[str]]:
    return nn.LSTM(WIDTH, WIDTH), lambda module: module(inputs())[0], ["weight_ih_l0", "weight_hh_l0"]


@pytest.mark.parametrize("became", BECOMES)
@pytest.mark.parametrize("made", [attention, lstm])
def test_layers_whose_forward_nobody_calls_are_masked_too(made: Callable[[], Any], became: str) -> None:
    module, output, names = made()
    for name in names:
        owner, _, local_name = name.rpartition(".")
        shape = module.get_parameter(name).shape
        attach_mask(module.get_submodule(owner), local_name, dense_mask(0, (shape[0], shape[1]), shape.numel() // 4))
    module = BECOMES[became](module)
    masks = named_masks(module)
    assert sorted(masks) == sorted(names)
    output(module).square().sum().backward()
    for name, mask in masks.items():
        grad = module.get_parameter(name).grad
        assert grad is not None
        assert not grad[~mask].any()
        assert grad[mask].any()


def test_copies_share_neither_masks_nor_what_may_pass() -> None:
    net = planned()[0]
    twin = copy.deepcopy(net)
    let_dead_gradients_through(twin, True)
    twin.get_buffer("blocks.0.fc.weight_mask").fill_(True)
    backward(net)
    backward(twin)
    for weight, mask in masked_layers(net).values():
        assert torch.equal(weight.grad != 0, mask)  # type: ignore[arg-type]
    assert all(bool(weight.grad.all()) for weight, _ in masked_layers(twin).values() if weight.grad is not None)


def test_torch_func_computes_with_a_masked_module() -> None:
    net = planned()[0]
    tensors = {name: value.detach() for name, value in net.named_parameters()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, tensors, (inputs(),)).square().mean()

    grads = torch.func.grad(loss)(tensors)
    assert grads["head.weight"].any()
    backward(net)  # its own parameters are back, with their masks
    assert all(torch.equal(weight.grad != 0, mask) for weight, mask in masked_layers(net).values())  # type: ignore[arg-type]
