"""A small masked net, planned as a user's own model is, and the ways in which it becomes another object before it is trained."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from supar_sweep.rules.hparams import HParams, Ratios
from supar_sweep.rules.parameterization import Method
from supar_sweep.training.roles import ParameterPlan, parameterize
from supar_sweep.training.tags import tag

WIDTH, N_BLOCKS, N_TOKENS = 24, 3, 16
DENSITY = 1 / 4
HPARAMS = HParams(lr=0.01, init_std=0.1, alpha_in=1.0, alpha_out=1.0, weight_decay=0.1)


class Block(nn.Module):
    """One masked layer in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH, bias=False)
        tag(self.fc, "weight", "hidden_residual", base_fan_in=WIDTH / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Net(nn.Module):
    """Blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(N_BLOCKS))
        self.head = nn.Linear(WIDTH, 5, bias=False)
        tag(self.head, "weight", "head")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def planned(density: float = DENSITY) -> tuple[Net, list[ParameterPlan]]:
    """Return a net with masks, and its plans."""
    net = Net()
    ratios = Ratios(m_d=2, m_L=1, n_layer=N_BLOCKS)
    method = Method(parameterization="mup")  # SuPar warns of so few live weights a neuron
    return net, parameterize(net, method=method, hparams=HPARAMS, ratios=ratios, density=density, seed=0, eps=1e-8)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(N_TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def backward(net: Callable[[Tensor], Tensor], seed: int = 0, scale: float = 1.0) -> None:
    """Leave gradients in the net's parameters."""
    loss: Any = net(inputs(seed)).square().mean() * scale
    loss.backward()


def masked_layers(net: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Return the name, weight and mask of each layer that has one, read off the modules themselves."""
    return {
        name: (child.weight, child.weight_mask) for name, child in net.named_modules() if hasattr(child, "weight_mask")
    }


def n_dead_nonzero(net: nn.Module) -> int:
    """Return how many dead weights are not 0."""
    return sum(int((weight.detach()[~mask] != 0).sum()) for weight, mask in masked_layers(net).values())


def unpickled(net: nn.Module) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(net))
    return made


def saved_whole(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


def with_new_parameters(net: nn.Module) -> nn.Module:
    for child in net.modules():
        if isinstance(child, nn.Linear):
            child.weight = nn.Parameter(child.weight.detach().clone())
    return net


def loaded_by_assignment(net: nn.Module) -> nn.Module:
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    return net


def copied_while_frozen(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net.requires_grad_(False)).requires_grad_(True)


BECOMES: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda net: net,
    "deepcopy": copy.deepcopy,
    "a copy of a copy": lambda net: copy.deepcopy(copy.deepcopy(net)),
    "pickle": unpickled,
    "torch.save": saved_whole,
    "new parameters": with_new_parameters,
    "assigned": loaded_by_assignment,
    "frozen": copied_while_frozen,
    "of another type": lambda net: net.double().float(),
}


def groups_by_name(net: nn.Module, plans: Sequence[ParameterPlan], **settings: Any) -> list[dict[str, Any]]:
    """Return parameter groups of what the net has now."""
    named = dict(net.named_parameters())
    return [
        {"params": [named[plan.name]], "lr": plan.hparams.lr, "weight_decay": plan.hparams.weight_decay, **settings}
        for plan in plans
    ]
