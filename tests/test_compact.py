"""The compact layer: the dense layer's numbers from its live weights alone, and nothing of the dense matrix's size."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supar_sweep import HParams, Method, Ratios, check_init, param_groups, parameter_rows, parameterize, tag
from supar_sweep.errors import ConfigError
from supar_sweep.sparse.compact import CompactLinear, named_live
from supar_sweep.sparse.compute import MIN_COMPACT_SPEEDUP, choose_compute, decide_compute
from supar_sweep.sparse.convert import to_form_of
from supar_sweep.sparse.linear import MaskedLinear, attach_mask
from supar_sweep.sparse.masks import LivePositions, dense_mask, live_positions, mask_hash
from supar_sweep.training.cost import compact_layer_bytes

FAN_IN, FAN_OUT, N_LIVE = 24, 40, 96
LIVE = live_positions(1, (FAN_OUT, FAN_IN), N_LIVE)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def near(got: Tensor | None, want: Tensor | None, dtype: torch.dtype) -> bool:
    assert got is not None
    assert want is not None
    return got.shape == want.shape and bool((got - want).norm() <= TOLERANCE[dtype] * want.norm())


def pair(dtype: torch.dtype, *, bias: bool = True, feature_major: bool = False) -> tuple[Any, Any]:
    """The same layer in both forms."""
    dense: Any = MaskedLinear(FAN_IN, FAN_OUT, bias=bias, dtype=dtype)
    compact: Any = CompactLinear(FAN_IN, FAN_OUT, N_LIVE, bias=bias, feature_major=feature_major, dtype=dtype)
    compact.set_pattern(LIVE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(generator=generator)
        mask = dense_mask(1, (FAN_OUT, FAN_IN), N_LIVE)
        attach_mask(dense, "weight", mask)
        compact.values.copy_(dense.weight[mask])
        if bias:
            compact.bias.copy_(dense.bias)
    return dense, compact


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def at_live(dense: Any, of: Tensor) -> Tensor:
    return of[dense.weight_mask]


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("feature_major", [True, False])
@pytest.mark.parametrize(
    "shape", [(FAN_IN,), (0, FAN_IN), (5, FAN_IN), (2, 3, FAN_IN), (2, 1, FAN_IN), (3, 64, FAN_IN), (2, 600, FAN_IN)]
)
def test_forward_and_gradients_are_the_dense_layers(
    dtype: torch.dtype, bias: bool, feature_major: bool, shape: tuple[int, ...]
) -> None:
    dense, compact = pair(dtype, bias=bias, feature_major=feature_major)
    outputs, x_grads = [], []
    for layer in (dense, compact):
        x = inputs(shape, dtype).requires_grad_()
        y = layer(x)
        y.backward(inputs(tuple(y.shape), dtype, seed=2))
        outputs.append(y.detach())
        x_grads.append(x.grad)
    assert near(outputs[1], outputs[0], dtype)
    assert near(x_grads[1], x_grads[0], dtype)
    assert near(compact.values.grad, at_live(dense, dense.weight.grad), dtype)
    if bias:
        assert near(compact.bias.grad, dense.bias.grad, dtype)


@pytest.mark.usefixtures("product")
def test_two_feature_major_layers_in_a_row_agree_with_two_dense_ones() -> None:
    dense_up, up = pair(torch.float64, feature_major=True)
    generator = torch.Generator().manual_seed(5)
    down = CompactLinear(FAN_OUT, 8, 50, dtype=torch.float64)
    down.set_pattern(live_positions(2, (8, FAN_OUT), 50))
    with torch.no_grad():
        down.values.normal_(generator=generator)
    dense_down = torch.zeros(8, FAN_OUT, dtype=torch.float64)
    dense_down[torch.from_numpy(down.live().rows).long(), torch.from_numpy(down.live().cols).long()] = (
        down.values.detach()
    )
    x = inputs((3, 70, FAN_IN), torch.float64)
    got = down(nn.functional.gelu(up(x)))
    want = nn.functional.gelu(dense_up(x)) @ dense_down.T
    assert near(got.detach(), want.detach(), torch.float64)
    assert got.is_contiguous()
    assert not up(x).is_contiguous()
    for result in (got, want):
        result.square().sum().backward()
    assert near(up.values.grad, at_live(dense_up, dense_up.weight.grad), torch.float64)


@pytest.mark.usefixtures("product")
def test_it_is_a_linear_map_with_the_patterns_zeros() -> None:
    _, compact = pair(torch.float64, bias=False)
    columns = compact(torch.eye(FAN_IN, dtype=torch.float64)).detach().T
    want = torch.zeros(FAN_OUT, FAN_IN, dtype=torch.float64)
    want[torch.from_numpy(LIVE.rows).long(), torch.from_numpy(LIVE.cols).long()] = compact.values.detach()
    assert torch.equal(columns, want)
    assert compact.density == N_LIVE / (FAN_IN * FAN_OUT)


@pytest.mark.usefixtures("product")
def test_rows_and_columns_without_a_live_weight_give_zeros() -> None:
    compact = CompactLinear(4, 5, 1, bias=False)
    compact.set_pattern(LivePositions(np.array([2], np.int32), np.array([3], np.int32), (5, 4)))
    with torch.no_grad():
        compact.values.fill_(2.0)
    x = torch.ones(3, 4, requires_grad=True)
    compact(x).sum().backward()
    assert compact(x).tolist() == [[0.0, 0.0, 2.0, 0.0, 0.0]] * 3
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0, 0.0, 2.0]] * 3


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.3, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_with_decay_and_clipping_are_the_dense_layers(optimizer: str, dtype: torch.dtype) -> None:
    dense, compact = pair(dtype)
    norms: list[list[float]] = []
    for layer in (dense, compact):
        steps = OPTIMIZERS[optimizer](layer.parameters())
        seen = []
        for step in range(20):
            steps.zero_grad()
            layer(inputs((2, 9, FAN_IN), dtype, seed=step)).square().mean().backward()
            seen.append(float(nn.utils.clip_grad_norm_(layer.parameters(), 0.1)))
            steps.step()
        norms.append(seen)
    assert min(norms[0]) > 0.1  # clipping did act
    # twenty steps add up the roundings of twenty
    assert norms[1] == pytest.approx(norms[0], rel=20 * TOLERANCE[dtype])
    want = at_live(dense, dense.weight.detach())
    assert (compact.values.detach() - want).norm() <= 20 * TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("case", ["autocast", "bfloat16"])
def test_bfloat16_is_as_near_as_the_dense_layer(case: str) -> None:
    dense, compact = pair(torch.float32)
    x = inputs((64, FAN_IN), torch.float32)
    exact = dense(x).detach()
    if case == "bfloat16":
        dense, compact, x = dense.bfloat16(), compact.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        y, y_dense = compact(x), dense(x)
    assert y.dtype == y_dense.dtype == torch.bfloat16
    (y.float().square().sum()).backward()
    (y_dense.float().square().sum()).backward()
    assert (y.float() - exact).norm() <= 2 * (y_dense.float() - exact).norm()
    assert compact.values.grad.dtype == compact.values.dtype
    want = at_live(dense, dense.weight.grad).float()
    assert (compact.values.grad.float() - want).norm() <= 2e-2 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_agrees(dtype: torch.dtype) -> None:
    _, compact = pair(torch.float32)
    there = copy.deepcopy(compact).to("cuda", dtype)
    x = inputs((2, 70, FAN_IN), torch.float32)
    for layer, given in ((compact, x), (there, x.to("cuda", dtype))):
        layer(given).float().square().sum().backward()
    error = 1e-5 if dtype == torch.float32 else 2e-2
    want = compact.values.grad
    assert (there.values.grad.float().cpu() - want).norm() <= error * want.norm()


def test_copies_pickles_and_loads_keep_the_pattern() -> None:
    _, compact = pair(torch.float32)
    x = inputs((5, FAN_IN), torch.float32)
    fresh = CompactLinear(FAN_IN, FAN_OUT, N_LIVE)
    fresh.load_state_dict(compact.state_dict())
    for other in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact)), fresh):
        grads: list[Any] = []
        for layer in (compact, other):
            x_own = x.clone().requires_grad_()
            layer(x_own).square().sum().backward()
            grads.append(x_own.grad)
        assert torch.equal(compact(x), other(x))
        assert torch.equal(grads[0], grads[1])  # the transposed pattern too


def test_wrong_patterns_are_refused() -> None:
    compact = CompactLinear(FAN_IN, FAN_OUT, N_LIVE)
    shuffled = LivePositions(LIVE.rows[::-1].copy(), LIVE.cols[::-1].copy(), LIVE.shape)
    for wrong in (
        live_positions(1, (FAN_OUT, FAN_IN), N_LIVE - 1),
        live_positions(1, (FAN_IN, FAN_OUT), N_LIVE),
        shuffled,
    ):
        with pytest.raises(ConfigError, match="does not fit its compact layer"):
            compact.set_pattern(wrong)
    for n_live in (0, FAN_IN * FAN_OUT + 1):
        with pytest.raises(ConfigError, match="n_live"):
            CompactLinear(FAN_IN, FAN_OUT, n_live)


class Net(nn.Module):
    """One hidden layer in either form, under the same names."""

    def __init__(self, n_live: int | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer: Any
        if n_live is None:
            self.layer = MaskedLinear(64, 128, dtype=dtype)
        else:
            self.layer = CompactLinear(64, 128, n_live, dtype=dtype)
        tag(self.layer, "weight" if n_live is None else "values", "hidden", base_fan_in=32)


def planned(net: Net, density: float, seed: int = 3) -> Any:
    hparams = HParams(lr=0.01, init_std=0.1, alpha_in=1.0, alpha_out=1.0, weight_decay=0.1)
    method = Method(parameterization="supar")
    ratios = Ratios(m_d=2.0)
    return parameterize(net, method=method, hparams=hparams, ratios=ratios, density=density, seed=seed, eps=1e-8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("density", [1 / 64, 0.25])
@pytest.mark.filterwarnings("ignore:.*live weights a neuron")
def test_the_rules_write_the_same_start_and_say_the_same_of_it(density: float, dtype: torch.dtype) -> None:
    dense, compact = Net(None, dtype), Net(int(density * 64 * 128), dtype)
    dense_plans, plans = planned(dense, density), planned(compact, density)
    assert torch.equal(compact.layer.values, at_live(dense.layer, dense.layer.weight))
    check_init(plans)
    rows, dense_rows = parameter_rows(plans), parameter_rows(dense_plans)
    for row, want in zip(rows, dense_rows, strict=True):
        assert row.pop("measured_std") == pytest.approx(want.pop("measured_std"), rel=1e-6)
        assert row == want
    assert rows[0]["name"] == "layer.weight"
    for group, want in zip(param_groups(plans), param_groups(dense_plans), strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in want.items() if k != "params"}
    assert mask_hash(named_live(compact)) == mask_hash(named_live(dense))
    with torch.no_grad():
        compact.layer.values.mul_(2)
    with pytest.raises(ConfigError, match=r"layer\.weight: starts with the wrong standard deviation"):
        check_init(plans)


def test_a_state_converts_there_and_back_unchanged() -> None:
    density = 0.25
    dense, compact = Net(None), Net(2048)
    optimizers = [torch.optim.AdamW(param_groups(planned(net, density))) for net in (dense, compact)]
    for _ in range(2):
        dense.layer(inputs((4, 64), torch.float32)).square().sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    weights, moments = dense.state_dict(), optimizers[0].state_dict()
    there = to_form_of(compact, optimizers[1], weights, moments)
    compact.load_state_dict(there[0])
    optimizers[1].load_state_dict(there[1])
    state = optimizers[1].state[compact.layer.values]
    mine = optimizers[0].state[dense.layer.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], at_live(dense.layer, mine[key]))
    assert torch.equal(state["step"], mine["step"])
    back = to_form_of(dense, optimizers[0], compact.state_dict(), optimizers[1].state_dict())
    assert set(back[0]) == set(weights)
    assert all(torch.equal(back[0][key], weights[key]) for key in weights)
    for index, want in moments["state"].items():
        assert all(torch.equal(back[1]["state"][index][key], want[key]) for key in want)


@pytest.mark.parametrize(("fan_out", "fan_in", "n_live"), [(40, 24, 96), (16, 40000, 500)])
def test_state_bytes_are_those_of_the_formula(fan_out: int, fan_in: int, n_live: int) -> None:
    compact = CompactLinear(fan_in, fan_out, n_live, bias=False)
    compact.set_pattern(live_positions(1, (fan_out, fan_in), n_live))
    optimizer = torch.optim.AdamW(compact.parameters())
    compact(torch.randn(2, fan_in)).sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    kept = [compact.values, compact.values.grad, *compact.buffers(), *moments]
    assert sum(t.numel() * t.element_size() for t in kept if t is not None) == compact_layer_bytes(
        fan_out, fan_in, n_live
    )


def test_constant_live_weights_cost_nearly_constant_state() -> None:
    n_live = 4096 * 4096 // 256
    dense_256 = 256 * 256 * 4 * 4  # weight, gradient and two moments
    assert n_live == 256 * 256
    assert compact_layer_bytes(4096, 4096, n_live) <= 1.5 * dense_256


MEMORY = """
import resource, torch
from supar_sweep.sparse.compact import CompactLinear
from tests.test_compact import Net, planned
from torch import nn
torch.ones(64, 64) @ torch.ones(64, 64)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + {allowed}, -1))
net = Net(64 * 128 // 4)
width, n_live = 16384, 16384 * 16384 // 1024
net.layer = {layer}
from supar_sweep import tag, param_groups, check_init
tag(net.layer, {name!r}, "hidden", base_fan_in=32)
plans = planned(net, 1 / 1024)
check_init(plans)
optimizer = torch.optim.AdamW(param_groups(plans), fused=True)
for _ in range(2):
    net.layer(torch.ones(4, width)).square().sum().backward()
    optimizer.step()
"""


def test_nothing_of_the_dense_matrix_is_ever_there() -> None:
    # 512 MiB of address space; a mask alone of this layer would take 256, one float32 matrix 1024
    allowed = 512 << 20
    compact = MEMORY.format(allowed=allowed, layer="CompactLinear(width, width, n_live)", name="values")
    answer = subprocess.run([sys.executable, "-c", compact], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    dense = MEMORY.format(allowed=allowed, layer="nn.Linear(width, width)", name="weight")
    assert subprocess.run([sys.executable, "-c", dense], capture_output=True, timeout=300).returncode != 0


def test_the_choice_follows_the_measurement() -> None:
    assert decide_compute(MIN_COMPACT_SPEEDUP * 1.01).form == "compact"
    assert decide_compute(MIN_COMPACT_SPEEDUP).form == "dense"
    assert decide_compute(float("nan")).form == "dense"


def test_the_choice_is_measured_once_and_leaves_no_trace() -> None:
    shape = {"fan_in": 64, "fan_out": 64, "density": 1 / 16, "tokens": 32, "context_tokens": 16}
    state = torch.get_rng_state()
    first = choose_compute("cpu", **shape)  # type: ignore[arg-type]
    assert first.speedup is not None
    assert choose_compute("cpu", **shape) is first  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


def test_dense_layers_are_never_compact_nor_measured() -> None:
    for density in (1.0, 0.75):
        choice = choose_compute("cpu", fan_in=64, fan_out=64, density=density, tokens=32, context_tokens=32)
        assert (choice.form, choice.speedup) == ("dense", None)


def test_what_fails_falls_back_to_dense() -> None:
    # a device that this build of torch cannot use
    choice = choose_compute("meta", fan_in=8, fan_out=8, density=0.125, tokens=4, context_tokens=4)
    assert choice.form == "dense"
    assert "failed here" in choice.reason
