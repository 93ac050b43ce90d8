"""Tags on parameters: what is known without one, what must be tagged, ties, copies."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.linear import named_masks
from supar_sweep.sparse.owners import named_owners
from supar_sweep.training.tags import collect, tag
from tests.one_process import one_process
from tests.test_roles import Net, by_name, plan


def test_collect_names_roles_and_fans() -> None:
    found = {item.name: item for item in collect(Net())}
    assert {name: item.tag.role for name, item in found.items()} == {
        "table.weight": "embedding",
        "norm.weight": "norm",
        "norm.bias": "bias",
        "up.weight": "hidden",
        "up.bias": "bias",
        "down.weight": "hidden_residual",
        "down.bias": "bias",
        "head.weight": "head",
    }
    assert (found["up.weight"].fan_out, found["up.weight"].fan_in) == (256, 64)
    # a bias is in the block of its weight; a residual projection always is in one
    assert found["up.bias"].tag.in_block
    assert found["down.weight"].tag.in_block
    assert found["down.bias"].tag.in_block
    assert not found["norm.weight"].tag.in_block


def test_untagged_matrices_are_named_in_the_error() -> None:
    net = Net()
    net.extra = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"^extra\.weight: has no role \(shape \(3, 3\)\)"):
        collect(net)


def test_a_gain_outside_a_norm_is_not_guessed() -> None:
    net = Net()
    net.gain = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"^gain: has no role"):
        collect(net)
    tag(net, "gain", "norm")
    assert [item.tag.role for item in collect(net) if item.name == "gain"] == ["norm"]


def test_tag_refuses_unknown_names_roles_and_bases() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"weigth: is not a parameter of this Linear; did you mean 'weight'"):
        tag(layer, "weigth", "hidden")
    with pytest.raises(ConfigError, match=r"did you mean 'hidden'"):
        tag(layer, "weight", "hiden")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="base_fan_in: out of range"):
        tag(layer, "weight", "hidden", base_fan_in=0)


def test_transposed_convolutions_are_refused() -> None:
    layer = nn.ConvTranspose2d(4, 8, 3)
    tag(layer, "weight", "hidden", base_fan_in=36)
    with pytest.raises(ConfigError, match=r"^weight: ConvTranspose2d stores its weight input first"):
        collect(layer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_tags_survive_copies_and_stay_out_of_the_state_dict(copied: Callable[[Net], Net]) -> None:
    net = Net()
    assert [item.tag for item in collect(copied(net))] == [item.tag for item in collect(net)]
    assert [item.tag for item in collect(net.double())] == [item.tag for item in collect(Net())]
    assert list(net.state_dict()) == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("tag_head", [True, False])
def test_a_tied_head_appears_once_with_the_embeddings_rule(tag_head: bool) -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 50, bias=False)
            self.table = nn.Embedding(50, 8)
            self.head.weight = self.table.weight
            tag(self.table, "weight", "embedding")
            if tag_head:
                tag(self.head, "weight", "head")

    found = collect(HeadFirst())
    assert [(item.name, item.tag.role) for item in found] == [("table.weight", "embedding")]


def test_tied_parameters_of_different_roles_are_refused() -> None:
    net = Net()
    net.other = nn.Linear(64, 256)
    net.other.weight = net.up.weight
    tag(net.other, "weight", "head")
    with pytest.raises(ConfigError, match=r"several roles: up.weight \(hidden\), other.weight \(head\)"):
        collect(net)


# ---------------------------------------------------------------- wrappers
def wrapped_whole(wrap: Callable[[Net], nn.Module]) -> nn.Module:
    return wrap(Net())


def wrapped_part(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net = Net()
    net.up = wrap(net.up)  # type: ignore[assignment]
    return net


def fsdp1(net: nn.Module) -> nn.Module:
    """What FSDP1 does to names; the class itself wants an accelerator."""
    outer = nn.Module()
    outer.add_module("_fsdp_wrapped_module", net)
    return outer


@pytest.mark.parametrize("place", [wrapped_whole, wrapped_part])
@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        AveragedModel,
        checkpoint_wrapper,
        torch.compile,
        fsdp1,
        lambda net: nn.parallel.DistributedDataParallel(checkpoint_wrapper(fsdp1(net))),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(script_method|deprecated)")
def test_wrappers_stay_out_of_names_noise_and_masks(wrap: Any, place: Callable[..., nn.Module]) -> None:
    plain = by_name(plan(Net(), density=0.25))
    with one_process():
        model = place(wrap)
        plans = by_name(plan(model, density=0.25))
    assert list(plans) == list(plain)
    assert all(torch.equal(item.parameter, plain[name].parameter) for name, item in plans.items())
    assert set(named_masks(model)) == {name for name, item in plain.items() if item.live < item.parameter.numel()}


def test_a_submodule_of_ones_own_may_be_called_module() -> None:
    net = nn.Module()
    net.add_module("module", Net())
    assert all(item.name.startswith("module.") for item in collect(net))


def test_owners_come_in_the_order_of_named_modules() -> None:
    net = Net()
    net.again = net.up
    plain = [(f"{name}." if name else "", id(module)) for name, module in net.named_modules()]
    assert [(prefix, id(owner)) for prefix, owner in named_owners(net)] == plain
