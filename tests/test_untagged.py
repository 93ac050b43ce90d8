"""Untagged parameters, and the role that keeps its start: nothing that a user wrote is replaced without a word."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supar_sweep.errors import ConfigError
from supar_sweep.rules.hparams import Ratios
from supar_sweep.rules.parameterization import Method
from supar_sweep.rules.transfer import role_hparams
from supar_sweep.training.roles import check_init, param_groups, parameter_rows
from supar_sweep.training.tags import collect, tag
from tests.test_roles import HPARAMS, by_name, plan


class Mixer(nn.Module):
    """What a state space model has beside its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1.0, 9.0).log().repeat(4, 1))
        self.D = nn.Parameter(torch.ones(4))
        self.dt_bias = nn.Parameter(torch.full((4,), -3.0))


class MyLinear(nn.Linear):
    """A subclass, whose bias is torch's; its gate's is not."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gate_bias = nn.Parameter(torch.linspace(-2, -1, 4))


class RMSNorm(nn.Module):
    """A norm of one's own, whose gain may be 1 + weight."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), start))


def role_of(module: nn.Module, name: str) -> str:
    for other, parameter in module.named_parameters():
        parameter.requires_grad_(other == name)
    (item,) = collect(module)
    return item.tag.role


def filled(module: nn.Module, name: str, value: float) -> nn.Module:
    nn.init.constant_(module.get_parameter(name), value)
    return module


def spread(module: nn.Module, name: str, low: float, high: float) -> nn.Module:
    parameter = module.get_parameter(name)
    with torch.no_grad():
        parameter.copy_(torch.linspace(low, high, parameter.numel()))
    return module


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("module", "name", "problem"),
    [
        (Mixer(), "dt_bias", r"is called bias, but of Mixer it is not known whether it may start at 0 \(it holds -3\)"),
        (MyLinear(), "gate_bias", r"is called bias, but of MyLinear .* \(it holds -2 to -1\)"),
        (Mixer(), "D", r"has no role: a parameter of Mixer, neither called bias nor in a norm"),
        (Mixer(), "A_log", r"has no role \(shape \(4, 8\)\)"),
        (filled(nn.Linear(4, 3), "bias", -4.6), "bias", r"holds -4.6, and its start at 0 would replace that"),
        (filled(nn.Linear(4, 1), "bias", -4.6), "bias", r"holds -4.6, and its start at 0"),
        (filled(nn.Conv2d(4, 3, 1), "bias", -2), "bias", r"holds -2, and its start at 0"),
        (spread(nn.Linear(4, 3), "bias", -6, -2), "bias", r"holds -6 to -2, and its start at 0"),  # as the dt of Mamba
        (spread(nn.Conv2d(4, 3, 1), "bias", 0.6, 0.7), "bias", r"holds 0.6 to 0.7, and its start at 0"),
        (filled(nn.LayerNorm(4), "weight", 1e-4), "weight", r"holds 0.0001, and its start at 1"),
        (filled(nn.LayerNorm(4), "bias", 7), "bias", r"holds 7, and its start at 0"),
        (RMSNorm(0.0), "weight", r"holds 0, and its start at 1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_values_that_somebody_set_are_not_replaced(module: nn.Module, name: str, problem: str) -> None:
    before = module.get_parameter(name).clone()
    for other, parameter in module.named_parameters():
        parameter.requires_grad_(other == name)
    with pytest.raises(ConfigError, match=rf"^{name}: {problem}.*supar_sweep\.tag\(owner, '{name}', role\)") as error:
        plan(module)
    assert torch.equal(module.get_parameter(name), before)
    if before.dim() == 1:
        assert str(error.value).endswith("allowed: bias (starts at 0), norm (starts at 1), own (keeps its values)")
    tag(module, name, "own")
    (item,) = plans = plan(module)
    check_init(plans)
    assert torch.equal(item.parameter, before)


@pytest.mark.parametrize("values", [torch.ones(8), torch.linspace(1, 3, 8)], ids=["constant", "spread"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell])
def test_a_gate_set_among_random_biases_is_seen(kind: Callable[..., Any], values: Tensor) -> None:
    layer, fresh = kind(4, 8), kind(4, 8)
    for module in (layer, fresh):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("bias" in name)
    assert {item.tag.role for item in collect(fresh)} == {"bias"}  # torch's random start goes to 0, as ever
    name = next(name for name, _ in layer.named_parameters() if "bias_hh" in name)
    with torch.no_grad():
        layer.get_parameter(name)[8:16].copy_(values)
    with pytest.raises(ConfigError, match=rf"^{name}: holds 1( to 3)?, and its start at 0 would replace that"):
        collect(layer)
    assert len(collect(layer, starts=False)) == 2


# ---------------------------------------------------------------- as before
@pytest.mark.parametrize(
    ("module", "name", "role"),
    [
        (nn.Linear(4, 3), "bias", "bias"),  # uniform
        (nn.Linear(4, 1), "bias", "bias"),  # uniform: one number is a constant whatever it is
        (nn.Bilinear(4, 4, 1), "bias", "bias"),  # uniform, by the first input
        (spread(nn.Linear(4, 3), "bias", -6, -0.4), "bias", "bias"),  # after training, some are still small
        (filled(nn.Linear(4, 3), "bias", 0), "bias", "bias"),
        (filled(nn.Linear(4, 3), "bias", 1), "bias", "bias"),
        (nn.MultiheadAttention(4, 2), "in_proj_bias", "bias"),
        (nn.LayerNorm(4), "weight", "norm"),
        (filled(nn.LayerNorm(4), "weight", 0), "weight", "norm"),
        (nn.BatchNorm1d(4), "bias", "bias"),
        (RMSNorm(1.0), "weight", "norm"),
        (MyLinear(), "bias", "bias"),
        (filled(Mixer(), "dt_bias", 0), "dt_bias", "bias"),  # a start at 0 is what it has
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_known_classes_keep_their_start(module: nn.Module, name: str, role: str) -> None:
    assert role_of(module, name) == role


def test_a_second_start_and_a_trained_model_are_no_constants() -> None:
    layer = nn.LayerNorm(4)
    plan(layer)
    check_init(plan(layer))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.linspace(0, 1, 4))
    check_init(plan(layer))


# ---------------------------------------------------------------- the role itself
def test_own_keeps_its_values_and_is_trained_as_a_bias() -> None:
    mixer = Mixer()
    before = {name: parameter.clone() for name, parameter in mixer.named_parameters()}
    for name in before:
        tag(mixer, name, "own", in_block=True)
    plans = plan(mixer, depth="completep", depth_alpha=0.5)
    check_init(plans)
    ratios = Ratios(m_d=4, m_L=2, n_layer=4)
    method = Method(parameterization="supar", depth="completep", depth_alpha=0.5)
    for name, item in by_name(plans).items():
        assert torch.equal(item.parameter, before[name])
        assert item.hparams == role_hparams("bias", method, ratios, HPARAMS, in_block=True, eps=1e-8)
        assert item.hparams == role_hparams("own", method, ratios, HPARAMS, in_block=True, eps=1e-8)
        assert item.hparams.weight_decay == 0
        rms = before[name].square().mean().sqrt().item()
        assert math.isclose(item.measured_std, rms, rel_tol=1e-6)
    (group,) = param_groups(plans)
    assert group["role"] == "own"
    assert group["lr"] == pytest.approx(HPARAMS.lr * 2**-0.5)  # m_L^(alpha - 1)
    assert {row["role"] for row in parameter_rows(plans)} == {"own"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("parameterization", ["sp", "mup", "supar"])
def test_own_has_the_rules_of_a_bias(parameterization: Any, optimizer: Any) -> None:
    depths: tuple[Any, ...] = ("none", "gpt2", "completep") if optimizer == "adamw" else ("none", "gpt2")
    for depth in depths:
        method = Method(parameterization=parameterization, optimizer=optimizer, depth=depth)
        for in_block in (True, False):
            ratios = Ratios(m_d=8, m_rho=0.25, m_L=3, n_layer=6)
            both = [
                role_hparams(role, method, ratios, HPARAMS, in_block=in_block, eps=1e-8) for role in ("own", "bias")
            ]
            assert both[0] == both[1]


@pytest.mark.parametrize("lost", [lambda p: p.zero_(), lambda p: p.mul_(1.1), lambda p: p.fill_(math.nan)])
def test_check_init_sees_values_that_were_lost(lost: Callable[[Tensor], Tensor]) -> None:
    mixer = Mixer()
    for name, _ in mixer.named_parameters():
        tag(mixer, name, "own")
    plans = plan(mixer)
    check_init(plans)
    with torch.no_grad():
        lost(mixer.dt_bias)
    with pytest.raises(ConfigError, match=r"^dt_bias: was to keep its values \(role own\), and holds others now"):
        check_init(plans)


def test_a_cast_is_no_loss() -> None:
    mixer = Mixer()
    for name, _ in mixer.named_parameters():
        tag(mixer, name, "own")
    plans = plan(mixer)
    mixer.bfloat16()
    check_init(plans)
