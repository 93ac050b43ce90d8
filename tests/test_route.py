"""Matmul routes of the linear layer: the same numbers, the setting kept to its matmuls, a choice by measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from supar_sweep.errors import ConfigError
from supar_sweep.sparse.linear import MaskedLinear, set_route
from supar_sweep.sparse.route import MAX_ROUTE_ERROR, MIN_ROUTE_SPEEDUP, ROUTES, choose_route, decide_route
from tests.small_linear import FAN_IN, FAN_OUT, TOKENS, inputs, layer, precision

has_onednn_setting = pytest.mark.skipif(
    not hasattr(precision(), "fp32_precision"), reason="this torch has no oneDNN precision setting"
)


@pytest.fixture
def onednn_is_fp32() -> None:
    error = choose_route("cpu").error
    if error is None or error >= MAX_ROUTE_ERROR:
        pytest.skip("oneDNN's precision setting is absent, or not fp32 on this CPU")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, for every operator that runs, the oneDNN setting it runs under."""

    def __init__(self, fail_on: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, str]] = []
        self.fail_on = fail_on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = str(func)
        self.seen.append((name, precision().fp32_precision))
        if self.fail_on and self.fail_on in name and precision().fp32_precision == "bf16":
            raise RuntimeError(f"no {name} today")
        return func(*args, **(kwargs or {}))

    def settings(self, part: str) -> set[str]:
        return {setting for name, setting in self.seen if part in name}


class Attention(nn.Module):
    def __init__(self, route: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = MaskedLinear(32, 96, route=route)
        self.out = MaskedLinear(32, 32, route=route)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (part.reshape(batch, tokens, 2, 16).transpose(1, 2) for part in self.qkv(x).split(width, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return out


@contextmanager
def ambient(setting: str) -> Iterator[None]:
    before = precision().fp32_precision
    precision().fp32_precision = setting
    try:
        yield
    finally:
        precision().fp32_precision = before


@has_onednn_setting
def test_the_setting_covers_the_matmuls_and_nothing_else() -> None:
    model = Attention("onednn")
    x = torch.randn(2, 8, 32, requires_grad=True)
    before = precision().fp32_precision
    with Recorder() as recorder:
        model(x).square().sum().backward()
    matmuls = [item for item in recorder.seen if "mm." in item[0]]
    # two layers: a forward and two gradients each
    assert [setting for _, setting in matmuls] == ["bf16"] * 6
    assert recorder.settings("dot_product") == {before}
    assert recorder.settings("pow") == {before}
    assert precision().fp32_precision == before != "bf16"


@has_onednn_setting
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_setting_is_restored_after_an_exception(where: str) -> None:
    masked = layer(route="onednn")
    with ambient("ieee"):
        if where == "forward":
            with pytest.raises(RuntimeError, match="shapes"):
                masked(torch.randn(2, FAN_IN + 1))
        else:
            loss = masked(inputs()).square().sum()
            with pytest.raises(RuntimeError, match="today"), Recorder(fail_on="mm"):
                loss.backward()
        assert precision().fp32_precision == "ieee"


@pytest.mark.usefixtures("onednn_is_fp32")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FAN_IN,), (5, FAN_IN), (2, 3, FAN_IN)])
def test_both_routes_agree(bias: bool, shape: tuple[int, ...]) -> None:
    results = []
    for route in ROUTES:
        masked = layer(bias=bias, route=route)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = masked(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in masked.parameters())])
    for plain, onednn in zip(*results, strict=True):
        assert plain is not None
        assert onednn is not None
        assert plain.shape == onednn.shape
        assert (plain - onednn).norm() <= 1e-6 * plain.norm()


@pytest.mark.usefixtures("onednn_is_fp32")
def test_both_routes_agree_at_a_real_layers_size() -> None:
    x, weight = torch.randn(512, 256), torch.randn(1024, 256)
    outputs = []
    for route in ROUTES:
        linear = MaskedLinear(256, 1024, bias=False, route=route)
        linear.load_state_dict({"weight": weight})
        outputs.append(linear(x).detach())
    assert (outputs[0] - outputs[1]).norm() <= 1e-6 * outputs[0].norm()


@has_onednn_setting
def test_frozen_inputs_and_weights_get_no_gradient() -> None:
    masked = layer(route="onednn")
    masked.weight.requires_grad_(False)
    masked(inputs()).sum().backward()
    assert masked.weight.grad is None
    assert torch.equal(masked.bias.grad, torch.full((FAN_OUT,), 3.0 * TOKENS))


@has_onednn_setting
@pytest.mark.parametrize("case", ["autocast", "float64", "bfloat16"])
def test_only_plain_float32_takes_the_onednn_route(case: str) -> None:
    masked = layer(route="onednn")
    x = inputs()
    if case != "autocast":
        masked, x = (part.to(getattr(torch, case)) for part in (masked, x))
    with Recorder() as recorder, torch.autocast("cpu", enabled=case == "autocast"):
        masked(x).float().square().sum().backward()
    assert recorder.settings("mm.")
    assert "bf16" not in recorder.settings("")


def test_route_is_set_on_every_layer_below() -> None:
    model = nn.Sequential(layer(), nn.Linear(3, 3), nn.Sequential(layer()))
    assert set_route(model, "onednn") == 2
    assert {m.route for m in model.modules() if isinstance(m, MaskedLinear)} == {"onednn"}
    with pytest.raises(ConfigError, match=r"runtime\.route: .*did you mean 'onednn'"):
        set_route(model, "onednnn")
    with pytest.raises(ConfigError, match=r"runtime\.route"):
        MaskedLinear(2, 2, route="auto")


def test_accuracy_comes_before_speed() -> None:
    fast, slow = MIN_ROUTE_SPEEDUP * 2, MIN_ROUTE_SPEEDUP
    exact, coarse = MAX_ROUTE_ERROR / 2, MAX_ROUTE_ERROR
    assert decide_route(fast, exact).route == "onednn"
    assert decide_route(slow, exact).route == "torch"
    assert decide_route(fast, coarse).route == "torch"
    assert decide_route(fast, float("nan")).route == "torch"
    assert "not fp32" in decide_route(fast, 2e-3).reason


def test_real_bf16_inputs_would_be_refused() -> None:
    # what an AMX machine computes under the setting: inputs rounded to bf16, sums in fp32
    x, weight = torch.randn(64, 256), torch.randn(64, 256)
    rounded = F.linear(x.bfloat16().float(), weight.bfloat16().float())
    want = F.linear(x.double(), weight.double())
    error = float((rounded - want).norm() / want.norm())
    assert decide_route(2.0, error).route == "torch"


def test_the_choice_is_measured_once_and_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    before = getattr(precision(), "fp32_precision", None)
    first = choose_route("cpu", 256, 64, 64)
    assert first.route in ROUTES
    assert choose_route(torch.device("cpu"), 256, 64, 64) is first
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(precision(), "fp32_precision", None) == before
    if first.route == "onednn":
        assert first.error is not None
        assert first.error < MAX_ROUTE_ERROR


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta"])
def test_other_devices_keep_torchs_route(device: str) -> None:
    choice = choose_route(device)
    assert (choice.route, choice.speedup, choice.error) == ("torch", None, None)
    assert device.split(":")[0] in choice.reason


def test_a_torch_without_the_setting_keeps_its_own_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", object())
    choice = choose_route("cpu", 511, 33, 35)
    assert choice.route == "torch"
    assert "no oneDNN" in choice.reason
