"""The matmul of a masked linear layer: torch's own, or oneDNN's where it is faster at float32's accuracy, by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from supar_sweep.errors import ConfigError

ROUTES = ("torch", "onednn")

MAX_ROUTE_ERROR = 1e-5
"""Largest relative error against float64 at which a matmul still counts as float32 (bf16: 2e-3)."""

MIN_ROUTE_SPEEDUP = 1.05
"""Below this the other route is not worth being different."""

MEASURE_S = 0.05
"""Time that two functions are measured against each other for, or four rounds if these take longer."""


def check_route(route: str) -> None:
    """Raise ConfigError where a matmul route is neither of the two.

    Args:
        route: its name.
    """
    if route not in ROUTES:
        raise ConfigError("runtime.route", "unknown matmul route", value=route, allowed=ROUTES, nearest_to=route)


@dataclass(frozen=True)
class RouteChoice:
    """Which fp32 matmul the linear layers run on, and why.

    Args:
        route: "torch" or "onednn".
        speedup: a layer's forward and backward time, torch's over oneDNN's; None if not measured.
        error: oneDNN's largest relative error against float64; None if not measured.
        reason: one line for the log.
    """

    route: str
    speedup: float | None
    error: float | None
    reason: str


def choose_route(device: torch.device | str, tokens: int = 512, fan_in: int = 256, fan_out: int = 256) -> RouteChoice:
    """Return the matmul route for this machine, measured in under 0.3 s and cached for the process.

    "onednn" asks oneDNN for its bf16 fp32-precision mode around the layer's own matmuls. A CPU
    without AMX answers with plain AVX-512 fp32, which on AMD is about twice as fast as MKL; with
    AMX the inputs really become bf16, which the error check refuses.

    The choice rests on a timing, so a run that must continue exactly stores it and sets it again.

    Args:
        device: where the model runs; anything but the CPU keeps torch's route, unmeasured.
        tokens: rows of the activations of one step (batch * context), >= 1.
        fan_in, fan_out: a typical hidden layer, >= 1. Large shapes are measured smaller.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return RouteChoice("torch", None, None, f"device is {kind}, not the CPU")
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return RouteChoice("torch", None, None, "this torch has no oneDNN precision setting")
    # the answer depends on the threads in use, and a big layer's ratio is that of a 512 x 512 one
    shape = (min(tokens, 512), min(fan_in, 512), min(fan_out, 512))
    return _measured_choice(*shape, torch.get_num_threads())


def decide_route(speedup: float, error: float) -> RouteChoice:
    """Return the choice that follows from a measurement: fp32 accuracy first, then speed.

    Args:
        speedup: a layer's forward and backward time, torch's over oneDNN's.
        error: oneDNN's largest relative error (Frobenius norms) against float64.
    """
    measured = f"relative error {error:.1e}, {speedup:.2f}x torch's speed"
    if not error < MAX_ROUTE_ERROR:
        return RouteChoice("torch", speedup, error, f"oneDNN is not fp32 here: {measured}")
    if not speedup > MIN_ROUTE_SPEEDUP:
        return RouteChoice("torch", speedup, error, f"oneDNN is not faster here: {measured}")
    return RouteChoice("onednn", speedup, error, f"oneDNN is faster at fp32 accuracy: {measured}")


@lru_cache(maxsize=32)
def _measured_choice(tokens: int, fan_in: int, fan_out: int, threads: int) -> RouteChoice:
    try:
        error = max(
            _onednn_error(shape)
            # kernels differ by shape: long and short sums, and sizes off the vector width
            for shape in ((tokens, fan_in, fan_out), (64, 512, 64), (37, 129, 65))
        )
        passes = [_layer_pass((tokens, fan_in, fan_out), route, torch.float32) for route in ROUTES]
        return decide_route(speedup_of(passes), error)
    except (RuntimeError, AttributeError, ValueError) as problem:
        return RouteChoice("torch", None, None, f"oneDNN's precision setting failed: {problem}")


def _onednn_error(shape: tuple[int, int, int]) -> float:
    """Return the largest relative error of output and both gradients on the oneDNN route."""
    got = _layer_pass(shape, "onednn", torch.float32)()
    want = _layer_pass(shape, "torch", torch.float64)()
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))


def _layer_pass(shape: tuple[int, int, int], route: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Return a function that runs one layer, as in training, and returns output and gradients."""
    tokens, fan_in, fan_out = shape
    # its own generator: the caller's random state stays untouched
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((tokens, fan_in), (fan_out, fan_in), (tokens, fan_out))
    )
    x.requires_grad_()
    weight.requires_grad_()
    linear = onednn_linear if route == "onednn" else F.linear

    def run() -> list[Tensor]:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = linear(x, weight, None)
            # a scalar loss: with grad_outputs torch would import its symbolic shapes, .2 s
            return [y.detach(), *torch.autograd.grad((y * grad).sum(), (x, weight))]

    return run


def speedup_of(runs: Sequence[Callable[[], object]], device: str = "cpu") -> float:
    """Return the median over rounds of the first function's time over the second's, the two measured in turn.

    Args:
        runs: the two.
        device: where they compute: "cpu" or "cuda".
    """
    ratios: list[float] = []
    begun_s = time.perf_counter()
    # the first round warms up; a slow machine gets three more, enough for a ratio far from 1
    while len(ratios) < 4 or (len(ratios) < 32 and time.perf_counter() - begun_s < MEASURE_S):
        times = [time.perf_counter()]
        for run in runs:
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return median(ratios[1:])


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias), computed on oneDNN's route forward and backward.

    Args:
        x: [..., fan_in], float32 on the CPU, as are the others.
        weight: [fan_out, fan_in].
        bias: [fan_out] or None.
    """
    return cast(Tensor, _OneDnnLinear.apply(x, weight, bias))  # type: ignore[no-untyped-call]


@contextmanager
def onednn_precision() -> Iterator[None]:
    """Route fp32 matmuls through oneDNN for the block.

    The setting is the process's, and it makes CPU attention about four times slower: so it stands
    only around single matmuls. Backward on the CPU runs in the calling thread, hence no other
    thread of a one-model process can meet it.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _OneDnnLinear(torch.autograd.Function):
    """F.linear whose three matmuls run under `onednn_precision`, and nothing else does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with onednn_precision():
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # 2-d products only, so that the weight's gradient is contiguous (fused AdamW corrupts
        # silently where a gradient's strides differ from its parameter's)
        grad_2d = grad.reshape(-1, weight.shape[0])
        with onednn_precision():
            grad_x = (grad_2d @ weight).reshape(x.shape) if needs_x else None
            grad_weight = grad_2d.t() @ x.reshape(-1, weight.shape[1]) if needs_weight else None
        return grad_x, grad_weight, grad_2d.sum(0) if needs_bias else None
