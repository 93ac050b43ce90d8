"""Masks on any module's parameters, and a linear layer with a choice of matmul.

A mask is a bool buffer `<param>_mask` beside its parameter, so it is part of the state_dict and
moves with the module. Dead weights are zeroed when the mask is attached or loaded; their gradients
are zeroed as soon as autograd has accumulated them, before clipping or the optimizer can see them.
A zero weight with zero gradients stays zero under AdamW and SGD, decay included, so the forward
needs no mask at all.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_sweep.errors import ConfigError

ROUTES = ("torch", "onednn")

MAX_ROUTE_ERROR = 1e-5
"""Largest relative error against float64 at which a matmul still counts as float32 (bf16: 2e-3)."""

MIN_ROUTE_SPEEDUP = 1.05
"""Below this the other route is not worth being different."""

_NAMES = "_masked_param_names"
_DENSE_GRADIENTS = "_dead_gradients_pass"


def attach_mask(module: nn.Module, param_name: str, mask: Tensor, *, keep_full: bool = False) -> bool:
    """Mask one parameter in place; return whether a mask was attached.

    A mask with no dead entry attaches nothing unless a mask stands there already: density 1 costs
    nothing. Attaching again replaces the mask. The mask survives state_dict round trips (also with
    assign=True), device moves, deepcopy and pickling.

    Args:
        module: the module that owns the parameter directly.
        param_name: its name on that module, such as "weight".
        mask: bool, of the parameter's shape, True where live; copied to the parameter's device.
        keep_full: attach a mask with no dead entry too, which will get some later.

    Raises:
        ConfigError: the module has no such parameter, or the mask's shape or dtype does not fit.
    """
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if param_name not in names:
        raise ConfigError("param_name", "no such one", value=param_name, allowed=names, nearest_to=param_name)
    param = module.get_parameter(param_name)
    if mask.dtype != torch.bool or mask.shape != param.shape:
        raise ConfigError(
            f"{param_name}_mask",
            "does not fit its parameter",
            value=f"{mask.dtype} {tuple(mask.shape)}",
            allowed=f"torch.bool {tuple(param.shape)}",
        )
    masked: list[str] = module.__dict__.setdefault(_NAMES, [])
    if param_name in masked:
        module.get_buffer(f"{param_name}_mask").copy_(mask)
    elif bool(mask.all()) and not keep_full:
        return False
    else:
        # a copy: the caller may go on to use or change its tensor
        module.register_buffer(f"{param_name}_mask", mask.detach().clone().to(param.device))
        if not masked:
            module.register_forward_pre_hook(_before_forward)
            module.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        masked.append(param_name)
    _ensure_hooks(module)
    _zero_own_dead(module)
    return True


def named_masks(module: nn.Module) -> dict[str, Tensor]:
    """Return parameter name (dotted, from `module`) -> its attached mask."""
    found: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        for name in _masked_names(child):
            dotted = f"{prefix}.{name}" if prefix else name
            found[dotted] = child.get_buffer(f"{name}_mask")
    return found


def let_dead_gradients_through(module: nn.Module, passes: bool) -> None:
    """Set whether backward leaves the gradients of dead entries as they are; the caller then zeroes them before the optimizer.

    Args:
        module: every masked parameter in it.
        passes: False, as at the start: they are zeroed as soon as they are there.
    """
    for child in module.modules():
        if _masked_names(child):
            child.__dict__[_DENSE_GRADIENTS] = passes


class MaskedLinear(nn.Module):
    """y = x W^T + b, with an optional mask on W and a choice of fp32 matmul.

    The weight starts at zero: initialization belongs to the caller, who knows the layer's role.
    `attach_mask(layer, "weight", mask)` makes it sparse; without it, this is a plain linear layer.

    Args:
        fan_in: inputs, >= 1.
        fan_out: outputs, >= 1.
        bias: whether to add a bias [fan_out].
        route: "torch" or "onednn" (see `choose_route`); "onednn" takes effect for float32 on the
            CPU outside autocast and torch.compile, everything else runs torch's own.
        device, dtype: of the parameters.

    Raises:
        ConfigError: unknown route.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        bias: bool = True,
        *,
        route: str = "torch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fan_in = fan_in
        self.fan_out = fan_out
        _check_route(route)
        self.route = route
        self.weight = nn.Parameter(torch.zeros(fan_out, fan_in, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(fan_out, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @property
    def density(self) -> float:
        """The achieved density of the weight, in (0, 1]."""
        if "weight" not in _masked_names(self):
            return 1.0
        return float(self.get_buffer("weight_mask").sum().item()) / self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., fan_out].

        Args:
            x: [..., fan_in].
        """
        if self.route == "onednn" and not torch.compiler.is_compiling() and self._plain_fp32(x):
            return onednn_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return what print(layer) shows between its brackets."""
        return f"{self.fan_in}, {self.fan_out}, bias={self.bias is not None}, route={self.route!r}"

    def _plain_fp32(self, x: Tensor) -> bool:
        return (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == self.weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias), computed on oneDNN's route forward and backward.

    Args:
        x: [..., fan_in], float32 on the CPU, as are the others.
        weight: [fan_out, fan_in].
        bias: [fan_out] or None.
    """
    return cast(Tensor, _OneDnnLinear.apply(x, weight, bias))  # type: ignore[no-untyped-call]


def set_route(module: nn.Module, route: str) -> int:
    """Set the matmul route of every MaskedLinear in `module`; return how many there are.

    Args:
        module: any module.
        route: "torch" or "onednn".

    Raises:
        ConfigError: unknown route.
    """
    _check_route(route)
    layers = [child for child in module.modules() if isinstance(child, MaskedLinear)]
    for layer in layers:
        layer.route = route
    return len(layers)


def _check_route(route: str) -> None:
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
        return decide_route(_onednn_speedup((tokens, fan_in, fan_out)), error)
    except (RuntimeError, AttributeError, ValueError) as problem:
        return RouteChoice("torch", None, None, f"oneDNN's precision setting failed: {problem}")


def _onednn_error(shape: tuple[int, int, int]) -> float:
    """Return the largest relative error of output and both gradients on the oneDNN route."""
    got = _layer_pass(shape, "onednn", torch.float32)()
    want = _layer_pass(shape, "torch", torch.float64)()
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))


def _onednn_speedup(shape: tuple[int, int, int]) -> float:
    """Return the median over rounds of torch's time over oneDNN's, the two measured in turn."""
    passes = [_layer_pass(shape, route, torch.float32) for route in ("torch", "onednn")]
    ratios: list[float] = []
    deadline = time.perf_counter() + 0.06
    # the first round warms up; a slow machine gets three, enough for a ratio far from 1
    while len(ratios) < 4 or (len(ratios) < 32 and time.perf_counter() < deadline):
        times = [time.perf_counter()]
        for run in passes:
            run()
            times.append(time.perf_counter())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return median(ratios[1:])


def _layer_pass(shape: tuple[int, int, int], route: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Return a function that runs one layer, as in training, and returns output and gradients."""
    tokens, fan_in, fan_out = shape
    # its own generator: the caller's random state stays untouched
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((tokens, fan_in), (fan_out, fan_in), (tokens, fan_out))
    )
    layer = MaskedLinear(fan_in, fan_out, bias=False, route=route, dtype=dtype)
    layer.load_state_dict({"weight": weight})
    x.requires_grad_()

    def run() -> list[Tensor]:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = layer(x)
            # a scalar loss: with grad_outputs torch would import its symbolic shapes, .2 s
            return [y.detach(), *torch.autograd.grad((y * grad).sum(), (x, layer.weight))]

    return run


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


class _GradientMask:
    """The post-accumulate-grad hook of one masked parameter.

    Its mask is looked up when called: loading or moving the module may have replaced it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = weakref.ref(module)  # weak: module -> parameter -> hook -> module is a cycle
        self.name = name

    def __call__(self, param: Tensor) -> None:
        module = self.module()
        if module is None or param.grad is None or module.__dict__.get(_DENSE_GRADIENTS, False):
            return
        mask = module.get_buffer(f"{self.name}_mask")
        # as int8: torch converts a bool operand element by element, three times slower
        param.grad.mul_(mask.view(torch.int8))


def _masked_names(module: nn.Module) -> list[str]:
    return cast("list[str]", module.__dict__.get(_NAMES, []))


@torch.no_grad()
def _zero_own_dead(module: nn.Module) -> None:
    for name in _masked_names(module):
        # masked_fill rather than a product: a dead entry may hold anything, NaN too
        module.get_parameter(name).masked_fill_(~module.get_buffer(f"{name}_mask"), 0.0)


def _ensure_hooks(module: nn.Module) -> None:
    """Put the gradient hook on parameters that lack it.

    deepcopy, pickle and load_state_dict(assign=True) make new parameters, which carry no hooks.
    """
    for name in _masked_names(module):
        param = module.get_parameter(name)
        hooks: dict[int, Any] = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        mine = (h for h in hooks.values() if isinstance(h, _GradientMask))
        if param.requires_grad and not any(h.module() is module for h in mine):
            hook = _GradientMask(module, name)
            param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        _ensure_hooks(module)


def _after_load(module: nn.Module, incompatible_keys: object) -> None:
    _ensure_hooks(module)
    _zero_own_dead(module)
