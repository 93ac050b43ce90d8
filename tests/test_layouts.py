"""How weights are stored: fan_in of every kind of owner, as known or as tagged, and what that does to noise, masks, rules."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supar_sweep.errors import ConfigError
from supar_sweep.rules.parameterization import SPARSE_ROLES
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.linear import named_masks
from supar_sweep.training.layouts import Layout
from supar_sweep.training.roles import check_init, parameter_rows
from supar_sweep.training.tags import collect, tag
from tests.test_roles import HPARAMS, plan


class Conv1D(nn.Module):
    """As transformers has it: y = x W + b with W [nx, nf]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Bare(nn.Module):
    """A module with one weight, of which nothing is known."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))


def only(module: nn.Module) -> Any:
    return next(item for item in collect(module) if item.name == "weight")


# ---------------------------------------------------------------- what is known
@pytest.mark.parametrize(
    ("layer", "name", "fan_out", "fan_in"),
    [
        (nn.Linear(6, 8), "weight", 8, 6),
        (nn.Conv2d(6, 8, 3), "weight", 8, 6 * 9),
        (nn.Conv1d(8, 8, 4, groups=8), "weight", 8, 4),
        (nn.MultiheadAttention(8, 2), "in_proj_weight", 3 * 8, 8),
        (nn.LSTM(6, 8), "weight_ih_l0", 4 * 8, 6),
        (Conv1D(8, 6), "weight", 8, 6),
        (Bare(8, 6), "weight", 8, 6),
        (CompactLinear(6, 8, 10), "values", 8, 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_known_needs_no_fan_in(layer: nn.Module, name: str, fan_out: int, fan_in: int) -> None:
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer.get_parameter(name).requires_grad_(True)
    tag(layer, name, "hidden", base_fan_in=1)
    (item,) = collect(layer)
    assert (item.n_matrices, item.fan_out, item.fan_in) == (1, fan_out, fan_in)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (
            Bare(4, 8, 6),
            r"^weight: Bare is not a known kind of layer, so which axes are its inputs cannot be known \(shape \(4, 8, 6\)\)",
        ),
        (nn.Bilinear(4, 5, 6), r"^weight: Bilinear sums over pairs of inputs"),
        (nn.ConvTranspose2d(4, 8, 3), r"^weight: ConvTranspose2d stores its weight input first"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_known_is_refused_with_the_way_out(layer: nn.Module, problem: str) -> None:
    for role in SPARSE_ROLES:
        tag(layer, "weight", role, base_fan_in=2)
        with pytest.raises(
            ConfigError, match=problem + r".*allowed: its fan_in by hand: supar_sweep\.tag\(\.\.\., fan_in="
        ):
            collect(layer)
    # roles whose numbers do not depend on it: a class token [1, 1, width], a position table [1, n, width]
    tag(layer, "weight", "embedding")
    assert only(layer).tag.role == "embedding"


# ---------------------------------------------------------------- what is tagged
@pytest.mark.parametrize(
    ("shape", "fans", "wanted"),
    [
        ((4, 8, 6), {"fan_in": 6}, (4, 8, 6)),  # experts [E, out, in]
        ((4, 6, 8), {"fan_in": 6}, (4, 8, 6)),  # experts [E, in, out]
        ((4, 6, 6), {"fan_in": 6}, (4, 6, 6)),
        ((4, 8, 6), {"fan_in": 6, "fan_out": 32}, (1, 32, 6)),  # heads [H, d_head, in] are one matrix
        ((4, 8, 6), {"fan_in": 32, "fan_out": 6}, (1, 6, 32)),  # [H, d_head, out]
        ((8, 5, 6), {"fan_in": 30}, (1, 8, 30)),  # Bilinear, both inputs counted
        ((8, 6), {"fan_in": 8}, (1, 6, 8)),  # x @ W
        ((8, 6), {"fan_in": 6}, (1, 8, 6)),
        ((3, 8, 6, 2, 2), {"fan_in": 24}, (3, 8, 24)),
    ],
)
def test_a_tagged_fan_in_says_which_axes_are_inputs(
    shape: tuple[int, ...], fans: dict[str, int], wanted: tuple[int, int, int]
) -> None:
    layer = Bare(*shape)
    tag(layer, "weight", "hidden", base_fan_in=2, **fans)  # type: ignore[arg-type]
    item = only(layer)
    assert (item.n_matrices, item.fan_out, item.fan_in) == wanted
    assert math.prod(wanted) == item.parameter.numel()


def test_a_transposed_convolution_takes_its_first_axis() -> None:
    layer = nn.ConvTranspose2d(4, 4, 3)
    tag(layer, "weight", "hidden", base_fan_in=2, fan_in=4)
    assert (only(layer).n_matrices, only(layer).fan_out, only(layer).fan_in) == (1, 4 * 9, 4)


def test_a_fan_in_that_fits_nothing_is_refused() -> None:
    layer = Bare(4, 8, 6)
    for fans, shown in (({"fan_in": 7}, "fan_in=7"), ({"fan_in": 6, "fan_out": 9}, "fan_in=6, fan_out=9")):
        tag(layer, "weight", "hidden", base_fan_in=2, **fans)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"^weight: has no such axes in its shape \(4, 8, 6\) \(got '{shown}'\)"):
            collect(layer)
    linear = nn.Linear(6, 8)
    tag(linear, "weight", "hidden", base_fan_in=2, fan_in=8)
    with pytest.raises(
        ConfigError, match=r"^weight: Linear of shape \(8, 6\) has fan_in 6 and fan_out 8 \(got 'fan_in=8'\)"
    ):
        collect(linear)


def test_tag_refuses_fans_that_are_none_or_have_no_effect() -> None:
    layer = Bare(4, 8, 6)
    for value in (0, -1, 2.5):
        with pytest.raises(ConfigError, match=r"^fan_in: out of range, for weight"):
            tag(layer, "weight", "hidden", fan_in=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^fan_in: has no effect on weight: role embedding does not read it"):
        tag(layer, "weight", "embedding", fan_in=6)
    with pytest.raises(ConfigError, match=r"^fan_out: has no effect on weight without fan_in"):
        tag(layer, "weight", "hidden", fan_out=8)


def test_a_layout_gives_back_what_it_takes() -> None:
    matrices = [torch.arange(6.0).view(2, 3) + 10 * index for index in range(4)]
    straight, turned = Layout(1, 2), Layout(1, 2, inputs_first=True)
    assert torch.equal(straight.tensor(matrices, (4, 2, 3)), torch.stack(matrices))
    assert torch.equal(turned.tensor(matrices, (4, 3, 2)), torch.stack(matrices).transpose(1, 2))


# ---------------------------------------------------------------- what follows from it
def test_gpt2s_conv1d_is_a_linear_layer_turned_over() -> None:
    conv, linear = Conv1D(256, 64), nn.Linear(64, 256)
    plans = []
    for layer in (conv, linear):
        tag(layer, "weight", "hidden", base_fan_in=16)
        plans.append(plan(layer, density=0.25))
        check_init(plans[-1])
    (weight, _), _ = plans
    assert weight.m_d == 64 / 16
    other = {"shape": None, "measured_std": None}  # summed in another order
    rows = [[{**row, **other} for row in parameter_rows(of_layer)] for of_layer in plans]
    assert rows[0] == rows[1]
    assert torch.equal(conv.weight, linear.weight.T)
    assert torch.equal(named_masks(conv)["weight"], named_masks(linear)["weight"].T)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("layer_density", ["uniform", "er"])
def test_experts_are_matrices_of_their_own(layer_density: str, turned: bool) -> None:
    n, out, fan_in, base, density = 4, 96, 64, 32, 0.25
    layer = Bare(n, fan_in, out) if turned else Bare(n, out, fan_in)
    tag(layer, "weight", "hidden", base_fan_in=base, fan_in=fan_in)
    (weight,) = plans = plan(layer, density=density, layer_density=layer_density, ratios=None)
    check_init(plans)
    assert weight.m_d == fan_in / base
    assert weight.hparams.lr == HPARAMS.lr / (weight.m_d * density)
    assert weight.hparams.init_std == pytest.approx(HPARAMS.init_std / math.sqrt(weight.m_d * density), rel=1e-15)
    assert (weight.live, weight.density) == (n * out * fan_in * density, density)
    experts = layer.weight.detach().transpose(1, 2) if turned else layer.weight.detach()
    for expert in experts:  # each has its exact share, and numbers of its own
        assert int((expert != 0).sum()) == out * fan_in * density
        assert expert[expert != 0].std().item() == pytest.approx(weight.hparams.init_std, rel=0.1)
    for one, other in product(range(n), range(n)):
        assert one == other or not torch.equal(experts[one] != 0, experts[other] != 0)


def test_a_small_expert_is_the_corner_of_a_large_one() -> None:
    small, large = Bare(2, 8, 16), Bare(3, 24, 32)
    for layer in (small, large):
        tag(layer, "weight", "hidden", base_fan_in=layer.weight.shape[2], fan_in=layer.weight.shape[2])
        plan(layer)
    assert torch.equal(small.weight, large.weight[:2, :8, :16])


def test_er_counts_experts_one_by_one() -> None:
    class Pair(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.experts = Bare(*shape)
            self.linear = nn.Linear(64, 64, bias=False)
            tag(self.linear, "weight", "hidden", base_fan_in=16)
            tag(self.experts, "weight", "hidden", base_fan_in=16, fan_in=64)

    plans = {item.name: item for item in plan(Pair(6, 64, 64), density=0.3, layer_density="er")}
    # seven squares of one size: whoever took the experts for one matrix [384, 64] would give them less
    assert plans["experts.weight"].density == pytest.approx(plans["linear.weight"].density, abs=1 / 64**2)


def test_gradients_of_dead_experts_are_zero() -> None:
    layer = Bare(4, 32, 64)
    tag(layer, "weight", "hidden", base_fan_in=64, fan_in=64)
    plan(layer, density=0.5)
    x: Tensor = torch.ones(4, 3, 64)
    torch.einsum("eti,eoi->eto", x, layer.weight).square().sum().backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad != 0, named_masks(layer)["weight"])
