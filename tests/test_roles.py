"""Init, masks, parameter groups: on small modules of every kind a user may bring."""

import contextlib
import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import HParams, Ratios
from supar_sweep.rules.parameterization import PARAMETERIZATIONS, SPARSE_ROLES, Method
from supar_sweep.rules.transfer import role_hparams
from supar_sweep.sparse.linear import named_masks
from supar_sweep.sparse.masks import mask_hash
from supar_sweep.training.model import build
from supar_sweep.training.roles import (
    ParameterPlan,
    check_init,
    param_groups,
    parameter_rows,
    parameterize,
)
from supar_sweep.training.tags import tag
from tests.tiny import tiny_cell

HPARAMS = HParams(lr=0.01, init_std=0.08, alpha_in=1.0, alpha_out=1.0, weight_decay=0.1)


class Net(nn.Module):
    """Every role once: embedding, norm, hidden, hidden_residual, head, biases."""

    def __init__(self, width: int = 64, base_width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 50, bias=False)
        tag(self.table, "weight", "embedding")
        tag(self.up, "weight", "hidden", base_fan_in=base_width, in_block=True)
        tag(self.down, "weight", "hidden_residual", base_fan_in=4 * base_width)
        tag(self.head, "weight", "head")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def plan(
    module: nn.Module,
    *,
    density: float = 1.0,
    seed: int = 0,
    eps: float | None = 1e-8,
    layer_density: str = "uniform",
    ratios: Any = None,
    weight_decay: float | None = None,
    **method: Any,
) -> list[ParameterPlan]:
    method = {"parameterization": "supar", **method}
    return parameterize(
        module,
        method=Method(**method),
        hparams=HPARAMS if weight_decay is None else replace(HPARAMS, weight_decay=weight_decay),
        ratios=ratios or Ratios(m_d=4, m_L=2, n_layer=4),
        density=density,
        layer_density=layer_density,
        seed=seed,
        eps=None if method.get("optimizer") == "sgd" else eps,
    )


def by_name(plans: Any) -> dict[str, Any]:
    return {item.name: item for item in plans}


# ---------------------------------------------------------------- init
class MyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 7.0))


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), MyRMSNorm()])
def test_norms_start_at_1_and_their_shifts_at_0(norm: nn.Module) -> None:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(2, 3)
    for item in plan(norm):
        assert item.role == ("bias" if "bias" in item.name else "norm")
        assert torch.all(item.parameter == (item.role == "norm"))
        assert item.measured_std == 0


def test_frozen_parameters_are_left_alone() -> None:
    net = Net()
    net.positions = nn.Parameter(torch.full((3, 3), 7.0), requires_grad=False)
    assert "positions" not in by_name(plan(net))
    assert torch.all(net.positions == 7.0)


def test_compiled_modules_keep_their_names_and_noise() -> None:
    plain, whole, part = Net(), torch.compile(Net()), Net()
    part.up = torch.compile(part.up)  # type: ignore[assignment]
    wanted = by_name(plan(plain, density=0.25))
    module: Any
    for module in (whole, part):
        got = by_name(plan(module, density=0.25))
        assert got.keys() == wanted.keys()
        for name, item in wanted.items():
            assert torch.equal(got[name].parameter, item.parameter)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("density", [1.0, 0.25])
def test_each_weight_starts_with_the_rules_std(name: Any, density: float) -> None:
    method = Method(parameterization=name)
    plans = plan(Net(), density=density, parameterization=name)
    check_init(plans)
    for item in plans:
        rho = density if item.role in SPARSE_ROLES else 1.0
        ratios = Ratios(m_d=4, m_rho=rho, m_L=2, n_layer=4)
        in_block = item.name.startswith(("up", "down"))
        assert item.density == rho
        assert item.hparams == role_hparams(item.role, method, ratios, HPARAMS, in_block=in_block, eps=1e-8)
        live = item.parameter[item.parameter != 0] if item.role in SPARSE_ROLES else item.parameter
        if item.role not in ("norm", "bias"):
            error = 6 / math.sqrt(2 * item.live)
            std = live.detach().std(correction=0).item()
            assert math.isclose(std, item.hparams.init_std, rel_tol=error)


def test_all_parameterizations_share_noise_and_masks() -> None:
    runs = {name: Net() for name in PARAMETERIZATIONS}
    plans = {name: by_name(plan(net, density=0.25, parameterization=name)) for name, net in runs.items()}
    hashes = {mask_hash(named_masks(net)) for net in runs.values()}
    assert len(hashes) == 1
    for name, item in plans["sp"].items():
        if item.role in ("norm", "bias"):
            continue
        for other in plans.values():
            ratio = other[name].hparams.init_std / item.hparams.init_std
            torch.testing.assert_close(other[name].parameter, item.parameter * ratio)


def test_numbers_do_not_depend_on_dtype_or_the_global_generator() -> None:
    single, double = Net(), Net().double()
    plan(single, density=0.25)
    torch.manual_seed(1)
    torch.rand(3)
    before = torch.random.get_rng_state()
    plan(double, density=0.25)
    assert torch.equal(before, torch.random.get_rng_state())
    assert mask_hash(named_masks(single)) == mask_hash(named_masks(double))
    for one, other in zip(single.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_numbers_do_not_depend_on_the_device() -> None:
    here, there = Net(), Net().cuda()
    check_init(plan(here, density=0.25))
    check_init(plan(there, density=0.25))
    assert mask_hash(named_masks(here)) == mask_hash(named_masks(there))
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(one, other.cpu())


def test_seeds_and_names_decide_the_noise() -> None:
    same, again, other = Net(), Net(), Net()
    plan(same, seed=3, density=0.25)
    plan(again, seed=3, density=0.25)
    plan(other, seed=4, density=0.25)
    assert torch.equal(same.up.weight, again.up.weight)
    assert not torch.equal(same.table.weight, other.table.weight)
    masks = [named_masks(net) for net in (same, again, other)]
    for name in ("up.weight", "down.weight"):
        assert torch.equal(masks[0][name], masks[1][name])
        assert not torch.equal(masks[0][name], masks[2][name])
    assert not torch.equal(masks[0]["up.weight"], masks[0]["down.weight"].T)
    assert not torch.equal(same.table.weight[:, :50], same.head.weight[:50, :50])


def test_density_1_costs_nothing() -> None:
    net = Net()
    plan(net, density=1.0)
    assert not list(net.buffers())
    for module in net.modules():
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
    for parameter in net.parameters():
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)


def test_parameterizing_again_replaces_weights_and_masks() -> None:
    net, fresh = Net(), Net()
    for density in (0.25, 1.0, 0.5):
        plan(net, density=density)
    plan(fresh, density=0.5)
    for one, other in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    plans = plan(net, density=1.0)
    check_init(plans)
    assert all((item.parameter != 0).all() for item in plans if item.role in SPARSE_ROLES)


def test_convolutions_are_matrices_of_fan_in_times_kernel() -> None:
    layer = nn.Conv2d(16, 32, 3)
    tag(layer, "weight", "hidden", base_fan_in=4 * 9)
    weight, _ = plans = plan(layer, density=0.125)
    check_init(plans)
    assert weight.m_d == (16 * 9) / (4 * 9)
    assert weight.live == 32 * 16 * 9 // 8
    assert weight.hparams.init_std == 0.08 * math.sqrt(1 / (4 * 0.125))
    assert int((layer.weight != 0).sum()) == weight.live
    # the same numbers as a linear layer of that name over the unrolled input
    flat = nn.Linear(16 * 9, 32)
    tag(flat, "weight", "hidden", base_fan_in=4 * 9)
    plan(flat, density=0.125)
    assert torch.equal(layer.weight.flatten(1), flat.weight)


# ---------------------------------------------------------------- per-layer density, ratios
@pytest.mark.filterwarnings("ignore:.*live weights a neuron")
def test_er_layers_are_corrected_by_their_own_density() -> None:
    plans = plan(Net(), density=0.1, layer_density="er")
    check_init(plans)
    sparse = [item for item in plans if item.role in SPARSE_ROLES]
    assert sum(item.live for item in sparse) == round(0.1 * sum(math.prod(i.shape) for i in sparse))
    # a second pair of another shape, so that the densities differ
    net = Net()
    net.square = nn.Linear(64, 64)
    tag(net.square, "weight", "hidden", base_fan_in=16)
    named = by_name(plan(net, density=0.1, layer_density="er"))
    check_init(list(named.values()))
    square, up = named["square.weight"], named["up.weight"]
    assert square.density > 1.3 * up.density
    for item in (square, up):
        assert item.live == int((item.parameter != 0).sum())
        assert math.isclose(item.hparams.lr, 0.01 / (4 * item.density))
        assert math.isclose(item.hparams.init_std, 0.08 / math.sqrt(4 * item.density))
        assert math.isclose(item.hparams.weight_decay, 0.1 * 4 * item.density)


@pytest.mark.filterwarnings("ignore:.*live weights a neuron")
def test_m_rho_is_the_achieved_density() -> None:
    layer = nn.Linear(5, 5, bias=False)
    tag(layer, "weight", "hidden", base_fan_in=5)
    (item,) = plan(layer, density=0.3)  # 7.5 of 25
    assert item.live == 8
    assert item.density == 8 / 25
    assert math.isclose(item.hparams.lr, 0.01 / (8 / 25))


def test_rectangular_layers_go_by_their_own_fan_in_and_eps_by_the_model() -> None:
    layer = nn.Linear(24, 64)
    tag(layer, "weight", "hidden", base_fan_in=12)
    weight, bias = plan(layer, ratios=Ratios(m_d=4))
    assert weight.m_d == 2
    assert weight.hparams.lr == 0.01 / 2
    assert math.isclose(weight.hparams.init_std, 0.08 / math.sqrt(2))
    assert weight.hparams.eps == bias.hparams.eps == 1e-8 / 4


@pytest.mark.filterwarnings("ignore:.*live weights a neuron")
def test_sgd_groups_have_no_eps_and_dense_roles_take_the_models_m_d() -> None:
    for item in plan(Net(), density=1 / 8, optimizer="sgd"):
        assert item.hparams.eps is None
        m_d, m_rho = 4, 1 / 8
        assert item.hparams.lr == 0.01 * (1 / m_rho if item.role in SPARSE_ROLES else m_d)
    assert all("eps" not in group for group in param_groups(plan(Net(), optimizer="sgd")))


def test_hidden_weights_need_a_base_fan_in_unless_sp_goes_its_own_way() -> None:
    layer = nn.Linear(8, 8)
    tag(layer, "weight", "hidden")
    for name in PARAMETERIZATIONS:
        with pytest.raises(ConfigError, match=r"^weight: has no base_fan_in, which"):
            plan(layer, parameterization=name)
    weight, _ = plan(layer, parameterization="sp", sp_start="own")
    assert (weight.hparams.init_std, weight.hparams.lr) == (0.08, 0.01)


@pytest.mark.parametrize("density", [0, 1.5, math.nan, 1e-9])
def test_impossible_densities(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        plan(Net(), density=density)


def test_parameters_without_values_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^table\.weight: is on the meta device, .* allowed: parameterize after to_empty"
    ):
        plan(Net().to("meta"))


def test_adamw_needs_eps() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.eps"):
        plan(Net(), eps=None)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_few_live_weights_a_neuron_are_warned_of_where_the_rules_correct_them(name: Any) -> None:
    plan(Net(), density=0.25, parameterization=name)  # 64 / 4 = 16 is enough
    layer = nn.Linear(8, 8)
    tag(layer, "weight", "hidden", base_fan_in=8)
    plan(layer, parameterization=name)  # dense: there is nothing to correct
    few: Any = contextlib.nullcontext()
    if name not in ("sp", "mup"):
        few = pytest.warns(UserWarning, match=r"^up\.weight: 12\.8 live weights a neuron; below 16 the best lr drifts")
    with few as said:
        plan(Net(), density=0.2, parameterization=name)
    if said is not None:
        assert said[0].filename.endswith("test_roles.py")  # where parameterize was called
    build(tiny_cell(density=0.25))  # the built-in model's are said once a grid, not in each process


# ---------------------------------------------------------------- the check before step 1
@pytest.mark.parametrize("factor", [0.9, 1.1, 0.0])
@pytest.mark.parametrize("name", ["table.weight", "up.weight", "down.weight", "head.weight"])
def test_check_init_catches_a_std_off_by_a_tenth(name: Any, factor: float) -> None:
    plans = plan(Net(), density=0.25)
    check_init(plans)
    with torch.no_grad():
        by_name(plans)[name].parameter.mul_(factor)
    with pytest.raises(ConfigError, match=rf"^{name}: starts with the wrong standard deviation"):
        check_init(plans)


def test_check_init_catches_weights_that_were_never_written() -> None:
    layer = nn.Linear(2, 2, bias=False)  # so few that chance alone would allow a std near 0
    tag(layer, "weight", "hidden", base_fan_in=1)
    plans = plan(layer)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ConfigError, match=r"^weight: starts with the wrong"):
        check_init(plans)


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "up.bias"])
def test_check_init_catches_a_constant_that_is_not_one(name: Any) -> None:
    plans = plan(Net())
    with torch.no_grad():
        by_name(plans)[name].parameter[0] += 0.01
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        check_init(plans)


def test_check_init_catches_an_init_that_came_after() -> None:
    net = Net()
    plans = plan(net)
    net.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
    with pytest.raises(ConfigError, match=r"^up\.weight: starts with the wrong"):
        check_init(plans)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_init_catches_numbers_that_are_none(bad: float) -> None:
    plans = plan(Net())
    with torch.no_grad():
        by_name(plans)["up.weight"].parameter[0, 0] = bad
    with pytest.raises(ConfigError, match=r"^up\.weight: "):
        check_init(plans)


def test_check_init_catches_live_weights_where_the_mask_is_dead() -> None:
    net = Net()
    plans = plan(net, density=0.25)
    with torch.no_grad():
        net.up.weight[~named_masks(net)["up.weight"]] = 1e-6
    with pytest.raises(ConfigError, match=r"^up\.weight: has masked entries that are not 0"):
        check_init(plans)


def test_check_init_never_cries_wolf_on_tiny_layers() -> None:
    for shape, seed in product([(1, 1), (1, 2), (2, 3), (4, 8)], range(200)):
        layer = nn.Linear(*shape, bias=False)
        tag(layer, "weight", "hidden", base_fan_in=1)
        check_init(plan(layer, seed=seed))


# ---------------------------------------------------------------- groups and rows
def test_param_groups_hold_each_parameter_once_with_its_own_numbers() -> None:
    plans = plan(Net(), density=0.25)
    groups = param_groups(plans)
    numbers = [(g["lr"], g["weight_decay"], g["eps"]) for g in groups]
    assert len(set(numbers)) == len(groups)
    where = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(plans) == len(where)
    for item in plans:
        group = where[id(item.parameter)]
        assert group["lr"] == item.hparams.lr
        assert group["weight_decay"] == item.hparams.weight_decay
        assert group["eps"] == item.hparams.eps


def test_masked_entries_of_weights_gradients_and_moments_stay_exactly_zero() -> None:
    for optimizer_name in ("adamw", "sgd"):
        net = Net()
        plans = plan(net, density=0.25, optimizer=optimizer_name)
        groups = param_groups(plans)
        optimizer = torch.optim.AdamW(groups) if optimizer_name == "adamw" else torch.optim.SGD(groups, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            tokens = torch.randint(50, (32,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(tokens), tokens).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for item in plans:
            if item.role not in SPARSE_ROLES:
                continue
            dead = ~named_masks(net)[item.name]
            assert int(dead.sum()) == dead.numel() - item.live > 0
            moments = [v for v in optimizer.state[item.parameter].values() if v.dim() == 2]
            assert moments
            for tensor in (item.parameter, item.parameter.grad, *moments):
                assert torch.count_nonzero(tensor[dead]) == 0
                assert torch.count_nonzero(tensor) > 0


def test_rows_are_plain_and_complete() -> None:
    plans = plan(Net(), density=0.25)
    rows = {row["name"]: row for row in parameter_rows(plans)}
    assert set(rows) == set(by_name(plans))
    up = rows["up.weight"]
    assert up["role"] == "hidden"
    assert up["shape"] == [256, 64]
    assert up["live"] == 256 * 64 // 4
    assert up["density"] == 0.25
    assert up["m_d"] == 4
    assert math.isclose(up["init_std"], up["measured_std"], rel_tol=0.05)
    assert {"lr", "weight_decay", "eps"} <= set(up)
    for row in rows.values():
        assert all(isinstance(v, str | int | float | list) for v in row.values())
